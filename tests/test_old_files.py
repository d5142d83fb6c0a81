"""Journals, outputs, stats and shards of an older version: this one goes on from them."""

import shutil
from pathlib import Path

import pytest

from .cli import ROOT, SAMPLE, Run, read_rows, run

OLD = ROOT / "tests" / "files_of_5784cc7"
FLAGS = ("--model", "sample_data/model", "--max-tokens", "24", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the old files, and the model by the name that it had."""
    path = tmp_path / "old"
    shutil.copytree(OLD, path)
    (path / "sample_data").symlink_to(SAMPLE)
    return path


def generate(folder: Path, output: str, *more: str) -> Run:
    return run("generate", "in.jsonl", "-o", output, *FLAGS, *more, cwd=folder)


def test_a_finished_job_has_nothing_to_do_and_its_settings_count(folder: Path) -> None:
    before = (folder / "finished.jsonl").read_bytes()
    ended = generate(folder, "finished.jsonl")
    assert ended.code == 3, ended.stderr
    assert "nothing to do" in ended.stderr
    assert generate(folder, "sampled.jsonl", "--temperature", "0.8", "--choice", "yes,no",
                    "--limit", "6").code == 3  # fmt: skip
    assert (folder / "finished.jsonl").read_bytes() == before
    ended = generate(folder, "finished.jsonl", "--seed", "1")
    assert ended.code == 78
    assert "seed: 0 -> 1" in ended.stderr


def test_a_killed_job_goes_on_to_the_same_bytes(folder: Path) -> None:
    num_done = (folder / "killed.jsonl.partial").read_bytes().count(b"\n") - 1
    ended = generate(folder, "killed.jsonl")
    assert ended.code == 3, ended.stderr
    assert f"({num_done - num_failed(folder)} by an earlier run)" in ended.stderr
    expected = (OLD / "finished.jsonl").read_bytes()
    assert (folder / "killed.jsonl").read_bytes() == expected


def num_failed(folder: Path) -> int:
    """Failed rows among those that the killed job had done."""
    lines = (OLD / "killed.jsonl.partial").read_bytes().splitlines()[1:]
    return sum(line.split(b" ")[2] == b"e" for line in lines)


def test_shards_are_merged_to_the_same_bytes(folder: Path) -> None:
    ended = run("merge", "shard-1.jsonl", "shard-2.jsonl", "-o", "all.jsonl", cwd=folder)
    assert ended.code == 3, ended.stderr
    for name in ("", ".errors.jsonl"):
        merged, whole = folder / f"all.jsonl{name}", OLD / f"finished.jsonl{name}"
        assert merged.read_bytes() == whole.read_bytes()


def test_failed_rows_are_tried_again_and_new_rows_added(folder: Path) -> None:
    source = folder / "in.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b"no-prompt" in line)
    lines[at] = b'{"id":"no-prompt","prompt":"Q: 3+4=\\nA:"}\n'
    source.write_bytes(b"".join(lines) + b'{"id":"new","prompt":"Q: 3+4=\\nA:"}\n')
    ended = generate(folder, "finished.jsonl", "--retry-failed")
    assert ended.code == 3, ended.stderr
    rows = read_rows(folder / "finished.jsonl")
    old = read_rows(OLD / "finished.jsonl")
    assert [row for row in rows if row["id"] not in ("no-prompt", "new")] == old
    assert len(rows) == len(old) + 2
