"""A row's own settings: which columns are meant as settings, and what they must hold.

No field that looks like a setting is ignored: one of ours is checked, one of vLLM, OpenAI or
transformers that is not ours, or a misspelled one, makes the row bad.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams

from . import structured_output
from .refusal import Refused, shown

MAX_SAMPLES = 128
_MAX_STOP_STRINGS = 16
_MAX_OWN_STOP_TOKEN_IDS = MAX_STOP_TOKEN_IDS - 2  # Qwen3 has two eos ids
_NUMBERS = ("temperature", "top_p", "min_p")
_INTEGERS = ("top_k", "max_tokens", "min_tokens", "seed")


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and 1 <= len(texts) <= _MAX_STOP_STRINGS
    return is_list and all(isinstance(text, str) and text for text in texts)


def _is_stop_token_ids(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) <= _MAX_OWN_STOP_TOKEN_IDS
    return is_short and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _is_template_arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(
        item is None or (name == "enable_thinking" and isinstance(item, bool))
        for name, item in value.items()
    )


# A setting's JSON type; ranges are SamplingParams' to check.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_NUMBERS, (_is_number, "a number")),
    **dict.fromkeys(_INTEGERS, (_is_integer, "an integer")),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
    "n": (
        lambda value: _is_integer(value) and 1 <= value <= MAX_SAMPLES,
        f"an integer from 1 to {MAX_SAMPLES}",
    ),
    "stop": (_is_stop, f"a string or 1 to {_MAX_STOP_STRINGS} strings, none of them empty"),
    "stop_token_ids": (_is_stop_token_ids, f"at most {_MAX_OWN_STOP_TOKEN_IDS} token ids"),
    "chat_template_kwargs": (_is_template_arguments, '{"enable_thinking": true or false}'),
    **structured_output.SETTINGS,
}
# Settings of vLLM, OpenAI and transformers that are not ours, with ours to use instead.
_FOREIGN_SETTINGS: dict[str, str | None] = {
    **dict.fromkeys([
        "best_of", "logprobs", "prompt_logprobs", "top_logprobs", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "length_penalty", "logit_bias", "bad_words",
        "allowed_token_ids", "tools", "tool_choice", "parallel_tool_calls",
        "truncate_prompt_tokens", "echo", "suffix", "num_beams", "use_beam_search", "typical_p",
        "no_repeat_ngram_size", "thinking_budget", "reasoning_effort", "detokenize", "stream",
        "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
        "stream_options", "chat_template", "add_generation_prompt",
    ]),
    "max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens", "max_length": "max_tokens", "min_new_tokens": "min_tokens",
    "min_length": "min_tokens", "stop_strings": "stop", "stop_sequence": "stop",
    "stop_sequences": "stop", "stop_token": "stop_token_ids", "stop_token_id": "stop_token_ids",
    "eos_token_id": "stop_token_ids", "n_samples": "n", "num_return_sequences": "n",
    "do_sample": "temperature", "enable_thinking": "chat_template_kwargs",
}  # fmt: skip
_MAX_SETTING_CHARS = 32  # longer names are data
# For misspellings. Short words are left out: `speed` and `steps` are data, not `seed` and `stop`.
_BARE_NAMES = {
    name.replace("_", ""): name for name in [*_FOREIGN_SETTINGS, *SETTINGS] if "_" in name
}
_LONG_BARE_NAMES = {name.replace("_", ""): name for name in SETTINGS if len(name) >= 8}


class RowSettings(NamedTuple):
    """What a row says of its completions, checked."""

    sampling: Mapping[str, Any] = MappingProxyType({})  # fields of SamplingParams
    n: int | None = None
    stop: tuple[str, ...] = ()  # () where the row says nothing
    enable_thinking: bool | None = None


_NO_SETTINGS = RowSettings()


def settings_of(columns: Mapping[str, Any], data_columns: Mapping[str, Any]) -> RowSettings:
    """The settings among a row's columns; `data_columns` are none, whatever they are called."""
    fields = {}
    for name, complaint in settings_among(tuple(columns)):
        if columns[name] is None or name in data_columns:
            continue
        if complaint:
            raise Refused("unknown_setting", complaint)
        fields[name] = columns[name]
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
    sampling = dict(fields)
    for name, value in fields.items():
        is_good, expected = SETTINGS[name]
        if not is_good(value):
            message = f"{place}{name} is {shown(value)}; it must be {expected}"
            raise Refused("bad_parameters", message)
        if name in _NUMBERS:
            sampling[name] = float(value)
    n = sampling.pop("n", None)
    stop = sampling.pop("stop", ())
    template_arguments = sampling.pop("chat_template_kwargs", {})
    sampling |= structured_output.take_grammar(sampling, place)
    if sampling.get("top_k") in (-1, 0):
        sampling["top_k"] = None  # off, as vLLM and transformers spell it
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise Refused("bad_parameters", f"{place}{error}") from None
    return RowSettings(
        sampling=sampling,
        n=n,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        enable_thinking=template_arguments.get("enable_thinking"),
    )


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
