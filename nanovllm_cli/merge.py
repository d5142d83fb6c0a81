"""The outputs of all shards of an input -> the output of the job that was not sharded.

A shard has every N-th row; which of them failed is in its stats file. So the rows can be put in
input order without a look at the input, and the bytes are those of one run over all rows.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from nanovllm_cli import __version__

from .exit_code import CommandError, ExitCode
from .files import appearing, check_own, io_errors, remove_own
from .fingerprint import Fingerprint, as_metadata, differences
from .inputs import Source, find_inputs
from .log import Log
from .output_columns import RESULT_COLUMNS, SCORE_COLUMNS, OutputColumns
from .output_paths import OutputPaths, beside
from .resume import check_finished
from .rows import read_rows
from .shard import Shard
from .shard_file import ShardFile
from .writer import write_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """What `nanovllm merge` can be told."""

    shards: list[str]
    output: str
    overwrite: bool = False
    private: bool = False
    allow_errors: bool = False
    quiet: bool = False


def merge(options: MergeOptions) -> ExitCode:
    """Write the output, its errors and its stats; raises CommandError for shards that differ."""
    output = Path(options.output)
    errors = beside(output, "errors.jsonl")
    for path, _ in OutputPaths.of(options.output).all:
        if path != output:
            check_own(path)
    if os.path.lexists(output) and not options.overwrite:
        raise CommandError(
            f"{output} exists already",
            "Name another file, or add --overwrite.",
            exit_code=ExitCode.OUTPUT_EXISTS,
        )
    # What a pattern like out-*.jsonl finds besides: the shards' errors.
    besides = {beside(Path(name), "errors.jsonl") for name in options.shards}
    named = [path for path in map(Path, dict.fromkeys(options.shards)) if path not in besides]
    shards = _in_order([ShardFile.open(path) for path in named])
    sources = _sources(shards, output) if output.suffix == ".parquet" else []
    columns = _columns(shards[0])
    num_failed = sum(len(file.record.failed_rows) for file in shards)
    are_wrong = num_failed > 0 and not options.allow_errors
    exit_code = ExitCode.SOME_ROWS_FAILED if are_wrong else ExitCode.OK

    def completed() -> Iterator[tuple[int, bytes]]:
        return _merged(shards, ShardFile.completed, are_failed=False)

    def failed() -> Iterator[tuple[int, bytes]]:
        return _merged(shards, ShardFile.failed, are_failed=True)

    private = options.private
    with io_errors(output), appearing(output, private=private) as rows:
        metadata = as_metadata(_fingerprint(shards))
        write_lines(rows, output.name, completed, sources, columns, metadata)
        if num_failed:
            with io_errors(errors), appearing(errors, private=private) as failures:
                write_lines(failures, errors.name, failed, [], OutputColumns())
        else:
            remove_own(errors)
        stats = beside(output, "stats.json")
        with io_errors(stats), appearing(stats, private=private) as file:
            content = _stats(shards, exit_code)
            file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    if not options.quiet:
        num_rows = shards[0].record.num_rows
        Log().say(
            "end",
            f"{output}: {num_rows - num_failed} rows of {len(shards)} shards, {num_failed} failed",
        )
    return exit_code


def _in_order(files: list[ShardFile]) -> list[ShardFile]:
    """All shards of one job, by their index; raises CommandError."""
    first = files[0]
    by_shard: dict[Shard, ShardFile] = {}
    for file in files:
        settings = first.record.fingerprint | {"shard": ""}
        if changes := differences(settings, file.record.fingerprint | {"shard": ""}):
            raise CommandError(
                f"{first.path} and {file.path} are of different settings ({changes})",
                "Run all shards with the same ones.",
                exit_code=ExitCode.CONFIG_MISMATCH,
            )
        if file.shard.count != first.shard.count:
            raise _unusable(f"{first.path} is shard {first.shard}, {file.path} is {file.shard}")
        if file.record.num_rows != first.record.num_rows:
            raise _unusable(
                f"{first.path} is of an input of {first.record.num_rows} rows, {file.path} of one "
                f"of {file.record.num_rows}"
            )
        if file.record.input != first.record.input:
            raise _unusable(f"{first.path} and {file.path} are of inputs with other rows")
        if file.shard in by_shard:
            other = by_shard[file.shard].path
            raise _unusable(f"{other} and {file.path} are both shard {file.shard}")
        by_shard[file.shard] = file
    count = first.shard.count
    wanted = [Shard(index=index, count=count) for index in range(count)]
    missing = [str(shard) for shard in wanted if shard not in by_shard]
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise _unusable(f"{len(missing)} of {count} shards are missing: {named}")
    return [by_shard[shard] for shard in wanted]


def _merged(
    shards: list[ShardFile],
    lines_of: Callable[[ShardFile], Iterator[bytes]],
    *,
    are_failed: bool,
) -> Iterator[tuple[int, bytes]]:
    """(row number, line) of the completed rows or of the failed ones, in input order."""
    lines = [lines_of(file) for file in shards]
    failed = [iter(file.record.failed_rows.tolist()) for file in shards]
    next_failed = [next(rows, None) for rows in failed]
    for row in range(shards[0].record.num_rows):
        at = row % len(shards)
        is_failed = row == next_failed[at]
        if is_failed:
            next_failed[at] = next(failed[at], None)
        if is_failed == are_failed:
            yield row, next(lines[at])


def _columns(shard: ShardFile) -> OutputColumns:
    results = SCORE_COLUMNS if shard.stats["command"] == "score" else RESULT_COLUMNS
    return OutputColumns(results=results, chosen=tuple(shard.stats["output_columns"]))


def _sources(shards: list[ShardFile], output: Path) -> list[Source]:
    """The inputs, from which Parquet takes its types; raises CommandError if they changed."""
    outputs = [str(output), *(str(file.path) for file in shards)]
    sources = find_inputs(shards[0].stats["inputs"], outputs=outputs)
    if not any(source.is_stream for source in sources):
        for file in shards:
            rows = read_rows(sources, limit=file.record.num_rows)
            check_finished(file.record, rows, file.shard, output=file.path, are_failed_kept=True)
    return sources


def _stats(shards: list[ShardFile], exit_code: ExitCode) -> dict[str, Any]:
    """Sums over the shards; their speeds are in their own files."""
    first = shards[0]

    def total(part: str, name: str) -> int:
        return sum(file.stats[part][name] for file in shards)

    def counts(name: str) -> dict[str, int]:
        return dict(sum((Counter(file.stats["rows"][name]) for file in shards), Counter[str]()))

    tokens = {name: total("tokens", name) for name in ("prompt", "cached", "completion")}
    return {
        "nanovllm_version": __version__,
        "command": first.stats["command"],
        "model": first.stats["model"],
        "seed": first.stats["seed"],
        "inputs": first.stats["inputs"],
        "output_columns": first.stats["output_columns"],
        "exit_code": int(exit_code),
        "rows": {
            **{name: total("rows", name) for name in ("done", "completed", "failed")},
            "failed_by_code": counts("failed_by_code"),
            "finish_reasons": counts("finish_reasons"),
        },
        "tokens": tokens,
        "shards": {
            str(file.shard): {
                "path": str(file.path),
                "elapsed_seconds": file.stats["elapsed_seconds"],
                "throughput": file.stats["throughput"],
            }
            for file in shards
        },
        "fingerprint": _fingerprint(shards),
    }


def _fingerprint(shards: list[ShardFile]) -> Fingerprint:
    """That of the job that was not sharded."""
    return shards[0].record.fingerprint | {"shard": str(Shard())}


def _unusable(message: str) -> CommandError:
    hint = "Give the outputs of all shards 1/N to N/N of one input, each once."
    return CommandError(message, hint, exit_code=ExitCode.INPUT_UNUSABLE)
