"""OutputPaths: the files that a job writes, by what the command line names; all of them distinct.

Imports nothing slow: what cannot be written is told before anything is loaded.
"""

import errno
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .exit_code import CommandError, ExitCode
from .files import io_errors, kind_of

_BESIDE_OUTPUT = ("errors.jsonl", "stats.json", "partial", "lock")
_BESIDE_ERRORS = ("partial", "lock")  # of a job whose rows go to standard output
_OCTAL = re.compile(rb"\\([0-7]{3})")  # as /proc/self/mountinfo spells blanks in names


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputPaths:
    """OUTPUT and its errors file; None where they are standard output and standard error."""

    output: Path | None
    errors: Path | None
    is_errors_named: bool  # by a flag, so that it need not be ours

    @classmethod
    def of(cls, output_name: str, errors_name: str | None = None) -> "OutputPaths":
        """Raises CommandError for what cannot be published by a rename."""
        output = None if output_name == "-" else Path(output_name)
        errors = None if errors_name in (None, "-") else Path(errors_name)
        named = [path for path in (output, errors) if path is not None]
        if len({path.absolute() for path in named}) < len(named):
            raise CommandError("--output and --errors name the same file", "Name another one.")
        is_errors_named = errors is not None
        if output is not None:
            ends = _BESIDE_OUTPUT[1:] if errors_name is not None else _BESIDE_OUTPUT
            check_publishable(output, ends)
        if errors is not None:
            check_publishable(errors, _BESIDE_ERRORS)
        if output is not None and errors_name is None:
            errors = beside(output, "errors.jsonl")
        return cls(output=output, errors=errors, is_errors_named=is_errors_named)

    @property
    def named(self) -> list[Path]:
        """Files that the command line names; of these no other job may write one."""
        named = (self.output, self.errors if self.is_errors_named else None)
        return [path for path in named if path is not None]

    @property
    def all(self) -> list[tuple[Path, str]]:
        """Every file that the job may write, with what it is called in a message."""
        files: list[tuple[Path, str]] = []
        if self.output is not None:
            files.append((self.output, "the output"))
            for what in _BESIDE_OUTPUT[1:]:
                path = beside(self.output, what)
                files.append((path, f"{path.name}, which lies beside the output"))
        if self.errors is not None:
            files.append((self.errors, "the errors file"))
            if self.is_errors_named:
                for what in _BESIDE_ERRORS:
                    path = beside(self.errors, what)
                    files.append((path, f"{path.name}, which lies beside the errors file"))
        return files


def beside(path: Path, what: str) -> Path:
    """The file of a job that lies beside its output."""
    return path.with_name(f"{path.name}.{what}")


def check_publishable(path: Path, ends: Iterable[str] = (), *, flag: str = "") -> None:
    """Raise CommandError for a name under which no file can appear by a rename.

    ends: of the names that lie beside it, which must not be too long either. flag: that names it.
    """
    if "\0" in str(path) or not path.name:
        raise CommandError(f"{flag}{str(path)!r} is not a file's name", "Name a file.")
    with io_errors(path):
        _check_length(path, ends)
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        _check_kind(path, status, flag)
        if stat.S_ISLNK(status.st_mode):
            raise _cannot_replace(
                path, f"is a symbolic link to {os.readlink(path)}, which a rename would replace"
            )
        if os.fsencode(os.path.realpath(path)) in _mount_points():
            raise _cannot_replace(path, "is a mount point, which cannot be replaced by a rename")
        directory = os.stat(path.parent)
        if (
            directory.st_mode & stat.S_ISVTX
            and os.geteuid() not in (0, directory.st_uid, status.st_uid)
        ):  # fmt: skip
            raise _cannot_replace(
                path,
                f"belongs to another user (number {status.st_uid}), in a directory where only its "
                "owner can replace it",
            )


