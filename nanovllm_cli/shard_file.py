"""ShardFile: the finished output of one shard, with what its stats file says of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from nanovllm_cli.core.errors import UserError

from .exit_code import CommandError, ExitCode
from .files import io_errors, open_regular
from .finished import JobRecord, content_of
from .output_paths import beside
from .shard import Shard
from .writer import read_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A shard's rows in its file at `path`, and its failed rows beside it."""

    path: Path
    shard: Shard
    record: JobRecord
    stats: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "ShardFile":
        """Raises CommandError NOT_FOUND, or INPUT_UNUSABLE for what no job has left as it is."""
        if path.suffix == ".parquet":
            raise UserError(
                f"{path} is Parquet, which is not merged",
                "Let the shards be JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); OUTPUT may be "
                "Parquet.",
            )
        content = content_of(path) if not path.is_dir() else None
        if content is None:
            raise CommandError(f"there is no file {path}", exit_code=ExitCode.NOT_FOUND)
        stats_path = beside(path, "stats.json")
        content_of_stats = _read(stats_path)
        record, stats = JobRecord.parse(content_of_stats), _stats(content_of_stats)
        if record is None or stats is None:
            hint = "Run the shard to its end, and keep its .stats.json and .errors.jsonl beside it."
            raise _unusable(f"{stats_path} is not there, or not of a finished shard", hint)
        again = "Run the shard again, with --restart."
        if content != record.output:
            raise _unusable(f"{path} is not as its job has left it", again)
        errors_path = beside(path, "errors.jsonl")
        if len(record.failed_rows) and content_of(errors_path) != (record.errors or "elsewhere"):
            raise _unusable(
                f"{errors_path} is not there, or not as its job has left it",
                "It has the shard's failed rows. Move it there if --errors named another file.",
            )
        shard = Shard.parse(record.fingerprint["shard"])
        return cls(path=path, shard=shard, record=record, stats=stats)

    def completed(self) -> Iterator[bytes]:
        """The lines of completed rows, in input order."""
        return read_lines(self.path)

    def failed(self) -> Iterator[bytes]:
        """The lines of failed rows, in input order."""
        if len(self.record.failed_rows):
            yield from read_lines(beside(self.path, "errors.jsonl"))


def _read(path: Path) -> bytes | None:
    """Another user's too: a shard is an input."""
    with io_errors(path, "read"):
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read()


def _stats(content: bytes | None) -> dict[str, Any] | None:
    """The rest of a stats file; None where it has not what a merge needs."""
    try:
        stats = orjson.loads(content or b"")
        Shard.parse(stats["fingerprint"]["shard"])
        names = [stats["command"], stats["model"], *stats["inputs"], *stats["output_columns"]]
        rows = stats["rows"]
        tokens = stats["tokens"]
        numbers = [*(rows[name] for name in ("done", "completed", "failed"))]
        numbers += [tokens[name] for name in ("prompt", "cached", "completion")]
        numbers += [*rows["failed_by_code"].values(), *rows["finish_reasons"].values()]
        is_whole = all(isinstance(name, str) for name in names) and all(
            type(number) is int for number in numbers
        )
        is_whole &= {"seed", "elapsed_seconds", "throughput"} <= stats.keys()
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return stats if is_whole else None


def _unusable(message: str, hint: str) -> CommandError:
    return CommandError(message, hint, exit_code=ExitCode.INPUT_UNUSABLE)
