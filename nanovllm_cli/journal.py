"""The journal of a job, OUTPUT.partial: every row that is done, in the order the rows were done.

A line of JSON says whose rows they are (a header, never torn: it appears by a rename), then comes
a line for each row:

    crc32 of the rest, xxh3_128 of the input row, r or e (failed), row number, the line to publish

A damaged line counts for nothing: its row runs again. Of two lines of one row the later counts (a
failed row that was tried again). In memory a row is 21 bytes, with room for growth at most 32.

Each run first appends a claim, a line with a random number, on a line of its own whatever a crash
tore off before it, and then reads the file. Nothing else ever shortens or rewrites it. So whoever
finds the file other than it left it knows that another run has taken over, and stops: a lock may
lie (network file systems) or be lost (a cleaner that removes old files), this cannot.
"""

import errno
import fcntl
import os
import re
import time
import zlib
from array import array
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from .exit_code import CommandError, ExitCode
from .files import (
    TakenOver,
    appearing,
    check_own,
    hold,
    io_errors,
    is_still,
    open_own,
    sync_directory,
    write_whole,
)
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
_RECORD = re.compile(rb"[0-9a-f]{8} ([0-9a-f]{32}) ([re]) (0|[1-9][0-9]{0,17}) ")
_LEAST_RECORD_BYTES = 47
_MOST_IN_FLIGHT = 1 << 20  # rows whose numbers may be above those of all rows that are done
_TAIL_BYTES = 64


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
    """Rows that are done, and the file at `path` that keeps them.

    Raises CommandError IO_ERROR, and TakenOver when another run has taken the file over; from then
    on nothing is written.

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
        self._tail = b""  # the last bytes of them
        self._is_taken_over = False
        self._num_unsynced = 0
        self._synced = time.monotonic()

    @staticmethod
    def read_header(path: Path) -> dict[str, Any]:
        """The header of the journal at `path`; raises NotAJournal, FileNotFoundError."""
        with open(open_own(path, os.O_RDONLY), "rb") as file, io_errors(path, "read"):
            return _parse_header(file.readline(_MAX_HEADER_BYTES))

    @classmethod
    def recover(cls, path: Path, *, shard: Shard | None = None, private: bool = False) -> "Journal":
        """The journal that a run left at `path`, which is this run's from now on.

        Raises NotAJournal, FileNotFoundError, and CommandError LOCKED if another run has it open.
        """
        descriptor = open_own(path, os.O_RDWR | os.O_APPEND, private=private)
        try:
            with io_errors(path, "read"), open(descriptor, "rb", closefd=False) as file:
                line = file.readline(_MAX_HEADER_BYTES)
            journal = cls(path, _parse_header(line), shard=shard, private=private)
            if not hold(descriptor):
                raise CommandError(
                    f"{path} is being written by another process",
                    "Run it again later, or name another output.",
                    exit_code=ExitCode.LOCKED,
                )
            claim = _new_claim()
            with io_errors(path):
                write_whole(descriptor, b"\n" + claim)
            with io_errors(path, "read"), open(descriptor, "rb", closefd=False) as file:
                file.seek(len(line))
                journal._read_records(file)
        except BaseException:
            os.close(descriptor)
            raise
        journal._descriptor = descriptor
        journal._tail = claim
        if not journal._is_ours():  # whoever writes there began before this run has read it
            journal.close()
            raise TakenOver(journal._output)
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
                self.check_owner()
                data = b"".join(self._buffer)
                self._buffer.clear()
                self._buffered_bytes = 0
                try:
                    write_whole(self._descriptor, data)
                except OSError:
                    self._cut_half(data)
                    raise
                self._written_bytes += len(data)
                self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            is_due = self._num_unsynced >= _SYNC_ROWS or (
                self._num_unsynced and time.monotonic() - self._synced >= _SYNC_SECONDS
            )
            if is_due:
                self._sync()

    def sync(self) -> None:
        """Flush, and wait until all rows are on the disk."""
        self.flush()
        if self._num_unsynced:
            self.check_owner()
            with io_errors(self.path):
                self._sync()

    def check_owner(self) -> None:
        """Raise TakenOver if the file is another run's by now."""
        with io_errors(self.path, "read"):
            if not self._is_taken_over and self._is_ours():
                return
        self._is_taken_over = True
        self._buffer.clear()
        raise TakenOver(self._output)

    def lines(self, kind: Kind) -> Iterator[tuple[int, bytes]]:
        """(row number, line) of all rows of that kind in input order, each as it was written."""
        self.flush()
        if self._descriptor is None:
            return
        for start in range(0, self._num_slots, _ROWS_AT_ONCE):
            for slot in self._slots(kind, start, start + _ROWS_AT_ONCE).tolist():
                row = slot * self._shard.count + self._shard.index
                yield row, self._line(row, slot)

    def rename(self, path: Path) -> None:
        """Let the whole journal appear under another name."""
        self.sync()
        with io_errors(path):
            if self._descriptor is not None:
                self.check_owner()
                if check_own(path):
                    raise TakenOver(path.with_suffix(""))
                os.replace(self.path, path)
                sync_directory(path.parent)
        self.path = path

    def remove(self) -> None:
        """Its rows are published, or it was never any good to anyone."""
        with io_errors(self.path, "remove"):
            if self._descriptor is not None:
                self.check_owner()
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the file as it is, on the disk; another run's is left alone."""
        if self._descriptor is not None:
            try:
                if not self._is_taken_over and is_still(self.path, self._descriptor):
                    self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    @property
    def _output(self) -> Path:
        """What the rows are for, as messages name it."""
        return self.path.with_suffix("")

    def _create(self) -> None:
        content = orjson.dumps({_HEADER_KEY: _VERSION, **self._header})
        data = b"%08x %b\n" % (zlib.crc32(content), content) + _new_claim()
        with io_errors(self.path):
            if check_own(self.path):  # there was none when this run began
                raise TakenOver(self._output)
            with appearing(self.path, private=self._private) as file:
                file.write(data)
                # With it goes the hold: whoever opens the journal sees that this process lives.
                descriptor = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
                try:
                    file.flush()
                    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
                except BaseException:
                    os.close(descriptor)
                    raise
                self._descriptor = descriptor
        self._written_bytes = len(data)
        self._tail = data[-_TAIL_BYTES:]

    def _read_records(self, file: BinaryIO) -> None:
        """Take every whole record from here to the end of the file."""
        offset = file.tell()
        most_slots = os.fstat(file.fileno()).st_size // _LEAST_RECORD_BYTES + _MOST_IN_FLIGHT
        for line in file:
            record = _parse_record(line)
            if record is not None:
                key, kind, row, start = record
                is_possible = self._shard.has(row) and row // self._shard.count < most_slots
                # What is completed never runs again: damage has brought an older line here.
                is_older = kind == Kind.FAILED and self.kind(row) == Kind.COMPLETED
                if is_possible and not is_older:
                    self._place(row, offset + start, key, len(line) - start - 1, kind)
            offset += len(line)
        self._written_bytes = offset

    def _is_ours(self) -> bool:
        """Whether the file is still there, and as this run has left it."""
        if self._descriptor is None:
            return True
        try:
            # Opened anew: a network file system then looks whether it has changed.
            descriptor = os.open(
                self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return False
            raise
        try:
            status = os.fstat(descriptor)
            start = self._written_bytes - len(self._tail)
            return (
                os.path.samestat(status, os.fstat(self._descriptor))
                and status.st_size == self._written_bytes
                and os.pread(descriptor, len(self._tail), start) == self._tail
            )
        finally:
            os.close(descriptor)

    def _cut_half(self, data: bytes) -> None:
        """Remove what the disk has taken of `data`, if nobody has written since."""
        assert self._descriptor is not None, "only called where there is a file"
        written = os.pread(self._descriptor, len(data) + 1, self._written_bytes)
        if data.startswith(written):
            os.ftruncate(self._descriptor, self._written_bytes)

    def _line(self, row: int, slot: int) -> bytes:
        """A row's line, read again; its record must still be whole."""
        assert self._descriptor is not None, "only called where there is a file"
        start = 9 + 33 + 2 + len(b"%d " % row)
        length, offset = start + self._lengths[slot], self._offsets[slot] - start
        with io_errors(self.path, "read"):
            record = os.pread(self._descriptor, length, offset)
        if record[:9] != b"%08x " % zlib.crc32(memoryview(record)[9:]) or len(record) != length:
            raise CommandError(
                f"{self.path} is damaged at byte {offset}: row {row} is not what was written",
                "Run the same line again: this row runs again, and what is whole is kept.",
                exit_code=ExitCode.IO_ERROR,
            )
        return record[start:]

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


def _new_claim() -> bytes:
    """A line that no other run has ever written; an old version of the tool reads over it."""
    return b"owner %b\n" % os.urandom(16).hex().encode()


def _parse_header(line: bytes) -> dict[str, Any]:
    content = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(content) or line[-1:] != b"\n":
        raise NotAJournal
    try:
        header = orjson.loads(content)
    except ValueError:
        raise NotAJournal from None
    if not isinstance(header, dict) or header.pop(_HEADER_KEY, None) != _VERSION:
        raise NotAJournal
    fingerprint = header.get("fingerprint")
    if not isinstance(fingerprint, dict) or not all(
        isinstance(value, str) for value in fingerprint.values()
    ):
        raise NotAJournal
    return header


def _parse_record(line: bytes) -> tuple[int, Kind, int, int] | None:
    """Key, kind, row number, and where the line to publish begins; None for a damaged record."""
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(memoryview(line)[9:-1]):
        return None
    found = _RECORD.match(line)
    if found is None:
        return None
    key, letter, row = found.groups()
    return int(key, 16), _KINDS[letter], int(row), found.end()
