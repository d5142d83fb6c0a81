"""Where a flag's value comes from when it is not on the command line: environment, then a file.

Click looks at the command line, the environment variable, its default map (filled here from
`--config FILE.toml`) and the default, in this order.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from .exit_code import CommandError, ExitCode


def option(default: Any, *names: str, **more: Any) -> Any:
    """A Typer option whose environment variable is NANOVLLM_ and its first long name."""
    return shared_option(*names, default=default, **more)


def shared_option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """The same for an `Annotated` type, which has no default of its own."""
    long_name = next(name for name in names if name.startswith("--"))
    variable = "NANOVLLM_" + long_name.split("/")[0][2:].replace("-", "_").upper()
    return typer.Option(
        *(() if "default" not in more else (more.pop("default"),)),
        *names,
        envvar=variable,
        show_envvar=False,
        rich_help_panel=panel,
        help=help,
        **more,
    )


def load_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: the file's values become the other flags' defaults."""
    if path is None:
        return None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"no config file {path}", exit_code=ExitCode.NOT_FOUND) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} is not a TOML file: {error}") from None
    flags = {
        name.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for name in parameter.opts
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = flags.get(key.replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), flags, n=1)
            hint = f"Did you mean {near[0].replace('_', '-')!r}?" if near else "See --help."
            raise CommandError(f"{path} has an unknown key {key!r}", hint)
        values[name] = value
    context.default_map = {**(context.default_map or {}), **values}
    return path
