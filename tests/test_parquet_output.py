"""Rows -> Parquet: columns from Parquet keep their exact types, columns from JSON get good ones."""

import datetime
import decimal
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source, find_inputs
from nanovllm_cli.output_columns import SCORE_COLUMNS, OutputColumns
from nanovllm_cli.parquet_output import write_parquet
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.results import result_line
from nanovllm_cli.rows import Row, check_inputs, read_rows
from nanovllm_cli.samples import Sample
from nanovllm_cli.scored_tokens import ScoredToken
from nanovllm_cli.token_texts import TokenText
from nanovllm_cli.tool_calls import ToolCall

from .job_folder import JobFolder, good_rows

STDIN = [Source(name="<stdin>", path=None)]
RESULTS = ["completion", "reasoning", "finish_reason", "usage"]


def samples(count: int = 1) -> list[Sample]:
    return [
        Sample(text=f"text {n}", reasoning=None, finish_reason="stop", num_tokens=3)
        for n in range(count)
    ]


def complete(sources: list[Source], *, shape: Any = "columns") -> list[tuple[int, bytes]]:
    """What a job makes of the rows of `sources`: (row index, line) in input order."""
    lines = []
    for row in read_rows(sources):
        assert isinstance(row, Row)
        prompt = to_prompt(row, PromptOptions())
        assert isinstance(prompt, Prompt), prompt
        kind = "openai" if prompt.endpoint else shape
        lines.append((row.index, result_line(prompt, samples(), 4, shape=kind, model="m")))
    return lines


def written(
    path: Path, lines: list[tuple[int, bytes]], sources: list[Source], *chosen: str
) -> pa.Table:
    def again() -> Iterator[tuple[int, bytes]]:
        return iter(lines)

    write_parquet(path, again, sources, OutputColumns(chosen=chosen))
    return pq.read_table(path)


def from_json(tmp_path: Path, rows: list[dict[str, Any]]) -> pa.Table:
    """The table of rows that came as JSON, without results."""
    lines = [(index, orjson.dumps(row)) for index, row in enumerate(rows)]
    return written(tmp_path / "out.parquet", lines, STDIN)


def typed_table(num_rows: int) -> pa.Table:
    """Every type that JSON does not have, and values that a careless reader changes."""
    day = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456)
    numbers = range(num_rows)

    def column(kind: pa.DataType, value: Any) -> pa.Array:
        return pa.array([None if n % 5 == 4 else value for n in numbers], kind)

    berlin = pa.timestamp("us", "Europe/Berlin")
    return pa.table(
        {
            "prompt": pa.array([f"p{n}" for n in numbers]),
            "zeros": column(pa.string(), "007"),
            "exponent": column(pa.string(), "12e3"),
            "large": column(pa.large_string(), "x"),
            "word": column(pa.string(), "no").dictionary_encode(),
            "int8": column(pa.int8(), -128),
            "uint64": column(pa.uint64(), 2**64 - 1),
            "int64": column(pa.int64(), -(2**63)),
            "float32": column(pa.float32(), 0.1),
            "not_a_number": column(pa.float64(), float("nan")),
            "infinite": column(pa.float64(), float("-inf")),
            "bool": column(pa.bool_(), True),
            "binary": column(pa.binary(), b"\x00\xff\n"),
            "decimal": column(pa.decimal128(20, 4), decimal.Decimal("1.1000")),
            "date": column(pa.date32(), day.date()),
            "time": column(pa.time64("us"), day.time()),
            "naive": column(pa.timestamp("ms"), day.replace(microsecond=123000)),
            "zoned": column(berlin, day.replace(tzinfo=datetime.UTC)),
            "nanoseconds": pa.array([n * 1000 for n in numbers], pa.timestamp("ns")),
            "duration": column(pa.duration("ms"), datetime.timedelta(days=1, milliseconds=7)),
            "list": column(pa.list_(pa.list_(pa.int16())), [[1, None], [], None]),
            "struct": column(
                pa.struct([("a", pa.timestamp("us")), ("b", pa.list_(pa.struct([("c", "i4")])))]),
                {"a": day, "b": [{"c": 1}, None]},
            ),
            "map": column(pa.map_(pa.string(), pa.int32()), [("k", 1)]),
            "nothing": pa.nulls(num_rows),
        }
    )  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 2500])
