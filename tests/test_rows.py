"""rows.py: which inputs are found, what is a row, and that damage never passes for success."""

import gzip
import io
import os
import queue
import random
import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from nanovllm_cli import rows
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.rows import (
    BadRow,
    InputSummary,
    Row,
    Source,
    check_inputs,
    find_inputs,
    read_rows,
)

LINES = b"".join(b'{"id": %d, "prompt": "number %d"}\n' % (at, at * 7919) for at in range(600))
COLUMNS = [{"id": at, "prompt": f"number {at * 7919}"} for at in range(600)]


def zstd(content: bytes) -> bytes:
    """A frame with a checksum as the zstd command writes it; pyarrow writes none, so it is added.

    RFC 8878: bit 2 of the descriptor after the magic, then the low half of xxh64 at the end.
    """
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    frame = bytearray(sink.getvalue().to_pybytes())
    frame[4] |= 1 << 2
    return bytes(frame) + xxhash.xxh64_digest(content)[:3:-1]


def parquet(columns: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(columns)
    pq.write_table(table, file, row_group_size=150, write_page_checksum=True)
    return file.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(name: str, content: bytes) -> list[Source]:
    Path(name).write_bytes(content)
    return find_inputs([name])


def read(content: bytes, name: str = "in.jsonl") -> list[Row | BadRow]:
    sources = source(name, content)
    result = list(read_rows(sources))
    assert check_inputs(sources).num_rows == len(result)
    return result


def columns_of(found: list[Row | BadRow]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in found)
    return [row.columns for row in found if isinstance(row, Row)]


def bad(found: list[Row | BadRow]) -> BadRow:
    (row,) = found
    assert isinstance(row, BadRow)
    return row


def unusable(sources: list[Source]) -> CommandError:
    with pytest.raises(CommandError) as caught:
        check_inputs(sources)
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
    assert sources[-1].name in caught.value.message
    return caught.value


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Source]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return find_inputs(["-"])


# Inputs


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
    for name in [*wanted, "notes.txt", ".hidden.jsonl", "x.csv.gz", "deeper/f.jsonl"]:
        (directory / name).touch()
    assert names(["data"]) == [f"data/{name}" for name in wanted]


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
    assert pipe.format is None
    assert check_inputs([pipe]) == InputSummary(num_rows=None, num_bytes=0)


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
    assert source("input.txt", content)[0].format == expected


# JSON lines


def test_rows_are_numbered_over_all_inputs_and_lines_within_each() -> None:
    sources = source("a.jsonl", b'{"a":1}\n\nnull\n') + source("b.jsonl", b'{"a":2}')
    found = [(row.index, row.source, row.line) for row in read_rows(sources)]
    assert found == [(0, "a.jsonl", 1), (1, "a.jsonl", 3), (2, "b.jsonl", 1)]
    assert check_inputs(sources) == InputSummary(num_rows=3, num_bytes=21)


def test_a_row_keeps_its_line_byte_for_byte() -> None:
    line = b' {"a" : 1.00, "b": "\\u00e9"} '
    (row,) = read(line + b"\r\n")
    assert isinstance(row, Row)
    assert row.raw == line


def test_a_blank_line_is_no_row() -> None:
    assert columns_of(read(b'\n{"a":1}\n\r\n  \t\n{"a":2}\n\n')) == [{"a": 1}, {"a": 2}]


def test_a_last_line_without_newline_is_a_row() -> None:
    assert columns_of(read(b'{"a":1}\n{"a":2}')) == [{"a": 1}, {"a": 2}]


def test_an_empty_file_has_no_rows_and_is_no_error() -> None:
    assert read(b"") == []
    assert read(gzip.compress(b""), "in.jsonl.gz") == []
    assert read(parquet([]), "in.parquet") == []


def test_a_byte_order_mark_is_dropped_at_the_start_only() -> None:
    good, other = read(b'\xef\xbb\xbf{"a":1}\n\xef\xbb\xbf{"a":2}\n')
    assert isinstance(good, Row)
    assert good.raw == b'{"a":1}'
    assert bad([other]).code == "invalid_json"


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(sign: str) -> None:
    assert columns_of(read(f'{{"a":"x{sign}y"}}\n'.encode())) == [{"a": f"x{sign}y"}]


