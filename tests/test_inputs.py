"""inputs.py: which files a command line names."""

import os
import sys
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.rows import check_inputs


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(arguments: list[str]) -> list[str]:
    return [found.name for found in find_inputs(arguments)]


def refusal(arguments: list[str]) -> CommandError:
    with pytest.raises(CommandError) as caught:
        find_inputs(arguments)
    return caught.value


def test_files_keep_the_order_they_are_named_in() -> None:
    for name in ("b.jsonl", "a.jsonl"):
        Path(name).touch()
    assert names(["b.jsonl", "a.jsonl"]) == ["b.jsonl", "a.jsonl"]


def test_a_glob_is_sorted_and_takes_files_only() -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        Path(name).touch()
    Path("d.jsonl").mkdir()
    assert names(["*.jsonl"]) == ["a.jsonl", "b.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file() -> None:
    Path("part[1].jsonl").touch()
    Path("part1.jsonl").touch()
    assert names(["part[1].jsonl"]) == ["part[1].jsonl"]


def test_a_directory_gives_its_own_input_files_sorted() -> None:
    wanted = ["a.jsonl", "b.ndjson.gz", "c.json.zst", "d.parquet", "e.JSONL"]
    directory = Path("data")
    (directory / "deeper").mkdir(parents=True)
    ours = ["a.jsonl.errors.jsonl", "a.jsonl.stats.json", "a.jsonl.partial", "a.jsonl.lock"]
    for name in [
        *wanted,
        *ours,
        ".a.jsonl.17.tmp",
        "notes.txt",
        ".hidden.jsonl",
        "x.csv.gz",
        "deeper/f.jsonl",
    ]:
        (directory / name).touch()
    assert names(["data"]) == [f"data/{name}" for name in wanted]


def test_a_file_that_lies_beside_an_output_may_be_named() -> None:
    for name in ("out.jsonl", "out.jsonl.errors.jsonl"):
        Path(name).touch()
    assert names(["out.jsonl.errors.jsonl"]) == ["out.jsonl.errors.jsonl"]
    assert names(["*.jsonl"]) == ["out.jsonl", "out.jsonl.errors.jsonl"]


@pytest.mark.parametrize("argument", ["nothing.jsonl", "nothing/*.jsonl", "empty", ""])
def test_an_input_that_is_not_there_names_what_was_tried(argument: str, tmp_path: Path) -> None:
    Path("empty").mkdir()
    error = refusal([argument])
    assert error.exit_code == ExitCode.NOT_FOUND
    assert error.hint
    assert str(tmp_path / argument if argument else "''") in error.message


def test_a_misspelled_file_is_suggested() -> None:
    Path("prompts.jsonl").touch()
    assert refusal(["promts.jsonl"]).hint == "Did you mean prompts.jsonl?"


def test_stdin_can_be_named_once_only() -> None:
    assert refusal(["-", "-"]).exit_code == ExitCode.USAGE


def test_a_closed_stdin_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal(["-"]).exit_code == ExitCode.NOT_FOUND


def test_a_fifo_is_a_stream() -> None:
    os.mkfifo("pipe")
    (pipe,) = find_inputs(["pipe"])
    assert pipe.is_stream
    assert check_inputs([pipe]) is None


def test_a_directory_never_gives_the_output_that_is_written_into_it() -> None:
    directory = Path("data")
    directory.mkdir()
    for name in ("a.jsonl", "in.jsonl", "z.jsonl", "a.jsonl.partial", ".nanovllm-1f-2.jsonl"):
        (directory / name).touch()
    Path("link").symlink_to("data")
    Path("other.jsonl").hardlink_to("data/z.jsonl")

    def found(argument: str, *outputs: str | None) -> list[str]:
        return [Path(source.name).name for source in find_inputs([argument], outputs=outputs)]

    assert found("data") == ["a.jsonl", "in.jsonl", "z.jsonl"]
    assert found("data", "data/a.jsonl") == ["in.jsonl", "z.jsonl"]
    assert found("data", "data/z.jsonl", None) == ["a.jsonl", "in.jsonl"]
    assert found("data", "link/z.jsonl", "-") == ["a.jsonl", "in.jsonl"]
    assert found("link", os.path.abspath("data/z.jsonl")) == ["a.jsonl", "in.jsonl"]
    assert found("data", "other.jsonl") == ["a.jsonl", "in.jsonl"]  # the same file
    assert found("data", "data/new.jsonl") == ["a.jsonl", "in.jsonl", "z.jsonl"]
    assert found("data/*.jsonl", "data/z.jsonl") == ["a.jsonl", "in.jsonl"]
    assert found("data/z.jsonl", "data/z.jsonl") == ["z.jsonl"]  # for output_paths to refuse


def test_a_name_with_a_newline_is_found_in_a_directory() -> None:
    Path("data").mkdir()
    for name in ("a.jsonl", "b\nc.jsonl", "d\n.jsonl.errors.jsonl"):
        Path("data", name).touch()
    assert names(["data"]) == ["data/a.jsonl", "data/b\nc.jsonl"]


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "hf", "az"])
def test_a_url_is_named_as_it_was_given(scheme: str) -> None:
    error = refusal([f"{scheme}://host/data/x.jsonl?a=1"])
    assert error.exit_code == ExitCode.NOT_FOUND
    assert error.message.startswith(f"{scheme}://host/data/x.jsonl?a=1 is a URL")
    assert "remote files are not read" in error.message
    assert error.hint == "Download it first, and name the file."


def test_a_data_set_of_a_hub_is_to_be_downloaded_first() -> None:
    for argument in ("tatsu-lab/alpaca", "datasets/tatsu-lab/alpaca"):
        error = refusal([argument])
        assert error.exit_code == ExitCode.NOT_FOUND
        assert "hf download --repo-type dataset tatsu-lab/alpaca" in str(error.hint)
    assert "hf download" not in str(refusal(["folder/missing.jsonl"]).hint)


@pytest.mark.parametrize("argument", ["in", "in/*.jsonl"])
def test_a_fifo_that_was_only_found_is_refused_by_name(argument: str) -> None:
    os.mkdir("in")
    Path("in/a.jsonl").write_text("{}\n")
    os.mkfifo("in/b.jsonl")
    error = refusal([argument])
    assert error.exit_code == ExitCode.INPUT_UNUSABLE
    assert "in/b.jsonl" in error.message
    assert "a FIFO" in error.message
    assert names(["in/a.jsonl", "in/b.jsonl"]) == ["in/a.jsonl", "in/b.jsonl"]
