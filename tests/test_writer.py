"""Lines -> files and streams: whole or refused, the same bytes twice."""

import errno
import gzip
import io
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source
from nanovllm_cli.output_columns import OutputColumns
from nanovllm_cli.writer import StreamWriter, read_lines, write_lines

STDIN = [Source(name="<stdin>", path=None)]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def line_of(index: int) -> bytes:
    return orjson.dumps({"id": index, "text": f"row {index} " * (index % 7)})


def write(path: Path, lines: list[bytes], *, name: str | None = None) -> None:
    with open(path, "wb") as file:
        named = name or path.name
        write_lines(file, named, lambda: iter(enumerate(lines)), STDIN, OutputColumns())


def content_of(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        with pa.input_stream(path, compression="zstd") as file:
            return file.read()
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        return b"".join(orjson.dumps(row) + b"\n" for row in rows)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_lines_are_in_the_file_in_the_format_of_its_name(suffix: str, tmp_path: Path) -> None:
    lines = [line_of(index) for index in range(3000)]
    write(tmp_path / f"out{suffix}", lines)
    assert content_of(tmp_path / f"out{suffix}") == b"".join(line + b"\n" for line in lines)


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_the_lines_can_be_read_again(suffix: str, tmp_path: Path) -> None:
    lines = [line_of(index) + b"\r \xe2\x80\xa8" * (index % 2) for index in range(3000)]
    lines += [b"", b"x" * 1_000_000, b"\r"]
    write(tmp_path / f"out{suffix}", lines)
    assert list(read_lines(tmp_path / f"out{suffix}")) == lines
    write(tmp_path / f"none{suffix}", [])
    assert list(read_lines(tmp_path / f"none{suffix}")) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_lines_give_the_same_bytes_under_any_name(suffix: str, tmp_path: Path) -> None:
    lines = [line_of(index) for index in range(500)]
    write(tmp_path / f"one{suffix}", lines)
    write(tmp_path / ".temporary", lines, name=f"other{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / ".temporary").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_lines_are_an_empty_file(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"out{suffix}", [])
    assert content_of(tmp_path / f"out{suffix}") == b""


def test_a_stream_has_the_rows_in_order_as_soon_as_that_is_known() -> None:
    stream = io.BytesIO()
    writer = StreamWriter(stream, is_ordered=True)
    held = []
    for index, line in [(2, b"c"), (1, None), (4, b"e"), (0, b"a"), (3, b"d")]:
        writer.write(index, line)
        held.append((stream.getvalue(), writer.num_held))
    assert held == [(b"", 1), (b"", 2), (b"", 3), (b"a\nc\n", 1), (b"a\nc\nd\ne\n", 0)]
    writer.publish()


def test_an_unordered_stream_has_the_rows_as_they_finish() -> None:
    stream = io.BytesIO()
    writer = StreamWriter(stream, is_ordered=False)
    for index, line in [(2, b"c"), (1, None), (0, b"a")]:
        writer.write(index, line)
    assert stream.getvalue() == b"c\na\n"
    assert writer.num_held == 0


class Refusing(io.RawIOBase):
    """A stream that raises when it is written to."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise self._error


class Sipping(io.RawIOBase):
    """A stream that takes a few bytes at a time, as an unbuffered stdout may."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += bytes(data[:5])
        return min(len(data), 5)


def test_an_unbuffered_stream_gets_every_byte() -> None:
    stream = Sipping()  # what PYTHONUNBUFFERED makes of stdout
    writer = StreamWriter(stream, is_ordered=True)  # type: ignore[arg-type]
    writer.write(0, line_of(6))
    writer.write(1, line_of(1))
    assert stream.content == line_of(6) + b"\n" + line_of(1) + b"\n"


def test_a_stream_that_refuses_is_an_error_of_its_own_kind() -> None:
    full = Refusing(OSError(errno.ENOSPC, "No space left on device"))
    writer = StreamWriter(full, is_ordered=True)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match="No space left") as error:
        writer.write(0, b"a")
    assert error.value.exit_code == ExitCode.IO_ERROR
    closed = Refusing(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        StreamWriter(closed, is_ordered=False).write(0, b"a")  # type: ignore[arg-type]
