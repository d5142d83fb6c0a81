"""parquet_values.py: every type of Parquet travels through; what JSON has not becomes text."""

import decimal
import random
import uuid
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.parquet_values import rows_of
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.results import Sample, result_line
from nanovllm_cli.rows import Row, read_rows

SECOND = 10**9
TIME = 1_709_251_199 * SECOND  # 2024-02-29T23:59:59 UTC


def written(array: pa.Array, path: Any) -> list[Any]:
    """What the output has for the values of a column, which a Parquet file held."""
    table = pa.table({"prompt": ["a"] * len(array), "x": array})
    pq.write_table(table, path)
    values = []
    for row in read_rows(find_inputs([str(path)])):
        assert isinstance(row, Row), row
        prompt = to_prompt(row, PromptOptions())
        assert isinstance(prompt, Prompt)
        sample = Sample(text="", reasoning=None, finish_reason="stop", num_tokens=1)
        line = result_line(prompt, [sample], 1, shape="columns", model="m")
        values.append(orjson.loads(line)["x"])
    return values


def nanoseconds(*values: int | None, zone: str | None = None) -> pa.Array:
    return pa.array(values, pa.timestamp("ns", zone))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (
            nanoseconds(TIME, TIME + 123_456_000, TIME + 123_456_789, TIME + 1, -1, None),
            [
                *("2024-02-29T23:59:59", "2024-02-29T23:59:59.123456"),
                *("2024-02-29T23:59:59.123456789", "2024-02-29T23:59:59.000000001"),
                *("1969-12-31T23:59:59.999999999", None),
            ],
        ),
        (nanoseconds(TIME + 7, zone="UTC"), ["2024-02-29T23:59:59.000000007+00:00"]),
        (nanoseconds(TIME + 7, zone="Europe/Berlin"), ["2024-03-01T00:59:59.000000007+01:00"]),
        (nanoseconds(TIME + 7, zone="-03:30"), ["2024-02-29T20:29:59.000000007-03:30"]),
        (nanoseconds(TIME + 7, zone="No/Where"), ["2024-02-29T23:59:59.000000007+00:00"]),
        (nanoseconds(-(2**63) + 1), ["1677-09-21T00:12:43.145224193"]),
        (pa.array([1_500], pa.timestamp("ms")), ["1970-01-01T00:00:01.500000"]),
        (pa.array([10**15], pa.timestamp("ms")), ["33658-09-27T01:46:40"]),
        (pa.array([10**15 + 7], pa.timestamp("ms", "UTC")), ["33658-09-27T01:46:40.007000+00:00"]),
        (pa.array([0, -719_162, None], pa.date32()), ["1970-01-01", "0001-01-01", None]),
        (pa.array([10**8], pa.date32()), ["275760-09-13"]),
        (pa.array([86_399_007], pa.time32("ms")), ["23:59:59.007000"]),
        (pa.array([3_600 * SECOND + 1, None], pa.time64("ns")), ["01:00:00.000000001", None]),
        (pa.array([0], pa.time64("us")), ["00:00:00"]),
        (pa.array([90_000 * SECOND + 1], pa.duration("ns")), ["PT90000.000000001S"]),
        (pa.array([-1_500, 0], pa.duration("ms")), ["-PT1.5S", "PT0S"]),
        (pa.array([2**62], pa.duration("s")), ["PT4611686018427387904S"]),
        (pa.array([decimal.Decimal("-1.10"), None], pa.decimal128(20, 2)), ["-1.10", None]),
        (pa.array([decimal.Decimal(0)], pa.decimal256(60, 10)), ["0.0000000000"]),
        (pa.array([b"a\xff", None]), ["Yf8=", None]),
        (pa.array([b"ab"], pa.binary(2)), ["YWI="]),
        (pa.array([b"ab", b"ab"]).dictionary_encode(), ["YWI=", "YWI="]),
        (pa.array(["no", "no", None]).dictionary_encode(), ["no", "no", None]),
        (nanoseconds(TIME + 1).dictionary_encode(), ["2024-02-29T23:59:59.000000001"]),
        (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
        (pa.array([float("nan"), float("-inf"), 0.5]), [None, None, 0.5]),
        (pa.array([uuid.UUID(int=7).bytes], pa.uuid()), ["00000000-0000-0000-0000-000000000007"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_value_that_json_has_no_type_for_becomes_text(
    array: pa.Array, expected: list[Any], tmp_path: Any
) -> None:
    assert written(array, tmp_path / "in.parquet") == expected


@pytest.mark.parametrize("zone", [None, "UTC", "America/St_Johns"])
def test_times_that_python_can_hold_are_written_as_orjson_writes_them(zone: str | None) -> None:
    rng = random.Random(0)
    days = [rng.randrange(-719_162, 2_932_896) for _ in range(300)]
    seconds = [rng.randrange(-(10**9), 10**10) for _ in days]  # since zones are whole minutes
    micros = [second * 10**6 + rng.choice((0, 1, 999_999, 500_000)) for second in seconds]
    batch = pa.record_batch(
        {
            "date": pa.array(days, pa.date32()),
            "s": pa.array(seconds, pa.timestamp("s", zone)),
            "us": pa.array(micros, pa.timestamp("us", zone)),
            "time": pa.array([micro % (86_400 * 10**6) for micro in micros], pa.time64("us")),
        }
    )
    expected = [orjson.loads(orjson.dumps(row)) for row in batch.to_pylist()]
    assert [row for row, _ in rows_of(batch)] == expected


TEXT = "1970-01-01T00:00:00.000000001"
NESTED: list[tuple[Any, Any, Any]] = [
    (pa.list_(pa.timestamp("ns")), [1, None], [TEXT, None]),
    (pa.large_list(pa.timestamp("ns")), [1], [TEXT]),
    (pa.list_(pa.timestamp("ns"), 2), [1, None], [TEXT, None]),
    (pa.struct({"a": pa.timestamp("ns"), "b": pa.int8()}), {"a": 1, "b": 2}, {"a": TEXT, "b": 2}),
    (pa.struct({"a": pa.struct({"b": pa.time32("s")})}), {"a": {"b": 1}}, {"a": {"b": "00:00:01"}}),
    (pa.map_(pa.string(), pa.timestamp("ns")), [("k", 1), ("l", None)], [["k", TEXT], ["l", None]]),
    (pa.map_(pa.date32(), pa.string()), [(0, "x")], [["1970-01-01", "x"]]),
    (pa.map_(pa.string(), pa.int8()), [("k", 1)], [["k", 1]]),
    (
        pa.list_(pa.struct({"m": pa.map_(pa.string(), pa.list_(pa.decimal128(5, 1)))})),
        [{"m": [("k", [decimal.Decimal("1.5"), None])]}, None],
        [{"m": [["k", ["1.5", None]]]}, None],
    ),
]


@pytest.mark.parametrize(("kind", "value", "expected"), NESTED, ids=[str(k) for k, *_ in NESTED])
def test_so_do_the_values_within_it(kind: Any, value: Any, expected: Any, tmp_path: Any) -> None:
    assert written(pa.array([value, None], kind), tmp_path / "in.parquet") == [expected, None]


def test_a_template_takes_every_type_but_binary(tmp_path: Any) -> None:
    table = pa.table(
        {
            "at": pa.array([1], pa.timestamp("ns")),
            "price": pa.array([decimal.Decimal("1.10")]),
            "raw": [b"x"],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    (row,) = read_rows(find_inputs([str(tmp_path / "in.parquet")]))
    assert isinstance(row, Row)
    prompt = to_prompt(row, PromptOptions(template="{price} at {at}"))
    assert isinstance(prompt, Prompt)
    assert prompt.text == "1.10 at 1970-01-01T00:00:00.000000001"
    refused = to_prompt(row, PromptOptions(template="{raw}"))
    assert not isinstance(refused, Prompt)
    assert refused.code == "template_error"


def test_a_binary_prompt_is_no_text(tmp_path: Any) -> None:
    pq.write_table(pa.table({"prompt": [b"x"]}), tmp_path / "in.parquet")
    (row,) = read_rows(find_inputs([str(tmp_path / "in.parquet")]))
    assert isinstance(row, Row)
    refused = to_prompt(row, PromptOptions())
    assert not isinstance(refused, Prompt)
    assert refused.code == "bad_prompt"


def test_a_uuid_can_be_the_id_of_a_row(tmp_path: Any) -> None:
    ids = pa.array([uuid.UUID(int=7).bytes], pa.uuid())
    pq.write_table(pa.table({"id": ids, "prompt": ["x"]}), tmp_path / "in.parquet")
    (row,) = read_rows(find_inputs([str(tmp_path / "in.parquet")]))
    assert isinstance(row, Row)
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt)
    assert prompt.id == str(uuid.UUID(int=7))
