"""Jobs that are killed, and disks that are full: no byte of what is published at last differs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .cli import MODEL, ROOT, SAMPLE, environment, run


def kill(tmp_path: Path, how: str, num_rows: int, number: int, *mutants: str) -> dict[str, int]:
    """What kill_driver.py finds."""
    lines = []
    for n in range(num_rows):
        good = b'{"id": %d, "prompt": "row %d %b"}' % (n, n, b"x" * (n % 40))
        lines.append(b'{"prompt": ' if n % 37 == 5 else b'{"id": %d}' % n if n % 41 == 7 else good)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = [how, tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl", str(number), *mutants]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kill_driver", *map(str, arguments)],
        env=environment(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# Each is a program of its own, and nothing in it hangs on time.
RUNS: dict[str, tuple[Any, ...]] = {
    "random": ("random", 300, 200),
    "calls": ("calls", 40, 0),
    "full": ("full", 60, 64),
    "no_cut": ("calls", 24, 0, "no_cut"),
    "no_rename": ("calls", 24, 0, "no_rename"),
}
Findings = Callable[[str], dict[str, int]]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    """findings(name): of RUNS, all of which are begun at once, on every core there is."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            name: pool.submit(kill, tmp_path_factory.mktemp(name), *arguments)
            for name, arguments in RUNS.items()
        }
        yield lambda name: runs[name].result()


NONE = {"differing": 0, "half_visible": 0, "failed_runs": 0, "left_files": 0, "unended": 0}


def test_kills_at_random_moments_change_no_byte(findings: Findings) -> None:
    found = findings("random")
    # How many jobs 200 kills make hangs on the machine's load: but each one must end.
    assert found.pop("kills") >= 200
    assert found.pop("jobs") >= 2
    assert found.pop("full") == 0
    assert found == NONE


def test_a_kill_in_any_call_that_changes_a_file_changes_no_byte(findings: Findings) -> None:
    found = findings("calls")
    assert found.pop("kills") > 80
    assert found.pop("jobs") > 40
    assert found == {**NONE, "full": 0}


def test_a_full_disk_is_74_at_64_sizes_and_what_was_written_is_not_run_again(
    findings: Findings,
) -> None:
    found = findings("full")
    assert (found.pop("kills"), found.pop("jobs")) == (0, 64)
    assert 20 < found.pop("full") < 64
    assert found == NONE


@pytest.mark.parametrize(
    ("mutant", "fault"), [("no_cut", "differing"), ("no_rename", "half_visible")]
)
def test_a_writer_without_one_of_its_habits_is_found_out(
    mutant: str, fault: str, findings: Findings
) -> None:
    assert findings(mutant)[fault] > 0


@pytest.mark.parametrize("number", [3, pytest.param(10, marks=pytest.mark.long)])
def test_kills_of_the_real_engine_change_no_byte(number: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    arguments = ["generate", SAMPLE / "prompts.jsonl", "--model", MODEL, "--quiet"]
    arguments += ["--max-tokens", "8", "--max-num-seqs", "8", "--limit", "120"]
    assert run(*arguments, "-o", whole).code == 0
    output = tmp_path / "out.jsonl"
    journal, num_kills, seen = tmp_path / "out.jsonl.partial", 0, 0
    command = [Path(sys.executable).with_name("nanovllm"), *arguments, "-o", output]
    while num_kills < number:
        process = subprocess.Popen(command, env=environment(HF_HUB_OFFLINE="1"))
        while process.poll() is None:  # until it has done some rows more
            size = journal.stat().st_size if journal.exists() else 0
            if size > seen:
                seen = size
                process.kill()
                num_kills += 1
            time.sleep(0.005)
        assert process.wait() in (0, -9)
        if process.returncode == 0:
            break
        assert not output.exists() or output.read_bytes() == whole.read_bytes()
    assert num_kills >= min(number, 5)
    assert run(*arguments, "-o", output).code == 0
    assert output.read_bytes() == whole.read_bytes()
