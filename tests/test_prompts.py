"""prompts.py: which columns are the prompt, what overrides what, and what is refused."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.rows import BadRow, Row

SETTINGS_OF_OTHERS = """
best_of logprobs prompt_logprobs top_logprobs presence_penalty frequency_penalty repetition_penalty
length_penalty logit_bias bad_words allowed_token_ids guided_json guided_regex guided_choice
structured_outputs response_format tools tool_choice truncate_prompt_tokens echo suffix do_sample
num_beams typical_p thinking_budget include_stop_str_in_output skip_special_tokens detokenize stream
"""
DATA_COLUMNS = """
text label source score category tokens id2 stops seeds speed step steps top top_1 max min maximum
N Seed Stop Suffix n_tokens in_tokens num_tokens mean_tokens median_tokens total_tokens
prompt_tokens temperature_c avg_temperature stop_reason finish_reason token_ids model url body
method completion question answer name seed_id min_price
"""
USER = {"role": "user", "content": "Hello"}


def parse(columns: dict[str, Any], **options: Any) -> Prompt | BadRow:
    row = Row(index=4, source="in.jsonl", line=5, raw=None, columns=columns)
    return to_prompt(row, PromptOptions(**options))


def good(columns: dict[str, Any], **options: Any) -> Prompt:
    prompt = parse(columns, **options)
    assert isinstance(prompt, Prompt), prompt
    assert (prompt.index, prompt.source, prompt.line) == (4, "in.jsonl", 5)
    assert prompt.row.columns is columns
    contents = (prompt.text, prompt.messages, prompt.token_ids)
    assert sum(content is not None for content in contents) == 1
    return prompt


def bad(code: str, columns: dict[str, Any], *words: str, **options: Any) -> BadRow:
    row = parse(columns, **options)
    assert isinstance(row, BadRow), row
    assert (row.index, row.source, row.line) == (4, "in.jsonl", 5)
    assert row.code == code, row
    for word in words:
        assert word in row.message
    return row


def batch_line(body: Any, url: Any = "/v1/chat/completions", **columns: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body, **columns}


def chat_line(**body: Any) -> dict[str, Any]:
    return batch_line({"model": "m", "messages": [USER], **body})


def text_line(**body: Any) -> dict[str, Any]:
    return batch_line({"model": "m", **body}, "/v1/completions")


# What the prompt is


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


@pytest.mark.parametrize("columns", [{}, {"text": "x"}, {"prompt": None}, {"custom_id": "c"}])
def test_a_row_without_prompt_is_bad(columns: dict[str, Any]) -> None:
    bad("no_prompt", columns, "prompt", "messages", "prompt_token_ids")


def test_a_row_with_two_prompts_is_bad() -> None:
    bad("bad_prompt", {"prompt": "x", "messages": [USER]}, "more than one")
    bad("bad_prompt", {"prompt": "x", "prompt_token_ids": [1]})


@pytest.mark.parametrize("value", [1, True, ["x"], {"a": 1}, 1.5, b"x"])
def test_a_prompt_is_a_string(value: Any) -> None:
    bad("bad_prompt", {"prompt": value}, "prompt is")


@pytest.mark.parametrize("options", [{}, {"chat": True}, {"template": "{prompt}"}])
def test_an_empty_prompt_is_bad(options: dict[str, Any]) -> None:
    bad("empty_prompt", {"prompt": ""}, **options)


# Messages


def test_messages_keep_the_fields_a_template_may_use() -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hello", "name": "Ann"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": [{"a": 1}]},
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
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = good({"messages": [message, {"role": "tool", "content": "4"}]}).messages
    assert messages is not None
    assert messages[0]["content"] == ""


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
        ([{"role": "user", "content": "x", "weight": 1}], "unknown field 'weight'"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name is 1"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f()"}], "tool_calls"),
    ],
)
def test_a_bad_message_is_named(messages: Any, words: str) -> None:
    bad("bad_messages", {"messages": messages}, words)


def test_only_the_last_user_message_must_not_be_empty() -> None:
    empty = {"role": "user", "content": ""}
    bad("empty_prompt", {"messages": [USER, empty]})
    bad("empty_prompt", {"messages": [{"role": "user", "content": []}]})
    assert good({"messages": [empty, USER]}).messages == [empty, USER]


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
    ["{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a", "a}", "{a!}", "{a:{b}}", "\udcff"],
)
def test_a_template_has_names_of_columns_only(template: str) -> None:
    with pytest.raises(CommandError) as caught:
        PromptOptions(template=template)
    assert caught.value.exit_code == ExitCode.USAGE


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


# Settings


def test_a_rows_settings_are_taken() -> None:
    prompt = good(
        {
            "prompt": "x",
            **{"temperature": 0, "top_k": 5, "top_p": 1, "min_p": 0.5, "max_tokens": 9},
            **{"min_tokens": 2, "seed": 2**64 - 1, "ignore_eos": True, "stop_token_ids": [1, 2]},
            **{"n": 128, "stop": ["a", "b"]},
        }
    )
    assert prompt.sampling == {
        **{"temperature": 0.0, "top_k": 5, "top_p": 1.0, "min_p": 0.5, "max_tokens": 9},
        **{"min_tokens": 2, "seed": 2**64 - 1, "ignore_eos": True, "stop_token_ids": (1, 2)},
    }
    assert type(prompt.sampling["temperature"]) is float
    assert (prompt.n, prompt.stop) == (128, ("a", "b"))
    SamplingParams(**prompt.sampling)


def test_settings_are_checked_together() -> None:
    bad("bad_parameters", {"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "9")


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_zero_and_minus_one_mean_every_token(off: int) -> None:
    assert good({"prompt": "x", "top_k": off}).sampling == {"top_k": None}


def test_stop_can_be_one_string() -> None:
    assert good({"prompt": "x", "stop": "\n"}).stop == ("\n",)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", ["1", True, -0.1, 101, [], float("nan")]),
        ("top_p", [0, 1.1, "x"]),
        ("min_p", [-0.1, 1.1, {}]),
        ("top_k", [1.0, -2, True, "5"]),
        ("max_tokens", [0, -1, 1.5, 16.0, "16"]),
        ("min_tokens", [-1, 1.0]),
        ("seed", [-1, 2**64, 1.0, "1", False]),
        ("ignore_eos", [0, 1, "true"]),
        ("n", [0, 129, 1.0, True, "2"]),
        ("stop", ["", [], [""], ["a"] * 17, 1, ["a", 1], {}]),
        ("stop_token_ids", [1, "1", [1.0], [True], [-1], [2**31], [1] * 15]),
        ("chat_template_kwargs", [1, [], {"enable_thinking": 1}, {"x": True}]),
    ],
)
def test_a_setting_of_wrong_type_or_range_is_bad(name: str, values: list[Any]) -> None:
    for value in values:
        bad("bad_parameters", {"prompt": "x", name: value}, f"{name} is ")


def test_a_rows_thinking_goes_before_the_flag() -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for columns in ({"messages": [USER], **off}, chat_line(**off)):
        assert good(columns, enable_thinking=True).enable_thinking is False
    assert good({"messages": [USER]}, enable_thinking=True).enable_thinking is True
    empty = {"chat_template_kwargs": {"enable_thinking": None}}
    assert good({"messages": [USER], **empty}, enable_thinking=True).enable_thinking is True


def test_thinking_is_for_chats() -> None:
    columns = {"prompt": "x", "chat_template_kwargs": {"enable_thinking": False}}
    bad("bad_parameters", columns, "chat_template_kwargs")
    assert good(columns, chat=True).enable_thinking is False
    assert good({"prompt": "x"}, enable_thinking=True).enable_thinking is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[(name, "temperature") for name in ("temprature", "temperatur", "Temperature")],
        *[("tempreature", "temperature"), ("max_token", "max_tokens"), ("maxTokens", "max_tokens")],
        *[("max_toekns", "max_tokens"), ("max-tokens", "max_tokens"), ("topk", "top_k")],
        *[("topP", "top_p"), ("minp", "min_p"), ("ignoreEos", "ignore_eos")],
        *[("max_new_tokens", "max_tokens"), ("stop_sequences", "stop"), ("n_samples", "n")],
        *[("stop_tokens", "stop_token_ids"), ("enable_thinking", "chat_template_kwargs")],
        *[("max_completion_tokens", "max_tokens"), ("maxNewTokens", "max_tokens")],
    ],
)
def test_a_misspelled_setting_is_an_error_that_names_the_right_one(name: str, meant: str) -> None:
    bad("unknown_setting", {"prompt": "x", name: 1}, repr(name), repr(meant))


@pytest.mark.parametrize("name", SETTINGS_OF_OTHERS.split())
def test_a_setting_of_others_is_an_error(name: str) -> None:
    bad("unknown_setting", {"prompt": "x", name: 1}, repr(name), "not supported")
    assert good({"prompt": "x", name: None})


@pytest.mark.parametrize("name", DATA_COLUMNS.split())
def test_an_ordinary_column_is_data(name: str) -> None:
    assert good({"prompt": "x", name: "anything"}).text == "x"


def test_a_very_long_name_is_data() -> None:
    assert good({"prompt": "x", "temperature" * 1000: 1}).sampling == {}


# OpenAI batch lines


def test_a_chat_line() -> None:
    ignored = {"stream": False, "user": "u", "metadata": {"a": "b"}, "store": True, "top_k": None}
    prompt = good(chat_line(temperature=0.5, n=2, stop="\n", min_p=0.1, seed=1, **ignored))
    assert prompt.messages == [USER]
    assert (prompt.id, prompt.endpoint, prompt.model) == ("c", "chat", "m")
    assert prompt.sampling == {"temperature": 0.5, "min_p": 0.1, "seed": 1}
    assert (prompt.n, prompt.stop) == (2, ("\n",))


def test_a_completions_line_stands_as_it_is() -> None:
    options: dict[str, Any] = {"chat": True, "system": "x", "template": "{y}"}
    assert good(text_line(prompt="Hello"), **options).text == "Hello"
    prompt = good(text_line(prompt=[1, 2]), **options)
    assert (prompt.token_ids, prompt.endpoint) == ([1, 2], "completions")


def test_max_completion_tokens_are_max_tokens() -> None:
    assert good(chat_line(max_completion_tokens=5)).sampling == {"max_tokens": 5}
    assert good(chat_line(max_completion_tokens=5, max_tokens=5)).sampling == {"max_tokens": 5}
    bad("bad_parameters", chat_line(max_completion_tokens=5, max_tokens=6), "differ")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (batch_line({}, custom_id=1), "custom_id is 1"),
        (batch_line({}, method="GET"), "method is 'GET'"),
        (batch_line({}, method=None), "method is null"),
        (batch_line({}, url="/v1/embeddings"), "url is '/v1/embeddings'"),
        (batch_line({}, url=["x"]), "url is ['x']"),
        (batch_line([]), "body is []"),
        (batch_line(None), "body is null"),
        (chat_line(model=1), "body.model is 1"),
        (chat_line(prompt="x"), "messages and no prompt"),
        (text_line(prompt="x", messages=[USER]), "a prompt and no messages"),
        ({**chat_line(), "temperature": 1}, "'temperature' must stand in the body"),
        ({**chat_line(), "max_token": 1}, "'max_token' must stand in the body"),
    ],
)
def test_a_bad_openai_line_is_named(columns: dict[str, Any], words: str) -> None:
    bad("bad_openai_line", columns, words)


@pytest.mark.parametrize(
    ("code", "columns", "words"),
    [
        ("bad_messages", batch_line({"model": "m"}), "body.messages is null"),
        ("bad_prompt", text_line(), "body.prompt is null"),
        ("bad_prompt", text_line(prompt=["a", "b"]), "body.prompt is ['a', 'b']"),
        ("empty_prompt", text_line(prompt=""), "body.prompt is empty"),
        ("empty_prompt", text_line(prompt=[]), "body.prompt is empty"),
        ("bad_parameters", chat_line(stream=True), "body.stream is True"),
        ("bad_parameters", chat_line(temperature=-1), "body.temperature is -1"),
        ("bad_parameters", chat_line(n=0), "body.n is 0"),
        ("unknown_setting", chat_line(logprobs=True), "'logprobs'"),
        ("unknown_setting", chat_line(temprature=1), "did you mean 'temperature'"),
        ("unknown_setting", chat_line(anything=1), "'anything' is not supported"),
    ],
)
def test_a_bad_body_is_named(code: str, columns: dict[str, Any], words: str) -> None:
    bad(code, columns, words)


# All rows

NAMES = [
    *("id", "custom_id", "method", "url", "body", "prompt", "messages", "prompt_token_ids", "role"),
    *("content", "type", "text", "tool_calls", "n", "stop", "seed", "temperature", "top_k", "x"),
    *("stop_token_ids", "chat_template_kwargs", "enable_thinking", "best_of", "stream", "model"),
]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary()
)
WORDS = st.sampled_from(["POST", "/v1/completions", "/v1/chat/completions", "user", "text"])
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
