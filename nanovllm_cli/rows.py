"""Inputs -> rows, good and bad, numbered over all of them and streamed in bounded memory.

The first station of the flow; prompts.py takes the rows from here. What a row means is not known
here: it is a JSON object, or a row of a Parquet file. What cannot be read as a row becomes a
BadRow with the reason; what spoils a file as a whole raises CommandError.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import orjson

from .input_file import InputFile, opened
from .input_lines import MAX_LINE_BYTES, line_blocks
from .inputs import Source

_MAX_DEPTH = 254  # of what orjson writes; it reads 1024 levels
_ID_AS_FIRST_KEY = re.compile(
    rb'\s*\{\s*"(?:id|custom_id)"\s*:\s*("(?:[^"\\]|\\.){0,1000}"|-?\d{1,18})\s*[,}]'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot run, and why."""

    index: int
    source: str
    line: int
    id: str | int | None
    code: str
    message: str
    is_openai_line: bool = False
    known_as: str | None = None  # the message by which a journal knows the row, if it is another


@dataclass(kw_only=True, slots=True)  # not frozen, which takes thrice the time, for every row
class Row:
    """One row as it stands in its file."""

    index: int  # from 0, over all inputs
    source: str
    line: int  # from 1; in a Parquet file the row
    raw: bytes | None  # the JSON without its line break; None for Parquet
    columns: dict[str, Any]
    num_bytes: int = 0  # about how many it holds

    def failed(
        self, row_id: str | int | None, code: str, message: str, *, is_openai_line: bool = False
    ) -> BadRow:
        """The row, which cannot run."""
        return BadRow(
            index=self.index,
            source=self.source,
            line=self.line,
            id=row_id,
            code=code,
            message=message,
            is_openai_line=is_openai_line,
        )


def check_inputs(sources: Iterable[Source], *, limit: int | None = None) -> int | None:
    """Read the first `limit` rows, or all, to find damage early; returns how many there are.

    None where a stream is among the inputs, which is left alone. Raises CommandError,
    INPUT_UNUSABLE, naming the byte or the row group reached.
    """
    num_rows, has_stream = 0, False
    for source in sources:
        if source.is_stream:
            has_stream = True
            continue
        if num_rows == limit:
            continue
        with opened(source) as file:
            num_read, is_whole = 0, True
            for num_new_rows in _row_counts(file):
                num_read += num_new_rows
                if limit is not None and num_rows + num_read >= limit:
                    num_read, is_whole = limit - num_rows, False
                    break
            file.check_unchanged(num_read if is_whole else None)
        if is_whole:
            source.first_look.num_rows = num_read
        num_rows += num_read
    return None if has_stream else num_rows


def _row_counts(file: InputFile) -> Iterator[int]:
    """The number of rows in each block of lines, or in each batch of Parquet rows."""
    if file.format == "parquet":
        from .parquet_input import parquet_batches  # late: it imports pyarrow

        return (batch.num_rows for batch in parquet_batches(file))
    return (sum(map(bool, map(bytes.strip, lines))) for _, lines in line_blocks(file))


def read_rows(sources: Iterable[Source], *, limit: int | None = None) -> Iterator[Row | BadRow]:
    """All rows of all sources, good and bad; at most `limit`.

    Raises CommandError: INPUT_UNUSABLE for damaged content, IO_ERROR where reading fails.
    """
    index = count()
    num_left = limit
    for source in sources:
        if num_left == 0:
            return
        with opened(source) as file:
            rows = _parquet_rows if file.format == "parquet" else _json_rows
            num_read = 0
            for row in rows(file, index):
                yield row
                num_read += 1
                if num_read == num_left:
                    file.check_unchanged()
                    return
            file.check_unchanged(num_read)
            if num_left is not None:
                num_left -= num_read


def _json_rows(file: InputFile, index: Iterator[int]) -> Iterator[Row | BadRow]:
    name = file.source.name
    numbered = (enumerate(lines, first) for first, lines in line_blocks(file))
    for number, line in chain.from_iterable(numbered):
        try:
            columns = orjson.loads(line) if len(line) <= MAX_LINE_BYTES else None
            if isinstance(columns, dict) and not _is_too_deep(line, columns):
                raw = line.removesuffix(b"\r")
                yield Row(
                    index=next(index),
                    source=name,
                    line=number,
                    raw=raw,
                    columns=columns,
                    num_bytes=len(raw),
                )
                continue
            if len(line) > MAX_LINE_BYTES:
                code, message = "line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes"
            elif isinstance(columns, dict):
                code, message = "too_deep", f"the row is nested over {_MAX_DEPTH} levels deep"
            else:
                beginning = line[:60].decode(errors="replace")
                code, message = "not_an_object", f"the line is no JSON object: {beginning}"
        except orjson.JSONDecodeError as error:
            if not line.strip():
                continue
            code = "invalid_json"
            message = f"not valid JSON at line {number} column {error.colno}: {error.msg}"
            known_as, message = message, _not_utf8(line) or message
        else:
            known_as = message
        yield BadRow(
            index=next(index),
            source=name,
            line=number,
            id=_id_in(line),
            code=code,
            message=message,
            known_as=known_as,
        )


def _not_utf8(line: bytes) -> str | None:
    """What is wrong with a line that is not UTF-8; None for another fault."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        value = line[error.start]
        return f"not UTF-8 at byte {error.start + 1} of the line, which is 0x{value:02x}"
    return None


def _is_too_deep(line: bytes, columns: dict[str, Any]) -> bool:
    """Whether no output could hold the row: orjson reads it, but cannot write it."""
    if line.count(b"[") + line.count(b"{") <= _MAX_DEPTH:
        return False
    try:
        orjson.dumps(columns)
    except TypeError:
        return True
    return False


def _id_in(line: bytes) -> str | int | None:
    """The id of a line that is no JSON, if it is the first key: only there it is surely one."""
    match = _ID_AS_FIRST_KEY.match(line)
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(match[1]) if match else None
    return None


def _parquet_rows(file: InputFile, index: Iterator[int]) -> Iterator[Row | BadRow]:
    name = file.source.name
    from .parquet_input import parquet_batches  # late, likewise
    from .parquet_values import rows_of

    rows = chain.from_iterable(map(rows_of, parquet_batches(file)))
    for line, (row, num_bytes) in enumerate(rows, 1):
        if isinstance(row, dict):
            yield Row(
                index=next(index),
                source=name,
                line=line,
                raw=None,
                columns=row,
                num_bytes=num_bytes,
            )
        else:
            text = f"a value cannot be read: {row}"
            yield BadRow(
                index=next(index), source=name, line=line, id=None, code="bad_value", message=text
            )
