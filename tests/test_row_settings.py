"""row_settings.py: a row's own settings, and columns that only look like one."""

from typing import Any

import pytest

from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.row_settings import RowSettings

from .parsing import TOOL, USER, bad, chat_line, good

SETTINGS_OF_OTHERS = """
length_penalty allowed_token_ids echo suffix do_sample num_beams typical_p
include_stop_str_in_output skip_special_tokens detokenize stream top_logprobs
reasoning_effort functions function_call
"""
DATA_COLUMNS = """
text label source score category tokens id2 stops seeds speed step steps top top_1 max min maximum
N Seed Stop Suffix n_tokens in_tokens num_tokens mean_tokens median_tokens total_tokens
prompt_tokens temperature_c avg_temperature stop_reason finish_reason token_ids model url body
method completion question answer name seed_id min_price logprob bad_word tool_call function penalty
"""


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


def test_what_a_row_asks_of_its_tokens_is_taken() -> None:
    prompt = good(
        {
            **{"prompt": "x", "repetition_penalty": 2, "presence_penalty": -1},
            **{"frequency_penalty": 0.5, "logit_bias": {"7": 1, "5": -100.0}, "logprobs": 0},
            **{"prompt_logprobs": 20, "best_of": 3, "bad_words": ["no", " never"]},
            "truncate_prompt_tokens": 5,
        }
    )
    assert prompt.sampling == {
        **{"repetition_penalty": 2.0, "presence_penalty": -1.0, "frequency_penalty": 0.5},
        **{"logit_bias": ((5, -100.0), (7, 1.0)), "logprobs": 0, "prompt_logprobs": 20},
    }
    assert type(prompt.sampling["repetition_penalty"]) is float
    settings = prompt.settings
    assert (settings.best_of, settings.truncate_prompt_tokens) == (3, 5)
    assert settings.bad_words == ("no", " never")
    SamplingParams(**prompt.sampling)


def test_tools_are_offered_unless_none_may_be_called() -> None:
    def settings(**columns: Any) -> RowSettings:
        return good({"messages": [USER], **columns}).settings

    assert settings(tools=[TOOL], tool_choice="auto").tools == [TOOL]
    assert settings(tools=[TOOL], tool_choice="none").tools is None
    assert settings(tools=[], tool_choice="auto").tools is None
    assert settings(tools=[TOOL], parallel_tool_calls=False).is_one_call_only
    assert not settings(tools=[TOOL], parallel_tool_calls=True).is_one_call_only
    bad("bad_tools", {"messages": [USER], "tools": ["weather"], "tool_choice": "none"})


def test_settings_are_checked_together() -> None:
    bad("bad_parameters", {"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "9")


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_zero_and_minus_one_mean_every_token(off: int) -> None:
    assert good({"prompt": "x", "top_k": off}).sampling == {"top_k": None}


def test_stop_can_be_one_string() -> None:
    assert good({"prompt": "x", "stop": "\n"}).stop == ("\n",)


NAMED = {"type": "function", "function": {"name": "f"}}
BAD_ALLOWED = [
    *([], {}, {"mode": "auto"}, {"tools": [NAMED]}, {"mode": "none", "tools": [NAMED]}),
    *({"mode": "auto", "tools": tools} for tools in ([], ["f"], [NAMED, {"type": "function"}], {})),
    {"mode": "auto", "tools": [NAMED], "strict": True},
]


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
        ("best_of", [0, 129, 1.0, True, "2"]),
        ("repetition_penalty", [0, -1, 101, "1", True]),
        ("presence_penalty", [-2.1, 2.1, "0"]),
        ("frequency_penalty", [-2.1, 2.1, []]),
        ("logprobs", [-1, 21, 1.0, True, "1"]),
        ("prompt_logprobs", [-1, 21, 1.0, False]),
        ("logit_bias", [[], 1, {"a": 1}, {"1": "a"}, {"-1": 1}, {"1.0": 1}, {"": 1}]),
        ("logit_bias", [{"2147483648": 1}, {"9" * 5000: 1}, {"\u0663": 1}, {"1": True}, {1: 1}]),
        ("bad_words", ["no", [""], [" "], [1], ["a"] * 65, {}]),
        ("truncate_prompt_tokens", [0, -1, 1.0, "5", True]),
        ("thinking_budget", [-1, 1.0, "5", True]),
        (
            "tool_choice",
            ["any", "", 1, [], {}, {"type": "function"}, {"type": "function", "name": "f"}],
        ),
        ("tool_choice", [{"type": "function", "function": {"name": "f", "strict": True}}]),
        ("tool_choice", [{"type": "function", "function": {"name": "f"}, "mode": "auto"}]),
        ("tool_choice", [{"type": "function", "function": {"name": 1}}]),
        ("tool_choice", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tool_choice", [{"type": "allowed_tools", "allowed_tools": bad} for bad in BAD_ALLOWED]),
        ("parallel_tool_calls", [1, "true"]),
        ("tools", [{}, "weather", 1]),
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


def test_a_bias_has_limits() -> None:
    for bias in (-101, 100.5):
        bad("bad_parameters", {"prompt": "x", "logit_bias": {"5": bias}}, "-100 to 100")
    many = {str(token_id): 1 for token_id in range(301)}
    bad("bad_parameters", {"prompt": "x", "logit_bias": many}, "301", "300")


@pytest.mark.parametrize("name", ["thinking_budget", "tools"])
def test_some_settings_are_for_chats(name: str) -> None:
    value: Any = [TOOL] if name == "tools" else 5
    bad("bad_parameters", {"prompt": "x", name: value}, f"{name} needs messages")
    assert good({"prompt": "x", name: value}, chat=True)
    assert good({"messages": [USER], name: value})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[(name, "temperature") for name in ("temprature", "temperatur", "Temperature")],
        *[("tempreature", "temperature"), ("max_token", "max_tokens"), ("maxTokens", "max_tokens")],
        *[("max_toekns", "max_tokens"), ("max-tokens", "max_tokens"), ("topk", "top_k")],
        *[("topP", "top_p"), ("minp", "min_p"), ("ignoreEos", "ignore_eos")],
        *[("max_new_tokens", "max_tokens"), ("stop_sequences", "stop"), ("n_samples", "n")],
        *[("stop_tokens", "stop_token_ids"), ("enable_thinking", "chat_template_kwargs")],
        *[("logit_biases", "logit_bias"), ("repetitionPenalty", "repetition_penalty")],
        *[("top_logprobs", "logprobs"), ("bad_words_ids", "bad_words"), ("bestOf", "best_of")],
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
