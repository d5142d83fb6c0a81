"""The engine's own process: requests come in over a socket, outputs go out; nothing else is shared.

`python -m nanovllm_cli.core.engine_worker SOCKET_FD HEARTBEAT_FD PARENT_PID`, started by
engine_child.py. It ends with its parent, whatever ends that. Its stdout is its parent's stderr.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.heartbeat import Heartbeat
from nanovllm_cli.core.messages import (
    Kind,
    decode_aborts,
    decode_requests,
    encode_json,
    encode_outputs,
)
from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.stats import EngineStats
from nanovllm_cli.core.worker_process import IDLE_SECONDS, receive_start, run_worker

_STATS_SECONDS = 0.1  # while no request finishes, for the progress


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

    def work(channel: Channel) -> None:
        heartbeat = Heartbeat(heartbeat_fd)
        with heartbeat.excused():
            make_engine = prepare()  # before it is asked for: the parent has imports of its own
            engine = make_engine(receive_start(channel, Kind.START))
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

    run_worker(parent_pid, socket_fd, work, error_kind=Kind.ERROR)


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
                channel.wait(IDLE_SECONDS)


if __name__ == "__main__":
    main()
