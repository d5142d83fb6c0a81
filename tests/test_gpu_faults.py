"""A GPU's engine killed while it loads, captures and decodes, and its parent too: nothing is lost.

In fp32 the tokens do not depend on what runs beside them, so the files are the same byte for byte.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .cli import COMMAND, MODEL, environment, write_rows

pytestmark = pytest.mark.gpu

NUM_ROWS = 20_000
PHASES = ["load", "capture", "decode"]


def gpu_megabytes() -> int:
    """What everyone uses of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def engines_of(pid: int) -> list[int]:
    """The engine processes that `pid` has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = map(int, children.read_text().split()) if children.exists() else iter(())
    return [p for p in pids if b"engine_worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Any, seconds: float) -> float:
    """Wait for it; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it does not come"
        time.sleep(0.02)
    return time.monotonic() - start


class Jobs:
    """One job, run as often as asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = ({"prompt_token_ids": [5 + n % 900, 7 + n % 31, n % 977]} for n in range(NUM_ROWS))
        self.input = write_rows(folder / "in.jsonl", rows)
        self.idle_megabytes = gpu_megabytes()
        self.whole = folder / "whole.jsonl"
        assert self.start(self.whole).wait(120) == 0

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        arguments: list[str | Path] = ["generate", self.input, "-o", output, "--model", MODEL]
        arguments += ["--dtype", "float32", "--max-tokens", "200", "--ignore-eos", "--quiet"]
        return subprocess.Popen([COMMAND, *arguments], env=environment(HF_HUB_OFFLINE="1", **PATHS))

    def wait_for(self, phase: str, process: subprocess.Popen[bytes], output: Path) -> int:
        """Until the engine is in the phase; its process."""
        until(lambda: engines_of(process.pid), 20)
        (engine,) = engines_of(process.pid)
        journal = output.with_name(output.name + ".partial")
        if phase == "load":
            time.sleep(1.0)
        elif phase == "capture":  # comes after the KV cache's allocation
            until(lambda: gpu_megabytes() > self.idle_megabytes + 5_000, 40)
        else:
            until(lambda: journal.exists() and journal.stat().st_size > 1_000_000, 60)
        return engine

    def is_whole(self, output: Path) -> bool:
        return output.read_bytes() == self.whole.read_bytes()


PATHS = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # of the checkout that is tested


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize(
    ("phase", "number"),
    [*((phase, signal.SIGKILL) for phase in PHASES), ("decode", signal.SIGSEGV)],
)
def test_an_engine_that_dies_is_started_again_and_no_row_is_lost(
    phase: str, number: signal.Signals, jobs: Jobs, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    process = jobs.start(output)
    os.kill(jobs.wait_for(phase, process, output), number)
    assert process.wait(120) == 0
    assert jobs.is_whole(output)


@pytest.mark.parametrize("phase", PHASES)
def test_a_parent_that_is_killed_leaves_no_engine_and_its_job_goes_on(
    phase: str, jobs: Jobs, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    process = jobs.start(output)
    engine = jobs.wait_for(phase, process, output)
    process.kill()
    process.wait()
    gone = until(lambda: not is_running(engine), 2)
    freed = until(lambda: gpu_megabytes() < jobs.idle_megabytes + 100, 5)
    print(f"{phase}: the engine is gone after {gone:.2f} s, its memory free after {freed:.2f} s")
    assert jobs.start(output).wait(120) == 0
    assert jobs.is_whole(output)
