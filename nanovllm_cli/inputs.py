"""What a command line names as its inputs -> Sources: files, globs, directories, `-`."""

import difflib
import glob
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .exit_code import CommandError, ExitCode
from .files import kind_of
from .input_identity import FirstLook

# A name may hold a newline.
_INPUT_NAME = re.compile(r".*\.(jsonl|ndjson|json|parquet)(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
# What lies beside an output, and what a killed job has left there.
_SIDE_FILE_NAME = re.compile(
    r".*\.(errors\.jsonl|stats\.json|partial|lock)|\.nanovllm-.*|\..*\.tmp", re.DOTALL
)
_SUFFIXES_BESIDE = (".errors.jsonl", ".stats.json", ".partial", ".lock")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HUB_NAME = re.compile(r"(datasets/)?[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w-]*(\.[\w-]*)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input; `name` is what messages call it."""

    name: str
    path: Path | None  # None: stdin
    first_look: FirstLook = field(default_factory=FirstLook, compare=False, repr=False)

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once: stdin, a FIFO, a terminal."""
        return self.path is None or not self.path.is_file()


def find_inputs(arguments: list[str], *, outputs: Iterable[str | None] = ()) -> list[Source]:
    """Return the inputs that a command line names: files, globs, directories, `-`.

    `outputs` are names of files that the job writes: neither they nor what lies beside them are
    found in a directory or by a glob. Raises CommandError, NOT_FOUND if there is nothing of a name.
    """
    if arguments.count("-") > 1:
        raise CommandError("stdin (-) is named twice as an input", "It can be read only once.")
    if "-" in arguments and sys.stdin is None:
        raise CommandError("stdin (-) is closed", exit_code=ExitCode.NOT_FOUND)
    own = _OwnFiles(outputs)
    sources: list[Source] = []
    for argument in arguments:
        if argument == "-":
            sources.append(Source(name="<stdin>", path=None))
        else:
            sources += [Source(name=path, path=Path(path)) for path in _paths_of(argument, own)]
    return sources


class _OwnFiles:
    """The files that the job writes, known by their names and, where they exist, as the same."""

    def __init__(self, outputs: Iterable[str | None]) -> None:
        named = [name for name in outputs if name not in (None, "", "-")]
        names = [f"{name}{rest}" for name in named for rest in ("", *_SUFFIXES_BESIDE)]
        self._paths = {_resolved(name) for name in names}
        identities = map(_device_and_inode, names)
        self._identities = {identity for identity in identities if identity is not None}

    def has(self, path: str) -> bool:
        if not self._paths:
            return False
        return _resolved(path) in self._paths or _device_and_inode(path) in self._identities


def _resolved(path: str) -> str:
    """The path with every link of its directories followed, and not its own."""
    directory, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(directory), name)


def _device_and_inode(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _paths_of(argument: str, own: _OwnFiles) -> list[str]:
    hint = "Name a file, a pattern such as 'data/*.jsonl', a directory, or - for stdin."
    if os.path.isdir(argument):
        names = sorted(filter(_is_input, glob.glob("*", root_dir=argument)))
        paths = [os.path.join(argument, name) for name in names]
        paths = [path for path in paths if not own.has(path) and not _is_made_of(argument, path)]
        missing = "there is no input file in the directory"
        hint = (
            "Looked for *.jsonl, *.ndjson, *.json and *.parquet, also with .gz or .zst, but not "
            "for outputs that were made of this directory, nor for *.errors.jsonl and "
            "*.stats.json, which lie beside an output."
        )
    elif os.path.exists(argument):
        paths, missing = [argument], ""
    elif _URL.match(argument):
        raise CommandError(
            f"{argument} is a URL, and remote files are not read yet",
            "Download it first, and name the file.",
            exit_code=ExitCode.NOT_FOUND,
        )
    elif any(sign in argument for sign in "*?["):
        paths, missing = sorted(glob.glob(argument, recursive=True)), "no file matches"
        paths = [path for path in paths if not own.has(path)]
    else:
        directory, name = os.path.split(argument)
        similar = difflib.get_close_matches(name, glob.glob("*", root_dir=directory), n=1)
        if similar:
            hint = f"Did you mean {os.path.join(directory, similar[0])}?"
        elif (
            _HUB_NAME.fullmatch(argument) and not _is_input(name) and not os.path.exists(directory)
        ):
            dataset = argument.removeprefix("datasets/")
            hint = (
                "If it is a data set of Hugging Face, download it first: hf download --repo-type "
                f"dataset {dataset} --local-dir {os.path.basename(dataset)}. Then name its files."
            )
        paths, missing = [], "there is no file"
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        tried = os.path.abspath(argument) if argument else "''"
        raise CommandError(f"{missing} {tried}", hint, exit_code=ExitCode.NOT_FOUND)
    for path in files:
        if path != argument and (what := _kind(path)) is not None:
            raise CommandError(
                f"{path}, found by {argument}, is {what}, which could keep the job waiting",
                "Remove it, or name it itself if it is an input.",
                exit_code=ExitCode.INPUT_UNUSABLE,
            )
    return files


def _kind(path: str) -> str | None:
    try:
        return kind_of(os.stat(path))
    except OSError:
        return None  # whoever reads it says why


def _is_made_of(directory: str, path: str) -> bool:
    """Whether `path` is an output of a job that had `directory` for an input: another shard's."""
    stats = f"{path}.stats.json"
    if not os.path.isfile(stats):  # a pipe would wait
        return False
    try:
        with open(stats, "rb") as file:
            inputs = json.load(file)["inputs"]
        given = [_device_and_inode(name) for name in inputs if name != "-"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return _device_and_inode(directory) in given


def _is_input(name: str) -> bool:
    return bool(_INPUT_NAME.fullmatch(name)) and not _SIDE_FILE_NAME.fullmatch(name)
