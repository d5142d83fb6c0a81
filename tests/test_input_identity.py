"""An input that changes while it is read is seen, whatever has become of it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.rows import check_inputs, read_rows

from .input_files import COLUMNS, COMPRESS, LINES, parquet

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def replace(path: Path) -> None:
    """By a file of the same size and time."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(path.read_bytes())
    os.utime(path, ns=(1, 1))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"prompt": "more"}\n')


CHANGES: dict[str, tuple[Change, str]] = {
    "replaced": (replace, "it was replaced by another file"),
    "rewritten": (rewrite, "it was written to"),
    "appended": (append, "it grew from {before} to {after} bytes"),
    "truncated": (lambda path: os.truncate(path, 900), "it shrank from {before} to 900 bytes"),
    "removed": (Path.unlink, "it was removed"),
}
CONTENTS = {
    "in.jsonl": LINES * 40,  # more than is read at once
    "in.jsonl.gz": COMPRESS[".gz"](LINES * 40),
    "in.jsonl.zst": COMPRESS[".zst"](LINES * 40),
    "in.parquet": parquet(COLUMNS),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("when", ["after the check", "at the first row", "at the last row"])
def test_a_change_is_an_error_that_says_what_has_changed(name: str, change: str, when: str) -> None:
    path = Path(name)
    path.write_bytes(CONTENTS[name])
    make, expected = CHANGES[change]
    sources = find_inputs([name])
    num_rows = check_inputs(sources)
    assert num_rows
    rows = read_rows(sources)
    taken = {"after the check": 0, "at the first row": 1, "at the last row": num_rows}[when]
    for _ in range(taken):
        next(rows)
    make(path)
    after = path.stat().st_size if path.exists() else 0
    with pytest.raises(CommandError) as caught:
        list(rows)
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
    what = expected.format(before=len(CONTENTS[name]), after=after)
    assert caught.value.message == f"{name} has changed since this run began to read it: {what}"
    assert "rows that are done are kept" in str(caught.value.hint)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_change_is_seen_though_only_the_first_rows_are_read(name: str) -> None:
    Path(name).write_bytes(CONTENTS[name])
    sources = find_inputs([name])
    assert check_inputs(sources, limit=5) == 5
    assert len(list(read_rows(sources, limit=5))) == 5
    append(Path(name))
    with pytest.raises(CommandError, match="it grew"):
        list(read_rows(sources, limit=5))


def test_a_file_that_only_grew_between_two_runs_is_another_run_s_matter() -> None:
    Path("in.jsonl").write_bytes(LINES)
    assert check_inputs(find_inputs(["in.jsonl"])) == 600
    append(Path("in.jsonl"))
    sources = find_inputs(["in.jsonl"])
    assert check_inputs(sources) == 601
    assert len(list(read_rows(sources))) == 601
