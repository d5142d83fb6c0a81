"""Where a job's rows go: FileOutput, or standard output with the failed rows on stderr."""

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from .exit_code import CommandError, ExitCode
from .file_output import FileOutput
from .files import appearing, io_errors, printable_json, remove_own
from .fingerprint import Fingerprint
from .finished import JobRecord
from .inputs import Source
from .journal import Journal, Kind
from .options import GenerateOptions
from .output_columns import OutputColumns
from .output_paths import OutputPaths, beside
from .prompts import Prompt
from .results import error_line
from .rows import BadRow, Row
from .writer import StreamWriter, write_lines


class StreamOutput:
    """Rows to standard output as they come; nothing is kept, and nothing can be resumed.

    Failed rows go to stderr, or to the file of --errors.
    """

    finished: JobRecord | None = None
    journal: Journal | None = None

    def __init__(self, options: GenerateOptions) -> None:
        if sys.stdout is None:
            raise CommandError(
                "standard output is closed",
                "Name a file with -o.",
                exit_code=ExitCode.PIPE_CLOSED,
            )
        self._poll = select.poll()
        with suppress(io.UnsupportedOperation):  # no file of the system's
            self._poll.register(sys.stdout, 0)
        self._shard = options.shard
        self._private = options.private
        self._format = options.format
        self._rows = StreamWriter(sys.stdout.buffer, is_ordered=not options.unordered)
        self._stderr = StreamWriter(sys.stderr.buffer, is_ordered=False)
        self._errors_path = OutputPaths.of(options.output, options.errors).errors
        if self._errors_path is not None:
            if os.path.lexists(self._errors_path) and not options.overwrite:
                raise CommandError(
                    f"{self._errors_path} exists already",
                    "Name another file, or add --overwrite: it is replaced when the job is done.",
                    exit_code=ExitCode.OUTPUT_EXISTS,
                )
            partial = beside(self._errors_path, "partial")
            remove_own(partial)
            self._errors = Journal(partial, {}, private=options.private)

    @property
    def num_held(self) -> int:
        """Finished rows that wait in memory for an earlier one."""
        return self._rows.num_held

    def resume(self, num_rows: int | None) -> bool:
        """There is nothing to go on from."""
        return False

    def watch(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """`rows` as they are."""
        return rows

    def missing(self, chunks: Iterator[list[Prompt | BadRow]]) -> Iterator[list[Prompt | BadRow]]:
        """The prompts that are in the shard."""
        for chunk in chunks:
            yield [prompt for prompt in chunk if self._shard.has(prompt.index)]

    def write(self, index: int, line: bytes) -> None:
        """Take a completed row's line."""
        self._rows.write(index // self._shard.count, line)

    def write_error(self, row: BadRow) -> None:
        """Take a failed row."""
        self._rows.write(row.index // self._shard.count, None)
        line = error_line(row, format=self._format)
        if self._errors_path is None:
            self._stderr.write(row.index, printable_json(line))
        else:
            self._errors.append(row.index, 0, Kind.FAILED, line)

    def flush(self) -> None:
        """Every row was written as it came; raises BrokenPipeError where nobody will read more."""
        if any(event & select.POLLERR for _, event in self._poll.poll(0)):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def publish(self, exit_code: ExitCode, stats: Callable[[], dict[str, Any]]) -> None:
        """All rows were written; the errors file appears, or an old one goes."""
        path = self._errors_path
        if path is not None:
            with io_errors(path):
                if self._errors.num_failed:
                    check = self._errors.check_owner
                    with appearing(path, private=self._private, check=check) as file:
                        write_lines(file, path.name, self._failed, [], OutputColumns())
                    self._errors.remove()
                else:
                    path.unlink(missing_ok=True)
        self._rows.publish()

    def close(self) -> None:
        """Standard output is not ours to close."""
        if self._errors_path is not None:
            self._errors.close()

    def _failed(self) -> Iterator[tuple[int, bytes]]:
        return self._errors.lines(Kind.FAILED)


JobOutput = FileOutput | StreamOutput


def open_output(
    options: GenerateOptions, sources: list[Source], fingerprint: Fingerprint
) -> JobOutput:
    """The output that `options` name.

    Raises CommandError where a job would replace what it must not, or cannot go on from what an
    earlier one left.
    """
    if options.output == "-":
        return StreamOutput(options)
    return FileOutput(options, sources, fingerprint)
