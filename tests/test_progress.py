"""What a job says on stderr while it runs: lines for a log, JSON for programs, or nothing."""

import json
import time
from pathlib import Path
from queue import SimpleQueue

import pytest

from nanovllm_cli.exit_code import ExitCode
from nanovllm_cli.log import Log
from nanovllm_cli.progress import Progress
from nanovllm_cli.totals import Totals

from .cli import MODEL, generate, run, write_rows

Captured = pytest.CaptureFixture[str]


def test_a_line_comes_now_and_then_whatever_the_job_does(capsys: Captured) -> None:
    totals = Totals(num_expected_rows=9)
    with Progress(totals, Log(), quiet=False, line_seconds=0.02), totals.phase("load"):
        totals.num_completed_rows = 4
        totals.errors["no_prompt"] = 1
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert lines[-1].startswith("load, 0 s: 5 of 9 rows done, 1 failed, 0 tok/s in, 0 tok/s out, ")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_status_that_is_asked_for_comes_at_once(quiet: bool, capsys: Captured) -> None:
    requests: SimpleQueue[None] = SimpleQueue()
    with Progress(Totals(), Log(), quiet=quiet, status_requests=requests) as progress:
        progress.say("drain", "something")
        requests.put(None)
        while not requests.empty():
            time.sleep(0.001)
        time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert ("something" in lines) == (not quiet)
    assert lines[-1].startswith("start, 0 s: 0 rows done, 0 failed")


def test_quiet_says_nothing(capsys: Captured) -> None:
    with Progress(Totals(), Log(), quiet=True, line_seconds=0.001) as progress:
        time.sleep(0.02)
        progress.end(ExitCode.OK)
        progress.end(ExitCode.OK, "nothing to do")
    assert capsys.readouterr().err == ""


def test_in_json_every_line_is_an_object_with_its_time_level_and_event(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": 1}])
    arguments = ("-o", tmp_path / "out.jsonl", "--max-tokens", "2", "--log-format", "json")
    ended = generate(rows, *arguments)
    again = generate(rows, *arguments)
    refused = generate(rows, *arguments, "--temperature", "-1")
    lines = [
        json.loads(line) for run in (ended, again, refused) for line in run.stderr.splitlines()
    ]
    assert [line["event"] for line in lines] == ["start", "end", "end", "error"]
    assert [line["level"] for line in lines] == ["info", "info", "info", "error"]
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert lines[1]["exit_code"] == lines[2]["exit_code"] == 3
    assert (lines[1]["rows"]["completed"], lines[1]["expected_rows"]) == (1, 2)
    assert lines[2]["rows"]["failed"] == 1
    assert lines[3]["exit_code"] == 2
    assert "temperature" in lines[3]["message"]


def test_a_name_that_is_no_unicode_makes_no_broken_json(capsys: Captured) -> None:
    Log("json").say("error", "no \udcff", hint="a \udcfe")
    line = json.loads(capsys.readouterr().err.encode("ascii"))
    assert (line["message"], line["hint"]) == ("no \\udcff", "a \\udcfe")


def test_the_real_command_is_silent_under_quiet_and_says_when_it_begins_without(
    tmp_path: Path,
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    arguments = ("generate", rows, "--model", MODEL, "--max-tokens", "2")
    quiet = run(*arguments, "-o", tmp_path / "quiet.jsonl", "--quiet")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, b"", "")
    told = run(*arguments, "-o", tmp_path / "told.jsonl")
    assert told.stderr.splitlines()[0] == f"0 of 1 rows done, 0 failed; loading {MODEL}"
    assert "1 completed, 0 failed" in told.stderr
