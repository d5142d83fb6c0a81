"""structured_output.py: what rows and flags say of a completion's form, good and bad."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.fingerprint import fingerprint
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.structured_output import SETTINGS, grammar_of_flags, grammar_text
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL, call, write_rows
from .parsing import USER, bad, chat_line, good, text_line

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LARK = 'start: "yes" | "no" start'
GBNF = 'root ::= "yes" | "no" root'
OPENAI_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
IN_EVERY_FORM: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": SCHEMA}, grammar_text("json", SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, grammar_text("json", SCHEMA)),
    ({"response_format": OPENAI_SCHEMA}, grammar_text("json", SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, grammar_text("json", SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, grammar_text("json", SCHEMA)),
    ({"response_format": {"type": "json_object"}}, grammar_text("json", {"type": "object"})),
    ({"structured_outputs": {"json_object": True}}, grammar_text("json", {"type": "object"})),
    ({"guided_regex": "a+b"}, grammar_text("regex", "a+b")),
    ({"structured_outputs": {"regex": "a+b"}}, grammar_text("regex", "a+b")),
    ({"guided_choice": ["a", "b c"]}, grammar_text("choice", ["a", "b c"])),
    ({"structured_outputs": {"choice": ["a"]}}, grammar_text("choice", ["a"])),
    ({"guided_grammar": LARK}, grammar_text("grammar", LARK)),
    ({"structured_outputs": {"grammar": GBNF}}, grammar_text("grammar", GBNF)),
]


@pytest.mark.parametrize(("fields", "grammar"), IN_EVERY_FORM)
def test_a_row_says_it_in_vllms_words_or_openais(fields: dict[str, Any], grammar: str) -> None:
    assert good({"prompt": "x", **fields}).settings.sampling == {"grammar": grammar}
    for line in (chat_line(**fields), text_line(prompt="x", **fields)):
        assert good(line).settings.sampling == {"grammar": grammar}


def test_plain_text_is_a_wish_too() -> None:
    prompt = good({"prompt": "x", "response_format": {"type": "text"}})
    assert prompt.settings.sampling == {"grammar": None}
    assert good({"prompt": "x", "response_format": None}).settings.sampling == {}


def test_json_is_laid_out_in_one_way_unless_the_schema_says_otherwise() -> None:
    options = json.loads(grammar_text("json", SCHEMA))["grammars"][0]["json_schema"]["x-guidance"]
    assert options["whitespace_flexible"] is False
    own = {**SCHEMA, "x-guidance": {"whitespace_flexible": True}}
    options = json.loads(grammar_text("json", own))["grammars"][0]["json_schema"]["x-guidance"]
    assert options["whitespace_flexible"] is True


def test_a_schemas_properties_keep_their_order() -> None:
    schema = {"properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
    text = grammar_text("json", schema)
    assert text.index('"b"') < text.index('"a"')


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("guided_json", [1, [], True]),
        ("guided_regex", ["", 1, {}]),
        ("guided_choice", ["a", [], [1], {}]),
        ("guided_grammar", ["", 1, []]),
        ("response_format", ["json_object", [], 1]),
        ("structured_outputs", ["json", [], 1]),
    ],
)
def test_a_value_of_another_type_is_bad(name: str, values: list[Any]) -> None:
    for value in values:
        bad("bad_parameters", {"prompt": "x", name: value}, f"{name} is ")
        bad("bad_parameters", chat_line(**{name: value}), f"body.{name} is ")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "type is null"),
        ({"type": "xml"}, "'xml'"),
        ({"type": ["text"]}, "['text']"),
        ({"type": "json_object", "schema": SCHEMA}, "'schema'"),
        ({"type": "text", "json_schema": {}}, "'json_schema'"),
        ({"type": "json_schema"}, "json_schema is null"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema is {'name'"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}, "json_schema is"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strickt": 1}}, "'strickt'"),
    ],
)
def test_a_response_format_is_checked_to_its_last_field(value: object, word: str) -> None:
    bad("bad_parameters", {"prompt": "x", "response_format": value}, "response_format", word)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "[]"),
        ({"json": None}, "[]"),
        ({"json": {}, "regex": "a"}, "['json', 'regex']"),
        ({"json_object": False}, "['json_object']"),
        ({"structural_tag": "x"}, "'structural_tag'"),
        ({"guided_json": {}}, "'guided_json'"),
        ({"choice": []}, "choice is []"),
    ],
)
def test_structured_outputs_hold_one_known_kind(value: object, word: str) -> None:
    bad("bad_parameters", {"prompt": "x", "structured_outputs": value}, "structured_outputs", word)


def test_a_row_has_one_grammar() -> None:
    both = {"guided_regex": "a", "guided_choice": ["a"]}
    bad("bad_parameters", {"prompt": "x", **both}, "guided_regex and guided_choice")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_json": {"type": "objec"}}, ("guided_json: ", "Invalid type: objec")),
        ({"guided_json": "{"}, ("guided_json: ", "EOF")),
        ({"guided_json": "[]"}, ("guided_json: ", "object")),
        ({"guided_json": {"not": {}}}, ("guided_json: ", '"not"')),
        (
            {"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}},
            ("guided_json: ", "Unsatisfiable"),
        ),
        ({"guided_regex": "(a"}, ("guided_regex: ", "unclosed group")),
        ({"guided_regex": "(?=a)b"}, ("guided_regex: ", "look-around")),
        ({"guided_grammar": 'start: "a'}, ("guided_grammar: ",)),
        ({"guided_grammar": "root ::= ("}, ("guided_grammar: ", "Expected")),
        (
            {"structured_outputs": {"json": {"type": "objec"}}},
            ("structured_outputs: ", "Invalid type"),
        ),
        (
            {"response_format": {**OPENAI_SCHEMA, "json_schema": {"schema": {"type": 1}}}},
            ("response_format: ",),
        ),
    ],
)
def test_a_grammar_that_cannot_compile_is_its_rows_error(
    fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    bad("bad_grammar", {"prompt": "x", **fields}, *words)
    bad("bad_grammar", chat_line(**fields), f"body.{words[0]}", *words[1:])


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "über", "😀", "\x7f", "", "it's", " a "])
def test_a_choice_may_be_any_text(text: str) -> None:
    assert grammar_text("choice", [text, "other"])


@pytest.mark.parametrize("name", [name for name in SETTINGS if "_" in name])
def test_a_misspelled_name_is_found(name: str) -> None:
    bad("unknown_setting", {"prompt": "x", name.replace("_", ""): 1}, repr(name))


# --- flags


def flags(**given: str) -> str | None:
    names = ("json_schema", "regex", "choice", "grammar")
    return grammar_of_flags(**{name: given.get(name) for name in names})


def test_a_flag_gives_every_row_its_grammar(tmp_path: Path) -> None:
    schema, lark = tmp_path / "s.json", tmp_path / "g.lark"
    schema.write_text(json.dumps(SCHEMA))
    lark.write_text(LARK)
    assert flags() is None
    assert flags(json_schema=str(schema)) == grammar_text("json", SCHEMA)
    assert flags(grammar=str(lark)) == grammar_text("grammar", LARK)
    assert flags(regex="a,b+") == grammar_text("regex", "a,b+")
    assert flags(choice="yes,not sure") == grammar_text("choice", ["yes", "not sure"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"regex": "("}, ("--regex: ", "unclosed group")),
        ({"regex": ""}, ("--regex is empty",)),
        ({"choice": ""}, ("--choice is empty",)),
        ({"choice": "a,,b"}, ("--choice is 'a,,b'",)),
        ({"choice": "a", "regex": "a"}, ("--regex and --choice are given",)),
        ({"json_schema": "{bad}"}, ("--json-schema: ",)),
        ({"json_schema": "{list}"}, ("--json-schema: ", "object")),
        ({"grammar": "{bad}"}, ("--grammar: ",)),
        ({"grammar": "{latin}"}, ("--grammar: ", "cannot be read")),
        ({"grammar": "{folder}"}, ("--grammar: ", "cannot be read")),
    ],
)
def test_a_bad_flag_ends_the_command_before_the_model_is_looked_for(
    tmp_path: Path, given: dict[str, str], words: tuple[str, ...]
) -> None:
    (tmp_path / "bad").write_text("{ x")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "latin").write_bytes(b"\xff")
    (tmp_path / "folder").mkdir()
    arguments = []
    for name, value in given.items():
        path = tmp_path / value.strip("{}") if value.startswith("{") else value
        arguments += [f"--{name.replace('_', '-')}", path]
    ended = call("generate", "none.jsonl", "--model", "none", *arguments)
    assert ended.code == ExitCode.USAGE, ended.stderr
    for word in words:
        assert word in ended.stderr


def test_a_file_that_is_not_there_is_named() -> None:
    for name in ("json_schema", "grammar"):
        with pytest.raises(CommandError, match=r"no file none\.json") as raised:
            flags(**{name: "none.json"})
        assert raised.value.exit_code is ExitCode.NOT_FOUND


def test_without_the_package_flags_and_rows_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(CommandError, match="pip install llguidance"):
        flags(regex="never compiled before")
    bad("bad_grammar", {"prompt": "x", "guided_regex": "nor this"}, "pip install llguidance")
    assert good({"prompt": "x"}).settings.sampling == {}


def test_the_grammar_of_a_job_is_part_of_its_fingerprint() -> None:
    options = GenerateOptions(inputs=["x"], model=str(MODEL))

    def of(sampling: dict[str, Any]) -> dict[str, str]:
        return fingerprint(options, model=MODEL, tokenizer=MODEL, sampling=sampling)

    prints = [of({}), *(of({"grammar": grammar_text("regex", text)}) for text in ("a", "b"))]
    assert len({json.dumps(each) for each in prints}) == 3


# --- where the grammar begins


def test_a_chat_that_thinks_is_known_by_the_prompt_that_its_template_made() -> None:
    tokenizer = PromptTokenizer(MODEL)
    end_think = 1025
    for enable_thinking, expected in ((None, end_think), (True, end_think), (False, None)):
        prompt = good({"messages": [USER]}, enable_thinking=enable_thinking)
        [token_ids] = tokenizer.encode([prompt])
        assert isinstance(token_ids, list)
        assert tokenizer.end_think_of(token_ids) == expected


def test_bad_rows_of_a_dry_run_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "guided_regex": "a+"}, {"prompt": "a", "guided_regex": "("}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    ended = call("generate", source, "--model", MODEL, "--dry-run")
    assert ended.code == ExitCode.SOME_ROWS_FAILED
    assert "1 bad_grammar" in ended.stderr
