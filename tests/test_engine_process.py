"""The engine in a process of its own: the same answers, whatever becomes of that process.

Faults come from engine_worker_with_faults.py, which runs as the engine's process: the real engine,
or, where many trials are wanted, a fake one that starts in a third of a second.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.errors import EngineDied, MemoryTooSmall, ModelError
from nanovllm_cli.core.heartbeat import NUM_BYTES, Heartbeat, HeartbeatMonitor
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.sampling_params import SamplingParams

from .cli import MODEL, SAMPLE
from .engine_worker_with_faults import FAULTS, WithFaults

WORKER = Path(__file__).with_name("engine_worker_with_faults.py")
LONGEST_SECONDS = 120.0  # only what hangs takes so long
HANG_SECONDS = 4.0  # more than a start takes on a busy machine
CONFIG = EngineConfig(max_model_len=256, num_threads=1)

Start = Callable[..., EngineProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(kind="fake" | "real", ...): an engine's process, ended when the test ends."""
    started = []

    def start(
        kind: str = "fake",
        config: EngineConfig = CONFIG,
        directory: Path = tmp_path,
        hang_seconds: float = HANG_SECONDS,
    ) -> EngineProcess:
        command = (sys.executable, str(WORKER), kind, str(directory))
        spawn = partial(EngineChild, command=command, hang_seconds=hang_seconds)
        engine = EngineProcess(MODEL, config, spawn=spawn)
        started.append(engine)
        return engine

    yield start
    pids = [engine.pid for engine in started]
    for engine in started:
        engine.close()
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float) -> float:
    """How long it took; fails where it takes longer than so."""
    begin = time.monotonic()
    while not is_so():
        assert time.monotonic() - begin < seconds, "too slow"
        time.sleep(0.005)
    return time.monotonic() - begin


def ask(request_id: int, prompt: Iterable[int] = (), **sampling: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt) or [request_id % 1000, 5, 6],
        sampling=SamplingParams(**{"seed": request_id + 1, **sampling}),
    )


def fault(name: str, *, once: bool = True) -> Request:
    """A request whose first step brings a fault; else it is like any other."""
    request_id = WithFaults.FIRST_FAULT + list(FAULTS).index(name)
    return ask(request_id + once * WithFaults.ONCE, [7, 7, 7], seed=3)


def finish(engine: EngineProcess | Engine, requests: Iterable[Request] = ()) -> dict[int, Output]:
    """Run everything to its end: request id -> Completion or Failure, in order of coming."""
    ended: dict[int, Output] = {}
    give_up = time.monotonic() + LONGEST_SECONDS
    for request in requests:
        if failure := engine.add(request):
            ended[request.request_id] = failure
    while engine.has_work:
        assert time.monotonic() < give_up, "the engine hangs"
        for output in engine.step():
            if isinstance(output, NewTokens):
                continue
            assert output.request_id not in ended, "a request ended twice"
            ended[output.request_id] = output
    return ended


def tokens(outputs: dict[int, Output]) -> dict[int, list[int]]:
    """Of completions only: the others must be looked for."""
    return {i: o.token_ids.tolist() for i, o in outputs.items() if isinstance(o, Completion)}


def fake_answers(requests: Iterable[Request]) -> dict[int, list[int]]:
    return {
        r.request_id: [token + r.sampling.seed for token in reversed(r.prompt_token_ids)]
        for r in requests
    }


# The real engine