def test_columns_from_parquet_keep_their_values_and_types(num_rows: int, tmp_path: Path) -> None:
    given = typed_table(num_rows)
    pq.write_table(given, tmp_path / "in.parquet", row_group_size=700)
    sources = find_inputs([str(tmp_path / "in.parquet")])
    found = written(tmp_path / "out.parquet", complete(sources), sources)
    assert found.column_names == [*given.column_names, *RESULTS]
    before = pq.read_table(tmp_path / "in.parquet")
    for name in given.column_names:
        assert found.schema.field(name).type == before.schema.field(name).type, name
        if name != "not_a_number":  # which does not equal itself
            assert found.column(name).equals(before.column(name)), name
    assert found.column("int64").to_pylist()[0] == -(2**63)
    assert found.column("zeros").to_pylist()[0] == "007"
    assert found.column("completion").to_pylist() == ["text 0"] * num_rows
    assert set(map(str, found.column("usage").to_pylist())) == {
        "{'prompt_tokens': 4, 'completion_tokens': 3}"
    }


def test_nanoseconds_that_are_whole_microseconds_keep_their_type(tmp_path: Path) -> None:
    times = pa.array([1000, 10**18 + 1000], pa.timestamp("ns"))
    given = pa.table({"prompt": ["a", "b"], "at": times})
    pq.write_table(given, tmp_path / "in.parquet")
    sources = find_inputs([str(tmp_path / "in.parquet")])
    found = written(tmp_path / "out.parquet", complete(sources), sources)
    assert found.column("at").equals(given.column("at"))


def test_the_right_rows_are_kept_where_others_failed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(
            pa.table({"prompt": [f"{name}{n}" for n in range(1500)], "number": range(1500)}),
            tmp_path / f"{name}.parquet",
            row_group_size=400,
        )
    sources = find_inputs([str(tmp_path / f"{name}.parquet") for name in ("b", "a", "c")])
    kept = [line for line in complete(sources) if line[0] % 7 == 3 or line[0] // 1500 == 2]
    found = written(tmp_path / "out.parquet", kept, sources)
    expected = [orjson.loads(line) for _, line in kept]
    assert found.column("prompt").to_pylist() == [row["prompt"] for row in expected]
    assert found.column("number").to_pylist() == [row["number"] for row in expected]


def test_parquet_files_of_different_columns_are_put_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "y": ["2"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "c", "x": 2.5}\n')
    sources = find_inputs([str(tmp_path)])
    found = written(tmp_path / "out.parquet", complete(sources), sources)
    assert found.select(["prompt", "x", "y"]).to_pylist() == [
        {"prompt": "a", "x": 1.0, "y": None},
        {"prompt": "b", "x": None, "y": "2"},
        {"prompt": "c", "x": 2.5, "y": None},
    ]


def test_a_column_of_a_results_name_gives_way_to_the_result(tmp_path: Path) -> None:
    table = pa.table({"usage": [1.5], "prompt": ["a"], "completion": [7], "reasoning": [b"x"]})
    pq.write_table(table, tmp_path / "in.parquet")
    sources = find_inputs([str(tmp_path / "in.parquet")])
    found = written(tmp_path / "out.parquet", complete(sources), sources)
    assert found.column_names == ["prompt", *RESULTS]
    assert found.column("completion").to_pylist() == ["text 0"]
    assert found.schema.field("reasoning").type == pa.string()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([True, False], pa.bool_()),
        (["007", "12e3", "2024-01-01"], pa.string()),
        (["a", 1, None, [2], {"b": 3}], pa.string()),
        ([True, 1], pa.string()),
        ([None, None], pa.null()),
        ([[1], [], None], pa.list_(pa.int64())),
        ([[], []], pa.list_(pa.null())),
        ([[1], ["a"]], pa.string()),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([{"a": 1}, {"a": "x"}], pa.string()),
        ([{}, {}], pa.string()),  # Parquet has no struct without fields
        ([{"a": {}}, {"a": {}}], pa.string()),
        ([[{}]], pa.string()),
        ([2**63 - 1, -(2**63)], pa.int64()),
        ([2**63, 1], pa.string()),
        ([2**64 - 1, -1], pa.string()),
        ([2**60 + 1, 0.5], pa.string()),
    ],
    ids=str,
)
def test_columns_from_json_get_the_type_that_all_their_values_have(
    values: list[Any], kind: pa.DataType, tmp_path: Path
) -> None:
    found = from_json(tmp_path, [{"x": value} for value in values])
    assert found.schema.field("x").type == kind
    texts = [v if v is None or isinstance(v, str) else orjson.dumps(v).decode() for v in values]
    shown = found.column("x").to_pylist()
    if kind == pa.string():
        assert shown == texts
    elif not pa.types.is_struct(kind):
        assert shown == values


