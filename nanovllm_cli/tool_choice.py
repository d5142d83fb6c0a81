"""A row's `tool_choice` -> which tools it is shown, and the grammar of calls that it must make."""

import json
from typing import Any

from .refusal import Refused, shown
from .structured_output import BadGrammar, grammar_text
from .tool_calls import Tools

# As Qwen3's template writes one.
_CALL = r'<tool_call> "\n{\"name\": " function "}\n" </tool_call>'
_FUNCTION = r'%%json %s ", \"arguments\": " %%json %s'


def chosen_tools(
    tools: Tools, choice: str | dict[str, Any], *, is_one_only: bool, place: str
) -> tuple[Tools, str | None]:
    """The tools that may be called, all that a row is shown, and the grammar where one must be.

    choice: "auto", "none", "required" or one of OpenAI's two objects, checked. Raises Refused;
    `place` goes before a name in a message.
    """
    offered = {f"{place}tools[{at}].function": tool for at, tool in enumerate(tools)}
    if isinstance(choice, dict):
        allowed = choice.get("allowed_tools", {"mode": "required", "tools": [choice]})
        choice, names = allowed["mode"], [_name(tool) for tool in allowed["tools"]]
        for name in names:
            if name not in map(_name, tools):
                message = f"{place}tool_choice names {shown(name)}, which the row does not offer"
                raise Refused("bad_parameters", message)
        offered = {at: tool for at, tool in offered.items() if _name(tool) in names}
    if choice == "none":
        return [], None
    grammar = None
    if choice == "required":
        if not tools:
            message = f"{place}tool_choice is 'required', but the row offers no tools"
            raise Refused("bad_parameters", message)
        grammar = _grammar_of_calls(offered, is_one_only)
    return [*offered.values()], grammar


def _grammar_of_calls(offered: dict[str, dict[str, Any]], is_one_only: bool) -> str:
    """llguidance's text of one call or, unless `is_one_only`, of several; a tool for each place."""
    functions = "\n    | ".join(
        _FUNCTION % _name_and_arguments(tool["function"], at) for at, tool in offered.items()
    )
    calls = "call" if is_one_only else r'call ("\n" call)*'
    return f"start: {calls}\ncall: {_CALL}\nfunction: {functions}\n"


def _name(tool: dict[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


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
