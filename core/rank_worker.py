"""A rank's own process: it holds its part of the model, and makes every launch that rank 0 makes.

`python -m nanovllm_cli.core.rank_worker SOCKET_FD STORE_FD PARENT_PID`, started by rank_group.py.
It ends with its parent, whatever ends that. No tokens go back: every rank draws the same ones, from
the same logits.
"""

import os
import signal
import socket
import sys
from enum import IntEnum
from typing import Any, NoReturn

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.engine_worker import describe_error, die_with, read_start_message
from nanovllm_cli.core.messages import decode_json, encode_json

_IDLE_SECONDS = 60.0  # a message or the parent's end wakes the loop sooner
_LAST_WORDS_SECONDS = 2.0


class RankMessage(IntEnum):
    """What a message is; the first two come from rank 0, the others go to it."""

    START = 0  # JSON: what the engine's process is told, and the rank
    BATCH = 1
    MEET = 2  # empty: this rank has come as far as the next meeting
    ERROR = 3  # JSON; the last message


def main() -> NoReturn:
    """Follow until rank 0 is gone or closes the connection."""
    socket_fd, store_fd, parent_pid = map(int, sys.argv[1:])
    die_with(parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # rank 0's to decide
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=socket_fd))
    exit_code = 0
    try:
        _follow(channel, store_fd)
    except Exception as error:
        exit_code = 1
        channel.send(RankMessage.ERROR, encode_json(describe_error(error)))
        channel.flush_all(_LAST_WORDS_SECONDS)
    # There is nothing to tidy up, and taking torch apart takes as long as importing it.
    sys.stderr.flush()
    os._exit(exit_code)


def _follow(channel: Channel, store_fd: int) -> None:
    # Late: it takes seconds, and this process must know its parent's end before.
    from nanovllm_cli.core.batch_layout import decode_batch
    from nanovllm_cli.core.collectives import connect
    from nanovllm_cli.core.engine import load_model, make_runner, sizes_of

    start = _receive_start(channel)
    source, config = read_start_message(start)
    parallel = connect(
        start["rank"], store_fd, config, sizes_of(source), meet=lambda: _meet(channel)
    )
    model = load_model(source, config, parallel)
    _meet(channel)
    runner = make_runner(model, config)
    while not channel.is_closed:
        for _, payload in channel.receive():
            runner.launch(decode_batch(payload))
        channel.wait(_IDLE_SECONDS)


def _meet(channel: Channel) -> None:
    channel.send(RankMessage.MEET, b"")
    channel.flush()


def _receive_start(channel: Channel) -> dict[str, Any]:
    """The first message, and the only one before the second meeting."""
    while not (messages := channel.receive()):
        if channel.is_closed:
            os._exit(0)
        channel.wait(_IDLE_SECONDS)
    [(kind, payload)] = messages
    assert kind == RankMessage.START, f"the first message is of kind {kind}"
    return decode_json(payload)


if __name__ == "__main__":
    main()
