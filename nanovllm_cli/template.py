"""A template's text -> its parts: "Translate: {text}" has a text, and a column's name behind it.

{{ and }} are braces. A name may hold anything but a closing brace: {a.b}, {c:d} and {0} name the
columns that are called so. {name|text} has a text for rows in which the column is null or missing;
{name|} leaves it out. || is a bar that belongs to the name, or to the text.
"""

import re
from typing import NamedTuple

from .exit_code import CommandError
from .refusal import shown

_HINT = "Fields are names of columns, like {text}, or {text|a default}; write {{ and }} for braces."
_PART = re.compile(r"\{\{|\}\}|\{([^}]*)\}|[{}]")


class TemplatePart(NamedTuple):
    """A piece of text, and the column behind it; None: none is."""

    text: str
    name: str | None
    default: str | None  # where the column is null or missing; None: that is an error


def parse_template(template: str) -> list[TemplatePart]:
    """Raise CommandError for braces that are not balanced, and for a field without a name."""
    parts: list[TemplatePart] = []
    text = ""
    position = 0
    for match in _PART.finditer(template):
        text += template[position : match.start()]
        position = match.end()
        if match[0] in ("{{", "}}"):
            text += match[0][0]
            continue
        if match[1] is None:
            what = "is never closed" if match[0] == "{" else "closes nothing"
            message = f"template {shown(template)}: the {match[0]} at character {match.start() + 1}"
            raise CommandError(f"{message} {what}", _HINT)
        name, *default = _at_bars(match[1])
        if not name:
            raise CommandError(f"template {shown(template)} has a field without a name", _HINT)
        parts.append(TemplatePart(text, name, "|".join(default) if default else None))
        text = ""
    text += template[position:]
    return [*parts, TemplatePart(text, None, None)] if text or not parts else parts


def _at_bars(field: str) -> list[str]:
    """The parts between single bars; of a double one one is left."""
    return [part.replace("\0", "|") for part in field.replace("||", "\0").split("|")]
