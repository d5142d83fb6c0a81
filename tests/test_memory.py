"""Memory does not grow with the input: peaks of whole processes, over few rows and over many."""

import json
import os
from pathlib import Path

import pytest

from .cli import COMMAND, MODEL, environment

MOST_GROWTH_BYTES = 50e6


def peak_bytes(arguments: list[str], output: Path) -> int:
    """The most memory that `nanovllm generate ARGUMENTS` held at a time; it must end well."""
    command = [str(COMMAND), "generate", *arguments, "--model", str(MODEL), "--quiet"]
    with open(output, "wb") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1)]
        process = os.posix_spawn(command[0], command, environment(), file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    return usage.ru_maxrss * 1024


def rows_in(path: Path, count: int) -> str:
    with path.open("w") as file:
        for number in range(count):
            row = {"id": f"row-{number:07d}", "prompt": f"Q: {number % 97}+4=\nA:"}
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "many"),
    [
        (["--dry-run"], 1_000_000),
        (["--max-tokens", "2", "-o", "{}.out.jsonl"], 20_000),
        (["--max-tokens", "2"], 20_000),
        (["--max-tokens", "2", "-o", "{}.out.parquet"], 20_000),
    ],
    ids=["dry run", "to a file", "to stdout", "to parquet"],
)
def test_the_peak_memory_is_that_of_a_small_job(
    flags: list[str], many: int, tmp_path: Path
) -> None:
    peaks = []
    for count in (1000, many):
        source = rows_in(tmp_path / f"{count}.jsonl", count)
        own = [flag.format(tmp_path / str(count)) for flag in flags]
        peaks.append(peak_bytes([source, *own], tmp_path / "stdout"))
    print(f"peaks: {peaks[0] / 1e6:.0f} MB, {peaks[1] / 1e6:.0f} MB")  # seen with -s
    assert peaks[1] <= peaks[0] + MOST_GROWTH_BYTES
