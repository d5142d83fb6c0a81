"""Runs jobs in which one call on one of their files fails, each in turn; a program of its own.

As kill_driver.py does, it starts once and each run is a fork of it; the calls fail in libc, by
failing_calls.c, which must be preloaded. `python -m tests.io_driver SHIM INPUT OUTPUT NUMBER STEP
[merge]`: every STEP-th call, each with EIO and ENOSPC, and again with rows in other orders until
NUMBER have failed. The last line on stdout is a JSON object: how many ended with which code, and
what was bad.
"""

import ctypes
import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nanovllm_cli.lock import output_lock
from nanovllm_cli.log import Log
from nanovllm_cli.merge import MergeOptions, merge
from nanovllm_cli.run_job import run_job
from nanovllm_cli.shard import Shard

from .kill_driver import clear, ended, forked, options_of, results, run

ERRORS = (errno.EIO, errno.ENOSPC)


class Trials:
    """Jobs with failing calls, and what was found."""

    def __init__(self, shim: str, output: Path, step: int, job: Callable[[int], int]) -> None:
        self._step = step
        self._shim = ctypes.CDLL(shim)
        self._shim.what_failed.restype = ctypes.c_char_p
        self._output, self._job = output, job
        self.codes: Counter[int] = Counter()
        self.bad: list[str] = []
        self.num_failed = 0
        code, _ = self._run(-1, 0, seed=0)
        assert code == 3, f"the uninterrupted run ended with {code}"
        self._expected = results(output)

    def every_call(self, at_least: int) -> None:
        """Each call of a job fails; then those of the job that goes on with rows in its journal."""
        seed = 0
        while self.num_failed < at_least:
            seed += 1
            for error in ERRORS:
                for stops_first in (False, True):
                    number = seed % self._step
                    while self._fail(number, error, seed=seed, stops_first=stops_first):
                        number += self._step
                        if self.num_failed >= at_least and seed > 1:
                            return

    def _fail(self, number: int, error: int, *, seed: int, stops_first: bool) -> bool:
        clear(self._output)
        if stops_first:
            self._run(40, errno.EIO, seed=seed)
        code, what = self._run(number, error, seed=seed)
        if not what:
            return False
        self.num_failed += 1
        self.codes[code] += 1
        trial = f"{what} ({errno.errorcode[error]}, call {number}): "
        # A call whose failing does no harm (to remove what is to be removed) is no failure.
        if code not in (3, 74):
            self.bad.append(f"{trial}ended with {code}")
        for found, whole in zip(results(self._output), self._expected, strict=True):
            if found is not None and found != whole:
                self.bad.append(f"{trial}a file is half visible")
        code, _ = self._run(-1, 0, seed=seed + 1)
        if code != 3 or results(self._output) != self._expected:
            self.bad.append(f"{trial}run again, it ended with {code}")
        left = {path.name.removeprefix(self._output.name) for path in self._output.parent.iterdir()}
        if left != {"", ".errors.jsonl", ".stats.json"}:
            self.bad.append(f"{trial}left {sorted(left)}")
        return True

    def _run(self, number: int, error: int, *, seed: int) -> tuple[int, str]:
        """The code, and the call that failed."""
        read_end, write_end = os.pipe()

        def body() -> int:
            self._shim.arm(os.fsencode(self._output.parent) + b"/", number, error)
            code = run_job(lambda: self._job(seed), debug=False, log=_Quiet())  # type: ignore[arg-type,return-value]
            self._shim.arm(b"/nowhere/", -1, 0) if not self._shim.what_failed() else None
            os.write(write_end, self._shim.what_failed())
            return int(code)

        child = forked(body)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            what = pipe.read().decode()
        return ended(child), what


class _Quiet(Log):
    def say(self, *arguments: Any, **more: Any) -> None:
        if "internal error" in str(arguments):
            print(*arguments, file=sys.stderr)


def main(shim: str, source: Path, output: Path, number: int, step: int, *kind: str) -> NoReturn:
    output.parent.mkdir(exist_ok=True)

    def job(seed: int) -> int:
        return run(options_of(source, output), seed=seed, step_seconds=0.0)

    if kind:
        shards = [output.parent.parent / f"shard-{index}.jsonl" for index in range(2)]
        for index, shard in enumerate(shards):
            options = options_of(source, shard, shard=Shard(index=index, count=2))
            assert ended(forked(lambda o=options: run(o, seed=0, step_seconds=0.0))) in (0, 3)  # type: ignore[misc]

        def job(seed: int) -> int:
            options = MergeOptions(
                shards=[str(shard) for shard in shards],
                output=str(output),
                overwrite=True,
                quiet=True,
            )
            with output_lock(output):
                return int(merge(options))

    trials = Trials(shim, output, step, job)
    trials.every_call(number)
    print(json.dumps({"failed": trials.num_failed, "codes": trials.codes, "bad": trials.bad}))
    sys.exit(0)


if __name__ == "__main__":
    _, shim, source, output, number, step, *kind = sys.argv
    main(shim, Path(source), Path(output), int(number), int(step), *kind)