def check_distinct(
    paths: OutputPaths,
    *,
    inputs: Iterable[str | Path] = (),
    metrics: Path | None = None,
    others: Iterable[tuple[str, Path]] = (),
) -> None:
    """Raise CommandError USAGE if a file that the job writes is another of its files as well.

    By whatever names: links, mounts, case. inputs: files, "-" for standard input; a directory is
    not looked into. others: what they are called, and files that are read, such as --config's.
    """
    written = paths.all
    if metrics is not None:
        written.append((metrics, "the file of --metrics-file"))
    known: dict[tuple[object, ...], tuple[Path, str]] = {}
    for path, what in written:
        for key in _keys_of(path, is_case_folded=True):
            other = known.setdefault(key, (path, what))
            if other != (path, what):
                raise _same(path, what, other[1])
    stream = _key_of_stream(1) if paths.output is None else None
    if stream is not None:
        if stream in known:
            raise _same(known[stream][0], known[stream][1], "standard output")
        known[stream] = (Path("standard output"), "standard output")
    for name in inputs:
        keys = _key_of_stdin() if name == "-" else _keys_of(Path(name), is_case_folded=False)
        for key in keys:
            if key in known:
                raise _same(Path(name), "an input", known[key][1])
    for what, path in others:
        for key in _keys_of(path, is_case_folded=False):
            if key in known:
                raise _same(path, what, known[key][1])


def _same(path: Path, one: str, other: str) -> CommandError:
    return CommandError(
        f"{path} is {one} and also {other}",
        "Name another file: each file of a job has one use, and an input is never replaced.",
    )


def _keys_of(path: Path, *, is_case_folded: bool) -> Iterator[tuple[object, ...]]:
    """What the file is known by: by itself if it is there, and by its place and name."""
    with io_errors(path, "read"):
        try:
            status = os.stat(path)
            yield (status.st_dev, status.st_ino)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EACCES):
                raise
        if is_case_folded or not os.path.lexists(path):
            yield _place_of(path)


def _place_of(path: Path) -> tuple[object, ...]:
    """The nearest directory that is there, and the names that lead on from it.

    Names that differ in case alone are one file on some file systems.
    """
    names = [path.name]
    parent = Path(os.path.realpath(path.parent))
    while True:
        try:
            status = os.stat(parent)
            break
        except OSError:
            names.append(parent.name)
            parent = parent.parent
    folded = [unicodedata.normalize("NFC", name.casefold()) for name in reversed(names)]
    return (status.st_dev, status.st_ino, *folded)


def _key_of_stdin() -> list[tuple[object, ...]]:
    key = _key_of_stream(0) if sys.stdin is not None else None
    return [] if key is None else [key]


def _key_of_stream(number: int) -> tuple[object, ...] | None:
    """Of a standard stream that is a regular file."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _check_length(path: Path, ends: Iterable[str]) -> None:
    directory = path.parent
    while not os.path.isdir(directory) and directory != directory.parent:
        directory = directory.parent
    limit = os.pathconf(directory, "PC_NAME_MAX")
    names = [(path.name, 0)] + [(beside(path, end).name, len(end) + 1) for end in ends]
    longest, extra = max(names, key=lambda item: len(os.fsencode(item[0])))
    length = len(os.fsencode(longest))
    if length > limit:
        why = f", as {longest} will lie beside it" if extra else ""
        raise CommandError(
            f"the name of {path} has {length - extra} bytes; it may have {limit - extra}{why}",
            "Give it a shorter name.",
        )
    whole, most = len(os.fsencode(path.absolute())) + extra, os.pathconf(directory, "PC_PATH_MAX")
    if whole >= most or any(len(os.fsencode(part)) > limit for part in path.parts):
        raise CommandError(
            f"{path} has a part of more than {limit} bytes, or more than {most} bytes in all",
            "Give it a shorter name.",
        )


def _check_kind(path: Path, status: os.stat_result, flag: str) -> None:
    """Refuse what is not a regular file, also at the end of a link."""
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)
        except OSError:
            return  # a link that leads nowhere
    if (what := kind_of(status)) is not None:
        raise CommandError(
            f"{flag}{path} is {what}, not a regular file",
            "Outputs are published by a rename, which would replace it; write to stdout (-).",
        )


def _cannot_replace(path: Path, why: str) -> CommandError:
    return CommandError(
        f"{path} {why}",
        "Name another file, or write to stdout (-).",
        exit_code=ExitCode.OUTPUT_EXISTS,
    )


def _mount_points() -> set[bytes]:
    """Where something is mounted; proc_pid_mountinfo(5)."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            fields = [line.split(b" ", 5) for line in file]
    except OSError:
        return set()
    unescaped = lambda found: bytes([int(found[1], 8)])  # noqa: E731
    return {_OCTAL.sub(unescaped, field[4]) for field in fields if len(field) > 5}
