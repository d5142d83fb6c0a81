"""tool_choice.py: what a row that must call a tool may write, and what comes out of such rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanovllm_cli.tool_calls import ToolCall, split_calls

from .cli import generate, read_rows, write_rows
from .parsing import TOOL, USER, bad, chat_line, good
from .schemas import EOS, MODEL, check_json, random_schema, sample_grammars

GRAMMARS = sample_grammars()
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
TOKEN = "<tool_call>"  # one token of Qwen3's, and no text
ONE_ONLY = {"parallel_tool_calls": False}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    more = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": tools}


INTEGER = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [TOOL, tool("time", INTEGER), tool("now")]


def grammar(choice: object = "required", tools: object = TOOLS, **columns: Any) -> str:
    row = {"messages": [USER], "tools": tools, "tool_choice": choice, **columns}
    text = good(row).settings.sampling["grammar"]
    assert isinstance(text, str)
    return text


def accepts(grammar: str, text: str) -> bool:
    """Whether `text` may be the whole completion."""
    matcher = GRAMMARS.matcher(grammar)
    return matcher.accept([*TOKENIZER.encode(text).ids, EOS[0]]) and matcher.is_complete


def written(*calls: tuple[str, dict[str, Any]]) -> str:
    """What Qwen3's template makes of calls in a message of the assistant."""
    functions = [{"function": {"name": name, "arguments": given}} for name, given in calls]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": functions}]
    text = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text.rpartition("</think>\n\n")[2].removesuffix("<|im_end|>\n")


OSLO, SEVEN, NOW = ("weather", {"city": "Oslo"}), ("time", {"x": 7}), ("now", {"a": [1, {}]})


def test_calls_are_laid_out_as_the_template_writes_them() -> None:
    for calls in ([OSLO], [SEVEN], [NOW], [OSLO, SEVEN], [NOW, NOW, SEVEN]):
        text = written(*calls)
        assert text.count(TOKEN) == len(calls)
        assert accepts(grammar(), text), text
        assert accepts(grammar(**ONE_ONLY), text) == (len(calls) == 1)
        rest, found = split_calls(text, is_one_only=False)
        assert rest == ""
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It rains.",
        f"It rains. {written(OSLO)}",
        f"{written(OSLO)}\n",
        written(OSLO)[:-1],
        written(("other", {})),
        written(("time", {})),
        written(("time", {"x": "7"})),
        written(OSLO).replace("Oslo", "\n"),
        written(OSLO).replace('{"city": "Oslo"}', '"Oslo"'),
        written(NOW).replace('{"a": [1, {}]}', "null"),
        written(OSLO).replace(": ", ":"),
        written(OSLO).replace(TOKEN, "< tool_call>"),
    ],
)
def test_nothing_but_whole_calls_of_the_rows_tools_is_accepted(text: str) -> None:
    assert not accepts(grammar(), text)


def test_a_named_function_is_the_only_one_that_may_be_called() -> None:
    only = grammar(named("time"))
    assert accepts(only, written(SEVEN))
    assert accepts(only, written(SEVEN, SEVEN))
    for calls in ([OSLO], [NOW], [SEVEN, OSLO]):
        assert not accepts(only, written(*calls))
    assert not accepts(grammar(named("time"), **ONE_ONLY), written(SEVEN, SEVEN))


def test_no_tool_is_shown_that_may_not_be_called() -> None:
    only = grammar(allowed("required", "now", "time"))
    assert accepts(only, written(SEVEN, NOW))
    assert not accepts(only, written(OSLO))
    row = {"messages": [USER], "tools": TOOLS}
    for mode in ("auto", "required"):
        settings = good({**row, "tool_choice": allowed(mode, "now", "time")}).settings
        assert settings.tools == TOOLS[1:]
        assert ("grammar" in settings.sampling) == (mode == "required")
    assert good({**row, "tool_choice": named("weather")}).settings.tools == [TOOL]
    assert good({**row, "tool_choice": "required"}).settings.tools == TOOLS


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "\u00fc \U0001f600", "a'b%s", "/* */"])
def test_a_function_may_have_any_name(name: str) -> None:
    text = written(("NAME", {})).replace('"NAME"', json.dumps(name, ensure_ascii=False))
    assert accepts(grammar(tools=[tool(name)]), text)
    assert split_calls(text, is_one_only=True)[1] == [ToolCall(name, "{}")]


