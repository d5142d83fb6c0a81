"""tool_calls.py: tools as OpenAI shapes them, and the calls in what Qwen3 writes."""

import json
from typing import Any

import pytest

from nanovllm_cli.tool_calls import ToolCall, shaped_calls, split_calls

from .parsing import TOOL, USER, bad, good

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
OSLO = ToolCall("weather", '{"city": "Oslo"}')
TIME = ToolCall("time", "{}")


def split(text: str, is_one_only: bool = False) -> tuple[str, list[ToolCall]]:
    return split_calls(text, is_one_only=is_one_only)


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ("Hello", "Hello", []),
        ("", "", []),
        (CALL, "", [OSLO]),
        (f"{CALL}\n{OTHER}", "", [OSLO, TIME]),
        (f"{OTHER}{CALL}{OTHER}", "", [TIME, OSLO, TIME]),
        (f"I shall look.\n{CALL}\n", "I shall look.", [OSLO]),
        (f"First {CALL} then {OTHER} done", "First  then  done", [OSLO, TIME]),
        ('<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>', "", [OSLO]),
        (
            CALL.replace("Oslo", r"\ud83d\ude00"),
            "",
            [ToolCall("weather", '{"city": "\U0001f600"}')],
        ),
        (CALL.replace("Oslo", "Z\u00fcrich"), "", [ToolCall("weather", '{"city": "Z\u00fcrich"}')]),
    ],
)
def test_calls_are_split_off_a_text(text: str, rest: str, calls: list[ToolCall]) -> None:
    assert split(text) == (rest, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        CALL[:-1],
        CALL.removesuffix("</tool_call>"),
        CALL.replace("}}", "}"),
        CALL.replace('"arguments"', '"parameters"'),
        CALL.replace('"weather"', "7"),
        CALL.replace('{"city": "Oslo"}', '"{}"'),
        CALL.replace('"Oslo"', "NaN"),
        CALL.replace('"Oslo"', "1e999"),
        CALL.replace("Oslo", r"\ud83d"),  # half a character
        CALL.replace("weather", r"\udc00"),
        CALL.replace("Oslo", "\n"),
        CALL.replace('"Oslo"', "9" * 5000),
        CALL.replace('"Oslo"', "[" * 100_000),
        CALL.replace("</tool_call>", "and so on </tool_call>"),
        "<tool_call>[1]</tool_call>",
        "<tool_call> weather(Oslo) </tool_call>",
        CALL.replace("<tool_call>", "< tool_call>"),
    ],
)
def test_what_is_no_whole_call_stays_text(text: str) -> None:
    assert split(text) == (text, [])
    rest, calls = split(f"{text}{OTHER}")
    assert (rest, calls) == (text.strip(), [TIME])


def test_tags_within_arguments_are_text() -> None:
    inner = f"a </tool_call> b {CALL}"
    text = f'<tool_call>{{"name": "say", "arguments": {json.dumps({"text": inner})}}}</tool_call>'
    rest, (call,) = split(text)
    assert rest == ""
    assert json.loads(call.arguments) == {"text": inner}


def test_of_calls_that_must_come_alone_the_first_is_taken() -> None:
    assert split(f"{CALL}\n{OTHER}", is_one_only=True) == ("", [OSLO])
    assert split("Hello", is_one_only=True) == ("Hello", [])


def test_an_id_depends_on_the_key_and_the_place_alone() -> None:
    first, second = shaped_calls([OSLO, OSLO], "key")
    assert first["id"] != second["id"]
    assert shaped_calls([TIME], "key")[0]["id"] == first["id"]
    assert shaped_calls([OSLO], "other")[0]["id"] != first["id"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }


def changed(**function: Any) -> dict[str, Any]:
    return {**TOOL, "function": {**TOOL["function"], **function}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("weather", "tools[0] is 'weather'; it must be an object"),
        ({}, "tools[0].type is null"),
        ({**TOOL, "type": "custom"}, "only 'function' is supported"),
        ({**TOOL, "name": "weather"}, "tools[0] has the unknown field 'name'"),
        ({"type": "function"}, "tools[0].function is null"),
        ({"type": "function", "function": {}}, "tools[0].function.name is null"),
        (changed(name=""), "tools[0].function.name is empty"),
        (changed(name=7), "tools[0].function.name is 7"),
        (changed(description=["x"]), "tools[0].function.description is ['x']"),
        (changed(parameters="city"), "tools[0].function.parameters is 'city'"),
        (changed(strict=1), "tools[0].function.strict is 1"),
        (changed(returns={}), "tools[0].function has the unknown field 'returns'"),
    ],
)
def test_a_bad_tool_is_named(tool: Any, words: str) -> None:
    bad("bad_tools", {"messages": [USER], "tools": [tool]}, words)
    bad("bad_tools", {"messages": [USER], "tools": [TOOL, tool]}, words.replace("[0]", "[1]"))


def test_a_tool_needs_no_more_than_a_name() -> None:
    bare = {"type": "function", "function": {"name": "now"}}
    nulls = {**bare, "function": {"name": "now", "description": None, "other": None}}
    assert good({"messages": [USER], "tools": [bare, nulls, changed(strict=True)]}).settings.tools


def test_tools_may_be_written_as_json_text() -> None:
    expected = good({"messages": [USER], "tools": [TOOL]}).settings.tools
    bare = TOOL["function"]
    assert expected == [TOOL]
    for tools in (
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        json.dumps([bare]),
        [bare],
        [{"type": "function", **bare}],  # type: ignore[dict-item]
    ):
        assert good({"messages": [USER], "tools": tools}).settings.tools == expected
    assert good({"prompt": "x", "tools": ""}).settings.tools is None
    bad("bad_tools", {"messages": [USER], "tools": "[{"}, "tools is '[{', which is not JSON")
    bad("bad_tools", {"messages": [USER], "tools": ["{"]}, "tools[0] is '{', which is not JSON")
    bad("bad_tools", {"messages": [USER], "tools": [{"type": "custom", "name": "x"}]}, "'custom'")
    bad("bad_parameters", {"messages": [USER], "tools": "weather"}, "a list of tools")
