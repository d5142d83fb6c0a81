"""The journal of a job, OUTPUT.partial: every row that is done, in the order the rows were done.

A line of JSON says whose rows they are (a header, never torn: it appears by a rename), then comes
a line for each row:

    crc32 of the rest, xxh3_128 of the input row, r or e (failed), row number, the line to publish

What a crash tore off is cut before anything is appended, and a damaged line counts for nothing:
its row runs again. Of two lines of one row the later counts (a failed row that was tried again).
In memory a row is 21 bytes, wherever it came from.
"""

import os
import time
import zlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from .files import appearing, io_errors, sync_directory, write_whole
from .row_key import Keys, low_half
from .row_ranges import RowNumbers
from .shard import Shard

_SYNC_SECONDS = 1.0
_SYNC_ROWS = 1000
_BUFFER_BYTES = 1 << 20
_ROWS_AT_ONCE = 1 << 16
_MAX_HEADER_BYTES = 1 << 24
_HEADER_KEY = "nanovllm_journal"
_VERSION = 1


class Kind(IntEnum):
    """What is known of a row."""

    MISSING = 0
    COMPLETED = 1
    FAILED = 2


_LETTERS = {Kind.COMPLETED: b"r", Kind.FAILED: b"e"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_PLACE = np.dtype([("offset", "<i8"), ("key", "<u8"), ("length", "<i4"), ("kind", "u1")])


class NotAJournal(Exception):
    """A file whose first line is not a journal's."""


class Journal:
    """Rows that are done, and the file at `path` that keeps them; raises CommandError IO_ERROR.

    The file is made with the first row. Writing is by `flush`, one system call for all rows taken
    since the last; what is written outlives the process, and once a second or every 1,000 rows
    what is written is made to outlive the machine.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        shard: Shard | None = None,
        private: bool = False,
    ) -> None:
        self.path = path
        self._header = header
        self._shard = shard or Shard()
        self._private = private
        self._places: npt.NDArray[np.void] = np.zeros(0, _PLACE)  # row number // shard count
        self._counts = [0] * len(Kind)
        self._num_slots = 0  # up to the last row that is there
        self._descriptor: int | None = None
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._written_bytes = 0
        self._num_unsynced = 0
        self._synced = time.monotonic()

    @staticmethod
    def read_header(path: Path) -> dict[str, Any]:
        """The header of the journal at `path`; raises NotAJournal, FileNotFoundError."""
        with open(path, "rb") as file:
            return _parse_header(file.readline(_MAX_HEADER_BYTES))

    @classmethod
    def recover(cls, path: Path, *, shard: Shard | None = None, private: bool = False) -> "Journal":
        """The journal that a run left at `path`; raises NotAJournal, FileNotFoundError."""
        with open(path, "rb") as file:
            header = _parse_header(file.readline(_MAX_HEADER_BYTES))
            journal = cls(path, header, shard=shard, private=private)
            offset = end = file.tell()
            for line in file:
                record = _parse_record(line)
                if record is not None:
                    key, kind, row, start = record
                    journal._place(row, offset + start, key, len(line) - start - 1, kind)
                    end = offset + len(line)
                offset += len(line)
        with io_errors(path):
            journal._descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
            os.ftruncate(journal._descriptor, end)
        journal._written_bytes = end
        return journal

    @property
    def header(self) -> dict[str, Any]:
        return self._header

    @property
    def num_completed(self) -> int:
        return self._counts[Kind.COMPLETED]

    @property
    def num_failed(self) -> int:
        return self._counts[Kind.FAILED]

    @property
    def num_done(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def end_row(self) -> int:
        """One more than the highest row number that was ever appended; 0 if there is none."""
        if not self._num_slots:
            return 0
        return (self._num_slots - 1) * self._shard.count + self._shard.index + 1

    def kind(self, row: int) -> Kind:
        """What is known of a row of the shard."""
        places, slot = self._places, row // self._shard.count
        return Kind(places["kind"][slot]) if slot < len(places) else Kind.MISSING

    def key(self, row: int) -> int:
        """The low half of the key of a row that is done."""
        return int(self._places["key"][row // self._shard.count])

    def keys(self, kind: Kind) -> Keys:
        """The low halves of the keys of all rows of that kind, in input order."""
        places = self._places[: self._num_slots]
        return places["key"][places["kind"] == kind]

    def rows(self, kind: Kind) -> RowNumbers:
        """The numbers of all rows of that kind, ascending."""
        slots = np.flatnonzero(self._places["kind"][: self._num_slots] == kind)
        return slots * self._shard.count + self._shard.index

    def forget_failed(self) -> None:
        """Count failed rows as missing, so that they run again."""
        kinds = self._places["kind"]
        kinds[kinds == Kind.FAILED] = Kind.MISSING
        self._counts[Kind.FAILED] = 0

    def append(self, row: int, key: int, kind: Kind, line: bytes) -> None:
        """Take a row that is done, its line without the newline."""
        assert self.kind(row) != Kind.COMPLETED, f"row {row} was done before"
        record = b"%032x %b %d %b" % (key, _LETTERS[kind], row, line)
        data = b"%08x %b\n" % (zlib.crc32(record), record)
        if self._descriptor is None:
            self._create()
        end = self._written_bytes + self._buffered_bytes + len(data)
        self._place(row, end - 1 - len(line), key, len(line), kind)
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        self._num_unsynced += 1
        if self._buffered_bytes >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was taken; sync when it is time."""
        if self._descriptor is None:
            return
        with io_errors(self.path):
            if self._buffer:
                data = b"".join(self._buffer)
                self._buffer.clear()
                self._buffered_bytes = 0
                try:
                    write_whole(self._descriptor, data)
                except OSError:
                    os.ftruncate(self._descriptor, self._written_bytes)
                    raise
                self._written_bytes += len(data)
            is_due = self._num_unsynced >= _SYNC_ROWS or (
                self._num_unsynced and time.monotonic() - self._synced >= _SYNC_SECONDS
            )
            if is_due:
                self._sync()

    def sync(self) -> None:
        """Flush, and wait until all rows are on the disk."""
        self.flush()
        if self._num_unsynced:
            with io_errors(self.path):
                self._sync()

    def lines(self, kind: Kind) -> Iterator[tuple[int, bytes]]:
        """(row number, line) of all rows of that kind in input order."""
        self.flush()
        if self._descriptor is None:
            return
        for start in range(0, self._num_slots, _ROWS_AT_ONCE):
            places = self._places[start : min(start + _ROWS_AT_ONCE, self._num_slots)]
            slots = np.flatnonzero(places["kind"] == kind)
            chosen = places[slots]
            rows = (slots + start) * self._shard.count + self._shard.index
            for row, offset, length in zip(
                rows.tolist(), chosen["offset"].tolist(), chosen["length"].tolist(), strict=True
            ):
                yield row, os.pread(self._descriptor, length, offset)

    def rename(self, path: Path) -> None:
        """Let the whole journal appear under another name."""
        self.sync()
        with io_errors(path):
            if self._descriptor is not None:
                os.replace(self.path, path)
                sync_directory(path.parent)
        self.path = path

    def remove(self) -> None:
        """Its rows are published."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the file as it is, on the disk."""
        if self._descriptor is not None:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _create(self) -> None:
        content = orjson.dumps({_HEADER_KEY: _VERSION, **self._header})
        line = b"%08x %b\n" % (zlib.crc32(content), content)
        with io_errors(self.path):
            with appearing(self.path, private=self._private) as temporary:
                temporary.write_bytes(line)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._written_bytes = len(line)

    def _sync(self) -> None:
        assert self._descriptor is not None, "only called where there is a file"
        os.fdatasync(self._descriptor)
        self._num_unsynced = 0
        self._synced = time.monotonic()

    def _place(self, row: int, offset: int, key: int, length: int, kind: Kind) -> None:
        slot = row // self._shard.count
        if slot >= len(self._places):
            grown = np.zeros(max(2 * len(self._places), slot + 1, 1024), _PLACE)
            grown[: len(self._places)] = self._places
            self._places = grown
        self._counts[self._places["kind"][slot]] -= 1
        self._counts[kind] += 1
        self._places[slot] = (offset, low_half(key), length, kind)
        self._num_slots = max(self._num_slots, slot + 1)


def _parse_header(line: bytes) -> dict[str, Any]:
    content = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(content) or line[-1:] != b"\n":
        raise NotAJournal
    header = orjson.loads(content)
    if header.pop(_HEADER_KEY, None) != _VERSION:
        raise NotAJournal
    return header


def _parse_record(line: bytes) -> tuple[int, Kind, int, int] | None:
    """Key, kind, row number, and where the line to publish begins; None for a damaged record."""
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(memoryview(line)[9:-1]):
        return None
    end = line.index(b" ", 44)
    return int(line[9:41], 16), _KINDS[line[42:43]], int(line[44:end]), end + 1
