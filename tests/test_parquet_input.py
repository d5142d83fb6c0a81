"""parquet_input.py: every row of a Parquet file, in order; damage is found."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.inputs import Source, find_inputs
from nanovllm_cli.rows import Row, check_inputs, read_rows

from .input_files import COLUMNS, bad, columns_of, parquet, read, source, unusable


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_parquet_values_keep_their_types() -> None:
    row = {
        "id": "007",
        "prompt": "12e3",
        "none": None,
        "messages": [{"role": "user", "content": "x"}],
        "number": 1 << 62,
    }
    found = read(parquet([row]), "in.parquet")
    assert columns_of(found) == [row]
    assert (found[0].line, isinstance(found[0], Row) and found[0].raw) == (1, None)


def test_a_text_that_is_not_utf8_is_a_bad_row() -> None:
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
    assert check_inputs(sources, limit=10) == 10
    assert columns_of(list(read_rows(sources, limit=10))) == COLUMNS[:10]
