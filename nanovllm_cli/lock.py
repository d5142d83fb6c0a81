"""One job an output: an flock(2) on OUTPUT.lock, which the kernel lets go of with the process.

So a lock is never stale. Imports nothing slow: whoever comes second is to hear it at once.
"""

import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from .exit_code import CommandError, ExitCode
from .files import io_errors, write_whole
from .options import GenerateOptions
from .output_paths import OutputPaths, beside

_POLL_SECONDS = 0.1
_MAX_HOLDER_BYTES = 4096


@contextmanager
def output_locks(options: GenerateOptions) -> Iterator[None]:
    """Hold the locks of the files that a job writes.

    Raises CommandError LOCKED, IO_ERROR, and what OutputPaths raises.
    """
    with ExitStack() as stack:
        for path in OutputPaths.of(options.output, options.errors).named:
            lock = output_lock(path, wait_seconds=options.wait_lock, private=options.private)
            stack.enter_context(lock)
        yield


@contextmanager
def output_lock(
    output: Path, *, wait_seconds: float = 0.0, private: bool = False
) -> Iterator[None]:
    """Hold the lock of `output`; its directory is made. Raises CommandError LOCKED, IO_ERROR."""
    path = beside(output, "lock")
    give_up = time.monotonic() + wait_seconds
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try_lock(path, private=private)) is None:
            if time.monotonic() >= give_up:
                raise _locked(output, path)
            time.sleep(min(_POLL_SECONDS, max(give_up - time.monotonic(), 0.0)))
    try:
        with io_errors(path):
            os.ftruncate(descriptor, 0)
            write_whole(descriptor, _this_process().encode())
        yield
    finally:
        # Only the holder removes the name, and whoever opened it before finds out in _try_lock.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path, *, private: bool) -> int | None:
    """A descriptor that holds the lock, or None where another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600 if private else 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the open and the lock: once more


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    host, line = socket.gethostname(), shlex.join(sys.argv)
    return f"process {os.getpid()} on {host} since {started}: {line}"[:_MAX_HOLDER_BYTES] + "\n"


def _locked(output: Path, path: Path) -> CommandError:
    try:
        holder = path.read_text(errors="replace")[:_MAX_HOLDER_BYTES].strip()
    except OSError:
        holder = ""
    return CommandError(
        f"{output} is being written by {holder or 'another process'}",
        "Run it again later, name another output, or wait with --wait-lock SECONDS.",
        exit_code=ExitCode.LOCKED,
    )
