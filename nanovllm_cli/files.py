"""Files that are there whole or not at all, and what a disk's refusal ends the command with.

Imports nothing slow: the lock is taken before torch is imported.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .exit_code import CommandError, ExitCode

# C0, DEL, C1; marks and controls of direction; separators of lines; undecodable bytes of names.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNPRINTABLE_IN_JSON = re.compile(
    r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"  # JSON has escaped the others
)


def create_file(path: Path, *, private: bool) -> int:
    """Create or empty a file; its descriptor. A private one only its owner can read."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)


@contextmanager
def appearing(path: Path, *, private: bool) -> Iterator[Path]:
    """The name of an empty file to fill: it becomes `path` where the block ends without an error.

    In this order, so that no moment of a crash leaves less than a whole file under `path`:
    content to the disk, rename, directory to the disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one a file: what a kill leaves is taken over
    try:
        os.close(create_file(temporary, private=private))
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


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


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@contextmanager
def io_errors(path: Path | str) -> Iterator[None]:
    """Turn the system's refusals to write into the error of that exit code; not a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}", exit_code=ExitCode.IO_ERROR) from None


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
