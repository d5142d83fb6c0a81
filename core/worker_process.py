"""What an engine's process and the processes of its other ranks have in common.

Each has a parent, with which it ends, whatever ends that; a socket to it; and its word, where
something fails, for why.
"""

import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any, NoReturn

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.messages import decode_json, encode_json

IDLE_SECONDS = 60.0  # a message or the parent's end wakes a loop sooner
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST_WORDS_SECONDS = 2.0


def run_worker(
    parent_pid: int, socket_fd: int, work: Callable[[Channel], None], *, error_kind: IntEnum
) -> NoReturn:
    """The process from its first line on; what `work` raises goes to the parent as `error_kind`."""
    _die_with(parent_pid)
    # Whether a signal ends the job is the parent's to decide; it may want the rows in flight.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=socket_fd))
    exit_code = 0
    try:
        work(channel)
    except Exception as error:
        exit_code = 1
        channel.send(error_kind, encode_json(_describe(error)))
        channel.flush_all(_LAST_WORDS_SECONDS)
    # There is nothing to tidy up, and taking torch apart takes as long as importing it.
    # What was printed, though: a pipe or a file behind stdout is written in blocks.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has left, or it is closed
            if stream is not None:
                stream.flush()
    os._exit(exit_code)


def receive_start(channel: Channel, start_kind: IntEnum) -> dict[str, Any]:
    """The first message, and the only one before this process has answered it."""
    while not (messages := channel.receive()):
        if channel.is_closed:
            os._exit(0)
        channel.wait(IDLE_SECONDS)
    [(kind, payload)] = messages
    assert kind == start_kind, f"the first message is of kind {kind}"
    return decode_json(payload)


def _describe(error: Exception) -> dict[str, Any]:
    """For the parent, which raises a UserError again as what it was."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "hint": error.hint if isinstance(error, UserError) else None,
        "traceback": traceback.format_exc(),
    }


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it has ended before the line above
        os._exit(1)
