"""Runs `generate` in children that are killed, and says what was found; a program of its own.

A start of Python with torch takes seconds, so this program starts once and each run is a fork of
it. `python -m tests.kill_driver HOW INPUT OUTPUT NUMBER [MUTANT]`; HOW is

    random    NUMBER kills at random moments
    calls     a kill before, and one in the middle of, every system call that changes a file
    full      a disk that is full after each of NUMBER sizes
    pairs     NUMBER times two runs at once, with locks that do not lock

The last line on stdout is a JSON object. MUTANT breaks one habit of the writer, so that a test can
see that its breaking is found.
"""

import fcntl
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nanovllm_cli import file_output, files, journal, pipeline, run_rows
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.lock import output_locks
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL
from .fake_engine import FakeEngine, loader

_CALLS = ("write", "ftruncate", "fsync", "fdatasync", "replace", "unlink", "pread")
_READS_A_CALL = 10  # of the journal, while the output is written: they stand for its writes
_LEAST_JOBS = 10
_TOKENIZER = PromptTokenizer(MODEL)


run_rows.load_tokenizer = lambda options, model: _TOKENIZER  # loaded once, for all children


def options_of(source: Path, output: Path, **more: Any) -> GenerateOptions:
    return GenerateOptions(
        inputs=[str(source)],
        output=str(output),
        model=str(MODEL),
        offline=True,
        engine=EngineConfig(device="cpu", max_num_seqs=8),
        max_inflight=64,
        quiet=True,
        **more,
    )


def run(options: GenerateOptions, *, seed: int, step_seconds: float) -> int:
    engine: Any = FakeEngine(order_seed=seed, step_seconds=step_seconds)
    with output_locks(options):
        return int(pipeline.generate(options, loader(engine)))


def forked(body: Callable[[], int]) -> int:
    """The id of a child that runs `body` and exits with what it returns."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = body()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """How a child ended, the signal's number below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(output: Path) -> tuple[bytes | None, bytes | None]:
    """OUTPUT and its errors, None where they are not there."""
    errors = output.with_name(f"{output.name}.errors.jsonl")
    return tuple(path.read_bytes() if path.exists() else None for path in (output, errors))  # type: ignore[return-value]


def clear(output: Path) -> None:
    for path in output.parent.iterdir():
        path.unlink()


class Findings:
    """What is counted; the two bad things must stay 0."""

    def __init__(self, expected: tuple[bytes | None, bytes | None]) -> None:
        self.expected = expected
        bad = ("differing", "half_visible", "failed_runs", "left_files")
        self.counts = dict.fromkeys(("kills", "full", "lost", "jobs", *bad), 0)

    def after_kill(self, output: Path) -> None:
        self.counts["kills"] += 1
        for found, whole in zip(results(output), self.expected, strict=True):
            self.counts["half_visible"] += found is not None and found != whole

    def after_end(self, output: Path, code: int) -> None:
        self.counts["jobs"] += 1
        self.counts["failed_runs"] += code != 3
        self.counts["differing"] += results(output) != self.expected
        names = {path.name.removeprefix(output.name) for path in output.parent.iterdir()}
        self.counts["left_files"] += names != {"", ".errors.jsonl", ".stats.json"}


def at_random_moments(
    options: GenerateOptions, output: Path, findings: Findings, num_kills: int
) -> None:
    chance = random.Random(7)
    start = time.monotonic()
    body = lambda: run(options, seed=chance.randrange(2**30), step_seconds=0.001)  # noqa: E731
    findings.after_end(output, ended(forked(body)))
    whole_run = time.monotonic() - start
    clear(output)
    while findings.counts["kills"] < num_kills or findings.counts["jobs"] < _LEAST_JOBS:
        seed = chance.randrange(2**30)
        child = forked(lambda seed=seed: run(options, seed=seed, step_seconds=0.001))
        if findings.counts["kills"] < num_kills:  # on a busy machine few come to their end
            time.sleep(chance.random() * whole_run * 0.6)
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        if code == -signal.SIGKILL:
            findings.after_kill(output)
        else:
            findings.after_end(output, code)
            clear(output)


