"""Finished rows -> files and streams: in order, whole or not there at all, the same bytes twice."""

import errno
import gzip
import io
import random
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source
from nanovllm_cli.writer import FileWriter, StreamWriter

from .cli import ROOT, environment

STDIN = [Source(name="<stdin>", path=None)]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def line_of(index: int) -> bytes:
    return orjson.dumps({"id": index, "text": f"row {index} " * (index % 7)})


def write(path: Path, indices: list[int], *, failed: frozenset[int] = frozenset()) -> None:
    writer = FileWriter(path, STDIN)
    for index in indices:
        writer.write(index, None if index in failed else line_of(index))
    writer.publish()
    writer.close()


def content_of(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        with pa.input_stream(path, compression="zstd") as file:
            return file.read()
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        return b"".join(orjson.dumps(row) + b"\n" for row in rows)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_come_in_input_order_however_they_finish(suffix: str, tmp_path: Path) -> None:
    indices = list(range(3000))
    random.Random(0).shuffle(indices)
    path = tmp_path / f"out{suffix}"
    write(path, indices, failed=frozenset(range(0, 3000, 3)))
    expected = b"".join(line_of(index) + b"\n" for index in range(3000) if index % 3)
    assert content_of(path) == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_rows_give_the_same_bytes_in_any_order_and_place(
    suffix: str, tmp_path: Path
) -> None:
    indices = list(range(500))
    write(tmp_path / f"one{suffix}", indices)
    random.Random(1).shuffle(indices)
    write(tmp_path / "deep" / f"other{suffix}", indices)
    one, other = tmp_path / f"one{suffix}", tmp_path / "deep" / f"other{suffix}"
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_rows_are_an_empty_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    write(path, [0, 1], failed=frozenset((0, 1)))
    assert content_of(path) == b""


def test_only_the_output_is_left_and_its_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out.jsonl"
    write(path, [1, 0])
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_nothing_is_visible_before_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    writer = FileWriter(path, [])
    for index in range(1000):
        writer.write(index, line_of(index))
    assert path.read_bytes() == b"old"
    writer.close()
    assert path.read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.partial"}


def test_an_optional_file_without_rows_is_not_made_and_an_old_one_is_removed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out.errors.jsonl"
    path.write_bytes(b"old")
    writer = FileWriter(path, [], is_optional=True)
    writer.publish()
    writer.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from nanovllm_cli import writer

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

path, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "replace":
    os.replace = kill
file = writer.FileWriter(path, [])
for index in range(2000):
    file.write(index, b'{"id": %d}' % index)
if moment == "publish":
    kill()
file.publish()
"""


@pytest.mark.parametrize("moment", ["publish", "replace"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_kill_before_the_rename_leaves_no_output_and_no_half_of_one(
    moment: str, is_new: bool, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    if not is_new:
        path.write_bytes(b"old\n")
    ended = subprocess.run([sys.executable, "-c", KILLED, path, moment], env=environment())
    assert ended.returncode == -9
    assert (path.read_bytes() if path.exists() else None) == (None if is_new else b"old\n")
    # The same line run again is not in the way of what was left.
    write(path, [0, 1])
    assert content_of(path) == line_of(0) + b"\n" + line_of(1) + b"\n"


FULL_DISK = """
import resource, sys
from pathlib import Path
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source
from nanovllm_cli.writer import FileWriter

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for suffix in sys.argv[2:]:
    outcomes = set()
    for limit in range(0, 6400, 100):
        path = Path(sys.argv[1]) / f"{limit}{suffix}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        writer = None
        try:
            writer = FileWriter(path, [Source(name='<stdin>', path=None)])
            for index in range(100):
                writer.write(index, b'{"id": %d, "text": "%032x"}' % (index, index ** 20))
            writer.publish()
            writer.close()
            outcomes.add("published")
        except CommandError as error:
            assert error.exit_code == ExitCode.IO_ERROR, error.exit_code
            assert not path.exists(), f"half of {path} was published"
            outcomes.add("refused")
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            if writer is not None:
                writer.close()
        left = {file.name for file in path.parent.iterdir()} - {path.name, f"{path.name}.partial"}
        assert not left, left
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if path.exists():
            path.rename(path.parent.parent / path.name)
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
    assert outcomes == {"published", "refused"}, (suffix, outcomes)
"""


def test_a_full_disk_is_an_error_at_every_size_and_no_half_file_is_published(
    tmp_path: Path,
) -> None:
    (tmp_path / "full").mkdir()
    arguments = [sys.executable, "-W", "error", "-c", FULL_DISK, tmp_path / "full", *SUFFIXES]
    ended = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    published = [path for path in tmp_path.iterdir() if path.is_file()]
    contents = {content_of(path) for path in published if path.suffix != ".parquet"}
    assert len(contents) == 1
    assert contents.pop().count(b"\n") == 100
    for path in published:
        if path.suffix == ".parquet":
            assert pq.read_table(path).num_rows == 100


def test_a_stream_has_the_rows_in_order_as_soon_as_that_is_known() -> None:
    stream = io.BytesIO()
    writer = StreamWriter(stream, is_ordered=True)
    held = []
    for index, line in [(2, b"c"), (1, None), (4, b"e"), (0, b"a"), (3, b"d")]:
        writer.write(index, line)
        held.append((stream.getvalue(), writer.num_held))
    assert held == [(b"", 1), (b"", 2), (b"", 3), (b"a\nc\n", 1), (b"a\nc\nd\ne\n", 0)]
    writer.publish()


def test_an_unordered_stream_has_the_rows_as_they_finish() -> None:
    stream = io.BytesIO()
    writer = StreamWriter(stream, is_ordered=False)
    for index, line in [(2, b"c"), (1, None), (0, b"a")]:
        writer.write(index, line)
    assert stream.getvalue() == b"c\na\n"
    assert writer.num_held == 0


class Refusing(io.RawIOBase):
    """A stream that raises when it is written to."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise self._error


class Sipping(io.RawIOBase):
    """A stream that takes a few bytes at a time, as an unbuffered stdout may."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += bytes(data[:5])
        return min(len(data), 5)


def test_an_unbuffered_stream_gets_every_byte() -> None:
    stream = Sipping()  # what PYTHONUNBUFFERED makes of stdout
    writer = StreamWriter(stream, is_ordered=True)  # type: ignore[arg-type]
    writer.write(0, line_of(6))
    writer.write(1, line_of(1))
    assert stream.content == line_of(6) + b"\n" + line_of(1) + b"\n"


def test_a_stream_that_refuses_is_an_error_of_its_own_kind() -> None:
    full = Refusing(OSError(errno.ENOSPC, "No space left on device"))
    writer = StreamWriter(full, is_ordered=True)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match="No space left") as error:
        writer.write(0, b"a")
    assert error.value.exit_code == ExitCode.IO_ERROR
    closed = Refusing(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        StreamWriter(closed, is_ordered=False).write(0, b"a")  # type: ignore[arg-type]
