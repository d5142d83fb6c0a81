"""OutputPaths: the files that a job writes, by what the command line names."""

from dataclasses import dataclass
from pathlib import Path

from .exit_code import CommandError


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputPaths:
    """OUTPUT and its errors file; None where they are standard output and standard error."""

    output: Path | None
    errors: Path | None
    is_errors_named: bool  # by a flag, so that it need not be ours

    @classmethod
    def of(cls, output_name: str, errors_name: str | None = None) -> "OutputPaths":
        """Raises CommandError for what cannot be published by a rename."""
        output = None if output_name == "-" else Path(output_name)
        errors = None if errors_name in (None, "-") else Path(errors_name)
        named = [path for path in (output, errors) if path is not None]
        if len({path.absolute() for path in named}) < len(named):
            raise CommandError("--output and --errors name the same file", "Name another one.")
        for path in named:
            if path.exists() and not path.is_file():
                raise CommandError(
                    f"{path} is no regular file",
                    "Outputs are published by a rename, which would replace it; "
                    "write to stdout (-).",
                )
        is_errors_named = errors is not None
        if output is not None and errors_name is None:
            errors = beside(output, "errors.jsonl")
        return cls(output=output, errors=errors, is_errors_named=is_errors_named)

    @property
    def named(self) -> list[Path]:
        """Files that the command line names; of these no other job may write one."""
        named = (self.output, self.errors if self.is_errors_named else None)
        return [path for path in named if path is not None]


def beside(path: Path, what: str) -> Path:
    """The file of a job that lies beside its output."""
    return path.with_name(f"{path.name}.{what}")
