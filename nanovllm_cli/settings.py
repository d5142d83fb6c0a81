"""Where a flag's value comes from when it is not on the command line: environment, then a file.

Click looks at the command line, the environment variable, its default map (filled here from
`--config FILE.toml`) and the default, in this order. Of a flag that may be repeated, a variable
holds one value, blanks and all, or a JSON list of them; a file holds a string or a list of them.
"""

import difflib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import typer

from .exit_code import CommandError, ExitCode
from .files import read_flag_file


def option(default: Any, *names: str, **more: Any) -> Any:
    """A Typer option whose environment variable is NANOVLLM_ and its first long name."""
    return shared_option(*names, default=default, **more)


def shared_option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """The same for an `Annotated` type, which has no default of its own."""
    long_name = next(name for name in names if name.startswith("--"))
    variable = "NANOVLLM_" + long_name.split("/")[0][2:].replace("-", "_").upper()
    if isinstance(more.get("default"), list):
        more["callback"] = _whole_values
    return typer.Option(
        *(() if "default" not in more else (more.pop("default"),)),
        *names,
        envvar=variable,
        show_envvar=False,
        rich_help_panel=panel,
        help=help,
        **more,
    )


def _whole_values(
    context: typer.Context, parameter: typer.CallbackParam, values: list[str]
) -> list[str]:
    """Callback of a flag that may be repeated: Click has split its variable at blanks."""
    source = context.get_parameter_source(str(parameter.name))
    if source is None or source.name != "ENVIRONMENT":
        return values
    text = os.environ[str(parameter.envvar)]
    try:
        items = json.loads(text)
    except ValueError:
        return [text]
    is_list = isinstance(items, list) and all(isinstance(item, str) for item in items)
    return items if is_list else [text]


def load_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: the file's values become the other flags' defaults."""
    if path is None:
        return None
    try:
        content = tomllib.loads(read_flag_file(path).decode())
    except FileNotFoundError:
        raise CommandError(f"no config file {path}", exit_code=ExitCode.NOT_FOUND) from None
    except OSError as error:
        raise CommandError(f"--config: cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not a TOML file: {error}") from None
    flags: dict[str, Any] = {
        name.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for name in parameter.opts
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        flag = flags.get(key.replace("-", "_"))
        if flag is None:
            near = difflib.get_close_matches(key.replace("-", "_"), flags, n=1, cutoff=0.75)
            hint = f"Did you mean {near[0].replace('_', '-')!r}?" if near else "See --help."
            raise CommandError(f"{path} has an unknown key {key!r}", hint)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not flag.multiple:
            value = str(value)  # as a variable or a flag is; some flags take 4096 and 32k
        values[flag.name] = _texts(path, key, value) if flag.multiple else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _texts(path: Path, key: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CommandError(f"{path} has {key} = {value!r}; it must be a string or a list of them")
    return texts
