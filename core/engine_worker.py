"""The engine's own process: requests come in over a socket, outputs go out; nothing else is shared.

`python -m nanovllm_cli.core.engine_worker SOCKET_FD HEARTBEAT_FD PARENT_PID`, started by
engine_child.py. It ends with its parent, whatever ends that. Its stdout is its parent's stderr.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.heartbeat import Heartbeat
from nanovllm_cli.core.messages import (
    Kind,
    decode_aborts,
    decode_json,
    decode_requests,
    encode_json,
    encode_outputs,
)
from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.stats import EngineStats

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IDLE_SECONDS = 60.0  # a message or the parent's end wakes the loop sooner
_STATS_SECONDS = 0.1  # while no request finishes, for the progress
_LAST_WORDS_SECONDS = 2.0


class AnyEngine(Protocol):
    """What the loop asks of an Engine; the tests of the process have simpler ones."""

    attention_backend: str
    num_blocks: int
    max_model_len: int
    max_num_seqs: int

    @property
    def device(self) -> str: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> Failure | None: ...

    def abort(self, request_id: int) -> None: ...

    def step(self) -> list[Output]: ...


MakeEngine = Callable[[dict[str, Any]], AnyEngine]


def start_message(source: Path | ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """What the process is told first: a checkpoint's directory, or sizes for random weights."""
    if isinstance(source, ModelConfig):
        return {"engine": asdict(config), "sizes": asdict(source)}
    return {"engine": asdict(config), "checkpoint": os.fspath(source.absolute())}


def read_start_message(message: dict[str, Any]) -> tuple[Path | ModelConfig, EngineConfig]:
    """What `start_message` was given."""
    config = EngineConfig(**message["engine"])
    if "checkpoint" in message:
        return Path(message["checkpoint"]), config
    sizes = message["sizes"]
    sizes["rope"] = RopeConfig(**sizes["rope"])
    sizes["eos_token_ids"] = tuple(sizes["eos_token_ids"])
    return ModelConfig(**sizes), config


def import_engine() -> MakeEngine:
    """What makes the engine that `start_message` describes, once torch is imported."""
    # Late: it takes seconds, and this process must know its parent's end before.
    from nanovllm_cli.core.engine import Engine

    return lambda message: Engine.load(*read_start_message(message))


def main(prepare: Callable[[], MakeEngine] = import_engine) -> NoReturn:
    """Serve until the parent is gone or closes the connection."""
    socket_fd, heartbeat_fd, parent_pid = map(int, sys.argv[1:])
    die_with(parent_pid)
    # Whether a signal ends the job is the parent's to decide; it may want the rows in flight.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=socket_fd))
    heartbeat = Heartbeat(heartbeat_fd)
    exit_code = 0
    try:
        with heartbeat.excused():
            make_engine = prepare()  # before it is asked for: the parent has imports of its own
            engine = make_engine(_receive_start(channel))
        heartbeat.processor_time_counts = engine.device == "cpu"
        ready = {
            "device": engine.device,
            "attention_backend": engine.attention_backend,
            "num_blocks": engine.num_blocks,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
        }
        channel.send(Kind.READY, encode_json(ready))
        _serve(channel, engine, heartbeat)
    except Exception as error:
        exit_code = 1
        channel.send(Kind.ERROR, encode_json(describe_error(error)))
        channel.flush_all(_LAST_WORDS_SECONDS)
    # There is nothing to tidy up, and taking torch apart takes as long as importing it.
    sys.stderr.flush()
    os._exit(exit_code)


def _serve(channel: Channel, engine: AnyEngine, heartbeat: Heartbeat) -> None:
    next_stats = 0.0
    while not channel.is_closed:
        outputs: list[Output] = []
        for kind, payload in channel.receive():
            if kind == Kind.REQUESTS:
                added = (engine.add(request) for request in decode_requests(payload))
                outputs += [failure for failure in added if failure is not None]
            else:
                for request_id in decode_aborts(payload):
                    engine.abort(request_id)
        if engine.has_work:
            outputs += engine.step()
        now = time.monotonic()
        if outputs or now >= next_stats:
            channel.send(Kind.OUTPUTS, encode_outputs(outputs, engine.stats))
            next_stats = now + _STATS_SECONDS
        channel.flush()
        heartbeat.count_step()
        if not engine.has_work:
            with heartbeat.excused():
                channel.wait(_IDLE_SECONDS)


def _receive_start(channel: Channel) -> dict[str, Any]:
    """The first message, and the only one before READY."""
    while not (messages := channel.receive()):
        if channel.is_closed:
            os._exit(0)
        channel.wait(_IDLE_SECONDS)
    [(kind, payload)] = messages
    assert kind == Kind.START, f"the first message is of kind {kind}"
    return decode_json(payload)


def describe_error(error: Exception) -> dict[str, Any]:
    """For the parent, which raises a UserError again as what it was."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "hint": error.hint if isinstance(error, UserError) else None,
        "traceback": traceback.format_exc(),
    }


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it has ended before the line above
        os._exit(1)


if __name__ == "__main__":
    main()
