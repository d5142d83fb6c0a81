"""Signals, --timeout and readers that leave: how a job ends, how soon, and that nothing is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.signals import Signals, Stopped

from .cli import COMMAND, MODEL, ROOT, SAMPLE, TIMEOUT_SECONDS, environment, read_rows

CODES = {"SIGTERM": -15, "SIGHUP": -1, "SIGINT": -2, "SIGINT twice": -2}
ARGUMENTS = [
    *("generate", SAMPLE / "prompts.jsonl", "--model", MODEL),
    *("--max-num-seqs", "16", "--max-tokens", "12", "--limit", "200"),
]
LONG = ("--max-tokens", "2000", "--ignore-eos")  # rows that are not done in any test's time


@contextmanager
def started(*arguments: str | Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The real command at work, its streams in pipes; killed at the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    command = [COMMAND, *arguments]
    with subprocess.Popen(command, env=environment(HF_HUB_OFFLINE="1"), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(stderr: Any, text: str) -> None:
    """Read lines until one has `text` in it."""
    while text not in (line := stderr.readline().decode()):
        assert line, f"ended without {text!r}"


def wait_until_it_listens(process: subprocess.Popen[bytes]) -> None:
    """Until the command takes signals itself: on a busy machine Python's start takes seconds."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = int(re.findall(r"^SigCgt:\s(\w+)", status.read_text(), re.MULTILINE)[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def wait_until_rows_run(process: subprocess.Popen[bytes]) -> None:
    """Until the engine is loaded and has its rows, however long that takes."""
    wait_for(process.stderr, "loading")
    assert process.stderr is not None
    line = ""
    while not line.startswith("generate, "):
        process.send_signal(signal.SIGUSR1)
        line = process.stderr.readline().decode()
        time.sleep(0.1)


def engines_of(pid: int) -> list[str]:
    """The engine processes that a command has left; their last argument is its process id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "nanovllm_cli.core.engine_worker" in words and str(pid) in words:
            found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """What a run that gets no signal writes, and its seconds."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    begin = time.monotonic()
    with started(*ARGUMENTS, "-o", output) as process:
        process.communicate()
    return output.read_bytes(), time.monotonic() - begin


