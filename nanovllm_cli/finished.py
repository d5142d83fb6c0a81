"""What a finished job left, as its stats file tells it: which rows, and which files are its own."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from .exit_code import ExitCode
from .files import io_errors, open_regular
from .journal import Journal, Kind
from .row_key import marks_of, num_marks
from .row_ranges import RowNumbers, from_ranges, to_ranges

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """The part of a stats file by which a later run knows what was done, and what it may replace.

    The stats file is written before the files it tells of, so that these are known as our own
    even if the job is killed between.
    """

    exit_code: ExitCode
    fingerprint: dict[str, str]
    num_rows: int  # of the input, in a shard's record too
    input: str  # a hash of the keys of all its rows
    num_completed: int
    completed_marks: list[str]  # of the keys of completed rows
    failed_marks: list[str]
    failed_rows: RowNumbers
    output: str | None  # contents, as `content_of` names them
    errors: str | None
    replaced: list[str]  # what the two took the place of, if that was the tool's own

    @classmethod
    def of(cls, journal: Journal, **fields: Any) -> "JobRecord":
        """The record of a job whose rows are all in `journal`."""
        return cls(
            fingerprint=journal.header["fingerprint"],
            num_completed=journal.num_completed,
            completed_marks=marks_of(journal.keys(Kind.COMPLETED)),
            failed_marks=marks_of(journal.keys(Kind.FAILED)),
            failed_rows=journal.rows(Kind.FAILED),
            **fields,
        )

    @classmethod
    def parse(cls, content: bytes | None) -> "JobRecord | None":
        """From a stats file; None if there is none, or it is damaged, or of another version."""
        if content is None:
            return None
        try:
            stats = orjson.loads(content)
            rows, resume = stats["rows"], stats["resume"]
            record = cls(
                exit_code=ExitCode(stats["exit_code"]),
                fingerprint=stats["fingerprint"],
                num_rows=resume["input_rows"],
                input=resume["input"],
                num_completed=rows["completed"],
                completed_marks=resume["completed_marks"].split(),
                failed_marks=resume["failed_marks"].split(),
                failed_rows=from_ranges(resume["failed_rows"], most=resume["input_rows"]),
                output=resume["output"],
                errors=resume["errors"],
                replaced=resume["replaced"],
            )
            return record if record._is_whole() else None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """For the stats file, which has the rest of `read` in other places."""
        return {
            "fingerprint": self.fingerprint,
            "resume": {
                "input_rows": self.num_rows,
                "input": self.input,
                "completed_marks": " ".join(self.completed_marks),
                "failed_marks": " ".join(self.failed_marks),
                "failed_rows": to_ranges(self.failed_rows),
                "output": self.output,
                "errors": self.errors,
                "replaced": self.replaced,
            },
        }

    def _is_whole(self) -> bool:
        """Whether each part is of its kind, and they agree."""
        num_failed = len(self.failed_rows)
        counts, texts = (self.num_rows, self.num_completed), (self.output, self.errors)
        return (
            all(type(count) is int and count >= 0 for count in counts)
            and isinstance(self.input, str)
            and all(text is None or isinstance(text, str) for text in texts)
            and isinstance(self.replaced, list)
            and all(isinstance(text, str) for text in self.replaced)
            and isinstance(self.fingerprint, dict)
            and all(isinstance(value, str) for value in self.fingerprint.values())
            and self.num_completed + num_failed <= self.num_rows
            and len(self.completed_marks) == num_marks(self.num_completed)
            and len(self.failed_marks) == num_marks(num_failed)
        )

    def owns(self, content: str | None) -> bool:
        """Whether a file of that content was written by this job, or is what it replaces."""
        return content is not None and content in (self.output, self.errors, *self.replaced)


def content_of(path: Path) -> str | None:
    """A file's size and hash; None where there is none."""
    with io_errors(path, "read"):
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return None
        try:
            return content_of_open(descriptor)
        finally:
            os.close(descriptor)


def content_of_open(descriptor: int) -> str:
    """An open file's size and hash."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, num_bytes):
        digest.update(chunk)
        num_bytes += len(chunk)
    return f"{num_bytes} bytes, xxh3 {digest.hexdigest()}"
