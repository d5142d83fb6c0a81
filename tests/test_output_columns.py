"""--output-columns: which columns come out, in which order, and which names are refused."""

import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.core.errors import UserError
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.output_columns import OutputColumns, parse_output_columns
from nanovllm_cli.results import joined
from nanovllm_cli.rows import Row

from .cli import call, generate, read_rows, write_rows
from .job_folder import JobFolder, append, good_rows
from .parsing import chat_line

RESULT = {"completion": "x,{", "usage": {"n": 1}}


def line_of(raw: bytes, *chosen: str, result: dict[str, Any] = RESULT) -> bytes:
    row = Row(index=0, source="s", line=1, raw=raw, columns=orjson.loads(raw))
    return joined(row, result, OutputColumns(chosen=chosen))


def test_the_names_are_put_apart_at_commas() -> None:
    assert parse_output_columns(None) == ()
    assert parse_output_columns("b, a b,completion") == ("b", "a b", "completion")


@pytest.mark.parametrize("text", ["", "a,", ",a", "a,,b", " ", "a,b,a"])
def test_names_that_are_empty_or_there_twice_are_refused(text: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_output_columns(text)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--output-columns" in caught.value.message


def test_members_of_json_stand_as_they_were_given_in_the_order_named() -> None:
    raw = rb' { "a" : 1.50e2 ,"b":"\u0041, }" , "c": [1, {"a": 2}],"\u0064":null } '
    assert line_of(raw, "c", "completion", "a") == (
        b'{"c": [1, {"a": 2}],"completion":"x,{","a" : 1.50e2}'
    )
    assert line_of(raw, "d", "b") == rb'{"\u0064":null,"b":"\u0041, }"}'
    assert line_of(b"{}", "usage") == b'{"usage":{"n":1}}'


def test_a_result_goes_before_a_column_of_its_name() -> None:
    raw = b'{"completion": "old", "reasoning": "old", "a": 1, "a": 2}'
    assert line_of(raw, "completion", "a") == b'{"completion":"x,{","a": 2}'
    assert line_of(raw, "reasoning") == b"{}", "an old result is not the new one"


def test_what_a_row_does_not_have_is_left_out() -> None:
    assert line_of(b'{"a": 1}', "b", "a", "completions") == b'{"a": 1}'


def test_rows_of_parquet_are_chosen_from_alike() -> None:
    columns = {"a": 1, "completion": "old", "b": b"\xff"}
    row = Row(index=0, source="s", line=1, raw=None, columns=columns)
    chosen = ("b", "completion", "nothing", "a")
    line = joined(row, RESULT, OutputColumns(chosen=chosen))
    assert line == b'{"b":"/w==","completion":"x,{","a":1}'
    assert b"a" not in orjson.loads(joined(row, RESULT, OutputColumns(chosen=("usage",))))


# --- the job


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"id": n, "prompt": f"Q: {n}+4=\nA:", "text": "t", "n": None} for n in range(3)]
    return write_rows(tmp_path / "in.jsonl", rows)


def test_the_output_has_the_columns_named(source: Path, tmp_path: Path) -> None:
    flags = ("--max-tokens", "2", "-q")
    whole = generate(source, *flags).rows
    chosen = generate(source, *flags, "--output-columns", "usage,id,completion").rows
    assert [[*row] for row in chosen] == [["usage", "id", "completion"]] * 3
    assert chosen == [{name: row[name] for name in chosen[0]} for row in whole]


