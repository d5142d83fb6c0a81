"""Refused: why one row cannot run; the job goes on."""

import reprlib
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


class Refused(Exception):
    """A row's error: `code` for scripts, `message` with the place, the value and the limit."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = "null" if value is None else _BRIEF.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def checked_text(place: str, value: Any, code: str) -> str:
    """`value`, which must be a string."""
    if not isinstance(value, str):
        raise Refused(code, f"{place} is {shown(value)}; it must be a string")
    return value
