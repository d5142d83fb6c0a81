"""What a command line names as its inputs -> Sources: files, globs, directories, `-`."""

import difflib
import glob
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .exit_code import CommandError, ExitCode

_INPUT_NAME = re.compile(r".*\.(jsonl|ndjson|json|parquet)(\.gz|\.zst)?", re.IGNORECASE)
_SIDE_FILE_NAME = re.compile(r".*\.(errors\.jsonl|stats\.json)")  # of an output; output.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input; `name` is what messages call it."""

    name: str
    path: Path | None  # None: stdin

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once: stdin, a FIFO, a terminal."""
        return self.path is None or not self.path.is_file()


def find_inputs(arguments: list[str]) -> list[Source]:
    """The inputs that a command line names: files, globs, directories, `-`.

    Raises CommandError, NOT_FOUND where there is nothing of that name.
    """
    if arguments.count("-") > 1:
        raise CommandError("stdin (-) is named twice as an input", "It can be read only once.")
    if "-" in arguments and sys.stdin is None:
        raise CommandError("stdin (-) is closed", exit_code=ExitCode.NOT_FOUND)
    sources: list[Source] = []
    for argument in arguments:
        if argument == "-":
            sources.append(Source(name="<stdin>", path=None))
        else:
            sources += [Source(name=path, path=Path(path)) for path in _paths_of(argument)]
    return sources


def _paths_of(argument: str) -> list[str]:
    hint = "Name a file, a pattern such as 'data/*.jsonl', a directory, or - for stdin."
    if os.path.isdir(argument):
        names = sorted(filter(_is_input, glob.glob("*", root_dir=argument)))
        paths = [os.path.join(argument, name) for name in names]
        missing = "there is no input file in the directory"
        hint = (
            "Looked for *.jsonl, *.ndjson, *.json and *.parquet, also with .gz or .zst, but not "
            "for *.errors.jsonl and *.stats.json, which lie beside an output."
        )
    elif os.path.exists(argument):
        paths, missing = [argument], ""
    elif any(sign in argument for sign in "*?["):
        paths, missing = sorted(glob.glob(argument, recursive=True)), "no file matches"
    else:
        directory, name = os.path.split(argument)
        for similar in difflib.get_close_matches(name, glob.glob("*", root_dir=directory), n=1):
            hint = f"Did you mean {os.path.join(directory, similar)}?"
        paths, missing = [], "there is no file"
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        tried = os.path.abspath(argument) if argument else "''"
        raise CommandError(f"{missing} {tried}", hint, exit_code=ExitCode.NOT_FOUND)
    return files


def _is_input(name: str) -> bool:
    return bool(_INPUT_NAME.fullmatch(name)) and not _SIDE_FILE_NAME.fullmatch(name)