def test_schemas_keep_their_references() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {**INTEGER, "additionalProperties": False}}}
    asked = grammar(tools=[tool("time", schema), tool("now", schema)])
    assert accepts(asked, written(SEVEN, ("now", {"x": 1})))
    assert not accepts(asked, written(("now", {"x": "1"})))


def test_plain_text_and_a_forced_call_are_a_forced_call() -> None:
    assert grammar(response_format={"type": "text"}) == grammar()
    line = chat_line(tools=TOOLS, tool_choice="required")
    assert good(line).settings.sampling["grammar"] == grammar()
    for choice in ("auto", "none"):
        row = {"messages": [USER], "tools": TOOLS, "tool_choice": choice}
        assert "grammar" not in good(row).settings.sampling


@pytest.mark.parametrize(
    ("code", "columns", "words"),
    [
        ("bad_parameters", {"tools": None}, "tool_choice is 'required', but the row offers no"),
        ("bad_parameters", {"tools": []}, "tool_choice is 'required', but the row offers no tools"),
        ("bad_parameters", {"tools": None, "tool_choice": named("time")}, "tool_choice names 'ti"),
        ("bad_parameters", {"tool_choice": named("when")}, "tool_choice names 'when', which the"),
        ("bad_parameters", {"tool_choice": allowed("auto", "now", "when")}, "tool_choice names 'w"),
        ("bad_parameters", {"guided_regex": "a"}, "tool_choice is 'required', but the row has a"),
        ("bad_parameters", {"response_format": {"type": "json_object"}}, "has a grammar as well"),
        (
            "bad_grammar",
            {"tools": [TOOL, tool("f", {"type": "string"})]},
            "tools[1].function.param",
        ),
        ("bad_grammar", {"tools": [tool("f", {"type": ["object"]})]}, "it must be 'object'"),
        (
            "bad_grammar",
            {"tools": [TOOL, tool("f", {"properties": {"a": {"type": "objec"}}})]},
            "tools[1].function.parameters: ",
        ),
        (
            "bad_grammar",
            {"tools": [tool("f", {"not": {}})]},
            'parameters: Unimplemented keys: ["no',
        ),
    ],
)
def test_a_call_that_cannot_be_forced_is_its_rows_error(
    code: str, columns: dict[str, Any], words: str
) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", **columns}
    bad(code, {"messages": [USER], **asked}, words)
    place = "" if words.startswith(("it", "has", "offers", "parameters")) else "body."
    bad(code, chat_line(**asked), f"{place}{words}")


def test_a_bad_schema_that_need_not_be_called_is_no_error() -> None:
    tools = [TOOL, tool("f", {"type": "string"})]
    good({"messages": [USER], "tools": tools, "tool_choice": "auto"})
    good({"messages": [USER], "tools": tools, "tool_choice": named("weather")})


def test_calls_are_for_chats() -> None:
    row = {"prompt": "x", "tools": TOOLS, "tool_choice": "required"}
    bad("bad_parameters", row, "tools needs messages")


def test_without_the_package_a_row_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    row = {"messages": [USER], "tools": [tool("never compiled")], "tool_choice": "required"}
    bad("bad_grammar", row, "tools[0].function.parameters: ", "pip install llguidance")


def test_forced_calls_parse_and_validate_where_they_stop(tmp_path: Path) -> None:
    """Drawn at temperature 1 by a model that knows no tools, after a thought and without."""
    rows = []
    for at in range(60):
        tools = [tool(f"f{3 * at + i}", random_schema(3 * at + i)) for i in range(3)]
        thinks = at % 2 == 0
        row = {"id": at, "messages": [USER], "tools": tools, "max_tokens": 160, "temperature": 1}
        row["tool_choice"] = named(f"f{3 * at + 1}") if at % 3 == 0 else "required"
        row["chat_template_kwargs"] = {"enable_thinking": thinks}
        rows.append({**row, **({"thinking_budget": 9} if thinks else {})})
    ended = generate(write_rows(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl")
    assert ended.code == 0, ended.stderr
    called = [row for row in read_rows(tmp_path / "out.jsonl") if row["finish_reason"] != "length"]
    assert len(called) > 0.6 * len(rows)
    for row in called:
        assert (row["finish_reason"], row["completion"]) == ("tool_calls", "")
        assert (row["reasoning"] is not None) == (row["id"] % 2 == 0)
        offered = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        for call in row["tool_calls"]:
            function = call["function"]
            check_json(function["arguments"], offered[function["name"]]["parameters"])
            if row["id"] % 3 == 0:
                assert function["name"] == f"f{3 * row['id'] + 1}"
