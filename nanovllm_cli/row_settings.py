"""A row's own settings: which columns are meant as settings, and what they must hold.

No field that looks like a setting is ignored: one of ours is checked, one of vLLM, OpenAI or
transformers that is not ours, or a misspelled one, makes the row bad.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from nanovllm_cli.core.sampling_params import MAX_BAD_WORDS, SamplingParams

from . import setting_values as values
from . import structured_output
from .dataset_chat import without_padding
from .refusal import Refused, shown
from .setting_values import MAX_OWN_STOP_TOKEN_IDS, MAX_SAMPLES, MAX_STOP_STRINGS, MAX_TOKEN_ID
from .tool_calls import Tools, checked_tools
from .tool_choice import chosen_tools

_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_INTEGERS = ("top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")
# A setting's JSON type; ranges are SamplingParams' to check.
_SAMPLES = (values.is_num_samples, f"an integer from 1 to {MAX_SAMPLES}")
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_NUMBERS, (values.is_number, "a number")),
    **dict.fromkeys(_INTEGERS, (values.is_integer, "an integer")),
    "ignore_eos": (values.is_bool, "true or false"),
    "n": _SAMPLES,
    "best_of": _SAMPLES,
    "stop": (values.is_stop, f"a string or 1 to {MAX_STOP_STRINGS} strings, none of them empty"),
    "stop_token_ids": (
        values.is_stop_token_ids,
        f"at most {MAX_OWN_STOP_TOKEN_IDS} token ids, 0 to {MAX_TOKEN_ID}",
    ),
    "logit_bias": (values.is_logit_bias, '{"token id": number}'),
    "bad_words": (values.is_bad_words, f"at most {MAX_BAD_WORDS} strings, none of them blank"),
    "truncate_prompt_tokens": (values.is_positive, "an integer of at least 1"),
    "thinking_budget": (values.is_count, "an integer of at least 0"),
    "chat_template_kwargs": (values.is_template_arguments, '{"enable_thinking": true or false}'),
    "tools": (values.is_list_or_json, "a list of tools, or its JSON as a string"),
    "tool_choice": (
        values.is_tool_choice,
        "'auto', 'none', 'required' or an object of type 'function' or 'allowed_tools'",
    ),
    "parallel_tool_calls": (values.is_bool, "true or false"),
    **structured_output.SETTINGS,
}
_NOT_OF_SAMPLING = {  # no fields of SamplingParams
    *("n", "best_of", "stop", "bad_words", "truncate_prompt_tokens", "thinking_budget"),
    *("chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls"),
}
# Settings of vLLM, OpenAI and transformers that are not ours, with ours to use instead.
_FOREIGN_SETTINGS: dict[str, str | None] = {
    **dict.fromkeys([
        "length_penalty", "allowed_token_ids", "echo", "suffix", "num_beams",
        "use_beam_search", "typical_p", "no_repeat_ngram_size", "detokenize", "stream",
        "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
        "stream_options", "chat_template", "add_generation_prompt",
    ]),
    "max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens", "max_length": "max_tokens", "min_new_tokens": "min_tokens",
    "min_length": "min_tokens", "stop_strings": "stop", "stop_sequence": "stop",
    "stop_sequences": "stop", "stop_token": "stop_token_ids", "stop_token_id": "stop_token_ids",
    "eos_token_id": "stop_token_ids", "n_samples": "n", "num_return_sequences": "n",
    "do_sample": "temperature", "enable_thinking": "chat_template_kwargs",
    "reasoning_effort": "chat_template_kwargs", "top_logprobs": "logprobs",
    "max_thinking_tokens": "thinking_budget", "bad_words_ids": "bad_words",
    "num_logprobs": "logprobs", "functions": "tools", "function_call": "tool_choice",
}  # fmt: skip
_MAX_SETTING_CHARS = 32  # longer names are data
# For misspellings. Short words are left out: `speed` and `steps` are data, not `seed` and `stop`.
_BARE_NAMES = {
    name.replace("_", ""): name for name in [*_FOREIGN_SETTINGS, *SETTINGS] if "_" in name
}
# And so is what is near to a name of data: a `logprob` or a `bad_word`.
_LONG_BARE_NAMES = {
    name.replace("_", ""): name
    for name in SETTINGS
    if len(name) >= 8 and name not in ("logprobs", "bad_words")
}


class RowSettings(NamedTuple):
    """What a row says of its completions, checked."""

    sampling: Mapping[str, Any] = MappingProxyType({})  # fields of SamplingParams
    n: int | None = None
    stop: tuple[str, ...] = ()  # () where the row says nothing
    enable_thinking: bool | None = None
    best_of: int | None = None
    bad_words: tuple[str, ...] | None = None
    truncate_prompt_tokens: int | None = None
    thinking_budget: int | None = None
    tools: Tools | None = None  # None where none may be called
    is_one_call_only: bool = False
    echo: bool = False  # of an OpenAI completion: the prompt before its text

    @property
    def for_chats(self) -> str | None:
        """The name of a setting that has no meaning for a raw prompt, if one is set."""
        if self.enable_thinking is not None:
            return "chat_template_kwargs"
        if self.tools is not None:
            return "tools"
        return None if self.thinking_budget is None else "thinking_budget"


_NO_SETTINGS = RowSettings()


def settings_of(
    columns: Mapping[str, Any], data_columns: Mapping[str, Any], *, is_parquet: bool = False
) -> RowSettings:
    """The settings among a row's columns; `data_columns` are none, whatever they are called."""
    fields = {}
    for name, complaint in settings_among(tuple(columns)):
        if columns[name] is None or name in data_columns:
            continue
        if complaint:
            raise Refused("unknown_setting", complaint)
        fields[name] = without_padding(columns[name]) if is_parquet else columns[name]
    return parse_settings(fields, "")