@pytest.fixture(scope="module")
def sample_requests() -> list[Request]:
    """64 sample prompts, each greedily and drawn."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    rows = map(json.loads, (SAMPLE / "prompts.jsonl").read_text().splitlines())
    prompts = [tokenizer.encode(row["prompt"]).ids for row in rows if "prompt" in row][:64]
    assert len(prompts) == 64
    greedy = [ask(i, p, temperature=0.0, max_tokens=24) for i, p in enumerate(prompts)]
    drawn = [ask(i + 64, p, temperature=1.5, max_tokens=24) for i, p in enumerate(prompts)]
    return greedy + drawn


@pytest.fixture(scope="module")
def in_process(sample_requests: list[Request]) -> tuple[dict[int, Output], Engine]:
    engine = Engine.from_checkpoint(MODEL, CONFIG)
    return finish(engine, sample_requests), engine


def assert_same(actual: dict[int, Output], expected: dict[int, Output]) -> None:
    assert actual.keys() == expected.keys()
    for request_id, ours in actual.items():
        theirs = expected[request_id]
        assert isinstance(ours, Completion), ours
        assert isinstance(theirs, Completion)
        assert ours.token_ids.tobytes() == theirs.token_ids.tobytes()
        assert replace(ours, token_ids=theirs.token_ids, num_cached_tokens=0) == replace(
            theirs, num_cached_tokens=0
        )


def test_its_answers_are_those_of_an_engine_in_this_process(
    sample_requests: list[Request], in_process: tuple[dict[int, Output], Engine]
) -> None:
    expected, engine = in_process
    child = EngineChild()  # as a job starts it, before it knows its model
    process = EngineProcess(MODEL, CONFIG, child=child)
    assert process.pid == child.pid
    assert_same(finish(process, sample_requests), expected)
    assert process.num_restarts == 0
    assert process.device == engine.device
    assert process.attention_backend == engine.attention_backend
    assert process.num_blocks == engine.num_blocks
    assert process.max_model_len == engine.max_model_len
    for name in ("num_prompt_tokens", "num_completion_tokens"):
        assert getattr(process.stats, name) == getattr(engine.stats, name)
    pid = process.pid
    process.close()
    process.close()  # a second time is no error
    assert not is_running(pid)


@pytest.mark.parametrize("num_done", [0, 1, 40])
def test_a_kill_in_the_middle_changes_no_answer(
    num_done: int,
    start: Start,
    sample_requests: list[Request],
    in_process: tuple[dict[int, Output], Engine],
) -> None:
    engine = start("real")
    engine.wait_until_ready()
    ended: dict[int, Output] = {}
    for request in sample_requests:
        engine.add(request)
    while len(ended) < num_done:
        ended |= {output.request_id: output for output in engine.step()}
    os.kill(engine.pid, signal.SIGKILL)
    ended |= finish(engine)
    assert engine.num_restarts == 1
    assert_same(ended, in_process[0])


@pytest.mark.parametrize("name", ["SIGSEGV", "exit 0", "exception", "SIGSTOP"])
def test_other_ends_of_the_real_engine_change_no_answer_either(
    name: str,
    start: Start,
    sample_requests: list[Request],
    in_process: tuple[dict[int, Output], Engine],
) -> None:
    engine = start("real")
    ended = finish(engine, [*sample_requests[::4], fault(name)])
    assert engine.num_restarts == 1
    assert isinstance(ended.pop(fault(name).request_id), Completion)
    assert_same(ended, {i: in_process[0][i] for i in ended})
    assert len(ended) == 32


def test_random_weights_need_no_checkpoint() -> None:
    sizes = ModelConfig.from_directory(MODEL)
    engine = EngineProcess(sizes, CONFIG)
    try:
        [output] = finish(engine, [ask(0, max_tokens=4, ignore_eos=True)]).values()
        assert isinstance(output, Completion), output
        assert len(output.token_ids) == 4
    finally:
        engine.close()


def test_what_a_checkpoint_lacks_is_told_as_without_a_process(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as expected:
        Engine.from_checkpoint(tmp_path, CONFIG)
    engine = EngineProcess(tmp_path, CONFIG)
    with pytest.raises(ModelError) as error:
        engine.wait_until_ready()
    assert (error.value.message, error.value.hint) == (expected.value.message, expected.value.hint)
    assert any("Traceback" in note for note in error.value.__notes__)  # what --debug shows
    with pytest.raises(ModelError):
        engine.step()
    engine.close()


# Deaths, seen in time


@pytest.mark.parametrize(
    "name", ["SIGKILL", "SIGSEGV", "exit 0", "exception", "SIGSTOP", "GpuFailed"]
)
def test_rows_in_flight_at_an_end_of_the_process_are_answered_by_the_next_one(
    name: str, start: Start, tmp_path: Path
) -> None:
    # Five jobs side by side on one machine: none meets another.
    trials = []
    for trial in range(5):
        rng = random.Random(trial)
        (directory := tmp_path / str(trial)).mkdir()
        before = [ask(i + 1000 * trial) for i in range(rng.randrange(40))]
        after = [ask(500 + i + 1000 * trial) for i in range(rng.randrange(40))]
        trials.append((start(directory=directory), [*before, fault(name), *after]))
    ended: list[list[Output]] = [[] for _ in trials]
    for engine, requests in trials:
        for request in requests:
            engine.add(request)
    while any(engine.has_work for engine, _ in trials):
        for (engine, _), outputs in zip(trials, ended, strict=True):
            outputs += engine.step()
    for (engine, requests), outputs in zip(trials, ended, strict=True):
        assert len(outputs) == len(requests)
        assert tokens({o.request_id: o for o in outputs}) == fake_answers(requests)
        assert engine.num_restarts == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda n: n.name)
def test_a_death_is_seen_within_a_second_and_the_process_is_gone(
    number: signal.Signals, start: Start
) -> None:
    for trial in range(5):
        engine = start()
        engine.wait_until_ready()
        requests = [ask(i) for i in range(5)]
        engine.add(ask(99, seed=0))  # never ends
        assert tokens(finish_some(engine, requests, 5)) == fake_answers(requests)
        time.sleep(0.02 * trial)
        pid = engine.pid
        os.kill(pid, number)
        begin = time.monotonic()
        while not engine.num_restarts:
            engine.step()
        assert time.monotonic() - begin < 1.0
        assert not is_running(pid)
        engine.abort(99)


def finish_some(
    engine: EngineProcess, requests: Iterable[Request], num_outputs: int
) -> dict[int, Output]:
    ended: dict[int, Output] = {}
    for request in requests:
        engine.add(request)
    give_up = time.monotonic() + LONGEST_SECONDS
    while len(ended) < num_outputs:
        assert time.monotonic() < give_up
        ended |= {output.request_id: output for output in engine.step()}
    return ended


@pytest.mark.parametrize(
    ("name", "device"), [("SIGSTOP", "cpu"), ("hang", "cpu"), ("hang", "cuda"), ("spin", "cuda")]
)
def test_a_hang_is_seen_in_the_seconds_that_it_may_last(
    name: str, device: Any, start: Start
) -> None:
    engine = start(config=replace(CONFIG, device=device))
    engine.wait_until_ready()
    pid = engine.pid
    engine.add(fault(name))
    begin = time.monotonic()
    while not engine.num_restarts:
        engine.step()
    assert HANG_SECONDS - 0.5 < time.monotonic() - begin < HANG_SECONDS + 2
    assert not is_running(pid)
    assert tokens(finish(engine)) == fake_answers([fault(name)])


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_an_engine_that_stops_while_it_starts_is_started_again(
    seconds: float, start: Start
) -> None:
    engine = start(hang_seconds=2.0)  # a moment later it imports torch
    time.sleep(seconds)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    engine.add(ask(1))
    assert tokens(finish(engine)) == fake_answers([ask(1)])
    assert engine.num_restarts == 1
    assert not is_running(pid)


def test_a_long_step_on_a_cpu_is_no_hang(start: Start) -> None:
    engine = start(config=replace(CONFIG, device="cpu"), hang_seconds=2.0)
    engine.wait_until_ready()
    assert tokens(finish(engine, [fault("spin a while")])) == fake_answers([fault("spin a while")])
    assert engine.num_restarts == 0


def test_slow_loading_and_idling_are_no_hangs(start: Start, tmp_path: Path) -> None:
    (slowly := tmp_path / "load slowly").touch()
    engine = start(hang_seconds=2.0)
    engine.add(ask(1))
    for moment in ("loading", "idle"):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            engine.step()
        if moment == "loading":
            slowly.unlink()
            assert tokens(finish(engine)) == fake_answers([ask(1)])
    assert engine.num_restarts == 0


def test_a_pause_of_the_reader_alone_does_not_make_the_writer_silent() -> None:
    memory = os.memfd_create("heartbeat")
    os.ftruncate(memory, NUM_BYTES)
    monitor = HeartbeatMonitor(memory)
    time.sleep(1.5)
    assert 0.9 < monitor.silent_seconds() <= 1.0  # not the whole pause
    time.sleep(0.2)
    assert 1.1 < monitor.silent_seconds() < 1.4
    with Heartbeat(memory).excused():
        time.sleep(0.6)
        assert monitor.silent_seconds() == 0.0
    os.close(memory)


# What happens to the requests


def test_a_request_in_flight_at_two_deaths_fails_and_few_others_with_it(start: Start) -> None:
    engine = start()
    innocent = [ask(i) for i in range(300)]
    poison = fault("SIGKILL", once=False)
    # The poison works in the first step that has it, so that all 300 are in flight.
    ended = finish(engine, [*innocent[:200], poison, *innocent[200:]])
    failed = {i: o for i, o in ended.items() if isinstance(o, Failure)}
    assert poison.request_id in failed
    assert {o.code for o in failed.values() if isinstance(o, Failure)} == {"engine_died"}
    assert "signal 9" in str(failed[poison.request_id])
    assert len(failed) <= 64
    assert engine.num_restarts == 2
    assert engine.last_death == "the engine was killed by signal 9 (Killed)"
    expected = fake_answers(r for r in innocent if r.request_id not in failed)
    assert tokens(ended) == expected


def test_two_deaths_with_no_request_in_flight_at_both_fail_none(start: Start) -> None:
    engine = start()
    for round_ in range(4):
        requests = [ask(i + 100 * round_) for i in range(10)]
        engine.wait_until_ready()
        for request in requests:
            engine.add(request)
        ended = {output.request_id: output for output in engine.step()}
        os.kill(engine.pid, signal.SIGKILL)
        assert tokens(ended | finish(engine)) == fake_answers(requests)
    assert engine.num_restarts == 4


def test_an_engine_that_dies_again_and_again_is_given_up(start: Start) -> None:
    engine = start()
    for i in range(500):
        engine.add(ask(i, seed=0))  # these never end

    def kill() -> list[Output]:
        engine.wait_until_ready()
        engine.step()
        os.kill(engine.pid, signal.SIGSEGV)
        outputs: list[Output] = []
        num_restarts = engine.num_restarts
        while engine.num_restarts == num_restarts:
            outputs += engine.step()
        return outputs

    assert kill() == []
    failures = kill()
    assert len(failures) == 64
    assert {type(failure) for failure in failures} == {Failure}
    with pytest.raises(EngineDied, match=r"signal 11 .*; that makes 3 deaths") as error:
        kill()
    assert error.value.hint
    assert engine.num_restarts == 2


def test_a_process_that_dies_whenever_it_loads_is_given_up(start: Start, tmp_path: Path) -> None:
    (tmp_path / "die while loading").touch()
    engine = start()
    with pytest.raises(EngineDied, match=r"signal 9 .*; that makes 3 deaths"):
        engine.wait_until_ready()
    with pytest.raises(EngineDied, match="signal 9"):
        finish(engine, [ask(1)])
    assert engine.num_restarts == 2


def test_a_process_that_dies_once_while_it_loads_is_started_again(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "die while loading").touch()
    engine = start()
    wait_until(lambda: not is_running(engine.pid), 20)
    (tmp_path / "die while loading").unlink()
    finish(engine, [ask(1)])
    assert engine.num_restarts == 1


def test_an_error_while_loading_is_told_in_words(start: Start, tmp_path: Path) -> None:
    (tmp_path / "fail while loading").touch()
    with pytest.raises(EngineDied, match="RuntimeError: the device is lost") as error:
        finish(start(), [ask(1)])
    assert error.value.__cause__ is not None
    assert any("Traceback" in note for note in error.value.__cause__.__notes__)
    (tmp_path / "fail while loading").unlink()
    (tmp_path / "too little memory").touch()
    with pytest.raises(MemoryTooSmall, match="7 bytes") as too_small:
        start().wait_until_ready()
    assert too_small.value.hint == "Buy one more."


def test_a_request_that_cannot_run_comes_back_as_its_failure(start: Start) -> None:
    engine = start()
    empty = replace(ask(1), prompt_token_ids=[])
    ended = finish(engine, [empty, ask(2), ask(3, [2**31]), ask(4, stop_token_ids=(2**40,))])
    assert {i: o.code for i, o in ended.items() if isinstance(o, Failure)} == {
        1: "bad_token_ids", 3: "bad_token_ids", 4: "bad_token_ids"
    }  # fmt: skip
    assert tokens(ended) == fake_answers([ask(2)])


def test_an_aborted_request_gives_no_output_and_is_not_started_again(start: Start) -> None:
    engine = start()
    endless = [ask(i, seed=0) for i in range(3)]
    assert len(finish_some(engine, [*endless, ask(3)], 1)) == 1
    engine.abort(0)
    engine.abort(0)
    engine.abort(12345)
    os.kill(engine.pid, signal.SIGKILL)
    while not engine.num_restarts:
        assert engine.step() == []
    engine.abort(1)
    engine.abort(2)
    assert not engine.has_work
    assert tokens(finish(engine, [ask(4)])) == fake_answers([ask(4)])


def test_reported_tokens_are_void_after_a_restart_and_come_again(start: Start) -> None:
    engine = start()
    watched = replace(ask(1, range(10), seed=0), reports_tokens=True)
    quiet = replace(ask(2, range(10)), reports_tokens=True)
    first = replace(ask(0, range(10)), reports_tokens=True)
    outputs: list[Output] = []
    for request in (first, watched, quiet):
        engine.add(request)
    while not any(isinstance(output, NewTokens) for output in outputs):
        outputs += engine.step()
    os.kill(engine.pid, signal.SIGKILL)
    while len([o for o in outputs if isinstance(o, Completion)]) < 2:
        outputs += engine.step()
    engine.abort(1)
    for request in (first, quiet):
        seen: list[int] = []
        completion = None
        for output in outputs:
            if output.request_id != request.request_id:
                continue
            if isinstance(output, NewTokens):
                seen = [] if output.starts_anew else seen
                seen += output.token_ids.tolist()
            else:
                assert isinstance(output, Completion), output
                completion = output.token_ids.tolist()
        assert completion == fake_answers([request])[request.request_id]
        assert seen == completion[:5]
    restarted = [o.request_id for o in outputs if isinstance(o, NewTokens) and o.starts_anew]
    reported = [o.request_id for o in outputs if isinstance(o, NewTokens) and not o.starts_anew]
    assert set(restarted) == {i for i in reported if reported.count(i) == 2}


def test_the_work_of_every_process_is_in_the_stats_which_stay_one_object(start: Start) -> None:
    engine = start()
    stats = engine.stats
    finish(engine, [ask(1)])
    assert stats.num_completion_tokens == 3
    os.kill(engine.pid, signal.SIGKILL)
    finish(engine, [ask(2), ask(3)])
    assert engine.num_restarts == 1
    assert stats.num_completion_tokens == 9


def test_much_in_both_directions_at_once_stops_neither_process(start: Start) -> None:
    engine = start()
    big = [ask(i, np.arange(100_000, dtype=np.int32).tolist()) for i in range(120)]  # 48 MB
    ended = tokens(finish(engine, big))
    assert len(ended) == 120
    for i in (0, 57, 119):
        assert ended[i] == fake_answers([big[i]])[i]


# What the process does to its surroundings


def test_signals_that_a_terminal_or_a_supervisor_sends_to_all_do_not_end_it(start: Start) -> None:
    engine = start()
    engine.wait_until_ready()
    assert os.getsid(engine.pid) == engine.pid
    engine.add(ask(1, seed=0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(engine.pid, number)
        assert tokens(finish_some(engine, [ask(2)], 1)) == fake_answers([ask(2)])
    assert engine.num_restarts == 0


def test_close_ends_a_process_whatever_it_does(start: Start, tmp_path: Path) -> None:
    for request in (None, ask(1, seed=0), fault("hang"), fault("SIGSTOP")):
        engine = start()
        engine.wait_until_ready()
        if request is not None:
            engine.add(request)
            engine.step()
            engine.step()
        pid, begin = engine.pid, time.monotonic()
        engine.close()
        assert time.monotonic() - begin < 1.0
        assert not is_running(pid)
    (tmp_path / "load slowly").touch()
    engine = start()
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 1.0


def test_restarts_leave_no_descriptors_behind(start: Start) -> None:
    engine = start()

    def restart(i: int) -> None:
        engine.wait_until_ready()
        os.kill(engine.pid, signal.SIGKILL)
        assert tokens(finish(engine, [ask(i)])) == fake_answers([ask(i)])

    restart(0)
    num_open = len(os.listdir("/proc/self/fd"))
    for i in range(1, 4):
        restart(i)
    assert len(os.listdir("/proc/self/fd")) == num_open


PARENT = f"""
import sys
from functools import partial
from pathlib import Path
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.request import Request
from nanovllm_cli.core.sampling_params import SamplingParams

