"""capacity.py: more engines than the machine holds are refused before any process is started."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from nanovllm_cli import capacity
from nanovllm_cli.core.errors import UserError

from .cli import COMMAND, MODEL, SAMPLE, environment, processes_with, run

GIB = 1 << 30


def refusal(dp: int, tp: int, **facts: int | None) -> str:
    """The message and the hint; empty where the processes fit."""
    known = {"cores": 2, "num_gpus": 0, "memory_bytes": 64 * GIB, "weights_bytes": 0, **facts}
    try:
        capacity.check_processes(dp, tp, **known)  # type: ignore[arg-type]
    except UserError as error:
        return f"{error.message} | {error.hint}"
    return ""


@pytest.mark.parametrize(
    ("dp", "tp", "facts", "expected"),
    [
        (8, 1, {}, ""),  # more than the cores, by a number that somebody may mean
        (9, 1, {}, "--dp 9 would start 9 processes; on this CPU, with 2 usable cores, at most 8"),
        (3, 4, {}, "--dp 3 with --tp 4 would start 12 processes"),
        (3, 4, {}, "| --dp 2 with --tp 4 fits: "),
        (1, 16, {}, "--tp 16 would start 16 processes"),
        (1, 16, {}, "| Lower --tp to 8 or less"),
        (64, 1, {"cores": 64}, ""),
        (4, 1, {"memory_bytes": GIB}, "needs about 1.4 GiB of memory for 4 processes, and 1.0 GiB"),
        (4, 1, {"memory_bytes": GIB}, "| --dp 2 fits: "),
        (2, 1, {"memory_bytes": 5 * GIB, "weights_bytes": 2 * GIB}, ""),
        (2, 1, {"memory_bytes": 4 * GIB, "weights_bytes": 2 * GIB}, "| --dp 1 fits: each engine"),
        (2, 1, {"memory_bytes": GIB, "weights_bytes": 2 * GIB}, "| Leave it out: "),
        (2, 1, {"memory_bytes": None}, ""),
        (2, 1, {"num_gpus": 1}, "--dp 2 needs 2 GPUs, and this machine shows 1 GPU"),
        (2, 2, {"num_gpus": 4}, ""),
        (2, 4, {"num_gpus": 4}, "--dp 2 with --tp 4 needs 8 GPUs, and this machine shows 4 GPUs"),
        (2, 4, {"num_gpus": 4}, "| --dp 1 with --tp 4 fits"),
        (1, 8, {"num_gpus": 4}, "| Lower --tp to 4 or less: one GPU for each process."),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    dp: int, tp: int, facts: dict[str, int | None], expected: str
) -> None:
    found = refusal(dp, tp, **facts)
    assert expected in found if expected else found == ""


@pytest.mark.parametrize("command", ["generate", "score", "bench"])
@pytest.mark.parametrize("flags", [("--dp", "99"), ("--dp", "500"), ("--tp", "64")])
def test_a_slip_of_the_keys_ends_at_once_and_starts_nothing(
    command: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    files = () if command == "bench" else (str(SAMPLE / "prompts.jsonl"),)
    start = time.monotonic()
    process = subprocess.Popen(
        [COMMAND, command, *files, "--model", MODEL, "--device", "cpu", *flags],
        env=environment(HF_HUB_OFFLINE="1", TEST_MARK=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: set[int] = set()
    while process.poll() is None:
        seen |= set(processes_with(tmp_path))
        time.sleep(0.01)
    seconds = time.monotonic() - start
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert stderr.startswith(f"error: {' '.join(flags)} would start {flags[1]} processes"), stderr
    assert seen <= {process.pid}
    assert seconds < 5  # 0.4 s where the machine is not busy


def test_a_dry_run_and_a_single_engine_are_not_asked_for_their_size(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    ended = run("generate", source, "--model", MODEL, "--dry-run", "--dp", "99")
    assert ended.code == 0, ended.stderr  # for a larger machine, from this one


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of files as the kernel has them, with 8 cores and 16 GiB of memory."""
    for name, path in (
        ("_CGROUPS", "cgroup"),
        ("_OWN_GROUPS", "own"),
        ("_MEMORY", "meminfo"),
    ):
        monkeypatch.setattr(capacity, name, tmp_path / path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    write(tmp_path / "meminfo", f"MemTotal: {32 << 20} kB\nMemAvailable:   {16 << 20} kB\n")
    write(tmp_path / "own", "")
    return tmp_path


def test_a_quota_and_a_limit_of_a_cgroup_count(machine: Path) -> None:
    assert (capacity.usable_cores(), capacity.available_memory()) == (8, 16 * GIB)
    write(machine / "own", "0::/jobs/one\n")
    write(machine / "cgroup/jobs/one/cpu.max", "max 100000\n")
    write(machine / "cgroup/jobs/cpu.max", "250000 100000\n")
    write(machine / "cgroup/jobs/one/memory.max", "max\n")
    write(machine / "cgroup/jobs/memory.max", f"{4 * GIB}\n")
    write(machine / "cgroup/jobs/memory.current", f"{2 * GIB}\n")
    write(machine / "cgroup/jobs/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    assert (capacity.usable_cores(), capacity.available_memory()) == (3, 3 * GIB)


def test_the_first_version_of_cgroups_counts_too(machine: Path) -> None:
    write(machine / "own", "4:memory:/here\n2:cpu,cpuacct:/gone\n1:name=systemd:/\n")
    write(machine / "cgroup/cpu,cpuacct/cpu.cfs_quota_us", "100000\n")
    write(machine / "cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(machine / "cgroup/memory/here/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(machine / "cgroup/memory/here/memory.usage_in_bytes", f"{GIB}\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert (capacity.usable_cores(), capacity.available_memory()) == (1, GIB)


def test_a_machine_that_tells_nothing_is_taken_to_have_room(machine: Path) -> None:
    (machine / "meminfo").unlink()
    (machine / "own").unlink()
    assert (capacity.usable_cores(), capacity.available_memory()) == (8, None)
