"""`nanovllm merge`: the outputs of all shards -> one output."""

import os
from pathlib import Path

import typer

from nanovllm_cli.core.errors import UserError

from . import flags
from .exit_code import CommandError, ExitCode
from .lock import output_lock
from .output_format import check_output_name
from .output_paths import OutputPaths, beside, check_distinct
from .run_job import run_job
from .settings import option


def merge_command(
    shards: list[str] = typer.Argument(
        ..., metavar="SHARD...", help="What generate --shard 1/N to N/N has written, in any order."
    ),
    output: str = typer.Option(
        ..., "--output", "-o", metavar="FILE",
        help="JSONL (also .gz, .zst) or Parquet by its extension.",
    ),
    overwrite: bool = option(
        False, "--overwrite", panel=flags.RUN, help="Replace OUTPUT when all rows are there."
    ),
    private: bool = option(
        False, "--private", panel=flags.RUN, help="Files that only you can read (mode 0600)."
    ),
    allow_errors: bool = option(
        False, "--allow-errors", panel=flags.RUN, help="Exit 0 though some rows failed."
    ),
    quiet: bool = option(
        False, "--quiet", "-q", panel=flags.RUN, help="Silent unless something fails."
    ),
    wait_lock: float = option(
        0.0, "--wait-lock", panel=flags.RUN, metavar="SECONDS", min=0.0,
        help="Wait so long for another run that writes OUTPUT.",
    ),
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Put the outputs of a job's shards together, as one run would have written them.

    [bold]nanovllm merge out-*.jsonl -o out.jsonl[/bold]

    Each SHARD needs its .stats.json, and its .errors.jsonl if rows failed, beside it.
    """

    def job() -> ExitCode:
        check_output_name(output)
        paths = OutputPaths.of(output)
        path = paths.output
        if path is None:
            raise UserError("merge writes a file, not standard output", "Name it with -o.")
        check_distinct(paths, inputs=[file for name in shards for file in _files_of(name)])
        with output_lock(path, wait_seconds=wait_lock, private=private):
            from .merge import MergeOptions, merge

            return merge(
                MergeOptions(
                    shards=shards,
                    output=output,
                    overwrite=overwrite,
                    private=private,
                    allow_errors=allow_errors,
                    quiet=quiet,
                )
            )

    raise typer.Exit(run_job(job, debug=debug))


def _files_of(shard: str) -> list[Path]:
    if not shard or os.path.isdir(shard):
        raise CommandError(
            f"{shard} is a directory, not a shard's output" if shard else "a shard's name is empty",
            "Name the files: out-*.jsonl.",
        )
    return [Path(shard), *(beside(Path(shard), what) for what in ("stats.json", "errors.jsonl"))]
