"""A rank's own process: it holds its part of the model, and makes every launch that rank 0 makes.

`python -m nanovllm_cli.core.rank_worker SOCKET_FD STORE_FD PARENT_PID`, started by rank_group.py.
It ends with its parent, whatever ends that. No tokens go back: every rank draws the same ones, from
the same logits.
"""

import sys
from enum import IntEnum
from typing import NoReturn

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.engine_worker import read_start_message
from nanovllm_cli.core.worker_process import IDLE_SECONDS, receive_start, run_worker


class RankMessage(IntEnum):
    """What a message is; the first two come from rank 0, the others go to it."""

    START = 0  # JSON: what the engine's process is told, and the rank
    BATCH = 1
    MEET = 2  # empty: this rank has come as far as the next meeting
    ERROR = 3  # JSON; the last message


def main() -> NoReturn:
    """Follow until rank 0 is gone or closes the connection."""
    socket_fd, store_fd, parent_pid = map(int, sys.argv[1:])
    run_worker(
        parent_pid,
        socket_fd,
        lambda channel: _follow(channel, store_fd),
        error_kind=RankMessage.ERROR,
    )


def _follow(channel: Channel, store_fd: int) -> None:
    # Late: it takes seconds, and this process must know its parent's end before.
    from nanovllm_cli.core.batch_layout import decode_batch
    from nanovllm_cli.core.collectives import connect
    from nanovllm_cli.core.config import ModelConfig
    from nanovllm_cli.core.connection_errors import connection_errors
    from nanovllm_cli.core.engine import load_model, make_runner

    start = receive_start(channel, RankMessage.START)
    source, config = read_start_message(start)
    with connection_errors():
        parallel = connect(
            start["rank"], store_fd, config, ModelConfig.of(source), meet=lambda: _meet(channel)
        )
    model = load_model(source, config, parallel)
    _meet(channel)
    runner = make_runner(model, config)
    while not channel.is_closed:
        for _, payload in channel.receive():
            runner.launch(decode_batch(payload))
        channel.wait(IDLE_SECONDS)


def _meet(channel: Channel) -> None:
    channel.send(RankMessage.MEET, b"")
    channel.flush()


if __name__ == "__main__":
    main()
