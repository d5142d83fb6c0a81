"""Lines -> a file of the format that its name says, or standard output."""

import gzip
import heapq
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .exit_code import CommandError, ExitCode
from .files import io_errors
from .inputs import Source
from .output_columns import Lines, OutputColumns

_BUFFER_BYTES = 1 << 18


def write_lines(
    file: BinaryIO,
    name: str,
    lines: Lines,
    sources: list[Source],
    columns: OutputColumns,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Fill `file` in the format of `name`'s extension; equal lines give equal bytes.

    `sources` are where the rows came from: Parquet's columns keep the types that they had there.
    A Parquet file has `metadata` as well.
    """
    if name.endswith(".parquet"):
        import pyarrow as pa  # late: most outputs need none of it

        from .parquet_output import write_parquet

        try:
            write_parquet(file, lines, sources, columns, metadata)
        except MemoryError:
            raise  # Arrow's is one of its exceptions too, and not the disk's fault
        except pa.ArrowException as error:
            message = f"cannot write {name}: {error}"
            raise CommandError(message, exit_code=ExitCode.IO_ERROR) from None
        return
    with _compressed(file, name) as packed:
        for _, line in lines():
            packed.write(line + b"\n")


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that `write_lines` wrote, without their newlines; not of Parquet."""
    with _decompressed(path) as file:
        for line in file:
            yield line.removesuffix(b"\n")


class StreamWriter:
    """Rows -> standard output, in input order (or, with `is_ordered` false, as they finish)."""

    def __init__(self, stream: BinaryIO, *, is_ordered: bool) -> None:
        self._stream = stream
        self._is_ordered = is_ordered
        self._next = 0
        self._early: list[tuple[int, bytes | None]] = []

    @property
    def num_held(self) -> int:
        """Rows kept in memory until an earlier one comes."""
        return len(self._early)

    def write(self, index: int, line: bytes | None) -> None:
        """Take row `index`'s line, without its newline; None for a row that failed."""
        if not self._is_ordered:
            self._emit(line)
            return
        heapq.heappush(self._early, (index, line))
        while self._early and self._early[0][0] == self._next:
            self._emit(heapq.heappop(self._early)[1])
            self._next += 1

    def publish(self) -> None:
        """The job is done: everything must have been written."""
        assert not self._early, "rows are missing before the last ones"
        with io_errors("standard output"):
            self._stream.flush()

    def _emit(self, line: bytes | None) -> None:
        if line is not None:
            with io_errors("standard output"):
                rest = memoryview(line + b"\n")
                while rest:  # stdout may be unbuffered, and take a part only
                    rest = rest[self._stream.write(rest) :]
                self._stream.flush()


@contextmanager
def _compressed(file: BinaryIO, name: str) -> Iterator[Any]:
    """A file to write to; whoever leaves the block without an error has all of it in `file`."""
    if name.endswith(".gz"):  # no name and no time in the header: equal rows give equal files
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield packed
    elif name.endswith(".zst"):
        import pyarrow as pa

        with pa.CompressedOutputStream(_KeptOpen(file), "zstd") as packed:
            yield packed
    else:
        yield file


class _KeptOpen:
    """A file that Arrow does not close with its stream: it is still to be synced."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Write all of it."""
        return self._file.write(data)

    def flush(self) -> None:
        """Nothing: the whole file is flushed at once."""

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""


def _decompressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path, compression="zstd"), _BUFFER_BYTES)
    return open(path, "rb")
