"""One job an output: an flock(2) on OUTPUT.lock, which the kernel lets go of with the process.

So a lock is never stale. Imports nothing slow: whoever comes second is to hear it at once.
"""

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from .exit_code import CommandError, ExitCode
from .files import io_errors, is_still, open_own, open_regular, printable, remove_left, write_whole
from .options import GenerateOptions
from .output_paths import OutputPaths, beside

_POLL_SECONDS = 0.1
_MAX_HOLDER_CHARACTERS = 4096
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a file system


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
    """Hold the lock of `output`; its directory is made, and what killed runs left is removed.

    Raises CommandError LOCKED, IO_ERROR, and OUTPUT_EXISTS for a lock that is not this user's.
    """
    path = beside(output, "lock")
    give_up = time.monotonic() + wait_seconds
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try_lock(path, private=private)) is None:
            if time.monotonic() >= give_up:
                raise _locked(output, path)
            time.sleep(min(_POLL_SECONDS, max(give_up - time.monotonic(), 0.0)))
    try:
        whats = ("partial", "stats.json", "errors.jsonl")
        remove_left(
            [output, *(beside(output, what) for what in whats)]
        )  # a full disk has room then
        with io_errors(path):
            os.ftruncate(descriptor, 0)
            write_whole(descriptor, _this_process().encode())
        yield
    except BaseException:
        with suppress(OSError):
            _let_go(path, descriptor)
        raise
    with io_errors(path, "remove"):
        _let_go(path, descriptor)


def _let_go(path: Path, descriptor: int) -> None:
    """Remove the name and end the lock; whoever opened it before finds out in _try_lock.

    Where a stranger has removed the name, another run may have made it again: that is not ours.
    """
    try:
        if is_still(path, descriptor):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(path: Path, *, private: bool) -> int | None:
    """A descriptor that holds the lock, or None where another process holds it."""
    while True:
        try:
            descriptor = open_own(path, os.O_RDWR | os.O_CREAT, private=private)
        except CommandError:  # another user's: what counts is first whether it is held
            if _is_held(path):
                return None
            raise
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno not in _HAS_NO_LOCKS:  # the journal's owner is checked all the same
                    raise
            if is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the open and the lock: once more


def _is_held(path: Path) -> bool:
    try:
        if path.is_symlink():
            return False
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _this_process() -> str:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    host, line = socket.gethostname(), printable(shlex.join(sys.argv))
    return (
        f"process {os.getpid()} on {host} since {started}: {line}"[:_MAX_HOLDER_CHARACTERS] + "\n"
    )


def _locked(output: Path, path: Path) -> CommandError:
    holder = ""
    with suppress(OSError), open(open_regular(path), "rb") as file:
        text = file.read(4 * _MAX_HOLDER_CHARACTERS).decode(errors="replace")
        holder = text[:_MAX_HOLDER_CHARACTERS].strip()
    return CommandError(
        f"{output} is being written by {holder or 'another process'}",
        "Run it again later, name another output, or wait with --wait-lock SECONDS.",
        exit_code=ExitCode.LOCKED,
    )
