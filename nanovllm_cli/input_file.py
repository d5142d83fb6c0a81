"""InputFile: an open input, its format known by its first bytes and not by its name."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO, Literal

from .exit_code import CommandError, ExitCode
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

    def damaged(self, reason: object, place: str | None = None) -> CommandError:
        """The error for content that is not what its format says."""
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
    """`source` to read from; raises CommandError where the system or its first bytes refuse."""
    try:
        file = sys.stdin.buffer if source.path is None else source.path.open("rb")
    except OSError as error:
        raise _unreadable(source, error) from error
    with nullcontext() if source.path is None else file:
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
            raise unusable(f"{name} is {what}", hint)
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), "json")


def unusable(message: str, hint: str) -> CommandError:
    """The error for an input that is of no use as a whole."""
    return CommandError(message, hint, exit_code=ExitCode.INPUT_UNUSABLE)


def _unreadable(source: Source, error: OSError) -> CommandError:
    is_missing = isinstance(error, FileNotFoundError | PermissionError)
    return CommandError(
        f"cannot read {source.name}: {error.strerror or error}",
        exit_code=ExitCode.NOT_FOUND if is_missing else ExitCode.IO_ERROR,
    )
