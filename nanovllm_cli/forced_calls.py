"""Forced calls: a row's `tool_choice` -> the grammar of a completion that must call its tools."""

import json
from typing import Any

from .refusal import Refused, shown
from .structured_output import BadGrammar, grammar_text
from .tool_calls import Tools

# As Qwen3's template writes one.
_CALL = r'<tool_call> "\n{\"name\": " function "}\n" </tool_call>'
_FUNCTION = r'%%json %s ", \"arguments\": " %%json %s'


def grammar_of_calls(
    tools: Tools, choice: str | dict[str, Any], *, is_one_only: bool, place: str
) -> str:
    """llguidance's text of one call of one of the tools or, unless `is_one_only`, of several.

    choice: "required" or, for one of them alone, {"type": "function", "function": {"name": ...}}.
    Raises Refused; `place` goes before a name in a message.
    """
    if not tools:
        message = f"{place}tool_choice is {shown(choice)}, but the row offers no tools"
        raise Refused("bad_parameters", message)
    offered = {f"{place}tools[{at}].function": tool["function"] for at, tool in enumerate(tools)}
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        offered = {at: function for at, function in offered.items() if function["name"] == name}
        if not offered:
            message = f"{place}tool_choice names {shown(name)}, which is not among the row's tools"
            raise Refused("bad_parameters", message)
    functions = "\n    | ".join(
        _FUNCTION % _name_and_arguments(function, at) for at, function in offered.items()
    )
    calls = "call" if is_one_only else r'call ("\n" call)*'
    return f"start: {calls}\ncall: {_CALL}\nfunction: {functions}\n"


def _name_and_arguments(function: dict[str, Any], place: str) -> tuple[str, str]:
    """Two schemas as text: the name, and an object for the arguments."""
    parameters = function.get("parameters") or {}
    kind = parameters.get("type", "object")
    if kind != "object":
        message = f"{place}.parameters.type is {shown(kind)}; it must be 'object'"
        raise Refused("bad_grammar", message)
    try:
        return _schema({"const": function["name"]}), _schema({**parameters, "type": "object"})
    except BadGrammar as error:
        raise Refused("bad_grammar", f"{place}.parameters: {error}") from None


def _schema(schema: dict[str, Any]) -> str:
    """One that compiles, with the layout that JSON has elsewhere."""
    (compiled,) = json.loads(grammar_text("json", schema))["grammars"]
    return json.dumps(compiled["json_schema"])
