"""Tools: those that a row offers, and the calls that a completion makes of them.

Qwen3 is shown the tools by its chat template, and calls one by writing
<tool_call>{"name": ..., "arguments": {...}}</tool_call>. Both are OpenAI's shapes outside.
"""

import json
import re
from typing import Any, NamedTuple, NoReturn

import orjson
import xxhash

from .refusal import Refused, checked_text, shown

Tools = list[dict[str, Any]]

# Fields of a function besides its name.
_OPTIONAL: dict[str, tuple[type, str]] = {
    "description": (str, "a string"),
    "parameters": (dict, "an object"),
    "strict": (bool, "true or false"),
}
_OPEN = re.compile(r"<tool_call>\s*")
_CLOSE = re.compile(r"\s*</tool_call>")


class ToolCall(NamedTuple):
    """One call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


def checked_tools(value: list[Any] | str, place: str) -> Tools:
    """What a row offers: a list of {"type": "function", "function": {"name": ...}}.

    Data sets also hold the list or its items as JSON text, and functions without what is round
    them.
    """
    if isinstance(value, str):
        value = _from_json(value, place)
        if not isinstance(value, list):
            raise Refused("bad_tools", f"{place} is {shown(value)}; it must be a list of tools")
    tools = []
    for at, tool in enumerate(value):
        where = f"{place}[{at}]"
        if isinstance(tool, str) and tool.strip().startswith("{"):
            tool = _from_json(tool, where)
        if isinstance(tool, dict) and _is_bare_function(tool):
            tool = {"type": "function", "function": {n: v for n, v in tool.items() if n != "type"}}
        tools.append(tool)
        if not isinstance(tool, dict):
            raise Refused("bad_tools", f"{where} is {shown(tool)}; it must be an object")
        if tool.get("type") != "function":
            kind = shown(tool.get("type"))
            raise Refused("bad_tools", f"{where}.type is {kind}; only 'function' is supported")
        _check_names(tool, ("type", "function"), where)
        function = tool.get("function")
        if not isinstance(function, dict):
            message = f"{where}.function is {shown(function)}; it must be an object"
            raise Refused("bad_tools", message)
        _check_names(function, ("name", *_OPTIONAL), f"{where}.function")
        if not checked_text(f"{where}.function.name", function.get("name"), "bad_tools"):
            raise Refused("bad_tools", f"{where}.function.name is empty")
        for name, (wanted, expected) in _OPTIONAL.items():
            item = function.get(name)
            if item is not None and not isinstance(item, wanted):
                message = f"{where}.function.{name} is {shown(item)}; it must be {expected}"
                raise Refused("bad_tools", message)
    return tools


def _is_bare_function(tool: dict[str, Any]) -> bool:
    has_name = "name" in tool and tool.get("function") is None
    return has_name and tool.get("type") in (None, "function")


def _from_json(text: str, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        reason = f"{place} is {shown(text)}, which is not JSON: {error.msg}"
        raise Refused("bad_tools", reason) from None


def check_calls(value: Any, place: str) -> None:
    """The calls in a message of the assistant: OpenAI's objects, or the functions alone."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Refused("bad_messages", f"{place} is not a list of objects")
    for at, call in enumerate(value):
        where, function = f"{place}[{at}]", call
        if call.get("function") is not None:
            where, function = f"{where}.function", call["function"]
        if not isinstance(function, dict):
            raise Refused("bad_messages", f"{where} is {shown(function)}; it must be an object")
        checked_text(f"{where}.name", function.get("name"), "bad_messages")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | dict):
            message = f"{where}.arguments is {shown(arguments)}; it must be a string or an object"
            raise Refused("bad_messages", message)


def split_calls(text: str, *, is_one_only: bool) -> tuple[str, list[ToolCall]]:
    """The text without its calls, and the calls; what is no whole call stays text.

    With `is_one_only`, calls after the first are dropped, as vLLM does.
    """
    calls: list[ToolCall] = []
    rest, position = [], 0
    for opened in _OPEN.finditer(text):
        if opened.start() < position:
            continue  # in a call's arguments
        call, end = _call_at(text, opened.end())
        if call is not None:
            rest.append(text[position : opened.start()])
            calls.append(call)
            position = end
    if not calls:
        return text, calls
    rest.append(text[position:])
    return "".join(rest).strip(), calls[:1] if is_one_only else calls


def shaped_calls(calls: list[ToolCall], key: str) -> list[dict[str, Any]]:
    """OpenAI's objects; their ids come from `key`, which is the completion's own."""
    return [
        {
            "id": f"call_{xxhash.xxh3_128_hexdigest(f'{key} {at}'.encode())}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for at, call in enumerate(calls)
    ]


def _check_names(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for name, item in value.items():
        if name not in known and item is not None:
            raise Refused("bad_tools", f"{place} has the unknown field {shown(name)}")


def _call_at(text: str, start: int) -> tuple[ToolCall | None, int]:
    """The call whose JSON begins at `start`, and where it ends; None where there is none."""
    try:
        content, end = _DECODER.raw_decode(text, start)
        closed = _CLOSE.match(text, end)
        if closed is None or not isinstance(content, dict):
            return None, start
        name, arguments = content.get("name"), content.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None, start
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode()  # escapes may stand for half a character, which no line can hold
    except (ValueError, RecursionError):
        return None, start
    return call, closed.end()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
