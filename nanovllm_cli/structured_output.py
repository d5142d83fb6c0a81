"""Structured output: what flags and rows say of a completion's form -> llguidance's grammar text.

A JSON schema, a regular expression, one of some texts, or a grammar in Lark's or GBNF's notation;
rows say it in vLLM's words or in OpenAI's. Every grammar is compiled in the sandbox, without a
vocabulary, so that a bad one is found before the model loads; the engine compiles it for its
tokens.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from .choice_regex import choice_regex
from .exit_code import CommandError, ExitCode
from .files import read_flag_file
from .refusal import Refused, shown

Kind = Literal["json", "regex", "choice", "grammar"]
Check = tuple[Callable[[Any], bool], str]

_MAX_KNOWN = 1024  # grammars: most rows have one that an earlier row had
_MAX_ALTERNATIVES = 1000  # of a grammar; more texts are one expression
_ANY_OBJECT = '{"type":"object"}'
_SCHEMA_KEYS = ("name", "description", "schema", "strict")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | str | bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_choice(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(t, str) for t in value)


_CHECKS: dict[Kind, Check] = {
    "json": (_is_schema, "a JSON schema"),
    "regex": (_is_text, "a string that is not empty"),
    "choice": (_is_choice, "a list of strings, at least one"),
    "grammar": (_is_text, "a string that is not empty"),
}
_KINDS: dict[str, Kind] = {prefix + kind: kind for kind in _CHECKS for prefix in ("", "guided_")}
# A setting's JSON type, as row_settings.py has it of the others.
SETTINGS: dict[str, Check] = {
    "response_format": (_is_object, '{"type": "text", "json_object" or "json_schema", ...}'),
    "structured_outputs": (_is_object, '{"json", "regex", "choice" or "grammar": ...}'),
    **{f"guided_{kind}": check for kind, check in _CHECKS.items()},
}


class BadGrammar(ValueError):
    """A grammar that cannot be used, and why."""


def grammar_of_flags(
    *, json_schema: str | None, regex: str | None, choice: str | None, grammar: str | None
) -> str | None:
    """The grammar of every row that has none of its own; json_schema and grammar name files.

    Raises CommandError.
    """
    flags: tuple[tuple[str, Kind, str | None], ...] = (
        ("--json-schema", "json", json_schema),
        ("--regex", "regex", regex),
        ("--choice", "choice", choice),
        ("--grammar", "grammar", grammar),
    )
    given = [(flag, kind, text) for flag, kind, text in flags if text is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(flag for flag, _, _ in given)
        raise CommandError(f"{names} are given", "A completion can have one grammar: give one.")
    flag, kind, value = given[0]
    if not value:
        raise CommandError(f"{flag} is empty")
    if flag in ("--json-schema", "--grammar"):
        value = _read(flag, value)
    choices = value.split(",")
    if kind == "choice" and not all(choices):
        raise CommandError(f"--choice is {value!r}; it must be texts with commas between them")
    try:
        return grammar_text(kind, choices if kind == "choice" else value)
    except BadGrammar as error:
        raise CommandError(f"{flag}: {error}") from None


def take_grammar(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """Takes what a row says of its completion's structure out of `fields`, which SETTINGS checked.

    Returns the field of SamplingParams that it becomes, None where the row asks for plain text;
    raises Refused. `place` goes before a name in a message.
    """
    given = [name for name in SETTINGS if name in fields]
    if not given:
        return {}
    if len(given) > 1:
        names = " and ".join(given)
        raise Refused("bad_parameters", f"{place}{names} are given; a row can have one of them")
    name = given[0]
    value, place = fields.pop(name), f"{place}{name}"
    if name == "response_format":
        kind, value = _of_response_format(value, place)
    elif name == "structured_outputs":
        kind, value = _of_structured_outputs(value, place)
    else:
        kind = _KINDS[name]
    if kind is None:
        return {"grammar": None}
    try:
        return {"grammar": grammar_text(kind, value)}
    except BadGrammar as error:
        raise Refused("bad_grammar", f"{place}: {error}") from None


def grammar_text(kind: Kind, value: Any) -> str:
    """llguidance's text of a grammar that compiles; raises BadGrammar with llguidance's reason.

    value: for "json" a schema or its text, for "choice" a list of texts, else a text.
    """
    if kind == "choice" and len(value) > _MAX_ALTERNATIVES:
        try:
            kind, value = "regex", choice_regex(value)
        except RecursionError:
            raise BadGrammar("hundreds of the texts are the beginning of the next one") from None
    compiled = _compiled(kind, value if isinstance(value, str) else json.dumps(value))
    if isinstance(compiled, BadGrammar):
        raise compiled
    return compiled


def _of_response_format(value: Mapping[str, Any], place: str) -> tuple[Kind | None, Any]:
    """OpenAI's: https://platform.openai.com/docs/guides/structured-outputs."""
    rest = {name: item for name, item in value.items() if item is not None}
    kind = rest.pop("type", None)
    content = rest.pop("json_schema", None) if kind == "json_schema" else None
    if kind not in ("text", "json_object", "json_schema"):
        expected = "text, json_object or json_schema"
        raise Refused("bad_parameters", f"{place}.type is {shown(kind)}; it must be {expected}")
    if rest:
        raise Refused("bad_parameters", f"{place} of type {kind} has {shown([*rest])} as well")
    if kind == "text":
        return None, None
    if kind == "json_object":
        return "json", _ANY_OBJECT
    if not isinstance(content, dict) or not isinstance(content.get("schema"), dict):
        message = f'{place}.json_schema is {shown(content)}; it must be {{"name", "schema": ...}}'
        raise Refused("bad_parameters", message)
    unknown = [name for name in content if name not in _SCHEMA_KEYS]
    if unknown:
        raise Refused("bad_parameters", f"{place}.json_schema has an unknown {shown(unknown[0])}")
    return "json", content["schema"]


