"""What every child process of ours has in common, seen from its parent. Imports nothing slow."""

import fcntl
import signal
import socket


def how_it_ended(code: int) -> str:
    """Return a process's end in words; code: as subprocess gives it."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"


def above_the_streams(end: socket.socket) -> socket.socket:
    """Return the same socket under a number above those of the standard streams.

    One of those may be closed, and the socket would take its number.
    """
    with end:
        return socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3))
