"""What a finished job left, as its stats file tells it: which rows, and which files are its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from .exit_code import ExitCode
from .journal import Journal, Kind
from .row_key import marks_of, rows_per_mark
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
    def read(cls, path: Path) -> "JobRecord | None":
        """From a stats file; None where it is none, or of another version."""
        try:
            stats = orjson.loads(path.read_bytes())
            resume = stats["resume"]
            record = cls(
                exit_code=ExitCode(stats["exit_code"]),
                fingerprint=stats["fingerprint"],
                num_rows=resume["input_rows"],
                input=resume["input"],
                num_completed=stats["rows"]["completed"],
                completed_marks=resume["completed_marks"].split(),
                failed_marks=resume["failed_marks"].split(),
                failed_rows=from_ranges(resume["failed_rows"]),
                output=resume["output"],
                errors=resume["errors"],
                replaced=resume["replaced"],
            )
            num_marks = -(-record.num_completed // rows_per_mark(record.num_completed))
            return record if len(record.completed_marks) == num_marks else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
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

    def owns(self, content: str | None) -> bool:
        """Whether a file of that content was written by this job, or is what it replaces."""
        return content is not None and content in (self.output, self.errors, *self.replaced)


def content_of(path: Path) -> str | None:
    """A file's size and hash; None where there is none."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    except FileNotFoundError:
        return None
    return f"{num_bytes} bytes, xxh3 {digest.hexdigest()}"