@pytest.mark.parametrize(
    ("first", "later", "kind"),
    [
        (1, 2.5, pa.float64()),
        (2**60, 2.5, pa.float64()),
        ([2**60], [2.5], pa.list_(pa.float64())),
        (1, "a", pa.string()),
        (None, 7, pa.int64()),
        ([1], ["a"], pa.string()),
        ([], ["a"], pa.list_(pa.string())),
        ({"a": 1}, {"b": 2}, pa.struct([("a", pa.int64()), ("b", pa.int64())])),
        ({}, {"a": 1}, pa.struct([("a", pa.int64())])),
        (True, 1, pa.string()),
        (1, 2**63, pa.string()),
    ],
    ids=str,
)
def test_a_type_that_changes_far_down_is_still_found(
    first: Any, later: Any, kind: pa.DataType, tmp_path: Path
) -> None:
    rows = [{"x": first} for _ in range(2048)] + [{"x": later} for _ in range(1500)]
    found = from_json(tmp_path, rows)
    assert found.num_rows == 3548
    assert found.schema.field("x").type == kind
    if kind == pa.string():
        texts = {v if isinstance(v, str) else orjson.dumps(v).decode() for v in (first, later)}
        assert set(found.column("x").to_pylist()) == texts


def test_an_object_with_a_name_for_every_datum_is_text(tmp_path: Path) -> None:
    rows = [{"x": {"top": [{f"token {n}": n}]}, "y": {"a": n}} for n in range(3000)]
    found = from_json(tmp_path, rows)
    assert found.schema.field("x").type == pa.string()
    assert [orjson.loads(text) for text in found.column("x").to_pylist()] == [
        row["x"] for row in rows
    ]
    assert found.schema.field("y").type == pa.struct([("a", pa.int64())])


def test_a_column_that_comes_late_is_empty_before(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1} for _ in range(2000)]
    found = from_json(tmp_path, [*rows, {"b": "x", "a": 2}])
    assert found.column_names == ["a", "b"]
    assert found.column("b").to_pylist() == [None] * 2000 + ["x"]


def test_several_completions_are_a_list_of_them(tmp_path: Path) -> None:
    row = Row(index=0, source="s", line=1, raw=b'{"prompt": "a"}', columns={"prompt": "a"})
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt)
    lines = [
        (index, result_line(prompt, samples(count), 4, shape="columns", model="m"))
        for index, count in enumerate((2, 1))
    ]
    found = written(tmp_path / "out.parquet", lines, STDIN)
    assert found.column_names == [
        *("prompt", "completion", "completions", "reasoning", "finish_reason", "usage")
    ]
    several, one = found.to_pylist()
    assert [sample["completion"] for sample in several["completions"]] == ["text 0", "text 1"]
    assert several["completion"] is None
    assert one["completion"] == "text 0"
    assert one["completions"] is None


def test_log_probabilities_and_tool_calls_are_nested_columns(tmp_path: Path) -> None:
    whole, part = TokenText(7, "a", b"a", True), TokenText(8, "\ufffd", b"\xf0\x9f", False)
    tokens = [ScoredToken(whole, -0.1, [(part, -1.5)]), ScoredToken(part, None, [])]
    call = ToolCall("f", "{}")
    row = Row(index=0, source="s", line=1, raw=b'{"prompt": "a"}', columns={"prompt": "a"})
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt)
    made = Sample(text="x", reasoning=None, finish_reason="tool_calls", num_tokens=2,
                  tool_calls=[call], logprobs=tokens)  # fmt: skip
    lines = [
        (0, result_line(prompt, samples(), 4, shape="columns", model="m")),
        (1, result_line(prompt, [made], 4, shape="columns", model="m", prompt_logprobs=tokens)),
        (2, result_line(prompt, [made, *samples()], 4, shape="columns", model="m")),
    ]
    found = written(tmp_path / "out.parquet", lines, STDIN)
    assert found.column_names == [
        *("prompt", "completion", "completions", "reasoning", "tool_calls", "finish_reason"),
        *("logprobs", "prompt_logprobs", "usage"),
    ]
    plain, one, several = found.to_pylist()
    first = {"token": "a", "token_id": 7, "logprob": np.float32(-0.1), "bytes": None}
    second = {"token": "\ufffd", "token_id": 8, "logprob": None, "bytes": [0xF0, 0x9F]}
    expected = [
        {**first, "top": [{**second, "logprob": -1.5}]},
        {**second, "top": None},
    ]
    assert one["logprobs"] == one["prompt_logprobs"] == expected
    assert one["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert several["completions"][0]["logprobs"] == expected
    assert several["completions"][1]["tool_calls"] is None
    for name in ("logprobs", "prompt_logprobs", "tool_calls"):
        assert plain[name] is None
        assert several[name] is None


def test_openai_lines_have_their_response_in_parquet_too(tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": "a"},
        }
        for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "in.parquet")
    sources = find_inputs([str(tmp_path / "in.parquet")])
    found = written(tmp_path / "out.parquet", complete(sources), sources)
    assert found.column_names == ["id", "custom_id", "response", "error"]
    assert found.column("custom_id").to_pylist() == ["c0", "c1", "c2"]
    choices = [row["body"]["choices"] for row in found.column("response").to_pylist()]
    assert [choice[0]["text"] for choice in choices] == ["text 0"] * 3


