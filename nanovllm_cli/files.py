"""The tool's own files: whole or not at all, this user's alone, and never through another's link.

And what a disk's refusal ends the command with. Imports nothing slow: the lock is taken before
torch is imported.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from .exit_code import CommandError, ExitCode, code_of_os_error

# C0, DEL, C1; marks and controls of direction; separators of lines; undecodable bytes of names.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNPRINTABLE_IN_JSON = re.compile(
    r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"  # JSON has escaped the others
)
# A link is not followed, and a FIFO not waited on.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BUFFER_BYTES = 1 << 18
_MAX_FLAG_FILE_BYTES = 16 << 20
_LEFT_END = ".tmp"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class TakenOver(CommandError):
    """Another run works on this job's files: it has them now, and this run must leave them."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"another run has taken over {path}, or its journal was changed or removed",
            "Nothing was published by this run. Run it again when no other runs.",
            exit_code=ExitCode.LOCKED,
        )


def open_own(path: Path, flags: int, *, private: bool = False) -> int:
    """Return a descriptor of a regular file of this user's that has no other name.

    Raises CommandError OUTPUT_EXISTS at once for anything else, and what `os.open` raises. A new
    file, and with `private` an old one too, only its owner can read.
    """
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o600 if private else 0o666)
    except OSError:
        check_own(path)
        raise
    try:
        status = os.fstat(descriptor)
        _check_is_own(path, status)
        if private and status.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_own(path: Path) -> bool:
    """Return whether there is a file of this user's; raise CommandError for anything else."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    _check_is_own(path, status)
    return True


def read_own(path: Path) -> bytes | None:
    """Return the content of a file of this user's, None if there is none; raise CommandError."""
    with io_errors(path, "read"):
        try:
            descriptor = open_own(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read()


def remove_own(path: Path) -> None:
    """Remove a file of this user's if it is there; raise CommandError."""
    with io_errors(path, "remove"):
        if check_own(path):
            path.unlink(missing_ok=True)


def open_regular(path: Path) -> int:
    """Return a descriptor to read a regular file, whosever it is and through links.

    Raises OSError, for anything else that is there too.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def kind_of(status: os.stat_result) -> str | None:
    """Return what it is if it is not a regular file: "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(status.st_mode))


def read_flag_file(path: Path) -> bytes:
    """The content of a file that a flag names, which may be a pipe; raises OSError.

    Also for a device or a socket, and for more than 16 MiB: a pipe may have no end.
    """
    if (what := kind_of(os.stat(path))) not in (None, "a FIFO"):
        raise OSError(errno.EINVAL, f"it is {what}, not a file")
    with open(path, "rb") as file:
        content = file.read(_MAX_FLAG_FILE_BYTES + 1)
    if len(content) > _MAX_FLAG_FILE_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {_MAX_FLAG_FILE_BYTES >> 20} MiB")
    return content


def new_name(path: Path) -> Path:
    """Return a fresh name beside `path` that nobody can foresee, as short for long names."""
    return path.with_name(f"{_start_of_names(path)}{os.urandom(8).hex()}{_LEFT_END}")


@contextmanager
def appearing(
    path: Path, *, private: bool, check: Callable[[], object] = lambda: None
) -> Iterator[BinaryIO]:
    """An empty file to fill: it becomes `path` where the block ends without an error.

    In this order, so that no moment of a crash leaves less than a whole file under `path`:
    content to the disk, `check`, rename, directory to the disk.
    """
    temporary = new_name(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY
    descriptor = os.open(temporary, flags, 0o600 if private else 0o666)
    file = open(descriptor, "wb", _BUFFER_BYTES)  # noqa: SIM115  # closed in two ways
    try:
        hold(file.fileno())
        yield file
        file.flush()
        sync_file(file.fileno())
        check()
        if not is_still(temporary, file.fileno()):  # removed as what a killed run has left
            raise TakenOver(path)
        os.replace(temporary, path)
        sync_directory(path.parent)
        file.close()
    except BaseException:
        file.raw.close()  # type: ignore[attr-defined]  # what is buffered is not worth a try
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_left(paths: list[Path]) -> None:
    """Remove what killed runs have left of files that were to appear under these names."""
    for directory in {path.parent for path in paths}:
        starts = tuple(_start_of_names(path) for path in paths if path.parent == directory)
        with io_errors(directory), os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(starts) and entry.name.endswith(_LEFT_END):
                    _remove_if_left(entry.path)


def hold(descriptor: int) -> bool:
    """Say that the file's writer lives; return whether no other process says so."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        pass
    return True


def is_still(path: Path, descriptor: int) -> bool:
    """Return whether `path` is a name of the open file itself."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync_file(descriptor: int) -> None:
    """Wait until the file's content is on the disk."""
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data`: the system may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def as_text(name: str) -> str:
    """A file's name as valid Unicode: what JSON can hold, and close to what it is."""
    return name.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """Return the text with its control characters escaped: safe for a terminal, and one line."""
    return _UNPRINTABLE.sub(lambda found: _escaped(found.group()), text)


def printable_json(line: bytes) -> bytes:
    """Return a line of JSON that means the same and has no control character as it stands."""
    text = line.decode()
    return _UNPRINTABLE_IN_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", text).encode()


@contextmanager
def io_errors(path: Path | str, action: str = "write") -> Iterator[None]:
    """Turn the system's refusals into the error of that exit code; not a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(
            f"cannot {action} {path}: {error}",
            exit_code=code_of_os_error(error) or ExitCode.IO_ERROR,
        ) from None


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _check_is_own(path: Path, status: os.stat_result) -> None:
    what = kind_of(status)
    if stat.S_ISLNK(status.st_mode):
        with suppress(OSError):
            what = f"a symbolic link to {os.readlink(path)}"
        what = what or "a symbolic link"
    elif what is None and status.st_nlink > 1:
        what = f"a file with {status.st_nlink} hard links"
    elif what is None and status.st_uid != os.geteuid() and status.st_uid != _owner_beside(path):
        what = f"a file of another user (number {status.st_uid})"
    if what is not None:
        raise CommandError(
            f"{path} is {what}, not a file that this user's jobs have made",
            "Move it away, or name another file.",
            exit_code=ExitCode.OUTPUT_EXISTS,
        )


def _owner_beside(path: Path) -> int | None:
    """Return whose a new file is there: some file systems give all files to one user."""
    probe = new_name(path)
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        with suppress(OSError):
            probe.unlink()


def _start_of_names(path: Path) -> str:
    return f".nanovllm-{xxhash.xxh3_64_hexdigest(os.fsencode(path.name))}-"


def _remove_if_left(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | _SAFELY)
    except (FileNotFoundError, PermissionError):
        return
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return  # nothing that a run of ours has left
        raise
    try:
        status = os.fstat(descriptor)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if is_ours and hold(descriptor):
            with suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        os.close(descriptor)
