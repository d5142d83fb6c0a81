"""The commands' parser: foreign flags are translated, and a bad value is told in a sentence.

Typer's own messages name neither the value nor, where it is the case, the variable it came from.
"""

import difflib
import os
import re
from typing import Any, get_args, get_type_hints

from typer.core import TyperCommand

from nanovllm_cli.core.errors import UserError

from .foreign_flags import translate
from .log import Log

_PREFIX = "NANOVLLM_"
_MAX_INTEGER = 2**64 - 1  # a seed; what is larger can be written to no file of ours
_TYPO = 0.75  # of difflib's ratio: less alike is another word


class FlagCommand(TyperCommand):
    """A command of Typer's whose command line may have foreign flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse our own flags, and those of others; raises UserError and Typer's errors."""
        notes = ctx.meta.setdefault(__name__, [])
        args = translate(args, self._options(ctx), notes)
        parsed = list(args)  # the parser takes from its list
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            parameter = getattr(error, "param", None)
            if parameter is None or not getattr(error, "message", ""):
                raise  # nothing that was given is wrong, but something is missing or unknown
            if isinstance(error, UserError):
                raise
            raise self._bad_value(ctx, parameter, parsed, error) from None
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name)
            if type(value) is int and not -_MAX_INTEGER <= value <= _MAX_INTEGER:
                raise UserError(
                    f"{parameter.opts[0]} is {value}; it must be at most {_MAX_INTEGER}"
                )
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Say what was left out and which variables are unknown, then run the command."""
        if not ctx.params.get("quiet"):
            log = Log(str(ctx.params.get("log_format")))
            for note in ctx.meta[__name__]:
                log.say("note", note)
            for variable, near in unknown_variables(self._variables(ctx)):
                log.say(
                    "warning",
                    f"the environment variable {variable} is not a setting of nanovllm, and has "
                    "no effect",
                    level="warning",
                    hint=f"Did you mean {near}?" if near else None,
                )
        return super().invoke(ctx)

    def _options(self, ctx: Any) -> dict[str, bool]:
        """Every flag, and whether a value follows it."""
        options: dict[str, bool] = {}
        for parameter in self.get_params(ctx):
            names = [*parameter.opts, *parameter.secondary_opts]
            has_value = not getattr(parameter, "is_flag", False) and not getattr(
                parameter, "count", False
            )
            options |= {name: has_value for name in names if name.startswith("-")}
        return options

    def _variables(self, ctx: Any) -> set[str]:
        """The variables of all commands: one environment may serve several."""
        commands = getattr(ctx.parent.command, "commands", {}) if ctx.parent else {}
        return {
            str(parameter.envvar)
            for command in (self, *commands.values())
            for parameter in command.params
            if getattr(parameter, "envvar", None)
        }

    def _bad_value(self, ctx: Any, parameter: Any, args: list[str], error: Exception) -> Exception:
        """The error of a value that is no number, or is out of range, in our words."""
        names = [name for name in parameter.opts if name.startswith("-")]
        if not names:
            return error
        where, text = _given(names, args)
        if text is None and parameter.envvar in os.environ:
            where = f"{parameter.envvar} ({names[0]})"
            text = os.environ[parameter.envvar]
        if text is None:  # of a file: --config
            where, text = names[0], (ctx.default_map or {}).get(parameter.name)
        hints = get_type_hints(self.callback)
        hint = hints.get(parameter.name)
        types = get_args(hint) or (hint,)
        least = getattr(parameter, "min", None)
        if least is None:
            least = getattr(getattr(parameter, "type", None), "min", None)
        kind = "a whole number" if int in types else "a number" if float in types else None
        if kind is None and bool in types:
            kind = "true or false"
        if kind is None or text is None:
            return error
        if least is not None:
            kind += f" of at least {least:g}"
        elif kind == "a whole number" and re.fullmatch(r"[+-]?\d+", str(text)):
            kind += " of fewer digits"
        return UserError(f"{where} is {text!r}; it must be {kind}")


def unknown_variables(known: set[str]) -> list[tuple[str, str | None]]:
    """Return the NANOVLLM_ variables that are set and mean nothing, and what may be meant."""
    unknown = sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(_PREFIX) and value and name not in known
    )
    return [(name, nearest(name, known)) for name in unknown]


def nearest(name: str, names: Any) -> str | None:
    """Return the one of `names` that `name` is a typo of; None where it is another word."""
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=_TYPO)
    return found[0] if found else None


def _given(names: list[str], args: list[str]) -> tuple[str, str | None]:
    """The flag as it was last written, and its value."""
    found: tuple[str, str | None] = (names[0], None)
    for place, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in names:
            found = (name, value if equals else args[place + 1] if place + 1 < len(args) else None)
    return found