def _of_structured_outputs(value: Mapping[str, Any], place: str) -> tuple[Kind, Any]:
    """vLLM's: https://docs.vllm.ai/en/latest/features/structured_outputs.html."""
    given = {name: item for name, item in value.items() if item is not None}
    if given == {"json_object": True}:
        return "json", _ANY_OBJECT
    name, item = next(iter(given.items()), ("", None))
    if len(given) != 1 or name not in _CHECKS:
        names = ", ".join((*_CHECKS, "json_object"))
        message = f"{place} has {shown([*given])}; it must have one of {names}"
        raise Refused("bad_parameters", message)
    kind = _KINDS[name]
    is_good, expected = _CHECKS[kind]
    if not is_good(item):
        message = f"{place}.{name} is {shown(item)}; it must be {expected}"
        raise Refused("bad_parameters", message)
    return kind, item


def _read(flag: str, name: str) -> str:
    path = Path(name).expanduser()
    try:
        return read_flag_file(path).decode().replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise CommandError(f"{flag}: no file {path}", exit_code=ExitCode.NOT_FOUND) from None
    except OSError as error:
        why = error.strerror or error
        raise CommandError(f"{flag}: {path} cannot be read: {why}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{flag}: {path} cannot be read: {error}") from None


@lru_cache(maxsize=_MAX_KNOWN)
def _compiled(kind: Kind, text: str) -> str | BadGrammar:
    """Errors are kept as well: many rows may have one bad grammar."""
    from .sandbox import SandboxError, Task, sandbox  # late: `--help` needs none of it
    from .sandbox_worker import Kind as SandboxKind

    if find_spec("llguidance") is None:
        return BadGrammar("structured output needs llguidance: pip install llguidance")
    [result] = sandbox().run([Task(SandboxKind.GRAMMAR, {"kind": kind, "text": text})])
    return BadGrammar(str(result)) if isinstance(result, SandboxError) else result
