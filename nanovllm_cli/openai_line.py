"""An OpenAI batch line -> what it asks for: endpoint, model, content and settings.

{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}, as in
https://platform.openai.com/docs/guides/batch.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from nanovllm_cli.core.sampling_params import MAX_LOGPROBS

from .prompt_content import Content, from_messages, from_text, from_token_ids
from .refusal import Refused, checked_text, shown
from .row_settings import SETTINGS, RowSettings, complaint_about, parse_settings, settings_among

Endpoint = Literal["chat", "completions"]

_ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/chat/completions": "chat",  # as Azure has them
    "/completions": "completions",
}
_NAMED_ENDPOINTS = "/v1/chat/completions, /v1/completions"
# A column of what each of them calls a line's request.
_OTHER_BATCHES = {
    "params": "Anthropic's",
    "request": "Gemini's",
    "modelInput": "Bedrock's",
}
# They change where a request runs and who is told of it, not what comes out.
_WITHOUT_EFFECT = (
    *("stream", "user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
_OF_BOTH = ("model", "messages", "prompt", "max_completion_tokens", *_WITHOUT_EFFECT, *SETTINGS)
# Qwen3 thinks or does not; `thinking_budget` is what limits a thought.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_FIRST_THAT_THINKS = _EFFORTS.index("low")
_SPELLED_BY_CHATS = frozenset({"logprobs", "top_logprobs", "reasoning_effort", "modalities"})
_BODY_FIELDS: dict[Endpoint, frozenset[str]] = {
    "chat": frozenset({*_OF_BOTH, *_SPELLED_BY_CHATS}),
    "completions": frozenset({*_OF_BOTH, "echo"}),
}


class OpenAIRequest(NamedTuple):
    """What one line asks for."""

    endpoint: Endpoint
    model: str | None
    content: Content
    settings: RowSettings
    others: list[Content]  # a completion's further prompts


def is_openai_line(columns: Mapping[str, Any]) -> bool:
    """Whether a row is meant as one: it has a custom_id, and a body or a url."""
    if columns.get("custom_id") is None:
        return False
    return columns.get("body") is not None or columns.get("url") is not None


def batch_of_another(columns: Mapping[str, Any]) -> str | None:
    """Whose batch line a row is, if it is one that is not known here."""
    for name, whose in _OTHER_BATCHES.items():
        if isinstance(columns.get(name), dict):
            return whose
    return None


def parse_openai_line(columns: Mapping[str, Any], system: str | None) -> OpenAIRequest:
    """Check all that a line says; `system` goes before a chat without a system message.

    A line without method and url, as Mistral and Fireworks have it, is a chat.
    """
    endpoint, body = _endpoint_and_body(columns)
    model = body.pop("model", None)
    if model is not None:
        checked_text("body.model", model, "bad_openai_line")
    content, *others = _take_contents(endpoint, body, system)
    if endpoint == "chat" and not _SPELLED_BY_CHATS.isdisjoint(body):
        _translate_chat_fields(body)
    echo = body.pop("echo", False)
    if not isinstance(echo, bool):
        raise Refused("bad_parameters", f"body.echo is {shown(echo)}; it must be true or false")
    settings = parse_settings(body, "body.")
    if echo:
        settings = settings._replace(echo=True)
    return OpenAIRequest(endpoint, model, content, settings, others)


def _endpoint_and_body(columns: Mapping[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    """The endpoint, and the body's fields as far as they have an effect."""
    code = "bad_openai_line"
    method, url, body = columns.get("method"), columns.get("url"), columns.get("body")
    if method is not None and not (isinstance(method, str) and method.upper() == "POST"):
        raise Refused(code, f"method is {shown(method)}; it must be POST")
    if url is None:
        is_prompt = isinstance(body, dict) and body.get("messages") is None and "prompt" in body
        url = "/v1/completions" if is_prompt else "/v1/chat/completions"
    endpoint = _ENDPOINTS.get(url.removesuffix("/")) if isinstance(url, str) else None
    if endpoint is None:
        raise Refused(code, f"url is {shown(url)}; it must be one of {_NAMED_ENDPOINTS}")
    if not isinstance(body, dict):
        raise Refused(code, f"body is {shown(body)}; it must be an object")
    for name, _ in settings_among(tuple(columns)):
        if columns[name] is not None:
            raise Refused(code, f"{shown(name)} must stand in the body")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in _BODY_FIELDS[endpoint]:
            reason = complaint_about(name) or f"{shown(name)} is not supported"
            raise Refused("unknown_setting", f"in the body, {reason}")
    stream = body.get("stream", False)
    if stream is not False:
        raise Refused("bad_parameters", f"body.stream is {shown(stream)}; it must be false")
    if "max_completion_tokens" in body:
        limit = body.pop("max_completion_tokens")
        if body.setdefault("max_tokens", limit) != limit:
            raise Refused("bad_parameters", "body.max_tokens and max_completion_tokens differ")
    seed = body.get("seed")
    if type(seed) is int and -(2**63) <= seed < 0:  # OpenAI's are signed
        body["seed"] = seed + 2**64
    for name in _WITHOUT_EFFECT:
        body.pop(name, None)
    return endpoint, body


def _translate_chat_fields(body: dict[str, Any]) -> None:
    """What chats spell in a way of their own becomes settings of ours."""
    code = "bad_parameters"
    modalities, effort = body.pop("modalities", ["text"]), body.pop("reasoning_effort", None)
    if modalities != ["text"]:
        raise Refused(code, f"body.modalities is {shown(modalities)}; only ['text'] is supported")
    if effort is not None:
        if effort not in _EFFORTS:
            message = f"body.reasoning_effort is {shown(effort)}; it must be one of "
            raise Refused(code, message + ", ".join(_EFFORTS))
        thinks = {"enable_thinking": _EFFORTS.index(effort) >= _FIRST_THAT_THINKS}
        if body.setdefault("chat_template_kwargs", thinks) != thinks:
            raise Refused(code, "body.reasoning_effort and chat_template_kwargs differ")
    logprobs, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(logprobs, bool):
        raise Refused(code, f"body.logprobs is {shown(logprobs)}; it must be true or false")
    if top is not None and not (type(top) is int and 0 <= top <= MAX_LOGPROBS):
        limit = f"an integer from 0 to {MAX_LOGPROBS}"
        raise Refused(code, f"body.top_logprobs is {shown(top)}; it must be {limit}")
    if top and not logprobs:
        raise Refused(code, f"body.top_logprobs is {top}, without body.logprobs")
    if logprobs:
        body["logprobs"] = top or 0


def _take_contents(endpoint: Endpoint, body: dict[str, Any], system: str | None) -> list[Content]:
    """Takes them out of `body`, where settings remain: one, or several prompts of a completion."""
    prompt, messages = body.pop("prompt", None), body.pop("messages", None)
    foreign = prompt if endpoint == "chat" else messages
    if foreign is not None:
        names = "messages and no prompt" if endpoint == "chat" else "a prompt and no messages"
        raise Refused("bad_openai_line", f"the body of this url has {names}")
    if endpoint == "chat":
        return [from_messages(messages, "body.messages", system)]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return [_content_of(item, f"body.prompt[{at}]") for at, item in enumerate(prompt)]
    return [_content_of(prompt, "body.prompt")]


def _content_of(prompt: Any, place: str) -> Content:
    if isinstance(prompt, list):
        return from_token_ids(prompt, place)
    return from_text(prompt, place)
