"""A chat as data sets hold it -> messages as chat templates take them.

A Parquet column has one struct for all of its messages, and in it null for every field that a
message does not have, in tool calls too. ShareGPT's messages are {"from": "human", "value": ...}.
"""

from typing import Any

from .refusal import Refused, shown

_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SHARE_GPT_FIELDS = {"from", "value"}


def from_dataset(value: Any, place: str, *, is_parquet: bool) -> Any:
    """The value of a column of chats; what is no chat stays as it is, to be refused as such."""
    if is_parquet:
        value = _without_nulls(value)
    if not isinstance(value, list):
        return value
    return [_message(message, f"{place}[{at}]") for at, message in enumerate(value)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _message(value: Any, place: str) -> Any:
    if not isinstance(value, dict) or "from" not in value:
        return value
    if {name for name, item in value.items() if item is not None} != _SHARE_GPT_FIELDS:
        return value
    speaker = value["from"]
    if not isinstance(speaker, str) or speaker not in _SHARE_GPT_ROLES:
        names = ", ".join(_SHARE_GPT_ROLES)
        reason = f"{place}.from is {shown(speaker)}; it must be one of {names}"
        raise Refused("bad_messages", reason)
    return {"role": _SHARE_GPT_ROLES[speaker], "content": value["value"]}