@pytest.mark.parametrize("sign", [b"\0", b"\r", b"\x0b", b"\x0c", b"\x1c"])
def test_a_control_character_is_an_error_and_no_line_break(sign: bytes) -> None:
    row = bad(read(b'{"id":"i","a":"x' + sign + b'y"}\n'))
    assert (row.code, row.id) == ("invalid_json", "i")
    assert "column" in row.message


@pytest.mark.parametrize(
    "line",
    [b'{"a":NaN}', b'{"a":Infinity}', b'{"a":"\\ud800"}', b"{'a':1}", b'{"a":1,}', b'{"a":"\xff"}'],
)
def test_json_is_parsed_strictly(line: bytes) -> None:
    assert bad(read(line)).code == "invalid_json"


@pytest.mark.parametrize("line", [b"[1]", b"1", b'"text"', b"null", b"true"])
def test_a_line_must_hold_an_object(line: bytes) -> None:
    row = bad(read(line))
    assert row.code == "not_an_object"
    assert line.decode() in row.message


def test_an_error_names_line_and_column() -> None:
    _, row = read(b'{"a":1}\n{"a":x}\n')
    assert "line 2 column 6" in bad([row]).message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id":"a\\"b", "x":NaN}', 'a"b'),
        (b' { "custom_id" : 17, "x":NaN}', 17),
        (b'{"x":{"id":1}, "y":NaN}', None),  # whose id it is can not be known
        (b'{"id":"\\ud800", "y":NaN}', None),
        (b'{"id":1.5, "y":NaN}', None),
    ],
)
def test_a_broken_line_keeps_its_id_where_it_comes_first(
    line: bytes, expected: str | int | None
) -> None:
    assert bad(read(line)).id == expected


def test_a_too_long_line_is_one_bad_row_and_the_next_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 64)
    exact = b'{"id":"a","a":"%s"}' % (b"x" * 83)
    assert len(exact) == 100
    for long in (exact + b" ", b'{"id":"a","a":"%s"}' % (b"x" * 500), b" " * 101 + b"{}"):
        first, middle, last = read(exact + b"\n" + long + b"\n" + exact)
        assert isinstance(first, Row)
        assert bad([middle]).code == "line_too_long"
        assert (last.index, last.line) == (2, 3)
        assert isinstance(last, Row)


def test_lines_are_the_same_whatever_the_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'\xef\xbb\xbf{"a":1}\r\n\n\n{"b":"\xc3\xa9"}\nx\n' * 3
    expected = read(content)
    for size in range(1, 40):
        monkeypatch.setattr(rows, "_CHUNK_BYTES", size)
        assert read(content) == expected


def test_a_limit_counts_good_and_bad_rows() -> None:
    sources = source("a.jsonl", b'{"a":1}\nx\n{"a":2}\n') + source("b.jsonl", b'{"a":3}')
    for limit in range(6):
        assert len(list(read_rows(sources, limit=limit))) == min(limit, 4)
        assert check_inputs(sources, limit=limit).num_rows == min(limit, 4)


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
    assert check_inputs(sources) == InputSummary(num_rows=None, num_bytes=0)
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
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 10)
    monkeypatch.setattr(rows, "_COMPRESSED_CHUNK_BYTES", 1)  # of which come many more than 10
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


# Parquet


def test_parquet_values_keep_their_types() -> None:
    row = {
        "id": "007",
        "prompt": "12e3",
        "at": datetime(2024, 5, 6, 7, 8, 9, 123456),
        "none": None,
        "messages": [{"role": "user", "content": "x"}],
        "number": 1 << 62,
    }
    found = read(parquet([row]), "in.parquet")
    assert columns_of(found) == [row]
    assert (found[0].line, isinstance(found[0], Row) and found[0].raw) == (1, None)


def test_parquet_nanoseconds_are_no_pandas_type_and_never_cut() -> None:
    times = pa.array([1_000, 1_001], pa.timestamp("ns", "UTC"))
    pq.write_table(pa.table({"at": times, "prompt": ["a", "b"]}), "in.parquet")
    good, cut = list(read_rows(find_inputs(["in.parquet"])))
    assert isinstance(good, Row)
    assert type(good.columns["at"]) is datetime
    assert bad([cut]).code == "bad_value"


