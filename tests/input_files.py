"""What the tests of the inputs share: files of every kind, and what is read from them."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source, find_inputs
from nanovllm_cli.rows import BadRow, Row, check_inputs, read_rows

LINES = b"".join(b'{"id": %d, "prompt": "number %d"}\n' % (at, at * 7919) for at in range(600))
COLUMNS = [{"id": at, "prompt": f"number {at * 7919}"} for at in range(600)]


def zstd(content: bytes) -> bytes:
    """A frame with a checksum as the zstd command writes it; pyarrow writes none, so it is added.

    RFC 8878: bit 2 of the descriptor after the magic, then the low half of xxh64 at the end.
    """
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    frame = bytearray(sink.getvalue().to_pybytes())
    frame[4] |= 1 << 2
    return bytes(frame) + xxhash.xxh64_digest(content)[:3:-1]


def parquet(columns: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(columns)
    pq.write_table(table, file, row_group_size=150, write_page_checksum=True)
    return file.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


def source(name: str, content: bytes) -> list[Source]:
    Path(name).write_bytes(content)
    return find_inputs([name])


def read(content: bytes, name: str = "in.jsonl") -> list[Row | BadRow]:
    sources = source(name, content)
    result = list(read_rows(sources))
    assert check_inputs(sources) == len(result)
    return result


def columns_of(found: list[Row | BadRow]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in found)
    return [row.columns for row in found if isinstance(row, Row)]


def bad(found: list[Row | BadRow]) -> BadRow:
    (row,) = found
    assert isinstance(row, BadRow)
    return row


def unusable(sources: list[Source]) -> CommandError:
    with pytest.raises(CommandError) as caught:
        check_inputs(sources)
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
    assert sources[-1].name in caught.value.message
    return caught.value
