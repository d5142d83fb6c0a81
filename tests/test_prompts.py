"""prompts.py: which columns are the prompt and the id, and that every row is one or is bad."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt

from .parsing import USER, bad, batch_line, chat_line, good, parse


def test_a_prompt_stands_as_it_is() -> None:
    prompt = good({"prompt": " <|im_end|> ", "label": 3})
    assert prompt.text == " <|im_end|> "
    assert (prompt.sampling, prompt.n, prompt.stop) == ({}, None, ())
    assert (prompt.endpoint, prompt.model, prompt.enable_thinking) == (None, None, None)


def test_chat_makes_a_user_message_of_a_prompt() -> None:
    assert good({"prompt": "Hello"}, chat=True).messages == [USER]


def test_system_makes_messages_of_a_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert good({"prompt": "Hello"}, system="Be brief.").messages == [system, USER]


def test_system_goes_before_messages_that_have_none() -> None:
    system = {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Be long."}
    assert good({"messages": [USER]}, system="Be brief.").messages == [system, USER]
    assert good({"messages": [own, USER]}, system="Be brief.").messages == [own, USER]
    assert good(chat_line(), system="Be brief.").messages == [system, USER]


def test_system_leaves_the_row_alone() -> None:
    columns = {"messages": [USER]}
    good(columns, system="Be brief.")
    assert columns == {"messages": [USER]}


def test_token_ids_are_left_alone_by_chat_and_system() -> None:
    assert good({"prompt_token_ids": [1, 2]}, chat=True, system="x").token_ids == [1, 2]


@pytest.mark.parametrize("value", ["1", [], [1.0], [True], [1, "2"], [-1], [2**31], [None], {}])
def test_token_ids_are_a_list_of_integers(value: Any) -> None:
    bad("empty_prompt" if value == [] else "bad_prompt", {"prompt_token_ids": value})


def test_columns_can_have_other_names() -> None:
    assert good({"text": "x", "prompt": "y"}, prompt_column="text").text == "x"
    assert good({"chat": [USER], "messages": 1}, messages_column="chat").messages == [USER]


def test_null_counts_as_absent() -> None:
    columns = {"prompt": None, "messages": [USER], "prompt_token_ids": None, "temperature": None}
    assert good({**columns, "best_of": None, "id": None, "body": None}).messages == [USER]


@pytest.mark.parametrize("columns", [{}, {"text": "x"}, {"custom_id": "c"}])
def test_a_row_without_prompt_is_bad(columns: dict[str, Any]) -> None:
    bad("no_prompt", columns, "prompt", "messages", "prompt_token_ids")


def test_a_null_prompt_is_said_to_be_null() -> None:
    assert bad("no_prompt", {"id": 1, "prompt": None}).message == "prompt is null"
    nothing = {"prompt": None, "messages": None}
    assert bad("no_prompt", nothing).message == "prompt and messages are null"
    assert bad("no_prompt", {"q": None}, prompt_column="q").message == "q is null"


def test_a_misspelled_column_is_named_with_what_is_meant() -> None:
    assert bad("no_prompt", {"promt": "x"}).message.endswith("by 'promt', did you mean prompt?")
    assert "did you mean messages?" in bad("no_prompt", {"message": []}).message
    assert "did you mean" not in bad("no_prompt", {"text": "x", "page": 1}).message


def test_a_prompt_of_messages_is_a_chat_by_itself() -> None:
    row = {"prompt": [USER], "chosen": [USER], "rejected": []}
    assert good(row).messages == [USER]
    assert good(row, messages_column="prompt").messages == [USER]
    assert good({"q": [USER]}, prompt_column="q").messages == [USER]
    assert good({"prompt": [{"from": "human", "value": "Hello"}]}).messages == [USER]
    system = {"role": "system", "content": "Be brief."}
    assert good(row, system="Be brief.").messages == [system, USER]
    bad("bad_prompt", {"prompt": [USER], "messages": [USER]}, "more than one of prompt, messages")
    bad("bad_messages", {"prompt": [{"role": "x"}]}, "prompt[0].role is 'x'")
    bad("bad_messages", {"prompt": "x"}, "prompt is 'x'", messages_column="prompt")


@pytest.mark.parametrize(
    ("line", "whose"),
    [
        (
            {"custom_id": "a", "params": {"model": "m", "max_tokens": 9, "messages": []}},
            "Anthropic",
        ),
        ({"key": "a", "request": {"contents": [{"parts": [{"text": "x"}]}]}}, "Gemini"),
        ({"recordId": "a", "modelInput": {"messages": []}}, "Bedrock"),
    ],
)
def test_a_batch_line_of_another_service_is_named_as_such(line: Any, whose: str) -> None:
    bad("no_prompt", line, f"a line of {whose}'s batches", "only OpenAI's batch lines are known")


def test_a_row_with_two_prompts_is_bad() -> None:
    bad("bad_prompt", {"prompt": "x", "messages": [USER]}, "more than one")
    bad("bad_prompt", {"prompt": "x", "prompt_token_ids": [1]})


@pytest.mark.parametrize("value", [1, True, ["x"], {"a": 1}, 1.5, b"x"])
def test_a_prompt_is_a_string(value: Any) -> None:
    bad("bad_prompt", {"prompt": value}, "prompt is")


@pytest.mark.parametrize("options", [{}, {"chat": True}, {"template": "{prompt}"}])
def test_an_empty_prompt_is_bad(options: dict[str, Any]) -> None:
    bad("empty_prompt", {"prompt": ""}, **options)


# Templates


def test_a_template_is_filled_from_columns() -> None:
    columns = {"a": "x{b}", "b": 1.5, "c": [1, {"d": None}], "d": True, "long name": "y"}
    template = "{{{a}}} {b} {c} {d} {long name}"
    assert good(columns, template=template).text == '{x{b}} 1.5 [1,{"d":null}] true y'


def test_a_template_goes_before_the_other_kinds() -> None:
    columns = {"prompt": "x", "messages": [USER], "prompt_token_ids": [1]}
    assert good(columns, template="Say {prompt}.").text == "Say x."
    assert good(columns, template="Hello", chat=True).messages == [USER]


def test_a_column_in_a_template_is_data_whatever_its_name() -> None:
    prompt = good({"suffix": "s", "n": 7, "seed": "x"}, template="{suffix} {n} {seed}")
    assert (prompt.text, prompt.n, prompt.sampling) == ("s 7 x", None, {})


def test_a_column_missing_or_null_makes_the_row_bad() -> None:
    bad("template_error", {"txt": "x"}, "'text'", "'txt'", template="{text}")
    bad("template_error", {"text": None}, "'text'", "null", template="{text}")


def test_a_value_that_is_no_json_makes_the_row_bad() -> None:
    bad("template_error", {"text": b"x"}, "'text'", template="{text}")
    deep = orjson.loads(b"[" * 1000 + b"]" * 1000)
    bad("template_error", {"text": deep}, "'text'", template="{text}")


@pytest.mark.parametrize(
    "template",
    ["{}", "{|x}", "{a", "a}", "{a:{b}}", "\udcff"],
)
def test_a_template_needs_names_and_balanced_braces(template: str) -> None:
    with pytest.raises(CommandError) as caught:
        PromptOptions(template=template)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    "name", ["a:b", "c_customer_sk:", "a.b", "0", "a!r", "a[0]", "a b", "a{", "\n", "\u4f60", "||"]
)
def test_a_template_can_name_any_column(name: str) -> None:
    field = name.replace("|", "||")
    template = f"<{{{field}}}>"
    assert good({name: "x"}, template=template).text == "<x>"
    error = bad("template_error", {"other": 1}, template=template).message
    assert error.startswith(f"the template's column {name!r} is not among")


def test_a_template_says_what_stands_for_a_null_or_missing_column() -> None:
    template = "{instruction}{input|}{{{n|none}}}{x|a||b|c}"
    assert good({"instruction": "i", "input": "j", "n": 0}, template=template).text == "ij{0}a|b|c"
    assert good({"instruction": "i", "input": None}, template=template).text == "i{none}a|b|c"
    bad("template_error", {"instruction": None}, "'instruction' is null", template=template)
    assert good({"a": "", "b": "x"}, template="{a|none}{b}").text == "x"  # empty is not null


# Ids


@pytest.mark.parametrize("value", ["007", "", 7, -1])
def test_an_id_stands_as_it_is(value: str | int) -> None:
    assert good({"id": value, "prompt": "x"}).id == value
    assert good({"custom_id": value, "prompt": "x"}).id == value
    assert good({"id": 1, "key": value, "prompt": "x"}, id_column="key").id == value


def test_a_row_needs_no_id_unless_its_column_is_named() -> None:
    assert good({"prompt": "x"}).id is None
    bad("bad_id", {"id": 1, "prompt": "x"}, "'key'", id_column="key")


@pytest.mark.parametrize("value", [1.0, True, [1], {"$oid": "1"}])
def test_an_id_of_another_type_is_bad(value: Any) -> None:
    assert bad("bad_id", {"id": value, "prompt": "x"}).id is None


def test_a_bad_row_keeps_its_id() -> None:
    assert bad("no_prompt", {"id": "a"}).id == "a"
    assert bad("bad_messages", batch_line({"messages": 1})).id == "c"


# All rows

NAMES = [
    *("id", "custom_id", "method", "url", "body", "prompt", "messages", "prompt_token_ids", "role"),
    *("content", "type", "text", "tool_calls", "n", "stop", "seed", "temperature", "top_k", "x"),
    *("stop_token_ids", "chat_template_kwargs", "enable_thinking", "best_of", "stream", "model"),
    *("tools", "tool_choice", "function", "name", "arguments", "parameters", "refusal", "echo"),
    *("logit_bias", "bad_words", "logprobs", "top_logprobs", "prompt_logprobs", "modalities"),
    *("thinking_budget", "truncate_prompt_tokens", "reasoning_effort", "repetition_penalty"),
]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary()
)
WORDS = st.sampled_from(
    ["POST", "/v1/completions", "/v1/chat/completions", "user", "text", "function", "auto", "7"]
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=8)
    ),
    max_leaves=20,
)


@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), JSON),
    st.sampled_from([{}, {"chat": True}, {"system": "x"}, {"template": "{x}"}, {"id_column": "x"}]),
)
def test_any_row_is_a_prompt_or_a_bad_row(columns: dict[str, Any], options: dict[str, Any]) -> None:
    result = parse(columns, **options)
    if isinstance(result, Prompt):
        good(columns, **options)
    else:
        assert result.code
        assert len(result.message) < 500