def test_rows_made_openai_lines_have_their_response_in_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x", "y"], "prompt": ["a", "b"]}), tmp_path / "in.parquet")
    sources = find_inputs([str(tmp_path / "in.parquet")])
    lines = complete(sources, shape="openai")
    found = written(tmp_path / "out.parquet", lines, sources)
    assert found.to_pylist() == [orjson.loads(line) for _, line in lines]


def test_a_pipe_that_was_read_is_not_opened_again(tmp_path: Path) -> None:
    fifo = tmp_path / "in.jsonl"
    os.mkfifo(fifo)
    sources = find_inputs([str(fifo)])
    feeder = threading.Thread(target=fifo.write_bytes, args=(b'{"prompt": "a", "number": 1}\n',))
    feeder.start()
    lines = complete(sources)
    feeder.join()
    writer = threading.Thread(target=written, args=(tmp_path / "o.parquet", lines, sources))
    writer.daemon = True  # it would wait for someone to write to the pipe
    writer.start()
    writer.join(30)
    assert not writer.is_alive()
    assert pq.read_table(tmp_path / "o.parquet").column("number").to_pylist() == [1]


@pytest.mark.parametrize(
    "values",
    [
        [True, 0.5],
        [0.5, True, None],
        [[1.0], [False]],
        [{"a": 0.5}, {"a": True}],
        [{"a": [{"b": 0.5}, {"b": None}]}, {"a": [{"b": False}]}],
        [2**53 + 1] * 1024 + [0.5],
        [[2**53 + 1]] * 1024 + [[0.5]],
        [0.5] * 1024 + [-(2**53) - 1],
    ],
    ids=lambda values: str(values[-1]),
)
def test_values_that_one_type_would_change_are_json_text(values: Any, tmp_path: Path) -> None:
    found = from_json(tmp_path, [{"x": value} for value in values])
    assert pa.types.is_string(found.schema.field("x").type)
    read = [None if text is None else orjson.loads(text) for text in found["x"].to_pylist()]
    assert repr(read) == repr(values)


def test_values_that_are_equal_in_one_type_keep_it(tmp_path: Path) -> None:
    values = [1, 0.5, None, -3]
    found = from_json(tmp_path, [{"x": value} for value in values])
    assert found["x"].type == pa.float64()
    assert found["x"].to_pylist() == values
    vectors = from_json(tmp_path, [{"x": [1, 0.5]}, {"x": [2.5, None]}])
    assert vectors["x"].type == pa.list_(pa.float64())
    assert vectors["x"].to_pylist() == [[1.0, 0.5], [2.5, None]]


def test_row_groups_are_large_and_compressed_and_the_bytes_the_same(tmp_path: Path) -> None:
    num_rows = (1 << 16) + 5
    lines = [(n, b'{"prompt":"p%d","completion":"c"}' % n) for n in range(num_rows)]
    for name in ("a", "b"):
        write_parquet(
            tmp_path / name, lambda: iter(lines), STDIN, OutputColumns(), {"nanovllm.x": "y"}
        )
    metadata = pq.ParquetFile(tmp_path / "a").metadata
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [1 << 16, 5]
    assert {group.column(at).compression for group in groups for at in range(2)} == {"ZSTD"}
    assert metadata.metadata[b"nanovllm.x"] == b"y"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.read_table(tmp_path / "a")["prompt"].to_pylist()[-1] == f"p{num_rows - 1}"


