"""A chat as data sets hold it -> messages as chat templates take them.

A Parquet column has one struct for all of its values, and in it null for every field that a value
does not have: a message, a tool, a schema. ShareGPT's messages are {"from": "human", "value": ...}.
"""

from typing import Any

import orjson

from .refusal import Refused, shown

_SHARE_GPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
_SHARE_GPT_FIELDS = {"from", "value"}
_OF_TRAINING = {"weight", "loss", "loss_mask", "mask", "masked", "train"}  # nothing that was said


def from_dataset(value: Any, place: str, *, is_parquet: bool) -> Any:
    """The value of a column of chats; what is no chat stays as it is, to be refused as such."""
    if is_parquet:
        value = without_padding(value)
    if not isinstance(value, list):
        return value
    return [_message(message, f"{place}[{at}]") for at, message in enumerate(value)]


def without_padding(value: Any) -> Any:
    """A value of a Parquet column without the fields that are null in it, however deep."""
    if isinstance(value, dict):
        return {name: without_padding(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_padding(item) for item in value]
    return value


def _message(value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        return value
    if "from" not in value or "role" in value:
        is_clean = _OF_TRAINING.isdisjoint(value)
        return value if is_clean else {n: v for n, v in value.items() if n not in _OF_TRAINING}
    for name, item in value.items():
        if item is not None and name not in _SHARE_GPT_FIELDS and name not in _OF_TRAINING:
            raise Refused("bad_messages", f"{place} has the unknown field {shown(name)}")
    speaker, content = value["from"], value.get("value")
    if not isinstance(speaker, str) or speaker not in _SHARE_GPT_ROLES:
        names = ", ".join(_SHARE_GPT_ROLES)
        reason = f"{place}.from is {shown(speaker)}; it must be one of {names}"
        raise Refused("bad_messages", reason)
    message = {"role": _SHARE_GPT_ROLES[speaker], "content": content}
    if speaker == "function_call":
        calls = _calls_in(content)
        if calls is not None:
            return {"role": "assistant", "content": "", "tool_calls": calls}
    return message


def _calls_in(content: Any) -> list[dict[str, Any]] | None:
    """The calls that a text writes as JSON: one, or a list of them; None if it is another text."""
    try:
        found = orjson.loads(content) if isinstance(content, str) else content
    except orjson.JSONDecodeError:
        return None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]