command = (sys.executable, {str(WORKER)!r}, sys.argv[1], sys.argv[2])
spawn = partial(EngineChild, command=command)
engine = EngineProcess(Path({str(MODEL)!r}), EngineConfig(max_model_len=256), spawn=spawn)
Path(sys.argv[2], "pid").write_text(f"{{engine.pid}} ")
engine.wait_until_ready()
sampling = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)
for i in range(int(sys.argv[3])):
    engine.add(Request(request_id=i, prompt_token_ids=[1, 2, 3], sampling=sampling))
while engine.has_work:
    engine.step()
engine.close()
"""


def start_parent(
    kind: str, directory: Path, num_requests: int, **options: Any
) -> tuple[subprocess.Popen[bytes], int]:
    command = [sys.executable, "-c", PARENT, kind, str(directory), str(num_requests)]
    parent = subprocess.Popen(command, **options)
    file = directory / "pid"
    wait_until(lambda: file.exists() and file.read_text().endswith(" "), LONGEST_SECONDS)
    return parent, int(file.read_text())


@pytest.mark.parametrize(("kind", "num_trials"), [("fake", 20), ("real", 2)])
def test_a_parents_sigkill_leaves_no_orphan(kind: str, num_trials: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    longest = 0.6 if kind == "fake" else 6.0
    for trial in range(num_trials):
        (directory := tmp_path / str(trial)).mkdir()
        if trial % 2:
            (directory / "load slowly").touch()  # the fake then never looks at its connection
        parent, pid = start_parent(kind, directory, 100_000)  # more than it can do in the time
        time.sleep(rng.choice((0.0, rng.random() * longest)))
        assert is_running(pid)
        parent.kill()
        parent.wait()
        wait_until(lambda pid=pid: not is_running(pid), 2.0)  # type: ignore[misc]


def test_what_the_process_prints_is_not_among_the_jobs_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # as in a new user's shell
    parent, _ = start_parent("fake", tmp_path, 9, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = parent.communicate(timeout=LONGEST_SECONDS)
    assert (parent.returncode, stdout) == (0, b"")
    assert stderr == b"a library prints this\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_it_runs_with_streams_closed(closed: str, tmp_path: Path) -> None:
    line = f'exec "$0" -c "$1" fake "$2" 9 {closed}'
    ended = subprocess.run(
        ["/bin/sh", "-c", line, sys.executable, PARENT, str(tmp_path)],
        capture_output=True,
        timeout=LONGEST_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr


def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    engine = EngineProcess(MODEL, CONFIG)
    engine.wait_until_ready()
    engine.close()
