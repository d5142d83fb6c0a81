"""Finished rows -> the output: a file published whole and in input order, or standard output.

A file's rows are appended in the order they finish to `NAME.partial`, with an index of where each
lies. When the job is done they are copied in input order to a temporary file, which is renamed to
`NAME`: the output is never half visible. (The journal for resuming grows out of `.partial`.)
"""

import gzip
import heapq
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from .exit_code import CommandError, ExitCode
from .inputs import Source
from .parquet_output import write_parquet


class FileWriter:
    """Rows -> a file at `path`: JSON lines, also as .gz or .zst, or Parquet, by its extension.

    With `is_optional` a file without rows is not published, and an old one is removed.
    """

    def __init__(self, path: Path, sources: list[Source], *, is_optional: bool = False) -> None:
        self.path = path
        self._sources = sources
        self._is_optional = is_optional
        self._partial_path = path.with_name(path.name + ".partial")
        self._places = array("q")  # (row index, offset, length) after (row index, offset, ...
        self._end = 0
        with io_errors(self._partial_path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial: BinaryIO = open(self._partial_path, "w+b")  # noqa: SIM115

    @property
    def num_held(self) -> int:
        """Rows kept in memory until an earlier one comes: none."""
        return 0

    def write(self, index: int, line: bytes | None) -> None:
        """Take row `index`'s line, without its newline; None for a row that failed."""
        if line is None:
            return
        with io_errors(self._partial_path):
            self._partial.write(line + b"\n")
        self._places.extend((index, self._end, len(line)))
        self._end += len(line) + 1

    def publish(self) -> None:
        """Make the rows visible, all at once."""
        if self._is_optional and not self._places:
            self.path.unlink(missing_ok=True)
            self._partial_path.unlink()
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with io_errors(self.path):
                self._partial.flush()
                if self.path.suffix == ".parquet":
                    write_parquet(temporary, self._in_order, self._sources)
                else:
                    with _compressed(temporary, self.path.suffix) as file:
                        for _, line in self._in_order():
                            file.write(line + b"\n")
                _sync(temporary)
                os.replace(temporary, self.path)
                _sync(self.path.parent)
                self._partial_path.unlink()
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the partial file; it stays where it is unless it was published."""
        with io_errors(self._partial_path):
            self._partial.close()

    def _in_order(self) -> Iterator[tuple[int, bytes]]:
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        for row, offset, length in places[np.argsort(places[:, 0])].tolist():
            self._partial.seek(offset)
            yield row, self._partial.read(length)


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

    def close(self) -> None:
        """Standard output is not ours to close."""

    def _emit(self, line: bytes | None) -> None:
        if line is not None:
            with io_errors("standard output"):
                rest = memoryview(line + b"\n")
                while rest:  # stdout may be unbuffered, and take a part only
                    rest = rest[self._stream.write(rest) :]
                self._stream.flush()


@contextmanager
def io_errors(path: Path | str) -> Iterator[None]:
    """Turn the system's refusals to write into the error of that exit code; not a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise CommandError(f"cannot write {path}: {error}", exit_code=ExitCode.IO_ERROR) from None


@contextmanager
def _compressed(path: Path, suffix: str) -> Iterator[Any]:
    """A file to write to; whoever leaves the block without an error has it on the disk."""
    with open(path, "wb") as file:
        if suffix == ".gz":  # no name and no time in the header: equal rows give equal files
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                yield packed
        elif suffix == ".zst":
            with pa.CompressedOutputStream(file, "zstd") as packed:
                yield packed
        else:
            yield file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
