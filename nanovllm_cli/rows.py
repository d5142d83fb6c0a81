"""Input files -> rows: JSON lines and Parquet, plain or compressed, streamed in bounded memory.

The first station of the flow; prompts.py takes the rows from here. What a row means is not known
here: a row is a JSON object, or a row of a Parquet file, with its number over all inputs. What
cannot be read as a row becomes a BadRow with the reason; what spoils a file as a whole raises
CommandError. A file's format is known by its first bytes and not by its name.

gzip has a checksum in every member. zstd and Parquet may be written without: then a flipped bit
may go unseen, as in a plain file, while a truncated file is always found.
"""

import difflib
import glob
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from .exit_code import CommandError, ExitCode

MAX_LINE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_COMPRESSED_CHUNK_BYTES = 1 << 16
_PARQUET_BATCH_ROWS = 1024

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
_BOM = b"\xef\xbb\xbf"
_JSON_HEAD = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*("|\}|$)')
_BINARY_NAME = re.compile(r".*\.(gz|zst|parquet)", re.IGNORECASE | re.DOTALL)
_INPUT_NAME = re.compile(r".*\.(jsonl|ndjson|json|parquet)(\.gz|\.zst)?", re.IGNORECASE)
_ID_AS_FIRST_KEY = re.compile(
    rb'\s*\{\s*"(?:id|custom_id)"\s*:\s*("(?:[^"\\]|\\.){0,1000}"|-?\d{1,18})\s*[,}]'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input; `name` is what messages call it."""

    name: str
    path: Path | None  # None: stdin

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once: stdin, a FIFO, a terminal."""
        return self.path is None or not self.path.is_file()

    @property
    def format(self) -> Format | None:
        """By the file's first bytes; None for a stream, which shows it when it is read."""
        if self.is_stream:
            return None
        with _opened(self) as reader:
            return reader.format


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it stands in its file."""

    index: int  # from 0, over all inputs
    source: str
    line: int  # from 1; in a Parquet file the row
    raw: bytes | None  # the JSON without its line break; None for Parquet
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot run, and why."""

    index: int
    source: str
    line: int
    id: str | int | None
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSummary:
    """What check_inputs saw; `num_bytes` as the files lie on the disk, without streams."""

    num_rows: int | None  # None: a stream is among the inputs
    num_bytes: int


def find_inputs(arguments: list[str]) -> list[Source]:
    """The inputs that a command line names: files, globs, directories, `-`.

    Raises CommandError, NOT_FOUND where there is nothing of that name.
    """
    if arguments.count("-") > 1:
        raise CommandError("stdin (-) is named twice as an input", "It can be read only once.")
    if "-" in arguments and sys.stdin is None:
        raise CommandError("stdin (-) is closed", exit_code=ExitCode.NOT_FOUND)
    sources: list[Source] = []
    for argument in arguments:
        if argument == "-":
            sources.append(Source(name="<stdin>", path=None))
        else:
            sources += [Source(name=path, path=Path(path)) for path in _paths_of(argument)]
    return sources


def _paths_of(argument: str) -> list[str]:
    hint = "Name a file, a pattern such as 'data/*.jsonl', a directory, or - for stdin."
    if os.path.isdir(argument):
        names = sorted(filter(_INPUT_NAME.fullmatch, glob.glob("*", root_dir=argument)))
        paths = [os.path.join(argument, name) for name in names]
        missing = "there is no input file in the directory"
        hint = "Looked for *.jsonl, *.ndjson, *.json and *.parquet, also with .gz or .zst."
    elif os.path.exists(argument):
        paths, missing = [argument], ""
    elif any(sign in argument for sign in "*?["):
        paths, missing = sorted(glob.glob(argument, recursive=True)), "no file matches"
    else:
        directory, name = os.path.split(argument)
        for similar in difflib.get_close_matches(name, glob.glob("*", root_dir=directory), n=1):
            hint = f"Did you mean {os.path.join(directory, similar)}?"
        paths, missing = [], "there is no file"
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        tried = os.path.abspath(argument) if argument else "''"
        raise CommandError(f"{missing} {tried}", hint, exit_code=ExitCode.NOT_FOUND)
    return files


def check_inputs(sources: Iterable[Source], *, limit: int | None = None) -> InputSummary:
    """Read the first `limit` rows, or all, to find damage early; streams are left alone.

    Raises CommandError, INPUT_UNUSABLE, naming the byte or the row group reached.
    """
    num_rows, num_bytes, has_stream = 0, 0, False
    for source in sources:
        if source.path is None or source.is_stream:
            has_stream = True
            continue
        num_bytes += source.path.stat().st_size
        with _opened(source) as reader:
            for num_new_rows in _row_counts(reader):
                num_rows += num_new_rows
                if limit is not None and num_rows >= limit:
                    num_rows = limit
                    break
    return InputSummary(num_rows=None if has_stream else num_rows, num_bytes=num_bytes)


def _row_counts(reader: "_Reader") -> Iterator[int]:
    """The number of rows in each block of lines, or in each batch of Parquet rows."""
    if reader.format == "parquet":
        return (batch.num_rows for batch in _parquet_batches(reader))
    return (sum(map(bool, map(bytes.strip, lines))) for lines in _line_blocks(reader))


def read_rows(sources: Iterable[Source], *, limit: int | None = None) -> Iterator[Row | BadRow]:
    """All rows of all sources, good and bad; at most `limit`.

    Raises CommandError: INPUT_UNUSABLE for damaged content, IO_ERROR where reading fails.
    """
    return islice(_read_all(sources), limit)


def _read_all(sources: Iterable[Source]) -> Iterator[Row | BadRow]:
    index = count()
    for source in sources:
        with _opened(source) as reader:
            rows = _parquet_rows if reader.format == "parquet" else _json_rows
            yield from rows(reader, index)


class _Reader:
    """An open source that counts the bytes read; enough of a file for pyarrow to read from it."""

    closed = False

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self.source = source
        self.offset = 0
        self._file = file
        self._head = file.read(4)
        self.format = _format_of(self._head, source.name)
        if self.format == "parquet" and source.is_stream:
            hint = "Save it to a file first, and name that."
            raise _unusable(f"{source.name} is Parquet, which cannot be streamed", hint)
        # The content decides; but damage to its first bytes must not turn a file into text.
        is_text = self.format == "json"
        if is_text and _BINARY_NAME.fullmatch(source.name) and not _JSON_HEAD.match(self._head):
            raise self.damaged(f"it begins with {self._head!r}")

    def read(self, size: int) -> bytes:
        """What is there, at most `size` bytes, without waiting for more; b"" at the end."""
        try:
            data = self._head or self._file.read1(size)  # type: ignore[attr-defined]
        except OSError as error:
            raise _cannot_read(self.source, error) from error
        self._head = b""
        self.offset += len(data)
        return data

    def close(self) -> None:
        """For pyarrow; the file belongs to `_opened`."""

    def damaged(self, reason: object, place: str | None = None) -> CommandError:
        """The error for content that is not what its format says."""
        place = place or f"byte {self.offset}"
        return _unusable(
            f"{self.source.name} is damaged or incomplete, seen at {place}: {reason}",
            "Get the file again from where it came.",
        )


@contextmanager
def _opened(source: Source) -> Iterator[_Reader]:
    try:
        file = sys.stdin.buffer if source.path is None else source.path.open("rb")
    except OSError as error:
        raise _cannot_read(source, error) from error
    with nullcontext() if source.path is None else file:
        try:
            reader = _Reader(source, file)
        except OSError as error:
            raise _cannot_read(source, error) from error
        yield reader


def _cannot_read(source: Source, error: OSError) -> CommandError:
    is_missing = isinstance(error, FileNotFoundError | PermissionError)
    return CommandError(
        f"cannot read {source.name}: {error.strerror or error}",
        exit_code=ExitCode.NOT_FOUND if is_missing else ExitCode.IO_ERROR,
    )


def _unusable(message: str, hint: str) -> CommandError:
    return CommandError(message, hint, exit_code=ExitCode.INPUT_UNUSABLE)


def _format_of(head: bytes, name: str) -> Format:
    for magic, what in _FOREIGN_MAGIC.items():
        if head.startswith(magic):
            hint = "Inputs are JSON lines in UTF-8, plain or as .gz or .zst, or Parquet."
            raise _unusable(f"{name} is {what}", hint)
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), "json")