def test_parquet_has_the_columns_named_with_their_types(tmp_path: Path) -> None:
    given = pa.table({
        "id": pa.array([1, 2, 3], pa.int16()),
        "prompt": ["Q: 3+4=\nA:", "Q: 4+4=\nA:", ""],
        "at": pa.array([0, 1, 2], pa.timestamp("ns")),
        "unused": ["x", "y", "z"],
    })  # fmt: skip
    pq.write_table(given, tmp_path / "in.parquet")
    rows = given.drop_columns("at").to_pylist()
    write_rows(tmp_path / "in.jsonl", rows)
    flags = ("--max-tokens", "2", "-q", "--output-columns", "completion,at,completions,id")
    output = tmp_path / "out.parquet"
    assert generate(tmp_path / "in.parquet", "-o", output, *flags).code == 3
    found = pq.read_table(output)
    assert found.schema.names == ["completion", "at", "completions", "id"]
    assert found.schema.field("at").type == pa.timestamp("ns")
    assert found.schema.field("id").type == pa.int16()
    assert found.column("id").to_pylist() == [1, 2]
    assert found.column("completions").null_count == 2
    assert len(found.column("completion").to_pylist()[0]) > 0
    flags = (*flags[:3], "--output-columns", "unused,completion,id")
    assert generate(tmp_path / "in.jsonl", "-o", tmp_path / "j.parquet", *flags).code == 3
    again = pq.read_table(tmp_path / "j.parquet")
    assert again.schema.names == ["unused", "completion", "id"]
    assert again.column("completion").equals(found.column("completion"))


def test_a_column_only_in_rows_that_failed_is_empty_in_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": 1, "prompt": "a"}, {"id": 2, "late": 1}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    flags = ("--max-tokens", "1", "-q", "--output-columns", "late,id")
    assert generate(source, "-o", tmp_path / "out.parquet", *flags).code == 3
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"late": None, "id": 1}]


def test_an_unknown_name_is_a_mistake_of_the_command(source: Path) -> None:
    for name, hint in (("complettion", "'completion'"), ("txt", "'text'"), ("qq", "The rows have")):
        for more in ((), ("--dry-run",)):
            ended = call("generate", source, "--output-columns", f"id,{name}",
                         "--model", "/nowhere", *more)  # fmt: skip
            assert ended.code == ExitCode.USAGE, "before the model is looked for"
            assert f"--output-columns names the column '{name}'" in ended.stderr
            assert hint in ended.stderr


def test_openai_lines_have_no_columns_to_choose_from(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output-columns are not of --format openai"):
        GenerateOptions(inputs=[], format="openai", output_columns=("id",))
    late = write_rows(tmp_path / "late.jsonl", [*good_rows(100), chat_line()])
    ended = generate(late, "--output-columns", "id", "--max-tokens", "1", "-q")
    assert ended.code == 3
    assert json.loads(ended.stderr)["error"]["code"] == "bad_openai_line"
    assert [row["id"] for row in ended.rows] == [*range(100)]
    ended = generate(write_rows(late, [chat_line()]), "--output-columns", "custom_id")
    assert ended.code == ExitCode.USAGE
    assert "cannot choose from OpenAI batch lines" in ended.stderr


def test_other_columns_are_another_job_and_the_same_ones_go_on(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(40))
    folder.stop_after(2, output_columns=("completion", "id"))
    error = folder.refused(output_columns=("id", "completion"))
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert "output_columns: completion,id -> id,completion" in error.message
    assert folder.run(output_columns=("completion", "id"))[0] == 0
    append(folder.input, good_rows(1, start=40))
    assert folder.run(output_columns=("completion", "id")) == (0, 1)
    rows = read_rows(folder.output)
    assert [[*row] for row in rows] == [["completion", "id"]] * 41
    assert [row["id"] for row in rows] == [*range(41)]


def test_merged_shards_have_the_columns_of_one_run(source: Path, tmp_path: Path) -> None:
    flags = ("--max-tokens", "2", "-q", "--output-columns", "completion,reasoning,id")
    assert generate(source, "-o", tmp_path / "one.parquet", *flags).code == 0
    shards = [tmp_path / f"out-{n}.jsonl" for n in (1, 2)]
    for number, shard in enumerate(shards, 1):
        assert generate(source, "-o", shard, *flags, "--shard", f"{number}/2").code == 0
    assert call("merge", *shards, "-o", tmp_path / "merged.parquet", "-q").code == 0
    assert (tmp_path / "merged.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_failed_rows_can_go_to_parquet_from_a_stream_too(source: Path, tmp_path: Path) -> None:
    append(source, [{"id": 9}])
    flags = ("--errors", tmp_path / "e.parquet", "--max-tokens", "1", "-q")
    assert generate(source, *flags).code == 3
    assert pq.read_table(tmp_path / "e.parquet").column("id").to_pylist() == [9]
