"""rows.py: what is a row, and what makes a bad one."""

import gzip
from pathlib import Path

import orjson
import pytest

from nanovllm_cli import input_lines, rows
from nanovllm_cli.rows import Row, check_inputs, read_rows

from .input_files import bad, columns_of, parquet, read, source


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_rows_are_numbered_over_all_inputs_and_lines_within_each() -> None:
    sources = source("a.jsonl", b'{"a":1}\n\nnull\n') + source("b.jsonl", b'{"a":2}')
    found = [(row.index, row.source, row.line) for row in read_rows(sources)]
    assert found == [(0, "a.jsonl", 1), (1, "a.jsonl", 3), (2, "b.jsonl", 1)]
    assert check_inputs(sources) == 3


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


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_row_that_no_output_could_hold_is_bad(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"

    def nested(depth: int) -> bytes:  # in all, the row's own braces among them
        return b'{"id":"i","x":%s0%s}\n' % (opening * (depth - 1), closing * (depth - 1))

    deepest, *others = read(nested(254) + nested(255) + nested(1000) + nested(1100) + b"{}\n")
    assert isinstance(deepest, Row)
    assert orjson.dumps(deepest.columns) == deepest.raw
    assert [getattr(row, "code", None) for row in others] == [
        *("too_deep", "too_deep", "invalid_json", None)
    ]
    assert bad(others[:1]).id == "i"
    assert "254" in bad(others[:1]).message


def test_a_row_may_have_any_number_of_lists_side_by_side() -> None:
    (row,) = read(b'{"x":[%s]}' % b",".join([b"[]"] * 1000))
    assert isinstance(row, Row)


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
    monkeypatch.setattr(input_lines, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(input_lines, "_CHUNK_BYTES", 64)
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
        monkeypatch.setattr(input_lines, "_CHUNK_BYTES", size)
        assert read(content) == expected


def test_a_limit_counts_good_and_bad_rows() -> None:
    sources = source("a.jsonl", b'{"a":1}\nx\n{"a":2}\n') + source("b.jsonl", b'{"a":3}')
    for limit in range(6):
        assert len(list(read_rows(sources, limit=limit))) == min(limit, 4)
        assert check_inputs(sources, limit=limit) == min(limit, 4)
