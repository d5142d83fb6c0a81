"""What a job says on stderr while it runs: lines for a log, JSON for programs, or nothing."""

import json
import os
import re
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

from nanovllm_cli.exit_code import ExitCode
from nanovllm_cli.log import Log
from nanovllm_cli.progress import Progress
from nanovllm_cli.totals import Totals

from .cli import COMMAND, MODEL, environment, generate, run, shell, write_rows

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


# --- what is told when rows fail


GOOD = {"prompt": "a", "max_tokens": 2}
BAD = [{"id": 1}, {"prompt": "a", "temprature": 1}, {"prompt": "a", "temprature": 2}]


@pytest.mark.parametrize("in_json", [False, True])
def test_quiet_says_in_one_line_that_rows_failed_and_where_they_are(
    in_json: bool, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD, *BAD])
    output = tmp_path / "out.jsonl"
    arguments: tuple[str | Path, ...] = (rows, "-o", output, "--quiet")
    if in_json:
        arguments += ("--log-format", "json")
    first = "3 of 4 rows failed (2 unknown_setting, 1 no_prompt); see "
    again = f"nothing to do: {output} has all 1 rows of this job, 3 failed ("
    for text, end in ((first, ""), (again, "); --retry-failed runs them again")):
        ended = generate(*arguments)
        assert ended.code == 3
        (line,) = ended.stderr.splitlines()
        if in_json:
            entry = json.loads(line)
            assert (entry["level"], entry["event"], entry["exit_code"]) == ("warning", "end", 3)
            line = f"warning: {entry['message']}"
        assert line == f"warning: {text}{output}.errors.jsonl{end}"
    assert generate(*arguments, "--allow-errors").stderr == ""


def test_quiet_adds_nothing_to_errors_that_go_to_stderr(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD, BAD[0]])
    for arguments in ((), ("-o", tmp_path / "out.jsonl", "--errors", "-")):
        ended = generate(rows, "--quiet", *arguments)
        assert ended.code == 3
        (line,) = ended.stderr.splitlines()
        assert json.loads(line)["error"]["code"] == "no_prompt"


@pytest.mark.parametrize("columns", ["0", "5"])
def test_no_columns_are_as_many_as_usual(columns: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD])
    ended = run(
        *("generate", rows, "--model", MODEL, "--max-tokens", "2", "-o", tmp_path / "o.jsonl"),
        env={"COLUMNS": columns},
    )
    assert ended.code == 0
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in ended.stderr.splitlines()}
    assert table["output"].startswith(str(tmp_path)[:20])  # it may be cut at its end


def test_the_closing_table_names_the_files_and_the_reasons(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD, *BAD])
    output = tmp_path / "out.jsonl"
    ended = generate(rows, "-o", output)
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in ended.stderr.splitlines()}
    assert table["errors"].rstrip() == f"{output}.errors.jsonl: 2 unknown_setting, 1 no_prompt"
    assert table["output"].rstrip() == str(output)
    assert table["stats"].rstrip() == f"{output}.stats.json"
    good = write_rows(tmp_path / "good.jsonl", [GOOD])
    named = [line.split()[0] for line in generate(good).stderr.splitlines()]
    assert not {"errors", "output", "stats"} & set(named)


def test_the_seconds_are_those_of_the_process_and_of_its_phases(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD])
    start = time.monotonic()
    ended = run("generate", rows, "--model", MODEL, "-o", tmp_path / "out.jsonl")
    seconds = time.monotonic() - start
    assert ended.code == 0, ended.stderr
    stats = json.loads((tmp_path / "out.jsonl.stats.json").read_text())
    phases = stats["phases_seconds"]
    assert next(iter(phases)) == "start"
    # What is left is the process's end, of what it has imported.
    assert 0.5 * seconds < stats["elapsed_seconds"] <= seconds + 0.1
    assert abs(sum(phases.values()) - stats["elapsed_seconds"]) < 0.3 * seconds


def test_the_seconds_of_a_shell_that_became_the_command_are_not_its_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [GOOD])
    line = (
        f"sleep 11 && exec nanovllm generate in.jsonl --model {MODEL} -o out.jsonl --max-tokens 2"
    )
    ended = shell(line, cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    stats = json.loads((tmp_path / "out.jsonl.stats.json").read_text())
    assert 0.0 < stats["phases_seconds"]["start"] < stats["elapsed_seconds"] < 10.5


# --- on a terminal


def on_terminal(
    *arguments: str | Path, columns: int, stdout_too: bool, cwd: Path
) -> tuple[int, str]:
    """The exit code of the real command, and what it writes to a terminal of so many columns."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    process = subprocess.Popen(
        [COMMAND, *arguments],
        env=environment(HF_HUB_OFFLINE="1", TERM="xterm"),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=slave if stdout_too else subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # EIO when the other side is closed
        while chunk := os.read(master, 1 << 16):
            shown += chunk
    os.close(master)
    return process.wait(), shown.decode()


def test_the_bar_has_counts_and_fits_and_leaves_nothing_above_the_table(tmp_path: Path) -> None:
    long = {"prompt": "a", "max_tokens": 64, "ignore_eos": True}
    rows = write_rows(tmp_path / "in.jsonl", [long, BAD[0]] * 200)
    arguments = ("generate", rows, "--model", MODEL, "-o", "out.jsonl")
    code, shown = on_terminal(*arguments, columns=70, stdout_too=False, cwd=tmp_path)
    assert code == 3, shown
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", shown)]
    bars = [line for line in lines if "━" in line]
    assert bars
    assert all(len(line.rstrip()) <= 70 for line in bars)
    counts = re.compile(r"generate [━╸╺]+ \d+/400 rows, \d+ failed, \d:\d\d")
    assert any(map(counts.match, bars)), bars
    assert "rows done" not in shown
    assert shown.index("200 completed, 200 failed") < shown.index("jsonl: 200 no_prompt")
    assert shown.endswith("\x1b[2K")  # the bar is wiped away


def test_rows_on_the_terminal_share_it_with_no_bar(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD] * 3)
    arguments = ("generate", rows, "--model", MODEL)
    code, shown = on_terminal(*arguments, columns=100, stdout_too=True, cwd=tmp_path)
    assert code == 0, shown
    assert "━" not in shown
    assert "\x1b[" not in shown
    assert sum(line.startswith('{"prompt"') for line in shown.splitlines()) == 3


def test_names_that_the_table_shows_are_escaped(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [GOOD])
    ended = generate(rows, "-o", tmp_path / "o\x1b]0;x\x07\u202e.jsonl")
    assert ended.code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(ended.stderr)
    assert "\\x1b]0;x\\x07\\u202e.jsonl" in ended.stderr