def _chunks(reader: _Reader) -> Iterator[bytes]:
    """The content, decompressed."""
    if reader.format == "gzip":
        return _gunzip(reader)
    if reader.format == "zstd":
        return _unzstd(reader)
    return iter(partial(reader.read, _CHUNK_BYTES), b"")


def _gunzip(reader: _Reader) -> Iterator[bytes]:
    """All members; unlike with the gzip module, only a member may follow a member."""
    decoder = None
    while data := reader.read(_COMPRESSED_CHUNK_BYTES):
        while data:
            decoder = decoder or zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            try:
                chunk = decoder.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise reader.damaged(error) from error
            if chunk:
                yield chunk
            data = decoder.unconsumed_tail
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise reader.damaged("it ends before its last gzip member does")


def _unzstd(reader: _Reader) -> Iterator[bytes]:
    pa = _arrow()
    try:
        with pa.CompressedInputStream(pa.PythonFile(reader, mode="r"), "zstd") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise reader.damaged(error) from error


def _line_blocks(reader: _Reader) -> Iterator[list[bytes]]:
    """Lines, split at newlines only, as many at a time as a chunk ends.

    Of a line over MAX_LINE_BYTES comes the beginning alone, one byte longer than the limit.
    """
    rest = bytearray()
    is_first = True
    for chunk in chain(_chunks(reader), [b"\n"]):
        head, newline, tail = chunk.partition(b"\n")
        if len(rest) <= MAX_LINE_BYTES:
            rest += head
        if len(rest) > MAX_LINE_BYTES:
            rest[MAX_LINE_BYTES:] = b"+"  # not blank, whatever was cut off
        if not newline:
            continue
        lines = tail.split(b"\n")
        lines.insert(0, bytes(rest))
        rest = bytearray(lines.pop())
        if is_first:
            is_first = False
            lines[0] = lines[0].removeprefix(_BOM)
            if _format_of(lines[0], reader.source.name) != "json":
                message = f"{reader.source.name} holds another compressed or Parquet file"
                raise _unusable(message, "Decompress it first.")
        yield lines


