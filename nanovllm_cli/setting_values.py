"""What a row's settings may hold: JSON's types. Ranges are SamplingParams' to check."""

from typing import Any

from nanovllm_cli.core.sampling_params import MAX_BAD_WORDS, MAX_STOP_TOKEN_IDS

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_OWN_STOP_TOKEN_IDS = MAX_STOP_TOKEN_IDS - 2  # Qwen3 has two eos ids
MAX_TOKEN_ID = 2**31 - 1  # int32 is what the engine holds


def is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


def is_integer(value: Any) -> bool:
    return type(value) is int


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_list_or_json(value: Any) -> bool:
    """JSON's text of a list counts; so does no text at all."""
    return isinstance(value, list) or (isinstance(value, str) and value.strip()[:1] in ("[", ""))


def is_num_samples(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SAMPLES


def is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    is_short = isinstance(texts, list) and 1 <= len(texts) <= MAX_STOP_STRINGS
    return is_short and all(isinstance(text, str) and text for text in texts)


def is_stop_token_ids(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) <= MAX_OWN_STOP_TOKEN_IDS
    return is_short and all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in value)


def is_bad_words(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) <= MAX_BAD_WORDS
    return is_short and all(isinstance(text, str) and text.strip() for text in value)


def is_logit_bias(value: Any) -> bool:
    """As OpenAI has it, {"1234": -100}: JSON has no other keys than strings."""
    return isinstance(value, dict) and all(
        _is_token_id(name) and is_number(bias) for name, bias in value.items()
    )


def _is_token_id(name: Any) -> bool:
    is_short = isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= 10
    return is_short and int(name) <= MAX_TOKEN_ID


def is_tool_choice(value: Any) -> bool:
    match value:
        case "auto" | "none" | "required":
            return True
        case {"type": "allowed_tools", "allowed_tools": {**allowed}, **others}:
            tools = allowed.get("tools")
            is_list = isinstance(tools, list) and len(tools) > 0 and all(map(_is_named, tools))
            is_whole = allowed.get("mode") in ("auto", "required") and len(allowed) == 2
            return is_list and is_whole and not others
    return _is_named(value)


def _is_named(value: Any) -> bool:
    match value:
        case {"type": "function", "function": {"name": str(), **more}, **others}:
            return not more and not others
    return False


def is_template_arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(
        item is None or (name == "enable_thinking" and isinstance(item, bool))
        for name, item in value.items()
    )
