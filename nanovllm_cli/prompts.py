"""Row -> Prompt, or BadRow with the reason: which columns are the prompt, and how to sample it.

Pure: no file is read and nothing is printed. A Prompt is text, messages or token ids; tokenizer.py
makes token ids of the first two. A row that cannot run does not stop the job, and no field that
looks like a setting is ignored.
"""

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from string import Formatter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import orjson

from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams

from .exit_code import CommandError
from .rows import BadRow, Row

MAX_SAMPLES = 128
_MAX_STOP_STRINGS = 16
_MAX_OWN_STOP_TOKEN_IDS = MAX_STOP_TOKEN_IDS - 2  # Qwen3 has two eos ids

Endpoint = Literal["chat", "completions"]
Messages = list[dict[str, Any]]
_Content = tuple[str | None, Messages | None, list[int] | None]  # text, messages, token ids
_ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}

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
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
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
}
_BODY_WITHOUT_EFFECT = frozenset({"stream", "user", "metadata", "store"})
_BODY_FIELDS = frozenset(
    {"model", "messages", "prompt", "max_completion_tokens", *_BODY_WITHOUT_EFFECT, *_SETTINGS}
)
# Settings of vLLM, OpenAI and transformers that are not ours, with ours to use instead.
_FOREIGN_SETTINGS: dict[str, str | None] = {
    **dict.fromkeys([
        "best_of", "logprobs", "prompt_logprobs", "top_logprobs", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "length_penalty", "logit_bias", "bad_words",
        "allowed_token_ids", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
        "structured_outputs", "response_format", "tools", "tool_choice", "parallel_tool_calls",
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
    name.replace("_", ""): name for name in [*_FOREIGN_SETTINGS, *_SETTINGS] if "_" in name
}
_LONG_BARE_NAMES = {name.replace("_", ""): name for name in _SETTINGS if len(name) >= 8}

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_TEXTS = ("reasoning_content", "name", "tool_call_id")
_MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", *_MESSAGE_TEXTS})

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


class _Refused(Exception):
    """Why a row cannot run."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What the command says of all rows; a row's own fields win.

    Raises CommandError for a template or a sampling value that cannot be used.
    """

    chat: bool = False  # a prompt is a user message
    template: str | None = None  # "Translate: {text}": columns are its fields
    system: str | None = None  # for messages that have no system message; makes prompts messages
    enable_thinking: bool | None = None  # None: what the chat template does by itself
    prompt_column: str = "prompt"
    messages_column: str = "messages"
    id_column: str | None = None  # None: `id`, else `custom_id`, if there is one
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingParams, from flags

    def __post_init__(self) -> None:
        try:
            SamplingParams(**self.sampling)
            f"{self.template}{self.system}".encode()
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from None
        _ = self.template_parts

    @cached_property
    def template_parts(self) -> list[tuple[str, str | None]]:
        """The template, as pieces of text and the name of the column behind each."""
        hint = "Fields are names of columns, like {text}; write {{ and }} for braces."
        try:
            parts = list(Formatter().parse(self.template or ""))
        except ValueError as error:
            raise CommandError(f"template {self.template!r}: {error}", hint) from None
        for _, name, spec, conversion in parts:
            is_column = name and not name.isdigit() and "." not in name and "[" not in name
            if name is not None and (not is_column or spec or conversion):
                raise CommandError(f"template {self.template!r} has other fields than names", hint)
        return [(text, name) for text, name, _, _ in parts]

    @cached_property
    def data_columns(self) -> frozenset[str | None]:
        """Columns that the options name: data, even if they are called like a setting."""
        columns = {self.prompt_column, self.messages_column, self.id_column}
        return frozenset(columns | {name for _, name in self.template_parts})


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to complete; exactly one of `text`, `messages` and `token_ids` is there."""

    index: int
    source: str
    line: int
    id: str | int | None
    text: str | None
    messages: Messages | None
    token_ids: list[int] | None
    sampling: Mapping[str, Any]  # the row's own fields of SamplingParams, checked
    n: int | None
    stop: tuple[str, ...]  # () where the row says nothing
    enable_thinking: bool | None
    endpoint: Endpoint | None  # of an OpenAI batch line
    model: str | None  # what an OpenAI batch line asks for
    row: Row


class _Settings(NamedTuple):
    sampling: Mapping[str, Any] = MappingProxyType({})
    n: int | None = None
    stop: tuple[str, ...] = ()
    enable_thinking: bool | None = None


_NO_SETTINGS = _Settings()


def to_prompt(row: Row, options: PromptOptions) -> Prompt | BadRow:
    """The prompt of a row, whose kind is seen from its columns.

    `options.chat` and `options.system` leave token ids and OpenAI's completions as they are.
    """
    columns = row.columns
    row_id: str | int | None = None
    endpoint: Endpoint | None = None
    model: str | None = None
    try:
        if "custom_id" in columns and _is_openai(columns):
            row_id = _text("custom_id", columns["custom_id"], "bad_openai_line")
            endpoint, body = _openai_request(columns)
            if "model" in body:
                model = _text("body.model", body.pop("model"), "bad_openai_line")
            text, messages, token_ids = _openai_content(endpoint, body, options)
            settings = _parse_settings(body, options, "body.")
        else:
            row_id = _id_of(columns, options)
            settings = _settings_of(columns, options)
            text, messages, token_ids = _content_of(columns, options)
        enable_thinking = settings.enable_thinking
        if messages is None and enable_thinking is not None:
            raise _Refused("bad_parameter", "chat_template_kwargs needs messages, not a prompt")
        if messages is not None and enable_thinking is None:
            enable_thinking = options.enable_thinking
    except _Refused as refused:
        return BadRow(
            index=row.index,
            source=row.source,
            line=row.line,
            id=row_id,
            code=refused.code,
            message=refused.message,
        )
    return Prompt(
        index=row.index,
        source=row.source,
        line=row.line,
        id=row_id,
        text=text,
        messages=messages,
        token_ids=token_ids,
        sampling=settings.sampling,
        n=settings.n,
        stop=settings.stop,
        enable_thinking=enable_thinking,
        endpoint=endpoint,
        model=model,
        row=row,
    )


def _id_of(columns: dict[str, Any], options: PromptOptions) -> str | int | None:
    if options.id_column is not None:
        value = columns.get(options.id_column)
        if value is None:
            raise _Refused("bad_id", f"the row has no {_shown(options.id_column)} to be its id")
    else:
        value = columns.get("id")
        if value is None:
            value = columns.get("custom_id")
    if value is None or type(value) is str or type(value) is int:
        return value
    raise _Refused("bad_id", f"the id is {_shown(value)}; it must be a string or an integer")


def _content_of(columns: dict[str, Any], options: PromptOptions) -> _Content:
    if options.template is not None:
        return _from_text(_fill_template(columns, options), options)
    text = columns.get(options.prompt_column)
    messages = columns.get(options.messages_column)
    token_ids = columns.get("prompt_token_ids")
    num_found = (text is not None) + (messages is not None) + (token_ids is not None)
    if num_found != 1:
        names = f"{options.prompt_column}, {options.messages_column} and prompt_token_ids"
        if num_found > 1:
            raise _Refused("bad_prompt", f"the row has more than one of {names}")
        raise _Refused("no_prompt", f"the row has none of {names}, but {_shown([*columns])}")
    if messages is not None:
        return _from_messages(messages, options.messages_column, options)
    if token_ids is not None:
        return None, None, _checked_token_ids("prompt_token_ids", token_ids)
    return _from_text(_text(options.prompt_column, text, "bad_prompt"), options)


def _from_text(text: str, options: PromptOptions) -> _Content:
    if not text:
        raise _Refused("empty_prompt", "the prompt is empty")
    if options.chat or options.system is not None:
        return _from_messages([{"role": "user", "content": text}], "prompt", options)
    return text, None, None


def _fill_template(columns: dict[str, Any], options: PromptOptions) -> str:
    pieces = []
    for text, name in options.template_parts:
        pieces.append(text)
        if name is None:
            continue
        value = columns.get(name)
        if value is None:
            what = "is null" if name in columns else f"is not among {_shown([*columns])}"
            raise _Refused("template_error", f"the template's column {_shown(name)} {what}")
        try:
            # Only what is text in JSON, as a date is, comes with quotes.
            is_text = isinstance(value, str)
            pieces.append(value if is_text else orjson.dumps(value).decode().strip('"'))
        except TypeError as error:
            message = f"the template's column {_shown(name)} cannot be text: {error}"
            raise _Refused("template_error", message) from None
    return "".join(pieces)


def _from_messages(value: Any, place: str, options: PromptOptions) -> _Content:
    if not isinstance(value, list) or not value:
        message = f"{place} is {_shown(value)}; it must be a list of messages"
        raise _Refused("bad_messages", message)
    messages = [_message(item, f"{place}[{at}]") for at, item in enumerate(value)]
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise _Refused("empty_prompt", f"{place} ends with an empty user message")
    if options.system is not None and all(item["role"] != "system" for item in messages):
        messages.insert(0, {"role": "system", "content": options.system})
    return None, messages, None


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Refused("bad_messages", f"{place} is {_shown(value)}; it must be an object")
    message = {name: item for name, item in value.items() if item is not None}
    for name in message:
        if name not in _MESSAGE_FIELDS:
            raise _Refused("bad_messages", f"{place} has the unknown field {_shown(name)}")
    role = message.get("role")
    if role not in _ROLES:
        reason = f"{place}.role is {_shown(role)}; it must be one of {', '.join(_ROLES)}"
        raise _Refused("bad_messages", reason)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _Refused("bad_messages", f"{place}.tool_calls is not a list of objects")
    for name in _MESSAGE_TEXTS:
        if name in message:
            _text(f"{place}.{name}", message[name], "bad_messages")
    content = message.get("content", "" if calls and role == "assistant" else None)
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{place}.content") for part in content)
    return {**message, "content": _text(f"{place}.content", content, "bad_messages")}


def _text_part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _Refused("bad_messages", f"{place} has the part {_shown(part)}; only text is known")
    return _text(f"{place}[].text", part.get("text"), "bad_messages")


def _text(name: str, value: Any, code: str) -> str:
    if not isinstance(value, str):
        raise _Refused(code, f"{name} is {_shown(value)}; it must be a string")
    return value


def _checked_token_ids(name: str, value: Any) -> list[int]:
    if value == []:
        raise _Refused("empty_prompt", f"{name} is empty")
    # int32 is what the engine holds; which ids the vocabulary has is for it to say.
    is_list = isinstance(value, list) and set(map(type, value)) == {int}
    if not is_list or min(value) < 0 or max(value) >= 2**31:
        message = f"{name} is {_shown(value)}; it must be a list of integers, 0 to 2**31 - 1"
        raise _Refused("bad_prompt", message)
    return value


def _is_openai(columns: dict[str, Any]) -> bool:
    has_request = columns.get("body") is not None or columns.get("url") is not None
    return has_request and columns["custom_id"] is not None


def _openai_request(columns: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    """The endpoint, and the body's fields as far as they have an effect."""
    code = "bad_openai_line"
    method, url, body = (columns.get(name) for name in ("method", "url", "body"))
    if method != "POST":
        raise _Refused(code, f"method is {_shown(method)}; it must be POST")
    if not isinstance(url, str) or url not in _ENDPOINTS:
        raise _Refused(code, f"url is {_shown(url)}; it must be one of {', '.join(_ENDPOINTS)}")
    if not isinstance(body, dict):
        raise _Refused(code, f"body is {_shown(body)}; it must be an object")
    for name, value in columns.items():
        if value is not None and _verdict_of(name) is not None:
            raise _Refused(code, f"{_shown(name)} must stand in the body")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in _BODY_FIELDS:
            reason = _verdict_of(name) or f"{_shown(name)} is not supported"
            raise _Refused("unknown_setting", f"in the body, {reason}")
    stream = body.get("stream", False)
    if stream is not False:
        raise _Refused("bad_parameter", f"body.stream is {_shown(stream)}; it must be false")
    if "max_completion_tokens" in body:
        limit = body.pop("max_completion_tokens")
        if body.setdefault("max_tokens", limit) != limit:
            raise _Refused("bad_parameter", "body.max_tokens and max_completion_tokens differ")
    return _ENDPOINTS[url], {k: v for k, v in body.items() if k not in _BODY_WITHOUT_EFFECT}


def _openai_content(endpoint: Endpoint, body: dict[str, Any], options: PromptOptions) -> _Content:
    """Takes the content out of `body`."""
    prompt, messages = body.pop("prompt", None), body.pop("messages", None)
    foreign = prompt if endpoint == "chat" else messages
    if foreign is not None:
        names = "messages and no prompt" if endpoint == "chat" else "a prompt and no messages"
        raise _Refused("bad_openai_line", f"the body of this url has {names}")
    if endpoint == "chat":
        return _from_messages(messages, "body.messages", options)
    if isinstance(prompt, list):
        return None, None, _checked_token_ids("body.prompt", prompt)
    text = _text("body.prompt", prompt, "bad_prompt")
    if not text:
        raise _Refused("empty_prompt", "body.prompt is empty")
    return text, None, None


def _settings_of(columns: dict[str, Any], options: PromptOptions) -> _Settings:
    names = [n for n in columns if len(n) <= _MAX_SETTING_CHARS and _verdict(n) is not None]
    if not names:
        return _NO_SETTINGS
    fields = {
        name: columns[name]
        for name in names
        if columns[name] is not None and name not in options.data_columns
    }
    for name in fields:
        if complaint := _verdict(name):
            raise _Refused("unknown_setting", complaint)
    return _parse_settings(fields, options, "")


def _verdict_of(name: str) -> str | None:
    """None for data, "" for a setting of ours, or a complaint about what looks like a setting."""
    return _verdict(name) if len(name) <= _MAX_SETTING_CHARS else None


@lru_cache(maxsize=4096)
def _verdict(name: str) -> str | None:
    if name in _SETTINGS:
        return ""
    meant = name if name in _FOREIGN_SETTINGS else _similar_setting(name.lower())
    if meant is None:
        return None
    if meant in _SETTINGS:
        return f"{_shown(name)} is not a setting; did you mean {meant!r}?"
    instead = _FOREIGN_SETTINGS[meant]
    complaint = f"{_shown(name)} is a setting that is not supported"
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


def _parse_settings(fields: dict[str, Any], options: PromptOptions, place: str) -> _Settings:
    for name, value in fields.items():
        is_good, expected = _SETTINGS[name]
        if not is_good(value):
            message = f"{place}{name} is {_shown(value)}; it must be {expected}"
            raise _Refused("bad_parameter", message)
    sampling = {**fields, **{name: float(fields[name]) for name in _NUMBERS if name in fields}}
    n = sampling.pop("n", None)
    stop = sampling.pop("stop", ())
    template_arguments = sampling.pop("chat_template_kwargs", {})
    if sampling.get("top_k") in (-1, 0):
        sampling["top_k"] = None  # off, as vLLM and transformers spell it
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    try:
        SamplingParams(**{**options.sampling, **sampling})
    except ValueError as error:
        raise _Refused("bad_parameter", f"{place}{error}") from None
    return _Settings(
        sampling=sampling,
        n=n,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        enable_thinking=template_arguments.get("enable_thinking"),
    )


def _shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = "null" if value is None else _BRIEF.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
