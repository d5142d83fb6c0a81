"""Log: what the tool says on stderr, in words for people or one JSON object a line for programs."""

import json
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from .files import printable

Level = Literal["info", "warning", "error"]
FORMATS = ("text", "json")


class Log:
    """Lines to stderr, which may be full or closed: no job fails for what it does not say."""

    def __init__(self, format: str = "text") -> None:
        self.is_json = format == "json"

    def say(
        self,
        event: str,
        message: str,
        *,
        level: Level = "info",
        hint: str | None = None,
        **facts: Any,
    ) -> None:
        """One line, in JSON with `facts` beside it; a hint is a paragraph of its own in text.

        Names and rows in it may hold anything: what a terminal would obey is escaped.
        """
        message, hint = printable(message), printable(hint) if hint else None
        if self.is_json:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = {"time": time, "level": level, "event": event, "message": message}
            text = json.dumps({**entry, **({"hint": hint} if hint else {}), **facts})
        else:
            prefix = "" if level == "info" else f"{level}: "
            text = f"{prefix}{message}" + (f"\n\nhint: {hint}" if hint else "")
        with suppress(OSError):
            # In one piece, so that the lines of several threads do not mix.
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