def test_a_row_group_is_bounded_in_bytes(tmp_path: Path) -> None:
    text = b"x" * (1 << 20)
    lines = [(n, b'{"prompt":"%s"}' % text) for n in range(200)]
    write_parquet(tmp_path / "out.parquet", lambda: iter(lines), STDIN, OutputColumns())
    metadata = pq.ParquetFile(tmp_path / "out.parquet").metadata
    sizes = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    assert sum(sizes) == 200
    assert 100 < sizes[0] < 150


@pytest.mark.parametrize("from_parquet", [False, True])
def test_without_rows_there_are_typed_columns(from_parquet: bool, tmp_path: Path) -> None:
    sources = STDIN
    if from_parquet:
        pq.write_table(typed_table(0), tmp_path / "in.parquet")
        sources = find_inputs([str(tmp_path / "in.parquet")])
    found = written(tmp_path / "out.parquet", [], sources)
    given = typed_table(0).schema.names if from_parquet else []
    assert found.schema.names == [*given, *RESULTS]
    assert found.schema.field("completion").type == pa.string()
    assert found.schema.field("usage").type.num_fields == 2
    if from_parquet:
        kept = [found.schema.field(name).type for name in given]
        assert kept == [field.type for field in typed_table(0).schema]
    score = OutputColumns(results=SCORE_COLUMNS)
    write_parquet(tmp_path / "score.parquet", lambda: iter(()), sources, score)
    names = pq.read_schema(tmp_path / "score.parquet").names
    assert names == [*given, "logprob", "num_scored_tokens", "perplexity", "is_greedy"]


def test_inputs_that_have_changed_since_they_were_read_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    for change in ("replaced", "shorter"):
        pq.write_table(pa.table({"prompt": ["a", "b", "c"], "x": [1, 2, 3]}), path)
        sources = find_inputs([str(path)])
        assert check_inputs(sources) == 3
        lines = complete(sources)
        path.unlink()
        rows = 3 if change == "replaced" else 1
        pq.write_table(pa.table({"prompt": ["z"] * rows, "x": [9] * rows}), path)
        with pytest.raises(CommandError, match="has changed since this run") as caught:
            written(tmp_path / "out.parquet", lines, sources)
        assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind < 7:
        large = rng.choice((2**53 + 1, -(2**53) - 1, 2**60, 2**63, -(2**63), 7))
        return (None, True, False, large, rng.randrange(9), 0.5, "x")[kind]
    items = [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind == 7 else dict(zip("abcd", items, strict=False))


def is_kept(given: Any, found: Any, *, is_text: bool) -> bool:
    """Whether it is the same, a struct's missing fields null, and a number equal and no bool."""
    if found is None or given is None:
        return given is found
    if is_text and not isinstance(given, str):
        return repr(orjson.loads(found)) == repr(given)
    if isinstance(given, dict):
        names = {**given, **found}
        return all(is_kept_or_text(given.get(name), found.get(name)) for name in names)
    if isinstance(given, list):
        return len(given) == len(found) and all(map(is_kept_or_text, given, found))
    return bool(given == found) and isinstance(given, bool) == isinstance(found, bool)


def is_kept_or_text(given: Any, found: Any) -> bool:
    return is_kept(given, found, is_text=isinstance(found, str))


def test_random_values_come_back_as_they_were(tmp_path: Path) -> None:
    rng = random.Random(5)
    for trial in range(250):
        kinds = [some_value(rng) for _ in range(rng.choice((1, 2, 3)))]
        rows = [{"x": rng.choice(kinds), "y": some_value(rng)} for _ in range(rng.randrange(1, 9))]
        if trial % 50 == 0:
            rows += [{"x": kinds[0], "y": 0}] * 1024 + [{"x": some_value(rng), "y": 0.5}]
        found = from_json(tmp_path, rows)
        for name in found.schema.names:
            is_text = pa.types.is_string(found.schema.field(name).type)
            for row, value in zip(rows, found[name].to_pylist(), strict=True):
                assert is_kept(row[name], value, is_text=is_text), (name, row, value)


def test_a_job_s_file_says_by_its_fingerprint_how_it_was_made(tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        folder = JobFolder(tmp_path / f"job{len(found)}", good_rows(5), "out.parquet")
        folder.run(seed=seed)
        metadata = pq.read_schema(folder.output).metadata
        assert orjson.loads(metadata[b"nanovllm.fingerprint"]) == folder.stats["fingerprint"]
        found.append(folder.output.read_bytes())
    assert found[0] == found[1] != found[2]
