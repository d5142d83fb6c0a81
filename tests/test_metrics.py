"""The file of --metrics-file: Prometheus' text format, whole at every moment, and nobody else's."""

import os
import re
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.log import Log
from nanovllm_cli.metrics_file import MetricsFile
from nanovllm_cli.progress import Progress
from nanovllm_cli.totals import Totals

from .cli import generate, write_rows

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
_SAMPLE = re.compile(rf"({_NAME})\{{((?:{_LABEL},?)*)\}} (\S+)")
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Samples = dict[str, list[tuple[dict[str, str], float]]]


def parsed(text: str) -> Samples:
    """Name -> samples; fails where a line is none of the format's, or a family has no head."""
    assert text.endswith("\n")
    found: Samples = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in found, "a family comes twice"
            found[name] = []
        elif line.startswith("# TYPE "):
            kind = line.removeprefix(f"# TYPE {name} ")
            assert kind in ("counter", "gauge")
            assert (kind == "counter") == name.endswith("_total")
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == name
            labels = {
                label: re.sub(r"\\.", lambda escape: _ESCAPES[escape[0]], value)
                for label, value in re.findall(_LABEL, match[2])
            }
            found[name].append((labels, float(match[5])))
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    """The value of the one sample that has these labels."""
    (found,) = [
        number
        for its, number in samples[f"nanovllm_{name}"]
        if labels.items() <= its.items()
    ]  # fmt: skip
    return found


def test_a_jobs_totals_and_its_end_are_in_the_file(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": 1}, {"prompt": "b"}])
    metrics = tmp_path / "job.prom"
    arguments = ("-o", tmp_path / "out.jsonl", "--max-tokens", "2", "--metrics-file", metrics)
    old = os.umask(0o077)
    try:
        assert generate(rows, *arguments, "-q").code == 3
    finally:
        os.umask(old)
    assert metrics.stat().st_mode & 0o777 == 0o644
    found = parsed(metrics.read_text())
    assert value(found, "rows_total", status="completed") == 2
    assert value(found, "rows_total", status="failed") == 1
    assert value(found, "rows_expected") == 3
    assert value(found, "tokens_total", kind="prompt") >= 2
    assert value(found, "tokens_total", kind="completion") >= 2
    assert value(found, "tokens_per_second", kind="completion") > 0
    assert value(found, "engine_restarts_total") == 0
    assert value(found, "exit_code", output=str(tmp_path / "out.jsonl")) == 3
    assert generate(rows, *arguments, "-q").code == 3  # nothing to do
    found = parsed(metrics.read_text())
    assert value(found, "rows_total", status="completed") == 2
    assert value(found, "exit_code") == 3
    assert not list(tmp_path.glob(".*")), "nothing but whole files is left"


def test_labels_may_hold_any_text(tmp_path: Path) -> None:
    labels = {"output": 'a "b"\\n\n{},= \u00e9', "model": "\\"}
    MetricsFile(tmp_path / "m.prom", labels).write(Totals(), None)
    for samples in parsed((tmp_path / "m.prom").read_text()).values():
        for found, _ in samples:
            assert labels.items() <= found.items()


def test_while_a_job_runs_the_file_has_no_exit_code_and_is_kept_up_to_date(tmp_path: Path) -> None:
    totals, path = Totals(), tmp_path / "m.prom"
    metrics = MetricsFile(path, {})
    seen = set()
    with Progress(totals, Log(), quiet=True, metrics=metrics, metrics_seconds=0.001) as progress:
        while len(seen) < 4:
            totals.num_completed_rows += 1
            samples = parsed(path.read_text())
            assert samples["nanovllm_exit_code"] == []
            seen.add(value(samples, "rows_total", status="completed"))
        progress.end(ExitCode.OK)
    samples = parsed(path.read_text())
    assert value(samples, "rows_total", status="completed") == totals.num_completed_rows
    assert value(samples, "exit_code") == 0


def test_an_error_that_ends_a_job_is_its_exit_code(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.prom", {})
    error = CommandError("no", exit_code=ExitCode.IO_ERROR)
    with pytest.raises(CommandError), Progress(Totals(), Log(), quiet=True, metrics=metrics):
        raise error
    assert value(parsed((tmp_path / "m.prom").read_text()), "exit_code") == 74


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("in.jsonl", 2),
        ("old.txt", 73),
        ("out.jsonl", 2),
        ("out.jsonl.errors.jsonl", 2),
        ("folder", 2),
    ],
)
def test_a_file_that_holds_anything_else_is_not_replaced(
    name: str, code: int, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    before = rows.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.txt").write_text("precious")
    ended = generate(rows, "-o", tmp_path / "out.jsonl", "--metrics-file", tmp_path / name)
    assert (ended.code, ended.stdout) == (code, b"")
    assert "--metrics-file" in ended.stderr
    assert rows.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "folder", "old.txt"}
    assert (tmp_path / "old.txt").read_text() == "precious"


def test_a_folder_that_is_not_there_is_told_before_the_model_loads(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    ended = generate(rows, "--metrics-file", tmp_path / "none" / "m.prom")
    assert (ended.code, ended.stdout) == (74, b"")
    assert "loading" not in ended.stderr
