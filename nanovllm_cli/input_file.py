"""InputFile: an open input, its format known by its first bytes and not by its name."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO, Literal

from .exit_code import CommandError, ExitCode
from .input_identity import Identity
from .inputs import Source

Format = Literal["json", "gzip", "zstd", "parquet"]

_MAGIC: dict[bytes, Format] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a skippable frame; pzstd begins with one
    b"PAR1": "parquet",
}
# No JSON begins so: one error for the file is better than one for each "line" of it.
_FOREIGN_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\xfd7zX": "xz data",
    b"PARE": "an encrypted Parquet file",
    b"ARRO": "an Arrow file",
}
_JSON_HEAD = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*("|\}|$)')
_BINARY_NAME = re.compile(r".*\.(gz|zst|parquet)", re.IGNORECASE | re.DOTALL)


class InputFile:
    """An open source that counts the bytes read; enough of a file for pyarrow to read from it."""

    closed = False

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self.source = source
        self.offset = 0
        self._file = file
        self._head = file.read(4)
        self.format = format_of(self._head, source.name)
        if self.format == "parquet" and source.is_stream:
            hint = "Save it to a file first, and name that."
            raise unusable(f"{source.name} is Parquet, which cannot be streamed", hint)
        # The content decides; but damage to its first bytes must not turn a file into text.
        is_text = self.format == "json"
        if is_text and _BINARY_NAME.fullmatch(source.name) and not _JSON_HEAD.match(self._head):
            raise self.damaged(f"it begins with {self._head!r}")

    def read(self, size: int) -> bytes:
        """What is there, at most `size` bytes, without waiting for more; b"" at the end."""
        try:
            data = self._head or self._file.read1(size)  # type: ignore[attr-defined]
        except OSError as error:
            raise self.unreadable(error) from error
        self._head = b""
        self.offset += len(data)
        return data

    def close(self) -> None:
        """For pyarrow; the file belongs to `opened`."""

    @property
    def system_path(self) -> str:
        """A name for the file that is open here, whatever has become of the one it was found by."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def check_unchanged(self, num_rows: int | None = None) -> None:
        """Raise CommandError if the file is not what it was when the job first opened it.

        num_rows: how many were read, if that is all of them.
        """
        error = self._changed()
        if error is not None:
            raise error
        look = self.source.first_look
        if num_rows is not None and look.num_rows not in (None, num_rows):
            raise _changed(
                self.source, f"it has {num_rows} rows now, and had {look.num_rows} at first"
            )

    def _changed(self) -> CommandError | None:
        first = self.source.first_look.identity
        if first is None:
            return None
        assert self.source.path is not None, "stdin has no identity"
        try:
            found = [os.fstat(self._file.fileno()), os.stat(self.source.path)]
        except FileNotFoundError:
            return _changed(self.source, "it was removed")
        except OSError as error:
            return _changed(self.source, f"it cannot be looked at any more: {error.strerror}")
        changes = (first.change_to(Identity.of(each)) for each in found)
        change = next((change for change in changes if change is not None), None)
        return None if change is None else _changed(self.source, change)

    def damaged(self, reason: object, place: str | None = None) -> CommandError:
        """The error for content that is not what its format says, or no longer what it was."""
        changed = self._changed()
        if changed is not None:
            return changed
        place = place or f"byte {self.offset}"
        return unusable(
            f"{self.source.name} is damaged or incomplete, seen at {place}: {reason}",
            "Get the file again from where it came.",
        )

    def unreadable(self, error: OSError) -> CommandError:
        """The error for what the system does not read."""
        return _unreadable(self.source, error)


@contextmanager
def opened(source: Source) -> Iterator[InputFile]:
    """`source` to read from; raises CommandError where the system or its first bytes refuse.

    So it does for a file that is another than the one that the job opened first.
    """
    try:
        file = sys.stdin.buffer if source.path is None else source.path.open("rb")
    except FileNotFoundError as error:
        if source.first_look.identity is not None:
            raise _changed(source, "it was removed") from error
        raise _unreadable(source, error) from error
    except OSError as error:
        raise _unreadable(source, error) from error
    with nullcontext() if source.path is None else file:
        if source.path is not None:
            _check_identity(source, os.fstat(file.fileno()))
        try:
            input_file = InputFile(source, file)
        except OSError as error:
            raise _unreadable(source, error) from error
        yield input_file


def format_of(head: bytes, name: str) -> Format:
    """The format of content that begins with `head`; raises CommandError for a foreign one."""
    for magic, what in _FOREIGN_MAGIC.items():
        if head.startswith(magic):
            hint = "Inputs are JSON lines in UTF-8, plain or as .gz or .zst, or Parquet."
            if what == "a zip archive" and name.lower().endswith((".xlsx", ".ods")):
                what = "a spreadsheet"
                hint = f"Save it as CSV, and make JSON lines of that. {hint}"
            raise unusable(f"{name} is {what}", hint)
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), "json")


def unusable(message: str, hint: str) -> CommandError:
    """The error for an input that is of no use as a whole."""
    return CommandError(message, hint, exit_code=ExitCode.INPUT_UNUSABLE)


def _check_identity(source: Source, found: os.stat_result) -> None:
    """Note which file it is, or raise CommandError if it was another when it was opened first."""
    if not stat.S_ISREG(found.st_mode):
        return  # a stream, which is opened once
    now, look = Identity.of(found), source.first_look
    if look.identity is None:
        look.identity = now
    elif change := look.identity.change_to(now):
        raise _changed(source, change)


def _changed(source: Source, what: str) -> CommandError:
    return unusable(
        f"{source.name} has changed since this run began to read it: {what}",
        "Let what writes it finish, and run the same line again. With -o FILE, rows that are done "
        "are kept.",
    )


def _unreadable(source: Source, error: OSError) -> CommandError:
    is_missing = isinstance(error, FileNotFoundError | PermissionError)
    return CommandError(
        f"cannot read {source.name}: {error.strerror or error}",
        exit_code=ExitCode.NOT_FOUND if is_missing else ExitCode.IO_ERROR,
    )
