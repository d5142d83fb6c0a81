"""prompt_content.py: what messages may hold."""

from typing import Any

import pytest

from .parsing import USER, bad, good

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_messages_keep_the_fields_a_template_may_use() -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hello", "name": "Ann"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "t"},
    ]
    assert good({"messages": messages}).messages == messages


def test_null_fields_of_a_message_are_absent() -> None:
    message = {"role": "user", "content": "x", "name": None, "tool_calls": None, "weight": None}
    assert good({"messages": [message]}).messages == [{"role": "user", "content": "x"}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    (message,) = good({"messages": [{"role": "user", "content": parts}]}).messages or []
    assert message == {"role": "user", "content": "ab"}


def test_a_message_with_tool_calls_needs_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = good({"messages": [message, {"role": "tool", "content": "4"}]}).messages
    assert messages is not None
    assert messages[0]["content"] == ""


def test_a_developer_is_the_system() -> None:
    message = {"role": "developer", "content": "Be brief."}
    expected = [{"role": "system", "content": "Be brief."}, USER]
    assert good({"messages": [message, USER]}, system="Be long.").messages == expected


def test_a_response_of_openais_may_be_sent_back_as_it_is() -> None:
    empty = {"function_call": None, "audio": None, "tool_calls": None, "annotations": []}
    said = {"role": "assistant", "content": "Yes", "refusal": None, **empty}
    refused = {"role": "assistant", "content": None, "refusal": "No.", **empty}
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    messages = good({"messages": [USER, said, USER, refused, USER, parts, USER]}).messages or []
    answers = [message for message in messages if message["role"] == "assistant"]
    contents = ("Yes", "No.", "No.")
    assert answers == [{"role": "assistant", "content": content} for content in contents]


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "x", "tool_calls": [*calls]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("x", "messages is 'x'"),
        ([], "messages is []"),
        ({}, "messages is {}"),
        (["x"], "messages[0] is 'x'"),
        ([USER, None], "messages[1] is null"),
        ([{"content": "x"}], "messages[0].role is null"),
        ([{"role": "bot", "content": "x"}], "messages[0].role is 'bot'"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content is null"),
        ([{"role": "assistant"}, USER], "messages[0].content is null"),
        ([{"role": "user", "content": 1}], "messages[0].content is 1"),
        ([{"role": "user", "content": ["x"]}], "part 'x'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text is null"),
        ([{"role": "user", "content": "x", "partial": 1}], "unknown field 'partial'"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name is 1"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f()"}], "tool_calls"),
        ([calling({"id": "1"})], "tool_calls[0].name is null"),
        ([calling({**CALL, "function": "f"})], "tool_calls[0].function is 'f'"),
        ([calling({"function": {"arguments": {}}})], "tool_calls[0].function.name is null"),
        ([calling(CALL, {"name": "f"})], "tool_calls[1].arguments is null"),
        ([calling({"name": "f", "arguments": [1]})], "tool_calls[0].arguments is [1]"),
        ([{"role": "assistant", "refusal": 1}], "messages[0].refusal is 1"),
        ([{"role": "user", "content": [{"type": "refusal"}]}], "refusal is null"),
    ],
)
def test_a_bad_message_is_named(messages: Any, words: str) -> None:
    bad("bad_messages", {"messages": messages}, words)


def test_only_the_last_user_message_must_not_be_empty() -> None:
    empty = {"role": "user", "content": ""}
    bad("empty_prompt", {"messages": [USER, empty]})
    bad("empty_prompt", {"messages": [{"role": "user", "content": []}]})
    assert good({"messages": [empty, USER]}).messages == [empty, USER]