@contextmanager
def killed_in_call(number: int, *, after_half: bool) -> Any:
    """The `number`-th call that changes a file kills the process, a write after half of it."""
    remaining, num_reads = number, 0

    def dying(name: str, real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal remaining, num_reads
            num_reads += name == "pread"
            remaining -= name != "pread" or num_reads % _READS_A_CALL == 1
            if remaining < 0:
                if name == "write" and after_half:
                    descriptor, data = arguments
                    real(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    for name in _CALLS:
        setattr(os, name, dying(name, getattr(os, name)))
    yield


def in_every_call(options: GenerateOptions, output: Path, findings: Findings) -> None:
    for after_half in (False, True):
        number, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL:
            clear(output)

            def body(number: int = number, after_half: bool = after_half) -> int:
                with killed_in_call(number, after_half=after_half):
                    return run(options, seed=1, step_seconds=0.0)

            code = ended(forked(body))
            if code == -signal.SIGKILL:
                findings.after_kill(output)
                # Killed once more, a little later than where it went on: a tail behind a tail.
                again = ended(forked(lambda: body(3, True)))
                if again == -signal.SIGKILL:
                    findings.after_kill(output)
                code_at_end = ended(forked(lambda: run(options, seed=2, step_seconds=0.0)))
                findings.after_end(output, code_at_end)
            number += 1


def run_to_its_publication(options: GenerateOptions) -> int:
    file_output.write_lines = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return run(options, seed=1, step_seconds=0.0)


def on_full_disks(
    options: GenerateOptions, output: Path, findings: Findings, num_sizes: int
) -> None:
    whole = findings.expected[0]
    assert whole is not None
    for number in range(num_sizes):
        clear(output)
        if number % 2:  # the journal has all rows, and the disk is full when they are published
            limit = len(whole) * number // num_sizes
            ended(forked(lambda: run_to_its_publication(options)))
        else:  # from nothing to what the journal needs, which is more than the output
            limit = 2 * len(whole) * number // num_sizes

        def body(limit: int = limit) -> int:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                return run(options, seed=1, step_seconds=0.0)
            except CommandError as error:
                return int(error.exit_code)

        code = ended(forked(body))
        findings.counts["full"] += code == 74
        findings.counts["failed_runs"] += code not in (3, 74)
        for found, expected in zip(results(output), findings.expected, strict=True):
            findings.counts["half_visible"] += found is not None and found != expected
        names = {path.name.removeprefix(output.name) for path in output.parent.iterdir()}
        findings.counts["left_files"] += code == 74 and not names <= {".partial"}
        findings.after_end(output, ended(forked(lambda: run(options, seed=2, step_seconds=0.0))))


def in_pairs(options: GenerateOptions, output: Path, findings: Findings, number: int) -> None:
    """Of two runs at once both may lose; whoever ends well has left the right file."""
    chance = random.Random(9)

    def body(seed: int, wait: float, step_seconds: float) -> int:
        fcntl.flock = lambda descriptor, operation: None  # type: ignore[assignment]
        time.sleep(wait)
        try:
            return run(options, seed=seed, step_seconds=step_seconds)
        except CommandError as error:
            return int(error.exit_code)

    for _ in range(number):
        clear(output)
        longest = chance.choice((0.0, 0.02, 0.1, 0.3))
        children = []
        for _ in range(2):
            wait, step_seconds = chance.random() * longest, chance.choice((0.0, 0.001, 0.003))
            seed = chance.randrange(2**30)
            children.append(forked(lambda s=seed, w=wait, t=step_seconds: body(s, w, t)))  # type: ignore[misc]
        codes = [ended(child) for child in children]
        findings.counts["lost"] += codes.count(75)
        findings.counts["failed_runs"] += any(code not in (3, 75) for code in codes)
        for found, whole in zip(results(output), findings.expected, strict=True):
            findings.counts["half_visible"] += found is not None and found != whole
            findings.counts["differing"] += 3 in codes and found != whole
        findings.after_end(output, ended(forked(lambda: run(options, seed=2, step_seconds=0.0))))


def mutate(name: str) -> None:
    """Break one habit."""
    if name == "no_crc":
        journal._parse_record = lambda line: _parse_without_crc(line)  # type: ignore[assignment]
    elif name == "no_owner":
        journal.Journal.check_owner = lambda self: None  # type: ignore[method-assign]
    elif name == "no_rename":

        @contextmanager
        def appearing(path: Path, **_: Any) -> Any:
            with open(path, "wb+") as file:
                yield file
                file.flush()

        for module in (files, journal, file_output):
            module.appearing = appearing  # type: ignore[attr-defined]
    else:
        raise ValueError(name)


def _parse_without_crc(line: bytes) -> Any:
    try:
        end = line.index(b" ", 44)
        return int(line[9:41], 16), journal._KINDS[line[42:43]], int(line[44:end]), end + 1
    except (ValueError, KeyError):
        return None


def main(how: str, source: Path, output: Path, number: int, *mutants: str) -> NoReturn:
    options = options_of(source, output)
    output.parent.mkdir(exist_ok=True)
    code = ended(forked(lambda: run(options, seed=0, step_seconds=0.0)))
    assert code == 3, f"the uninterrupted run ended with {code}"
    findings = Findings(results(output))
    clear(output)
    for mutant in mutants:
        mutate(mutant)
    if how == "random":
        at_random_moments(options, output, findings, number)
    elif how == "full":
        on_full_disks(options, output, findings, number)
    elif how == "pairs":
        in_pairs(options, output, findings, number)
    else:
        in_every_call(options, output, findings)
    print(json.dumps(findings.counts))
    sys.exit(0)


if __name__ == "__main__":
    _, how, source, output, number, *mutants = sys.argv
    main(how, Path(source), Path(output), int(number), *mutants)
