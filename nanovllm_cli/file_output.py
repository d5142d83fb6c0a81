"""A job's files: the journal while it runs, OUTPUT and what lies beside it when it is done.

OUTPUT.errors.jsonl has the failed rows, OUTPUT.stats.json the statistics and by what a later run
knows the job. They appear by renames: stats, errors, OUTPUT. Only then is the journal removed, so
that at every moment either the journal has all rows or the files have.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash

from nanovllm_cli import __version__

from .exit_code import CommandError, ExitCode
from .files import (
    appearing,
    check_own,
    io_errors,
    open_own,
    printable_json,
    read_own,
    remove_own,
)
from .fingerprint import Fingerprint, as_metadata, check_same
from .finished import JobRecord, content_of, content_of_open
from .inputs import Source
from .journal import Journal, Kind, NotAJournal
from .options import GenerateOptions
from .output_columns import OutputColumns
from .output_paths import OutputPaths, beside
from .prompts import Prompt
from .results import error_line
from .resume import check_finished, check_num_rows, check_unchanged, reopen
from .row_key import low_half, row_key
from .rows import BadRow, Row, read_rows
from .writer import write_lines


class FileOutput:
    """The output of a job that writes files; goes on where an earlier run of it stopped.

    Raises CommandError: OUTPUT_EXISTS, CONFIG_MISMATCH, IO_ERROR.
    """

    num_held = 0  # finished rows that wait in memory for an earlier one

    def __init__(
        self, options: GenerateOptions, sources: list[Source], fingerprint: Fingerprint
    ) -> None:
        self._options = options
        self._sources = sources
        self._shard = options.shard
        self._paths = OutputPaths.of(options.output, options.errors)
        assert self._paths.output is not None, "standard output is StreamOutput's"
        self._path, self._errors_path = self._paths.output, self._paths.errors
        self._stats_path = beside(self._path, "stats.json")
        self._keys: dict[int, int] = {}  # of rows that are read and not done
        self._num_rows = 0
        self._input = xxhash.xxh3_64()  # of the keys of all rows watched
        self._finished: JobRecord | None = None

        for path, _ in self._paths.all:
            if path != self._path:  # which is read, and replaced; the others are written as well
                check_own(path)
        record = JobRecord.parse(read_own(self._stats_path))
        output, errors = self._own_contents(record)
        if options.private and record is not None:
            self._make_private(self._stats_path, is_own=True)
        self._replaced = [content for content in (output, errors) if content is not None]
        self._found = {path: _identity(path) for path in (self._path, self._errors_path) if path}
        header = {"nanovllm_version": __version__, "fingerprint": fingerprint}
        journal_path = beside(self._path, "partial")
        if options.restart:
            remove_own(journal_path)
        self.journal = Journal(journal_path, header, shard=options.shard, private=options.private)
        if check_own(journal_path):
            check_same(_read_header(journal_path)["fingerprint"], fingerprint, of=journal_path)
            self.journal = Journal.recover(
                journal_path, shard=options.shard, private=options.private
            )
            if options.retry_failed:
                self.journal.forget_failed()
        elif not (options.restart or options.overwrite) and record and output == record.output:
            check_same(record.fingerprint, fingerprint, of=self._path)
            self._finished = record

    @property
    def finished(self) -> JobRecord | None:
        """After `resume`: the earlier run that has left nothing to do."""
        return self._finished

    def resume(self, num_rows: int | None) -> bool:
        """Check that the input is what it was; returns whether every row of it is done.

        With `num_rows` None the input can be read only once: its rows are checked as they come.
        """
        if self._finished is not None:
            self._resume_finished(self._finished, num_rows)
        elif num_rows is not None and (self.journal.end_row or not self._shard.size(num_rows)):
            check_num_rows(num_rows, self.journal.end_row, self.journal.path)
            for _ in self._checked(self._read(num_rows)):
                pass
        if num_rows is None:
            return False
        self._num_rows = num_rows
        return self._finished is not None or self._is_complete

    def watch(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """`rows` as they are, each checked, the missing ones noted."""
        for row, key in self._checked(rows):
            if self._shard.has(row.index) and self.journal.kind(row.index) == Kind.MISSING:
                self._keys[row.index] = key
            yield row

    def missing(self, chunks: Iterator[list[Prompt | BadRow]]) -> Iterator[list[Prompt | BadRow]]:
        """Of the prompts of watched rows those that are not done."""
        for chunk in chunks:
            yield [prompt for prompt in chunk if prompt.index in self._keys]

    def write(self, index: int, line: bytes) -> None:
        """Take a completed row's line."""
        self.journal.append(index, self._keys.pop(index), Kind.COMPLETED, line)

    def write_error(self, row: BadRow) -> None:
        """Take a failed row."""
        line = error_line(row, format=self._options.format)
        self.journal.append(row.index, self._keys.pop(row.index), Kind.FAILED, line)
        if self._errors_path is None:
            with suppress(OSError):
                sys.stderr.buffer.write(printable_json(line) + b"\n")
                sys.stderr.buffer.flush()

    def flush(self) -> None:
        """Let what was taken outlive this process."""
        self.journal.flush()

    def publish(self, exit_code: ExitCode, stats: Callable[[], dict[str, Any]]) -> None:
        """Make all rows visible at once."""
        check_num_rows(self._num_rows, self.journal.end_row, self.journal.path)
        assert self._is_complete, "a row is neither completed nor failed"
        private, errors = self._options.private, self._errors_path
        self.journal.sync()
        self.journal.check_owner()

        def file(path: Path) -> AbstractContextManager[BinaryIO]:
            return appearing(path, private=private, check=partial(self._check_replaceable, path))

        with io_errors(self._path), file(self._path) as output:
            columns = self._options.columns
            metadata = as_metadata(self.journal.header["fingerprint"])
            write_lines(output, self._path.name, self._completed, self._sources, columns, metadata)
            if errors is None or not self.journal.num_failed:
                self._publish_stats(exit_code, stats, _content_of(output), None)
                if errors is not None:
                    self._check_replaceable(errors)
                    remove_own(errors)
            else:
                with io_errors(errors), file(errors) as failed:
                    write_lines(failed, errors.name, self._failed, [], OutputColumns())
                    contents = _content_of(output), _content_of(failed)
                    self._publish_stats(exit_code, stats, *contents)
        self.journal.remove()

    def close(self) -> None:
        """Let go of the journal; what was not published stays in it."""
        self.journal.close()

    @property
    def _is_complete(self) -> bool:
        return self.journal.num_done == self._shard.size(self._num_rows)

    def _resume_finished(self, record: JobRecord, num_rows: int | None) -> None:
        if num_rows is None:
            raise CommandError(
                f"{self._path} is finished, and an input that can be read only once cannot be "
                "compared with what it was made of",
                "--overwrite runs all of it again; or name another output.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )
        check_num_rows(num_rows, record.num_rows, self._path)
        rows = self._read(record.num_rows)
        is_retried = self._options.retry_failed and len(record.failed_rows) > 0
        if num_rows == record.num_rows and not is_retried:
            check_finished(record, rows, self._shard, output=self._path, are_failed_kept=True)
            return
        self._finished = None
        self.journal = reopen(
            record,
            rows,
            self._shard,
            output=self._path,
            journal_path=self.journal.path,
            header=self.journal.header,
            private=self._options.private,
        )

    def _checked(self, rows: Iterator[Row | BadRow]) -> Iterator[tuple[Row | BadRow, int]]:
        """Rows and their keys; raises CommandError for a row that has changed."""
        self._input.reset()
        for row in rows:
            key = row_key(row)
            self._num_rows = row.index + 1
            self._input.update(low_half(key).to_bytes(8, "little"))
            if self._shard.has(row.index):
                check_unchanged(row, key, self.journal)
            yield row, key

    def _read(self, num_rows: int) -> Iterator[Row | BadRow]:
        return read_rows(self._sources, limit=num_rows)

    def _completed(self) -> Iterator[tuple[int, bytes]]:
        return self.journal.lines(Kind.COMPLETED)

    def _failed(self) -> Iterator[tuple[int, bytes]]:
        return self.journal.lines(Kind.FAILED)

    def _publish_stats(
        self,
        exit_code: ExitCode,
        stats: Callable[[], dict[str, Any]],
        output: str | None,
        errors: str | None,
    ) -> None:
        record = JobRecord.of(
            self.journal,
            exit_code=exit_code,
            num_rows=self._num_rows,
            input=self._input.hexdigest(),
            output=output,
            errors=errors,
            replaced=self._replaced,
        )
        content = {**stats(), **record.as_dict()}
        private, check = self._options.private, self.journal.check_owner
        with (
            io_errors(self._stats_path),
            appearing(self._stats_path, private=private, check=check) as file,
        ):
            file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")

    def _check_replaceable(self, path: Path) -> None:
        """Raise CommandError for a file that another program has left there while the job ran."""
        self.journal.check_owner()
        if not self._options.overwrite and _identity(path) != self._found[path]:
            raise CommandError(
                f"{path} has changed while the job ran, by another program",
                "Move it away and run the job again: all its rows are kept. Or --overwrite.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )

    @staticmethod
    def _make_private(path: Path, *, is_own: bool) -> None:
        """What an earlier run without --private has left is for its owner alone from now on."""
        if is_own:
            with io_errors(path):
                os.close(open_own(path, os.O_RDONLY, private=True))

    def _own_contents(self, record: JobRecord | None) -> tuple[str | None, str | None]:
        """The contents of OUTPUT and of --errors; raises OUTPUT_EXISTS for a file not our own."""
        contents: list[str | None] = []
        for path in (self._path, self._errors_path):
            content = None
            if path is not None and os.path.lexists(path):
                content = content_of(path) if record is not None else "unknown"
            is_own = content is None or (record is not None and record.owns(content))
            if not is_own and not self._options.overwrite:
                raise CommandError(
                    f"{path} exists already, and is not as a job of this tool has left it",
                    "Name another file, or add --overwrite: it is replaced when the job is done.",
                    exit_code=ExitCode.OUTPUT_EXISTS,
                )
            if path is not None and content is not None and self._options.private:
                self._make_private(path, is_own=is_own)
            contents.append(content)
        output, errors = contents
        if self._options.overwrite or os.path.lexists(beside(self._path, "partial")):
            return output, errors
        if record is None and os.path.lexists(self._stats_path):
            raise CommandError(
                f"{self._stats_path} exists already, and is no stats file of this tool",
                "Name another output, or add --overwrite: it is replaced when the job is done.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )
        if output is None and errors:
            raise CommandError(
                f"{self._errors_path} holds the failed rows of an earlier job, whose output "
                f"{self._path} has been moved or removed",
                "Move it after its output, or add --overwrite: the job then replaces it.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )
        return output, errors


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another one of its name, and from itself after a change."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _content_of(file: BinaryIO) -> str:
    file.flush()
    return content_of_open(file.fileno())


def _read_header(path: Path) -> dict[str, Any]:
    try:
        return Journal.read_header(path)
    except NotAJournal:
        raise CommandError(
            f"{path} is not a journal of this version of nanovllm, or its first line is damaged",
            "Move it away, or discard it with --restart.",
            exit_code=ExitCode.OUTPUT_EXISTS,
        ) from None