@lru_cache(maxsize=16)  # most rows have the columns of the row before
def settings_among(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The settings among `columns`, and what looks like one, each with its complaint."""
    complaints = ((name, complaint_about(name)) for name in columns)
    return tuple((name, complaint) for name, complaint in complaints if complaint is not None)


def parse_settings(fields: Mapping[str, Any], place: str) -> RowSettings:
    """Check `fields`, all of them settings of ours; `place` goes before a name in a message."""
    if not fields:
        return _NO_SETTINGS
    sampling: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, value in fields.items():
        is_good, expected = SETTINGS[name]
        if not is_good(value):
            message = f"{place}{name} is {shown(value)}; it must be {expected}"
            raise Refused("bad_parameters", message)
        if name in _NOT_OF_SAMPLING:
            own[name] = value
        else:
            sampling[name] = float(value) if name in _NUMBERS else value
    sampling |= structured_output.take_grammar(sampling, place)
    if sampling.get("top_k") in (-1, 0):
        sampling["top_k"] = None  # off, as vLLM and transformers spell it
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = logit_bias_of(sampling["logit_bias"])
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise Refused("bad_parameters", f"{place}{error}") from None
    return _row_settings(sampling, own, place) if own else RowSettings(sampling)


def _row_settings(sampling: dict[str, Any], own: dict[str, Any], place: str) -> RowSettings:
    """With those that are not SamplingParams' fields."""
    stop, bad_words = own.get("stop", ()), own.get("bad_words")
    tools = checked_tools(own["tools"], f"{place}tools") if own.get("tools") else []
    choice, is_one_only = own.get("tool_choice", "auto"), own.get("parallel_tool_calls") is False
    tools, calls = chosen_tools(tools, choice, is_one_only=is_one_only, place=place)
    if calls is not None:
        if sampling.get("grammar") is not None:
            message = f"{place}tool_choice is {shown(choice)}, but the row has a grammar as well"
            raise Refused("bad_parameters", message)
        sampling["grammar"] = calls
    return RowSettings(
        sampling=sampling,
        n=own.get("n"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        enable_thinking=own.get("chat_template_kwargs", {}).get("enable_thinking"),
        best_of=own.get("best_of"),
        bad_words=None if bad_words is None else tuple(bad_words),
        truncate_prompt_tokens=own.get("truncate_prompt_tokens"),
        thinking_budget=own.get("thinking_budget"),
        tools=tools or None,
        is_one_call_only=is_one_only,
    )


def logit_bias_of(value: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """OpenAI's {"token id": bias} as SamplingParams has it, in the order of the ids."""
    return tuple(sorted((int(token_id), float(bias)) for token_id, bias in value.items()))


def complaint_about(name: str) -> str | None:
    """None for data, "" for a setting of ours, or what is wrong with what looks like a setting."""
    return _complaint_about(name) if len(name) <= _MAX_SETTING_CHARS else None


@lru_cache(maxsize=4096)
def _complaint_about(name: str) -> str | None:
    if name in SETTINGS:
        return ""
    meant = name if name in _FOREIGN_SETTINGS else _similar_setting(name.lower())
    if meant is None:
        return None
    if meant in SETTINGS:
        return f"{shown(name)} is not a setting; did you mean {meant!r}?"
    instead = _FOREIGN_SETTINGS[meant]
    complaint = f"{shown(name)} is a setting that is not supported"
    return complaint if instead is None else f"{complaint}; use {instead!r}"


def _similar_setting(name: str) -> str | None:
    """The setting that `name` misspells: in another case, without its underscores, or nearly so.

    Not `n_tokens` or `temperature_c`: a typo keeps the first letter and adds no word.
    """
    bare = name.replace("_", "").replace("-", "")
    if bare in _BARE_NAMES:
        return _BARE_NAMES[bare]
    for match in difflib.get_close_matches(bare, _LONG_BARE_NAMES, n=1, cutoff=0.88):
        meant = _LONG_BARE_NAMES[match]
        if bare[0] == meant[0] and not name.startswith(f"{meant}_"):
            return meant
    return None
