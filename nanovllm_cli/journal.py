"""The journal of a job, OUTPUT.partial: every row that is done, in the order the rows were done.

A line of JSON says whose rows they are (a header, never torn: it appears by a rename), then comes
a line for each row:

    crc32 of the rest, xxh3_128 of the input row, r or e (failed), row number, the line to publish

What a crash tore off is cut before anything is appended, and a damaged line counts for nothing:
its row runs again. Of two lines of one row the later counts (a failed row that was tried again).
In memory a row is 21 bytes, with room for growth at most 32.
"""

import os
import time
import zlib
from array import array
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
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
_ALL_KINDS = tuple(Kind)


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
        # Of each row, at row number // shard count. Not numpy's: one by one they are quicker so.
        self._kinds = bytearray()
        self._offsets = array("q")
        self._keys = array("Q")  # low halves
        self._lengths = array("i")
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
        slot = row // self._shard.count
        return _ALL_KINDS[self._kinds[slot]] if slot < len(self._kinds) else Kind.MISSING

    def key(self, row: int) -> int:
        """The low half of the key of a row that is done."""
        return self._keys[row // self._shard.count]

    def keys(self, kind: Kind) -> Keys:
        """The low halves of the keys of all rows of that kind, in input order."""
        return np.frombuffer(self._keys, np.uint64)[self._slots(kind)]

    def rows(self, kind: Kind) -> RowNumbers:
        """The numbers of all rows of that kind, ascending."""
        return self._slots(kind) * self._shard.count + self._shard.index

    def forget_failed(self) -> None:
        """Count failed rows as missing, so that they run again."""
        self._kinds = self._kinds.replace(bytes([Kind.FAILED]), bytes([Kind.MISSING]))
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
            for slot in self._slots(kind, start, start + _ROWS_AT_ONCE).tolist():
                line = os.pread(self._descriptor, self._lengths[slot], self._offsets[slot])
                yield slot * self._shard.count + self._shard.index, line

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
        if slot >= len(self._kinds):
            num_new = max(slot + 1 - len(self._kinds), len(self._kinds) // 2, 1024)
            for column in (self._kinds, self._offsets, self._keys, self._lengths):
                column.extend(bytes(num_new))
        self._counts[self._kinds[slot]] -= 1
        self._counts[kind] += 1
        self._kinds[slot] = kind
        self._offsets[slot] = offset
        self._keys[slot] = low_half(key)
        self._lengths[slot] = length
        if slot >= self._num_slots:
            self._num_slots = slot + 1

    def _slots(self, kind: Kind, start: int = 0, end: int | None = None) -> RowNumbers:
        """The slots of all rows of that kind, from `start` on and before `end`."""
        kinds = np.frombuffer(self._kinds, np.uint8)[: self._num_slots]
        return np.flatnonzero(kinds[start:end] == kind) + start


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
