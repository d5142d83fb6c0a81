"""Chats as data sets hold them: Hugging Face's Parquet, ShareGPT's messages."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.rows import Row
from nanovllm_cli.rows import read_rows as read_inputs

from .cli import generate, read_rows
from .parsing import USER, bad, chat_line, good

TEXT = pa.string()
CALL = pa.struct([
    ("id", TEXT),
    ("type", TEXT),
    ("function", pa.struct([
        ("name", TEXT), ("arguments", pa.struct([("city", TEXT), ("day", TEXT)])),
    ])),
])  # fmt: skip
MESSAGES = pa.list_(pa.struct([
    ("role", TEXT), ("content", TEXT), ("name", TEXT), ("tool_calls", pa.list_(CALL)),
]))  # fmt: skip


def from_parquet(messages: Any) -> Prompt:
    row = Row(index=0, source="in.parquet", line=1, raw=None, columns={"messages": messages})
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt), prompt
    return prompt


def written_as_datasets_writes(
    path: Path, columns: dict[str, tuple[pa.DataType, list[Any]]]
) -> Path:
    """A file as `Dataset.to_parquet` makes it: features in the metadata, batches, a page index."""
    features = {name: {"dtype": str(kind), "_type": "Value"} for name, (kind, _) in columns.items()}
    schema = pa.schema(
        [(name, kind) for name, (kind, _) in columns.items()],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    arrays = [pa.array(values, kind) for kind, values in columns.values()]
    table = pa.Table.from_arrays(arrays, schema=schema)
    with pq.ParquetWriter(path, schema, write_page_index=True) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_table(pa.Table.from_batches([batch]))
    return path


def test_fields_that_a_parquet_message_does_not_have_are_absent_at_every_depth() -> None:
    call = {"id": None, "type": None, "function": {"name": "weather",
            "arguments": {"city": "Bern", "day": None}}}  # fmt: skip
    given = [
        {"role": "user", "content": "Rain?", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "name": None, "tool_calls": [call]},
        {"role": "tool", "content": "no", "name": "weather", "tool_calls": []},
    ]
    found = from_parquet(given).messages
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert found == [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "no", "name": "weather", "tool_calls": []},
    ]
    assert given[0]["name"] is None, "the column itself travels through as it was"


def test_a_null_argument_in_a_tool_call_of_json_is_meant() -> None:
    call = {"function": {"name": "f", "arguments": {"day": None}}}
    row = Row(index=0, source="s", line=1, raw=b"{}", columns={
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    })  # fmt: skip
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt)
    assert prompt.messages is not None
    assert prompt.messages[1]["tool_calls"] == [call]


def test_the_messages_of_share_gpt_are_a_chat() -> None:
    given = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi", "weight": None},
        {"from": "gpt", "value": "Ho"},
        {"from": "human", "value": "Hello"},
    ]
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        USER,
    ]
    prompt = good({"conversations": given}, messages_column="conversations")
    assert prompt.messages == expected
    assert good({"messages": given}).messages == expected


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"from": "bing", "value": "x"}, "messages[0].from is 'bing'; it must be one of human,"),
        ({"from": ["human"], "value": "x"}, "messages[0].from is ['human']"),
        ({"from": "human", "value": 1}, "messages[0].content is 1"),
        ({"from": "human"}, "messages[0].content is null"),
        ({"from": "human", "value": "x", "mood": 1}, "messages[0] has the unknown field 'mood'"),
        ({"from": "human", "role": "user", "content": "x"}, "unknown field 'from'"),
    ],
)
def test_what_is_not_quite_share_gpt_is_a_bad_message(message: Any, words: str) -> None:
    bad("bad_messages", {"messages": [message]}, words)


def test_share_gpt_may_have_more_keys_and_roles() -> None:
    given = [
        {"from": "system", "value": "s", "weight": None},
        {"from": "user", "value": "u", "weight": 0, "train": False},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}', "loss": 1.0},
        {"from": "observation", "value": "o"},
        {"from": "assistant", "value": "a", "weight": 1},
        {"from": "tool", "value": "t"},
        {"from": "function_call", "value": "f(1)"},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert good({"messages": given}).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "o"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "f(1)"},
    ]


def test_an_assistant_may_have_thought_and_said_nothing() -> None:
    thought = {"role": "assistant", "reasoning_content": "Hm.", "content": None, "weight": 1}
    messages = good({"messages": [USER, thought]}).messages
    assert messages == [USER, {"role": "assistant", "reasoning_content": "Hm.", "content": ""}]


def test_padding_is_left_out_of_every_setting_of_a_parquet_row(tmp_path: Path) -> None:
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties, "required": [*properties]}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    def schema(**properties: Any) -> dict[str, Any]:
        return {"type": "object", "properties": properties}

    city = tool("f", city={"type": "string"})
    count = tool("g", n={"type": "integer", "minimum": 0})
    chat = {"messages": [USER]}
    integer, text = schema(a={"type": "integer"}), schema(b={"type": "string", "maxLength": 3})

    def format_of(what: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": what}}

    pairs: list[list[dict[str, Any]]] = [
        [{**chat, "tools": [city]}, {**chat, "tools": [city, count]}],
        [{**chat, "tools": [city], "tool_choice": "required"}, {**chat, "tools": [count]}],
        [{"prompt": "Q:", "response_format": format_of(kind)} for kind in (integer, text)],
        [{"prompt": "Q:", "guided_json": kind} for kind in (integer, text)],
        [{"prompt": "Q:", "structured_outputs": {"json": kind}} for kind in (integer, text)],
        [
            {"prompt": "Q:", "logit_bias": {"50": -100.0}},
            {"prompt": "Q:", "logit_bias": {"51": 5.0}},
        ],
        [chat_line(tools=[city]), chat_line(tools=[count], response_format={"type": "text"})],
        [chat_line(logit_bias={"1": 1.0}), chat_line(response_format=format_of(text))],
    ]
    for number, rows in enumerate(pairs):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        for given, row in zip(rows, read_inputs(find_inputs([str(path)])), strict=True):
            assert isinstance(row, Row)
            prompt = to_prompt(row, PromptOptions())
            assert isinstance(prompt, Prompt), prompt
            assert prompt.settings == good(given).settings


def test_nulls_of_data_columns_stay(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q: 1+1=\nA:", "data": {"a": 1}},
        {"prompt": "Q: 1+2=\nA:", "data": {"b": 2}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    ended = generate(tmp_path / "in.parquet", "--max-tokens", "1")
    assert [row["data"] for row in ended.rows] == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_a_column_of_structs_is_a_chat_and_travels_through(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function",
            "function": {"name": "sum", "arguments": {"city": "a", "day": None}}}  # fmt: skip
    question = {"role": "user", "content": "What is 3+4?", "name": None, "tool_calls": None}
    chats = [
        [question],
        [{**question, "role": "system", "content": "Be brief."}, question],
        [question, {**question, "role": "assistant", "content": None, "tool_calls": [call]},
         {**question, "role": "tool", "content": "7"}, question],
    ]  # fmt: skip
    columns: dict[str, Any] = {
        "prompt_id": (pa.string(), ["a", "b", "c"]),
        "messages": (MESSAGES, chats),
        "score": (pa.float32(), [0.5, None, 1.5]),
    }
    source = written_as_datasets_writes(tmp_path / "in.parquet", columns)
    flags = ("--id-column", "prompt_id", "--no-thinking", "--max-tokens", "3", "-q")
    assert generate(source, "-o", tmp_path / "out.parquet", *flags).code == 0
    assert generate(source, "-o", tmp_path / "out.jsonl", *flags).code == 0
    given, found = pq.read_table(source), pq.read_table(tmp_path / "out.parquet")
    for name in columns:
        assert found.schema.field(name).type == given.schema.field(name).type
        assert found.column(name).equals(given.column(name))
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["messages"] for row in rows] == chats
    assert [row["completion"] for row in rows] == found.column("completion").to_pylist()
    plain = [[{k: v for k, v in m.items() if v is not None} for m in chat] for chat in chats[:2]]
    lines = b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in plain)
    again = generate("-", "--no-thinking", "--max-tokens", "3", "-q", stdin=lines).rows
    assert [row["completion"] for row in again] == [row["completion"] for row in rows[:2]]
    assert [row["usage"] for row in again] == [row["usage"] for row in rows[:2]]


def test_conversations_of_share_gpt_in_parquet_are_chats(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("from", TEXT), ("value", TEXT), ("weight", pa.float64())]))
    talk = [{"from": "human", "value": "What is 3+4?", "weight": None}]
    source = written_as_datasets_writes(tmp_path / "in.parquet", {"conversations": (kind, [talk])})
    (row,) = generate(source, "--messages-column", "conversations", "--no-thinking", "-q").rows
    assert row["conversations"] == talk
    assert row["completion"] == "7"