def test_a_parquet_value_that_python_cannot_hold_is_a_bad_row() -> None:
    texts = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")],
    )
    pq.write_table(pa.table({"prompt": texts}), "in.parquet")
    found = list(read_rows(find_inputs(["in.parquet"])))
    assert [isinstance(row, Row) for row in found] == [True, False, True]
    assert bad([found[1]]).code == "bad_value"
    assert [row.line for row in found] == [1, 2, 3]


def test_parquet_is_numbered_over_batches_and_row_groups() -> None:
    columns = [{"id": at} for at in range(5000)]
    found = read(parquet(columns), "in.parquet")
    assert columns_of(found) == columns
    assert [row.index for row in found] == list(range(5000))


def test_parquet_with_two_columns_of_one_name_is_unusable() -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, "in.parquet")
    unusable(find_inputs(["in.parquet"]))


def parquet_damaged_in_row_group(group: int) -> list[Source]:
    content = bytearray(parquet(COLUMNS))
    column = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(group).column(1)
    content[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 1
    return source("in.parquet", bytes(content))


def test_damaged_parquet_names_the_row_group() -> None:
    assert "row group 3 of 4" in unusable(parquet_damaged_in_row_group(2)).message


def test_a_footer_that_counts_other_rows_is_found() -> None:
    content = parquet(COLUMNS)
    count = b"\x16\xb0\x09"  # Thrift's 64-bit 600, of which there is one
    assert content.count(count) == 1
    error = unusable(source("in.parquet", content.replace(count, b"\x16\xae\x09")))
    assert "footer" in error.message


def test_damage_beyond_the_limit_is_not_looked_for() -> None:
    sources = parquet_damaged_in_row_group(3)
    unusable(sources)
    assert check_inputs(sources, limit=10).num_rows == 10
    assert columns_of(list(read_rows(sources, limit=10))) == COLUMNS[:10]


# Damage: 65 or the very same rows, never a partial success


def damaged(content: bytes, ends: set[int], trials: int, seed: int) -> Iterator[bytes]:
    """`content` cut, or with a byte changed; cut at `ends`, it would be a whole file."""
    rng = random.Random(seed)
    for trial in range(trials):
        place = rng.randrange(len(content))
        if trial % 2 and place not in ends:
            yield content[:place]
        else:
            changed = bytearray(content)
            changed[place] ^= rng.randrange(1, 256)
            yield bytes(changed)


def as_text(columns: dict[str, Any]) -> dict[str, Any]:
    """Parquet may lose the mark that bytes are text; the rows are all there, and in view."""
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in columns.items()}


def error_of(sources: list[Source]) -> CommandError | None:
    try:
        check_inputs(sources)
    except CommandError as error:
        return error
    return None


def assert_never_a_partial_success(suffix: str, trials: int) -> None:
    if suffix == ".parquet":
        content, ends = parquet(COLUMNS), set()
    else:
        half = LINES.index(b"\n", len(LINES) // 2) + 1
        first, second = COMPRESS[suffix](LINES[:half]), COMPRESS[suffix](LINES[half:])
        content, ends = first + second, {len(first)}
    num_found = 0
    for content_ in damaged(content, ends, trials, seed=trials):
        sources = source(f"in{suffix}", content_)
        error = error_of(sources)
        if error is None:
            assert [as_text(c) for c in columns_of(list(read_rows(sources)))] == COLUMNS
            continue
        num_found += 1
        assert error.exit_code == ExitCode.INPUT_UNUSABLE
        assert re.search(r"byte \d+|row group \d+ of \d+|footer", error.message), error.message
    assert num_found > trials * (0.5 if suffix == ".parquet" else 0.9)


SUFFIXES = [".gz", ".zst", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_never_a_partial_success(suffix: str) -> None:
    assert_never_a_partial_success(suffix, 67)


@pytest.mark.long
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_never_a_partial_success_at_full_size(suffix: str) -> None:
    assert_never_a_partial_success(suffix, 667)