def _json_rows(reader: _Reader, index: Iterator[int]) -> Iterator[Row | BadRow]:
    name = reader.source.name
    lines = chain.from_iterable(_line_blocks(reader))
    for number, line in enumerate(lines, 1):
        try:
            columns = orjson.loads(line) if len(line) <= MAX_LINE_BYTES else None
            if isinstance(columns, dict):
                raw = line.removesuffix(b"\r")
                yield Row(index=next(index), source=name, line=number, raw=raw, columns=columns)
                continue
            if len(line) > MAX_LINE_BYTES:
                code, message = "line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes"
            else:
                beginning = line[:60].decode(errors="replace")
                code, message = "not_an_object", f"the line is no JSON object: {beginning}"
        except orjson.JSONDecodeError as error:
            if not line.strip():
                continue
            code = "invalid_json"
            message = f"not valid JSON at line {number} column {error.colno}: {error.msg}"
        yield BadRow(
            index=next(index), source=name, line=number, id=_id_in(line), code=code, message=message
        )


def _id_in(line: bytes) -> str | int | None:
    """The id of a line that is no JSON, if it is the first key: only there it is surely one."""
    match = _ID_AS_FIRST_KEY.match(line)
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(match[1]) if match else None
    return None


def _parquet_rows(reader: _Reader, index: Iterator[int]) -> Iterator[Row | BadRow]:
    name = reader.source.name
    rows = chain.from_iterable(map(_to_dicts, _parquet_batches(reader)))
    for line, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield Row(index=next(index), source=name, line=line, raw=None, columns=row)
        else:
            text = f"a value cannot be read: {row}"
            yield BadRow(
                index=next(index), source=name, line=line, id=None, code="bad_value", message=text
            )


def _to_dicts(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows of a batch; for one with a value that Python cannot hold, the reason."""
    pa = _arrow()
    try:
        # As they stand, nanoseconds would become pandas' own type where pandas is installed.
        for at, field in enumerate(batch.schema):
            if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
                microseconds = batch.column(at).cast(pa.timestamp("us", field.type.tz))
                batch = batch.set_column(at, field.name, microseconds)
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
        return [row for at in range(batch.num_rows) for row in _to_dicts(batch.slice(at, 1))]


def _parquet_batches(reader: _Reader) -> Iterator[Any]:
    """Batches of rows, in order; every page and what the footer says of it is checked."""
    pa = _arrow()
    place = "its footer"
    try:
        with (
            pa.OSFile(str(reader.source.path)) as handle,
            pa.parquet.ParquetFile(
                handle, page_checksum_verification=True, pre_buffer=False, buffer_size=_CHUNK_BYTES
            ) as file,
        ):
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise _unusable(f"{reader.source.name} has two columns of one name", "Rename one.")
            paths = [file.schema.column(at).path for at in range(len(file.schema))]
            num_rows = num_expected = 0
            for group in range(file.num_row_groups):
                place = f"row group {group + 1} of {file.num_row_groups}"
                for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group]):
                    num_rows += batch.num_rows
                    yield batch
                # Only after the pages: asked for damaged metadata, pyarrow 26 may abort.
                metadata = file.metadata.row_group(group)
                columns = [metadata.column(at) for at in range(metadata.num_columns)]
                num_expected += metadata.num_rows
                if num_rows != num_expected or paths != [c.path_in_schema for c in columns]:
                    raise reader.damaged("it holds other rows than the footer says", place)
            if num_rows != file.metadata.num_rows:
                raise reader.damaged("the row groups hold other rows than it says", "its footer")
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _cannot_read(reader.source, error) from error
        raise reader.damaged(" ".join(str(error).split()), place) from error


def _arrow() -> Any:
    """pyarrow, imported only where it is needed: 40-80 ms that --help does not wait for."""
    import pyarrow.parquet

    return pyarrow
