"""What a job leaves behind: the rows, the failed rows beside them, and the statistics."""

import os
import sys
from pathlib import Path

from .exit_code import CommandError, ExitCode
from .inputs import Source
from .options import GenerateOptions
from .results import error_line
from .rows import BadRow
from .writer import FileWriter, StreamWriter, io_errors


class JobOutput:
    """OUTPUT, OUTPUT.errors.jsonl and OUTPUT.stats.json; with `-`, stdout and stderr.

    Raises CommandError: OUTPUT_EXISTS before anything is written, IO_ERROR where writing fails.
    """

    def __init__(self, options: GenerateOptions, sources: list[Source]) -> None:
        self._stats_path: Path | None = None
        self._rows: FileWriter | StreamWriter
        self._errors: FileWriter | StreamWriter
        errors = options.errors
        if errors is None and options.output != "-":
            errors = f"{options.output}.errors.jsonl"
        _check_paths(options, errors)
        if options.output == "-":
            if sys.stdout is None:
                raise CommandError(
                    "standard output is closed",
                    "Name a file with -o.",
                    exit_code=ExitCode.PIPE_CLOSED,
                )
            self._rows = StreamWriter(sys.stdout.buffer, is_ordered=not options.unordered)
        else:
            path = Path(options.output)
            self._rows = FileWriter(path, sources)
            self._stats_path = path.with_name(path.name + ".stats.json")
        if errors is None:
            self._errors = StreamWriter(sys.stderr.buffer, is_ordered=False)
        else:
            self._errors = FileWriter(Path(errors), sources, is_optional=True)

    @property
    def num_held(self) -> int:
        """Finished rows that wait in memory for an earlier one."""
        return self._rows.num_held

    def write(self, index: int, line: bytes) -> None:
        """Take a finished row."""
        self._rows.write(index, line)

    def write_error(self, row: BadRow) -> None:
        """Take a failed row."""
        self._rows.write(row.index, None)
        self._errors.write(row.index, error_line(row))

    def publish(self) -> None:
        """Make rows and errors visible; without errors no errors file is left, not an old one."""
        self._errors.publish()
        self._rows.publish()

    def publish_stats(self, content: bytes) -> None:
        """Write the stats file, whole or not at all."""
        if self._stats_path is not None:
            with io_errors(self._stats_path):
                temporary = self._stats_path.with_name(f".{self._stats_path.name}.{os.getpid()}")
                temporary.write_bytes(content)
                os.replace(temporary, self._stats_path)

    def close(self) -> None:
        """Let go of the files; what was not published stays invisible."""
        self._rows.close()
        self._errors.close()


def _check_paths(options: GenerateOptions, errors: str | None) -> None:
    """Raise CommandError where a job would replace what it must not."""
    named = [name for name in (options.output, errors) if name not in ("-", None)]
    paths = [Path(name) for name in named if name is not None]
    if len({path.absolute() for path in paths}) < len(paths):
        raise CommandError("--output and --errors name the same file", "Name another one.")
    for path in paths:
        if path.exists() and not path.is_file():
            raise CommandError(
                f"{path} is no regular file",
                "Outputs are published by a rename, which would replace it; write to stdout (-).",
            )
    is_default = options.errors is None  # an old errors file goes with the output it belongs to
    for path in paths[:1] if is_default else paths:
        if path.exists() and not options.overwrite:
            raise CommandError(
                f"{path} exists already",
                "Name another file, or add --overwrite: it is replaced when the job is done.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )
