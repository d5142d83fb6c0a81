"""Runs the command with streams that are closed or whose readers leave, and says what was found.

A program of its own, and each run a fork of it, as in kill_driver.py: from its arguments to its
end the command is the real one, with a fake engine. `python -m tests.stream_driver INPUT OUTPUT
NUMBER`: NUMBER trials of each of KINDS. The last line on stdout is a JSON object: for each kind the
codes, and how many trials left something else than they had to.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nanovllm_cli import app, pipeline

from .cli import MODEL
from .fake_engine import FakeEngine, loader
from .kill_driver import clear, ended, forked, results

_STEP_SECONDS = 0.002
_FILES = ("", ".errors.jsonl", ".stats.json")  # of a job that has ended
_GENERATE = pipeline.generate

Stream = int | None  # a descriptor; None: closed before the command begins


def command(
    arguments: list[str], *, seed: int, stdout: Stream, stderr: Stream, not_here: tuple[int, ...]
) -> int:
    """The command's `main` in this process, as Python starts it with such streams.

    not_here: descriptors that only the parent has.
    """
    for descriptor in not_here:
        os.close(descriptor)
    for number, name, stream in ((1, "stdout", stdout), (2, "stderr", stderr)):
        if stream is None:
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(stream, number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    engine: Any = FakeEngine(order_seed=seed, step_seconds=_STEP_SECONDS)
    pipeline.generate = partial(_GENERATE, load=loader(engine))
    sys.argv = ["nanovllm", *arguments]
    try:
        app.main()
    except SystemExit as end:
        return int(end.code or 0)


class Trials:
    """The kinds of trial: each gives the command's code, and whether all was as it must be."""

    def __init__(self, source: Path, output: Path) -> None:
        self._source, self._output = source, output
        self._chance = random.Random(5)
        self._flags = ["generate", str(source), "--model", str(MODEL), "--single-process"]
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._run(self._to_file, stdout=self._nowhere, stderr=self._nowhere)
        self._expected = results(output)
        clear(output)

    def stdouts_reader_leaves(self) -> tuple[int, bool]:
        """`| head -n N`: the N lines are the first. More rows may come all the while."""
        num_lines = self._chance.choice((1, 1, 2, 10, 100))
        reader, writer = os.pipe()
        rows, more_rows = os.pipe()
        os.write(more_rows, self._source.read_bytes() + b"\n")
        os.dup2(rows, 0)
        flags = ["generate", "-", *self._flags[2:]]
        child = self._fork(flags, stdout=writer, stderr=self._nowhere, not_here=(reader, more_rows))
        os.close(writer)
        with open(reader, "rb") as lines:
            read = [lines.readline() for _ in range(num_lines)]
        code = ended(child)
        os.close(more_rows)
        os.close(rows)
        assert self._expected[0] is not None
        return code, b"".join(read) == b"".join(
            self._expected[0].splitlines(keepends=True)[:num_lines]
        )

    def stdout_is_closed(self) -> tuple[int, bool]:
        """There is nowhere to write rows to: nothing is begun."""
        code = self._run(self._flags, stdout=None, stderr=self._nowhere)
        return code, not list(self._output.parent.iterdir())

    def stdout_is_closed_and_not_needed(self) -> tuple[int, bool]:
        code = self._run(self._to_file, stdout=None, stderr=self._nowhere)
        return code, self._is_whole()

    def stderr_is_closed(self) -> tuple[int, bool]:
        """No row is lost for what nobody can be told."""
        code = self._run(self._to_file, stdout=self._nowhere, stderr=None)
        return code, self._is_whole()

    def stderrs_reader_leaves(self) -> tuple[int, bool]:
        """At a random moment of a job that goes on."""
        reader, writer = os.pipe()
        child = self._fork(self._to_file, stdout=self._nowhere, stderr=writer, not_here=(reader,))
        os.close(writer)
        time.sleep(self._chance.random() * 0.3)
        os.close(reader)
        code = ended(child)
        return code, self._is_whole()

    @property
    def _to_file(self) -> list[str]:
        return [*self._flags, "-o", str(self._output)]

    def _fork(
        self,
        arguments: list[str],
        *,
        stdout: Stream,
        stderr: Stream,
        not_here: tuple[int, ...] = (),
    ) -> int:
        seed = self._chance.randrange(2**30)
        return forked(
            lambda: command(arguments, seed=seed, stdout=stdout, stderr=stderr, not_here=not_here)
        )

    def _run(self, arguments: list[str], *, stdout: Stream, stderr: Stream) -> int:
        return ended(self._fork(arguments, stdout=stdout, stderr=stderr))

    def _is_whole(self) -> bool:
        names = sorted(path.name for path in self._output.parent.iterdir())
        is_whole = names == [self._output.name + end for end in _FILES]
        is_whole &= results(self._output) == self._expected
        clear(self._output)
        return is_whole


KINDS: dict[str, Callable[[Trials], tuple[int, bool]]] = {
    "stdout's reader leaves": Trials.stdouts_reader_leaves,
    "stdout is closed": Trials.stdout_is_closed,
    "stdout is closed and not needed": Trials.stdout_is_closed_and_not_needed,
    "stderr is closed": Trials.stderr_is_closed,
    "stderr's reader leaves": Trials.stderrs_reader_leaves,
}


def main(source: Path, output: Path, number: int) -> NoReturn:
    output.parent.mkdir(exist_ok=True)
    trials = Trials(source, output)
    found: dict[str, Any] = {}
    for kind, trial in KINDS.items():
        outcomes = [trial(trials) for _ in range(number)]
        found[kind] = {
            "codes": [code for code, _ in outcomes],
            "wrong": sum(not is_right for _, is_right in outcomes),
        }
    print(json.dumps(found))
    sys.exit(0)


if __name__ == "__main__":
    _, source, output, number = sys.argv
    main(Path(source), Path(output), int(number))
