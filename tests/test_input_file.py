"""input_file.py and input_lines.py: formats by content, stdin, compression, foreign files."""

import gzip
import io
import os
import queue
import re
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nanovllm_cli import input_lines
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.input_file import opened
from nanovllm_cli.inputs import Source, find_inputs
from nanovllm_cli.rows import BadRow, Row, check_inputs, read_rows

from .input_files import (
    COLUMNS,
    COMPRESS,
    LINES,
    columns_of,
    parquet,
    read,
    source,
    unusable,
    zstd,
)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Source]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return find_inputs(["-"])


# Formats


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}', "json"),
        (b"", "json"),
        (gzip.compress(b""), "gzip"),
        (zstd(b""), "zstd"),
        (b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + zstd(b""), "zstd"),
        (parquet(COLUMNS), "parquet"),
    ],
)
def test_the_content_decides_on_the_format(content: bytes, expected: str) -> None:
    with opened(source("input.txt", content)[0]) as file:
        assert file.format == expected


@pytest.mark.parametrize(
    "head", [b"\xff\xfe{\0", b"PK\x03\x04", b"BZh91AY", b"\xfd7zXZ\0", b"PARE", b"ARROW1"]
)
def test_a_foreign_format_is_unusable_as_a_whole(head: bytes) -> None:
    unusable_source = [Source(name="x.jsonl", path=Path("x.jsonl"))]
    Path("x.jsonl").write_bytes(head + b"\n" * 10)
    assert unusable(unusable_source).hint


def test_what_the_system_refuses_to_read_is_an_io_error() -> None:
    with pytest.raises(CommandError, match="/proc/self/mem") as caught:
        list(read_rows([Source(name="/proc/self/mem", path=Path("/proc/self/mem"))]))
    assert caught.value.exit_code == ExitCode.IO_ERROR


def test_a_file_that_vanished_is_not_found() -> None:
    sources = source("a.jsonl", b"{}")
    Path("a.jsonl").unlink()
    with pytest.raises(CommandError, match=r"a\.jsonl") as caught:
        list(read_rows(sources))
    assert caught.value.exit_code == ExitCode.NOT_FOUND


# stdin


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_stdin_is_read_plain_and_compressed(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = set_stdin(monkeypatch, compress(LINES))
    assert check_inputs(sources) is None
    assert columns_of(list(read_rows(sources))) == COLUMNS


def test_parquet_on_stdin_is_unusable_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError) as caught:
        list(read_rows(set_stdin(monkeypatch, parquet(COLUMNS))))
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
    assert "file" in str(caught.value.hint)


def test_a_row_on_stdin_comes_before_the_next_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(reading) as stdin, open(writing, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        found: queue.Queue[Row | BadRow] = queue.Queue()

        def read_stdin() -> None:
            for row in read_rows(find_inputs(["-"])):
                found.put(row)

        reader = Thread(target=read_stdin)
        reader.start()
        try:
            for at in range(3):
                pipe.write(b'{"a": 1}\n{"a')
                assert found.get(timeout=10).index == 2 * at
                pipe.write(b'": 2}\n')
                assert found.get(timeout=10).index == 2 * at + 1
        finally:
            pipe.close()
            reader.join()


# Compressed


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_and_frames_follow_each_other(suffix: str) -> None:
    compress = COMPRESS[suffix]
    half = LINES.index(b"\n", len(LINES) // 2) - 10  # in the middle of a line
    content = compress(LINES[:half]) + compress(b"") + compress(LINES[half:])
    assert columns_of(read(content, f"in.jsonl{suffix}")) == COLUMNS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("tail", [b"garbage", b"\0", b"\0" * 64, b"\n"])
def test_what_follows_the_last_member_is_an_error(suffix: str, tail: bytes) -> None:
    unusable(source(f"in.jsonl{suffix}", COMPRESS[suffix](LINES) + tail))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_error_names_the_byte_reached(suffix: str) -> None:
    content = COMPRESS[suffix](LINES)
    error = unusable(source(f"in.jsonl{suffix}", content[:-1]))
    place = re.search(r"byte (\d+)", error.message)
    assert place
    assert int(place[1]) == len(content) - 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_decompresses_to_much_more_comes_in_pieces(suffix: str) -> None:
    content = b'{"a":"%s"}\n' % (b" " * (3 << 20)) * 4
    assert len(columns_of(read(COMPRESS[suffix](content), f"in.jsonl{suffix}"))) == 4


def test_gzip_hands_on_all_it_holds_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lines, "_CHUNK_BYTES", 10)
    monkeypatch.setattr(input_lines, "_COMPRESSED_CHUNK_BYTES", 1)  # from which many more come
    content = gzip.compress(b'{"a":"%s"}\n' % (b"x" * 5000))
    assert len(columns_of(read(content * 2, "in.jsonl.gz"))) == 2


def test_a_file_packed_twice_is_unusable() -> None:
    unusable(source("in.jsonl.gz.gz", gzip.compress(gzip.compress(LINES))))
    unusable(source("in.parquet.gz", gzip.compress(parquet(COLUMNS))))


def test_plain_lines_under_a_compressed_name_are_read() -> None:
    assert columns_of(read(LINES, "in.jsonl.gz")) == COLUMNS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"\x1f", b"P", b"\x9f\x8b\x08\x00", b"not json\n"])
def test_a_damaged_head_does_not_make_text_of_a_file(suffix: str, content: bytes) -> None:
    unusable(source(f"in{suffix}", content))


def test_damage_after_the_check_is_found_while_reading() -> None:
    sources = source("in.jsonl.gz", gzip.compress(LINES))
    check_inputs(sources)
    os.truncate("in.jsonl.gz", 100)
    with pytest.raises(CommandError) as caught:
        list(read_rows(sources))
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
