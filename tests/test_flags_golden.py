"""Every flag, environment variable, TOML key and default of 5784cc7 is still there."""

import json
from typing import Any

import pytest
import typer

from nanovllm_cli.app import app

from .cli import ROOT

GOLDEN: dict[str, dict[str, list[Any]]] = json.loads(
    (ROOT / "tests" / "golden" / "flags_of_5784cc7.json").read_bytes()
)  # command -> its flags -> environment variable, default, whether it may be repeated


def flags_of(command: str) -> dict[str, list[Any]]:
    """What the command has now: each of its flags -> the same."""
    group: Any = typer.main.get_command(app)
    found = {}
    for parameter in group.commands[command].params:
        default = parameter.default
        is_repeated = bool(parameter.multiple or parameter.nargs == -1)
        if default is not None and not isinstance(default, str | int | float | bool | list):
            default = str(default)
        for flag in (*parameter.opts, *parameter.secondary_opts):
            found[flag] = [parameter.envvar, default, is_repeated]
    return found


@pytest.mark.parametrize("command", GOLDEN)
def test_the_flags_of_an_older_version_mean_what_they_meant(command: str) -> None:
    now = flags_of(command)
    for flags, meaning in GOLDEN[command].items():
        for flag in flags.split():
            assert now[flag] == meaning, flag
