"""Runs `generate` in children that get signals, and says what was found; a program of its own.

As in kill_driver.py each run is a fork of it. `python -m tests.signal_driver INPUT OUTPUT NUMBER
SECONDS`: NUMBER trials of each kind, with an engine whose step takes SECONDS. The last line on
stdout is a JSON object: for each kind of trial the codes and the longest time from signal to end;
and how many jobs, resumed after their signals, differ from one that had none.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from nanovllm_cli import pipeline
from nanovllm_cli.lock import output_locks
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.run_job import run_job
from nanovllm_cli.signals import Signals

from .fake_engine import FakeEngine, loader
from .kill_driver import clear, ended, forked, options_of, results

KINDS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGHUP": [signal.SIGHUP],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


def run(options: GenerateOptions, *, seed: int, step_seconds: float) -> int:
    engine: Any = FakeEngine(order_seed=seed, step_seconds=step_seconds)
    signals = Signals()

    def job() -> Any:
        with output_locks(options):
            return pipeline.generate(options, loader(engine), signals=signals)

    return int(run_job(job, debug=False, signals=signals))


def main(source: Path, output: Path, number: int, step_seconds: float) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command has it before a job begins
    options = options_of(source, output)
    output.parent.mkdir(exist_ok=True)

    def body(seconds: float) -> int:
        return run(options, seed=chance.randrange(2**30), step_seconds=seconds)

    chance = random.Random(number)
    assert ended(forked(lambda: body(0.0))) == 3, "some rows cannot be completed"
    expected = results(output)
    clear(output)
    start = time.monotonic()
    assert ended(forked(lambda: body(step_seconds))) == 3
    whole_run = time.monotonic() - start
    clear(output)
    found: dict[str, Any] = {kind: {"codes": [], "seconds": 0.0} for kind in KINDS}
    differing = 0
    for kind, numbers in KINDS.items():
        codes = found[kind]["codes"]
        while len(codes) < number:
            child = forked(lambda: body(step_seconds))
            time.sleep(chance.random() * whole_run * 0.8)
            sent = time.monotonic()
            for at, signal_number in enumerate(numbers):
                time.sleep(0.02 * (at > 0))
                try:
                    os.kill(child, signal_number)
                except ProcessLookupError:
                    break
            code = ended(child)
            if code != 3:  # else it was done before: that is no trial
                codes.append(code)
                found[kind]["seconds"] = max(found[kind]["seconds"], time.monotonic() - sent)
            for path, whole in zip(results(output), expected, strict=True):
                differing += path is not None and path != whole
            code = ended(forked(lambda: body(0.0)))
            names = {path.name.removeprefix(output.name) for path in output.parent.iterdir()}
            is_whole = names == {"", ".errors.jsonl", ".stats.json"}
            differing += results(output) != expected or code != 3 or not is_whole
            clear(output)
    print(json.dumps({"kinds": found, "differing": differing}))
    sys.exit(0)


if __name__ == "__main__":
    _, source, output, number, step_seconds = sys.argv
    main(Path(source), Path(output), int(number), float(step_seconds))
