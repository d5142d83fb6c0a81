"""One job an output: whoever comes second is told who is there, at once, and nothing is torn."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.lock import output_lock

from .cli import MODEL, ROOT, environment, generate, run, write_rows

HOLD = """
import sys, time
from pathlib import Path
from nanovllm_cli.lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(output: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    arguments = [sys.executable, "-c", HOLD, str(output), str(seconds)]
    process = subprocess.Popen(
        arguments, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_held_lock_is_75_with_its_holder_and_no_second_is_lost(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    holder = hold(tmp_path / "out.jsonl", 60)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = run("generate", source, "-o", tmp_path / "out.jsonl", "--model", MODEL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    end(holder)
    assert ended.code == 75
    assert f"process {holder.pid} on " in ended.stderr
    assert "--wait-lock" in ended.stderr
    assert ended.stdout == b""
    # Not the clock's seconds, which a busy machine stretches. Importing torch alone takes more.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert not (tmp_path / "out.jsonl").exists()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    holder = hold(tmp_path / "out", 60)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "out.lock").exists()
    with output_lock(tmp_path / "out"):
        assert f"process {os.getpid()} " in (tmp_path / "out.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    holder = hold(tmp_path / "out", 1.0)
    start = time.monotonic()
    with output_lock(tmp_path / "out", wait_seconds=60):
        assert time.monotonic() - start < 30
    holder.communicate()
    with (
        output_lock(tmp_path / "out"),
        pytest.raises(CommandError, match="is being written by process") as error,
        output_lock(tmp_path / "out", wait_seconds=0.3),
    ):
        raise AssertionError("two have the lock")
    assert error.value.exit_code == ExitCode.LOCKED


def test_the_errors_file_of_a_flag_is_locked_too(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    with output_lock(tmp_path / "errors.jsonl"):
        ended = generate(source, "--errors", tmp_path / "errors.jsonl")
    assert ended.code == 75
    assert "errors.jsonl is being written by" in ended.stderr


def test_a_lock_of_a_private_job_is_private(tmp_path: Path) -> None:
    with output_lock(tmp_path / "out", private=True):
        assert (tmp_path / "out.lock").stat().st_mode & 0o777 == 0o600


def contend(output: Path, num_times: int) -> None:
    """Count in a file that only the lock protects."""
    for _ in range(num_times):
        with output_lock(output, wait_seconds=300):
            number = int(output.read_text())
            output.write_text("")
            output.write_text(str(number + 1))


def test_the_lock_is_one_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    threads = [
        threading.Thread(target=contend, args=(tmp_path / "count", 25)) for _ in range(8)
    ]  # an flock belongs to an open file: threads compete as processes do
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "count").read_text() == "200"


AT_ONCE = """
import json, multiprocessing, sys, time
from pathlib import Path
from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.lock import output_lock

def start(output, gate, num_ended, outcomes):
    gate.wait()
    begin = time.monotonic()
    try:
        with output_lock(output):
            outcomes.put((0, 0.0))
            while num_ended.value < 19:
                time.sleep(0.005)
    except CommandError as error:
        outcomes.put((int(error.exit_code), time.monotonic() - begin))
        with num_ended.get_lock():
            num_ended.value += 1

forks = multiprocessing.get_context("fork")
gate, num_ended, outcomes = forks.Barrier(20), forks.Value("i", 0), forks.SimpleQueue()
arguments = (Path(sys.argv[1]), gate, num_ended, outcomes)
processes = [forks.Process(target=start, args=arguments) for _ in range(20)]
for process in processes:
    process.start()
print(json.dumps([outcomes.get() for _ in processes]))
for process in processes:
    process.join()
"""


@pytest.mark.parametrize("number", range(5))
def test_of_20_simultaneous_starts_one_runs_and_19_are_75(number: int, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", AT_ONCE, tmp_path / "out"]
    ended = subprocess.run(arguments, env=environment(), cwd=ROOT, stdout=subprocess.PIPE)
    outcomes = json.loads(ended.stdout)
    assert sorted(code for code, _ in outcomes) == [0] + [75] * 19
    assert max(seconds for _, seconds in outcomes) < 1.0
    assert list(tmp_path.iterdir()) == []
