"""An input that changes while it is read is seen, whatever has become of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.rows import check_inputs, read_rows
from nanovllm_cli.shard import Shard

from .fake_engine import FakeEngine
from .input_files import COLUMNS, COMPRESS, LINES, parquet
from .job_folder import JobFolder, good_rows

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
    assert "run the same line again" in str(caught.value.hint)


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


class Changing(FakeEngine):
    """Lets the input change when the job has run so many steps."""

    def __init__(self, change: Change, path: Path, *, at_step: int) -> None:
        super().__init__()
        self._change, self._path, self._steps_left = change, path, at_step

    def step(self) -> Any:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._change(self._path)
        return super().step()


LONG = "x" * 2000  # so that the file is not read whole before the first row is done


@pytest.mark.parametrize("change", ["truncated", "appended", "replaced"])
def test_a_job_whose_input_changes_ends_with_65_and_keeps_what_is_done(
    change: str, tmp_path: Path
) -> None:
    rows = [{**row, "data": LONG} for row in good_rows(4000)]
    folder = JobFolder(tmp_path / "job", rows)
    before = folder.input.read_bytes()
    fake = Changing(CHANGES[change][0], folder.input, at_step=5)
    with pytest.raises(CommandError, match="has changed since this run began to read it") as error:
        folder.run(fake)
    assert error.value.exit_code == ExitCode.INPUT_UNUSABLE
    assert folder.names == {"out.jsonl.partial"}
    num_done = len(folder.journalled)
    assert num_done >= 40
    folder.input.write_bytes(before)  # mended: what is done is not run again
    code, num_added = folder.run()
    assert (code, num_added) == (0, 4000 - num_done)
    assert len(folder.output.read_bytes().splitlines()) == 4000


@pytest.mark.parametrize("num_new", [2, 60, 900])
def test_parquet_that_is_replaced_while_its_rows_run_is_not_published(
    num_new: int, tmp_path: Path
) -> None:
    folder = JobFolder(tmp_path / "job", [], "out.parquet")
    path = tmp_path / "job" / "in.parquet"

    def write(num_rows: int, prompt: str) -> None:
        columns = {"id": [*range(num_rows)], "prompt": [prompt] * num_rows}
        pq.write_table(pa.table(columns), tmp_path / "new")
        (tmp_path / "new").rename(path)

    write(60, "old")
    fake = Changing(lambda path: write(num_new, "new"), path, at_step=3)
    with pytest.raises(CommandError, match="it was replaced by another file") as error:
        folder.run(fake, inputs=[str(path)])
    assert error.value.exit_code == ExitCode.INPUT_UNUSABLE
    assert not folder.output.exists()
    write(60, "old")
    assert folder.run(inputs=[str(path)]) == (0, 0)
    assert pq.read_table(folder.output)["prompt"].to_pylist() == ["old"] * 60


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "out.jsonl", "z.jsonl.gz", "a.parquet"])
def test_an_output_in_the_directory_of_its_input_is_done_once(
    name: str, has_ids: bool, tmp_path: Path
) -> None:
    rows = good_rows(6) if has_ids else [{"prompt": f"row {n}"} for n in range(6)]
    folder = JobFolder(tmp_path / "job", [*rows, {"id": "bad"}], name)
    inputs = [str(folder.path)]
    errors = str(folder.path / "failed.jsonl")
    assert folder.run(inputs=inputs, errors=errors, allow_errors=True)[1] == 6
    content = folder.output.read_bytes()
    for _ in range(2):
        assert folder.done(inputs=inputs, errors=errors, allow_errors=True) == 0
        assert folder.output.read_bytes() == content
    if not name.endswith(".parquet"):
        append(folder.input)
        assert folder.run(inputs=inputs, errors=errors, allow_errors=True)[1] == 1


def test_shards_that_are_written_into_the_directory_of_their_input_do_not_read_each_other(
    tmp_path: Path,
) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(20))
    inputs = [str(folder.path)]
    for index in range(3):
        output = str(folder.path / f"a-{index}.jsonl")
        folder.run(inputs=inputs, output=output, shard=Shard(index=index, count=3))
    lines = [path.read_bytes().splitlines() for path in folder.path.glob("a-?.jsonl")]
    assert sum(map(len, lines)) == 20
    # What a job has made of another directory is a job's input like any other.
    (tmp_path / "next").mkdir()
    folder.run(inputs=inputs, output=str(tmp_path / "next" / "in.jsonl"))
    code, num_added = folder.run(
        inputs=[str(tmp_path / "next")], output=str(tmp_path / "next" / "out.jsonl")
    )
    assert (code, num_added) == (0, 20)
