"""Is the input still what it was? And a finished job, opened again for rows that are to be added.

A row whose content is not what it was ends the run: to mix answers to two questions in one file
would be worse than to stop.
"""

from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .exit_code import CommandError, ExitCode
from .files import new_name
from .finished import JobRecord
from .journal import Journal, Kind
from .row_key import low_half, marks_of, row_key, rows_per_mark
from .rows import BadRow, Row
from .shard import Shard
from .writer import read_lines

_RESTART = "--restart runs every row again; or name another output."


def check_unchanged(row: Row | BadRow, key: int, journal: Journal) -> None:
    """Raise CommandError where the journal has another row of its number."""
    if journal.kind(row.index) != Kind.MISSING and journal.key(row.index) != low_half(key):
        raise _changed(f"{row.source}:{row.line} has changed since {journal.path} was written")


def check_num_rows(num_rows: int, least: int, made_of_more: Path) -> None:
    """Raise CommandError where rows have gone."""
    if num_rows < least:
        raise _changed(f"the input has {num_rows} rows; {made_of_more} knows {least}")


def check_finished(
    record: JobRecord,
    rows: Iterable[Row | BadRow],
    shard: Shard,
    *,
    output: Path,
    are_failed_kept: bool,
    take: Callable[[int, int], None] = lambda row, key: None,
) -> None:
    """Raise CommandError where one of the rows that `output` was made of has changed.

    `take` gets number and key of every row that completed, before all of them are checked.
    """
    failed = iter(record.failed_rows.tolist())
    next_failed = next(failed, None)
    failed_keys = array("Q")
    digest = xxhash.xxh3_64()
    every = rows_per_mark(record.num_completed)
    rank, first = 0, None
    for row in rows:
        if not shard.has(row.index):
            continue
        key = row_key(row)
        if row.index == next_failed:
            next_failed = next(failed, None)
            failed_keys.append(low_half(key))
            continue
        take(row.index, key)
        digest.update(low_half(key).to_bytes(8, "little"))
        rank, first = rank + 1, first or row
        if rank % every == 0 or rank == record.num_completed:
            if digest.hexdigest() != record.completed_marks[(rank - 1) // every]:
                place = f"{first.source}:{first.line}"
                if every > 1 and row is not first:
                    place = f"a row from {place} to {row.source}:{row.line}"
                raise _changed(f"{place} has changed since {output} was written")
            first = None
    if are_failed_kept and marks_of(np.array(failed_keys, np.uint64)) != record.failed_marks:
        raise CommandError(
            f"a row that failed has changed since {output} was written",
            "Add --retry-failed to run the failed rows again.",
            exit_code=ExitCode.CONFIG_MISMATCH,
        )


def reopen(
    record: JobRecord,
    rows: Iterable[Row | BadRow],
    shard: Shard,
    *,
    output: Path,
    journal_path: Path,
    header: dict[str, Any],
    private: bool,
) -> Journal:
    """A journal with the completed rows of a finished job; what failed is left to run again.

    It appears under its name when it is whole, and every row was checked.
    """
    if output.suffix == ".parquet":
        raise CommandError(
            f"{output} is finished, and a Parquet file cannot be added to",
            f"JSON lines can. {_RESTART}",
            exit_code=ExitCode.CONFIG_MISMATCH,
        )
    lines = read_lines(output)  # those that `record` knows, by their hash
    journal = Journal(new_name(journal_path), header, shard=shard, private=private)
    try:
        check_finished(
            record,
            rows,
            shard,
            output=output,
            are_failed_kept=False,
            take=lambda row, key: journal.append(row, key, Kind.COMPLETED, next(lines)),
        )
        journal.rename(journal_path)
    except BaseException:
        with suppress(CommandError):
            journal.remove()
        journal.close()
        raise
    return journal


def _changed(message: str) -> CommandError:
    return CommandError(message, _RESTART, exit_code=ExitCode.CONFIG_MISMATCH)