def trials(tmp_path: Path, number: int, step_seconds: float) -> dict[str, Any]:
    """What signal_driver.py finds in as many trials of each kind."""
    lines = [
        b'{"id": %d}' % n if n % 41 == 7 else b'{"id": %d, "prompt": "row %d"}' % (n, n)
        for n in range(300)
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = [tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl", number, step_seconds]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.signal_driver", *map(str, arguments)],
        env=environment(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", [10, pytest.param(100, marks=pytest.mark.long)])
def test_signals_at_random_moments_end_a_job_as_promised_and_change_no_byte(
    number: int, tmp_path: Path
) -> None:
    found = trials(tmp_path, number, 0.01)
    assert found["differing"] == 0
    for kind, outcome in found["kinds"].items():
        assert outcome["codes"] == [CODES[kind]] * number
        assert outcome["seconds"] < (2 if kind == "SIGINT twice" else 10)


@pytest.mark.parametrize("number", [1, pytest.param(5, marks=pytest.mark.long)])
def test_signals_to_the_real_command_leave_nothing_running_and_change_no_byte(
    number: int, whole: tuple[bytes, float], tmp_path: Path
) -> None:
    chance = random.Random(number)
    expected, seconds = whole
    output = tmp_path / "out.jsonl"
    for _ in range(number):
        for kind in chance.sample(list(CODES), len(CODES)):  # each goes on from the one before
            with started(*ARGUMENTS, "-o", output) as process:
                wait_until_it_listens(process)
                time.sleep(chance.random() * seconds * 0.6)
                sent = time.monotonic()
                process.send_signal(-CODES[kind])
                if kind == "SIGINT twice":
                    time.sleep(0.05)
                    process.send_signal(signal.SIGINT)
                _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
            assert process.returncode in (CODES[kind], 0), stderr
            assert time.monotonic() - sent < (3 if kind == "SIGINT twice" else 10)
            assert b"Traceback" not in stderr
            assert engines_of(process.pid) == []
            assert not (tmp_path / "out.jsonl.lock").exists()
        with started(*ARGUMENTS, "-o", output) as process:
            process.communicate()
        assert process.returncode == 0
        assert output.read_bytes() == expected
        output.unlink()
        (tmp_path / "out.jsonl.stats.json").unlink()


def test_a_drain_takes_8_seconds_and_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    with (
        started(*ARGUMENTS, *LONG, "-o", tmp_path / "a.jsonl") as patient,
        started(*ARGUMENTS, *LONG, "-o", tmp_path / "b.jsonl") as urgent,
    ):
        for process in (patient, urgent):
            wait_until_rows_run(process)
        sent = time.monotonic()
        patient.terminate()
        urgent.send_signal(signal.SIGINT)
        wait_for(urgent.stderr, "have 8 s to finish")
        again = time.monotonic()
        urgent.send_signal(signal.SIGINT)
        assert urgent.wait(TIMEOUT_SECONDS) == -signal.SIGINT
        assert time.monotonic() - again < 2
        assert patient.wait(TIMEOUT_SECONDS) == -signal.SIGTERM
        assert 7.5 < time.monotonic() - sent < 10
        assert engines_of(patient.pid) + engines_of(urgent.pid) == []


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    line = f"trap '' INT HUP; exec {COMMAND} {' '.join(map(str, ARGUMENTS))} -o {output}"
    with subprocess.Popen(["/bin/sh", "-c", line], env=environment(), stderr=subprocess.PIPE) as p:
        wait_for(p.stderr, "loading")
        for _ in range(5):
            p.send_signal(signal.SIGINT)
            p.send_signal(signal.SIGHUP)
            time.sleep(0.3)
        p.communicate()
    assert p.returncode == 0
    assert len(read_rows(output)) == 200


@pytest.mark.long
def test_a_slow_reader_of_stdout_does_not_hold_up_the_end(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Q: 1+4=\nA:", "text": "x" * 5000}) + "\n")
    source.write_bytes(source.read_bytes() * 100)
    flags = ("--model", MODEL, "--max-tokens", "2")
    with started("generate", source, *flags) as process:
        wait_until_rows_run(process)
        time.sleep(2)  # by then the pipe is full
        sent = time.monotonic()
        process.terminate()
        assert process.wait(TIMEOUT_SECONDS) == -signal.SIGTERM
        assert time.monotonic() - sent < 11
        assert engines_of(process.pid) == []


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_job_out_of_time_is_75_and_says_how_many_rows_are_done(
    has_begun: bool, whole: tuple[bytes, float], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    seconds = whole[1] if has_begun else 0.3  # in as long as others are done its rows run
    with started(*ARGUMENTS, *LONG, "-o", output, "--timeout", f"{seconds}", "-q") as process:
        wait_until_it_listens(process)
        begin = time.monotonic()
        _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75
    assert time.monotonic() - begin < seconds + 11
    assert stderr.startswith(b"error: the time of --timeout is over")
    if has_begun:
        assert b"of 200 rows done, 0 failed, and the same line goes on from there" in stderr
    assert not output.exists()
    assert engines_of(process.pid) == []


def test_a_status_line_comes_for_sigusr1_though_quiet(tmp_path: Path) -> None:
    metrics = tmp_path / "m.prom"
    flags = ("--quiet", "--metrics-file", metrics)
    with started(*ARGUMENTS, *LONG, "-o", tmp_path / "o.jsonl", *flags) as process:
        while not metrics.exists():  # until the job has begun
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert "rows done, 0 failed" in line


def test_a_reader_that_leaves_ends_the_job_though_no_row_comes() -> None:
    with started(*ARGUMENTS, *LONG) as process:
        wait_for(process.stderr, "loading")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == -signal.SIGPIPE
        assert engines_of(process.pid) == []


def test_a_signal_outside_of_a_held_block_raises_and_one_inside_waits() -> None:
    with Signals() as signals:
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # what was left behind is being tidied up
    with Signals() as signals:
        with signals.held():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGHUP
            with pytest.raises(Stopped, match="SIGHUP"):
                os.kill(os.getpid(), signal.SIGINT)
        assert signals.has_raised
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_timeout_in_a_held_block_waits_and_is_urgent_the_second_time() -> None:
    with Signals() as signals, signals.held():
        signals.end_after(0.01)
        time.sleep(0.05)
        assert signals.received == signal.SIGALRM
        with pytest.raises(Stopped, match="--timeout"):
            os.kill(os.getpid(), signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
