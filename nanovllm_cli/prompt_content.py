"""What is to be completed: text, messages or token ids, checked."""

from typing import Any, NamedTuple

from .refusal import Refused, checked_text, shown
from .tool_calls import check_calls

Messages = list[dict[str, Any]]

_ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLES = {"developer": "system"}  # OpenAI's name for it, since its o1
_MESSAGE_TEXTS = ("reasoning_content", "name", "tool_call_id", "refusal")
_MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", "annotations", *_MESSAGE_TEXTS})


class Content(NamedTuple):
    """Exactly one of the three is there."""

    text: str | None = None
    messages: Messages | None = None
    token_ids: list[int] | None = None


def from_text(value: Any, place: str) -> Content:
    """Text that is completed as it stands."""
    if not checked_text(place, value, "bad_prompt"):
        raise Refused("empty_prompt", f"{place} is empty")
    return Content(text=value)


def from_messages(value: Any, place: str, system: str | None) -> Content:
    """A chat; `system` goes before one that has no system message."""
    if not isinstance(value, list) or not value:
        raise Refused("bad_messages", f"{place} is {shown(value)}; it must be a list of messages")
    messages = [_message(item, place, at) for at, item in enumerate(value)]
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise Refused("empty_prompt", f"{place} ends with an empty user message")
    if system is not None and all(item["role"] != "system" for item in messages):
        messages.insert(0, {"role": "system", "content": system})
    return Content(messages=messages)


def from_token_ids(value: Any, place: str) -> Content:
    """Token ids, which are completed as they stand."""
    if value == []:
        raise Refused("empty_prompt", f"{place} is empty")
    # int32 is what the engine holds; which ids the vocabulary has is for it to say.
    is_list = isinstance(value, list) and set(map(type, value)) == {int}
    if not is_list or min(value) < 0 or max(value) >= 2**31:
        message = f"{place} is {shown(value)}; it must be a list of integers, 0 to 2**31 - 1"
        raise Refused("bad_prompt", message)
    return Content(token_ids=value)


def with_prefix(content: Content, prefix: str | Messages | None) -> Content:
    """`content` after what all rows begin with: text before text, messages after a system's."""
    if prefix is None:
        return content
    text, messages, _ = content
    if isinstance(prefix, str) and text is not None:
        return Content(text=prefix + text)
    if isinstance(prefix, list) and messages is not None:
        at = 1 if messages[0]["role"] == "system" else 0
        return Content(messages=[*messages[:at], *prefix, *messages[at:]])
    held = "text" if isinstance(prefix, str) else "messages"
    given = "messages" if messages is not None else "text" if text is not None else "token ids"
    raise Refused("bad_prompt", f"--prefix-file holds {held}, and cannot go before {given}")


def _message(value: Any, list_place: str, at: int) -> dict[str, Any]:
    if type(value) is dict and len(value) == 2:  # almost every message, in a fifth of the time
        role, content = value.get("role"), value.get("content")
        if type(content) is str and role in _ROLES:
            return value
    return _checked_message(value, f"{list_place}[{at}]")


def _checked_message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("bad_messages", f"{place} is {shown(value)}; it must be an object")
    message = {name: item for name, item in value.items() if item is not None}
    for name in message:
        if name not in _MESSAGE_FIELDS:
            raise Refused("bad_messages", f"{place} has the unknown field {shown(name)}")
    role = message["role"] = _SAME_ROLES.get(str(message.get("role")), message.get("role"))
    if role not in _ROLES:
        known = ", ".join([*_ROLES, *_SAME_ROLES])
        reason = f"{place}.role is {shown(role)}; it must be one of {known}"
        raise Refused("bad_messages", reason)
    calls = message.get("tool_calls", [])
    check_calls(calls, f"{place}.tool_calls")
    for name in _MESSAGE_TEXTS:
        if name in message:
            checked_text(f"{place}.{name}", message[name], "bad_messages")
    message.pop("annotations", None)  # of a response that is sent back: nothing that was said
    says_more = bool(calls) or "reasoning_content" in message
    refusal = message.pop("refusal", "" if says_more and role == "assistant" else None)
    content = message.get("content", refusal)
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{place}.content") for part in content)
    return {**message, "content": checked_text(f"{place}.content", content, "bad_messages")}


def _text_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise Refused("bad_messages", f"{place} has the part {shown(part)}; only text is known")
    return checked_text(f"{place}[].{kind}", part.get(kind), "bad_messages")
