"""Several engines fed from one queue: the answers of one, whatever becomes of some of them.

Faults come from engine_worker_with_faults.py, as in test_engine_process.py, whose fake engine runs
8 requests at a time.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.device_shares import device_shares, start_children
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.engine_replicas import EngineReplicas, share_machine
from nanovllm_cli.core.errors import EngineDied, MemoryTooSmall, ModelError, UserError
from nanovllm_cli.core.prefix_homes import PrefixHomes
from nanovllm_cli.core.request import Failure, NewTokens, Output, Request

from .cli import MODEL, SAMPLE
from .stand_in_gpus import stand_in_gpus
from .test_engine_process import (
    CONFIG,
    HANG_SECONDS,
    LONGEST_SECONDS,
    WORKER,
    ask,
    assert_same,
    fake_answers,
    fault,
    finish,
    is_running,
    tokens,
    wait_until,
)

Start = Callable[..., EngineReplicas]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(kind="fake" | "real", ...): replicas, which leave no process when the test ends."""
    pids: list[int] = []
    started = []

    def start(
        kind: str = "fake",
        num_replicas: int = 2,
        config: EngineConfig = CONFIG,
        hang_seconds: float = HANG_SECONDS,
        **options: object,
    ) -> EngineReplicas:
        command = (sys.executable, str(WORKER), kind, str(tmp_path))

        def spawn(**environment: object) -> EngineChild:
            child = EngineChild(command=command, hang_seconds=hang_seconds, **environment)
            pids.append(child.pid)
            return child

        engine = EngineReplicas(MODEL, config, num_replicas=num_replicas, spawn=spawn, **options)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()
    assert not [pid for pid in pids if is_running(pid)]


def run_until(engine: EngineReplicas, is_so: Callable[[], bool]) -> dict[int, Output]:
    """What has ended until it is so."""
    give_up = time.monotonic() + LONGEST_SECONDS
    ended: dict[int, Output] = {}
    while not is_so():
        assert time.monotonic() < give_up
        ended |= run_one_step(engine)
    return ended


def run_one_step(engine: EngineReplicas) -> dict[int, Output]:
    """What has ended in it."""
    return {o.request_id: o for o in engine.step() if not isinstance(o, NewTokens)}


# The real engine


@pytest.fixture(scope="module")
def sample_requests() -> list[Request]:
    """32 sample prompts, each greedily and drawn."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    rows = map(json.loads, (SAMPLE / "prompts.jsonl").read_text().splitlines())
    prompts = [tokenizer.encode(row["prompt"]).ids for row in rows if "prompt" in row][:32]
    greedy = [ask(i, p, temperature=0.0, max_tokens=24) for i, p in enumerate(prompts)]
    drawn = [ask(i + 32, p, temperature=1.5, max_tokens=24) for i, p in enumerate(prompts)]
    return greedy + drawn


@pytest.fixture(scope="module")
def in_process(sample_requests: list[Request]) -> tuple[dict[int, Output], Engine]:
    engine = Engine.from_checkpoint(MODEL, CONFIG)
    return finish(engine, sample_requests), engine


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_any_number_of_replicas_gives_the_answers_of_an_engine_in_this_process(
    num_replicas: int,
    sample_requests: list[Request],
    in_process: tuple[dict[int, Output], Engine],
) -> None:
    expected, engine = in_process
    children = start_children(num_replicas, 1)  # as a job starts them, before it knows its model
    replicas = EngineReplicas(MODEL, CONFIG, num_replicas=num_replicas, children=children)
    pids = replicas.pids
    try:
        assert pids == [child.pid for child in children]
        assert_same(finish(replicas, sample_requests), expected)
        assert replicas.num_restarts == 0
        assert replicas.device == engine.device
        assert replicas.attention_backend == engine.attention_backend
        assert replicas.num_blocks == num_replicas * engine.num_blocks
        assert replicas.max_model_len == engine.max_model_len
        for name in ("num_prompt_tokens", "num_completion_tokens"):
            assert getattr(replicas.stats, name) == getattr(engine.stats, name)
    finally:
        replicas.close()
        replicas.close()  # a second time is no error
    assert not [pid for pid in pids if is_running(pid)]


def test_a_kill_of_a_replica_changes_no_answer(
    start: Start, sample_requests: list[Request], in_process: tuple[dict[int, Output], Engine]
) -> None:
    engine = start("real", config=replace(CONFIG, max_num_seqs=8))
    engine.wait_until_ready()
    for request in sample_requests:
        engine.add(request)
    ended = run_until(engine, lambda: engine.stats.num_completion_tokens > 40)
    os.kill(engine.pids[1], signal.SIGKILL)
    ended |= finish(engine)
    assert engine.num_restarts == 1
    assert engine.last_death == "replica 1: the engine was killed by signal 9 (Killed)"
    assert_same(ended, in_process[0])


def test_prompts_that_begin_alike_meet_at_one_replica_unless_it_is_too_busy(start: Start) -> None:
    engine = start("real")
    engine.wait_until_ready()
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 1000, (5, 128)).tolist()  # odd: load alone would part them
    prompts = [[*prefix, i] for i in range(4) for prefix in prefixes]  # taken in turns
    finish(engine, [ask(i, prompt, max_tokens=2) for i, prompt in enumerate(prompts)])
    # Each prefix, of two blocks, was computed once and found three times.
    assert engine.stats.num_prompt_tokens == 20 * 129
    assert engine.stats.num_cached_tokens == 5 * 3 * 128
    before = engine.stats.copy()
    prefix = rng.integers(0, 1000, 128).tolist()  # and now one for all
    finish(engine, [ask(i, [*prefix, i], max_tokens=2) for i in range(40)])
    assert engine.stats.since(before).num_cached_tokens == 38 * 128  # both have computed it


# Deaths


@pytest.mark.parametrize("name", ["SIGKILL", "exit 0", "exception", "SIGSTOP", "GpuFailed"])
def test_what_a_replica_had_when_it_died_is_answered(name: str, start: Start) -> None:
    engine = start(num_replicas=3)
    requests = [*map(ask, range(150)), fault(name), *map(ask, range(150, 200))]
    # Those that report their tokens are run by one replica only: nobody helps out.
    ended = finish(engine, [replace(request, reports_tokens=True) for request in requests])
    assert tokens(ended) == fake_answers(requests)
    assert engine.num_restarts == 1
    assert engine.num_replicas == 3


def test_the_others_answer_while_a_replica_starts_again(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.wait_until_ready()
    (tmp_path / "load slowly").touch()  # and that is: never
    requests = [ask(i) for i in range(100)]
    for request in requests:
        engine.add(request)
    ended = run_one_step(engine)
    os.kill(engine.pids[0], signal.SIGKILL)
    ended |= run_until(engine, lambda: not engine.has_work)
    assert tokens(ended) == fake_answers(requests)
    assert engine.num_restarts == 1


def test_the_others_answer_what_a_stopped_replica_is_late_with(start: Start) -> None:
    engine = start(hang_seconds=60.0)
    engine.wait_until_ready()
    requests = [ask(i) for i in range(100)]
    warm_up = [ask(1000 + i) for i in range(20)]
    finish(engine, warm_up)
    for request in requests:
        engine.add(request)
    ended = run_one_step(engine)
    os.kill(engine.pids[0], signal.SIGSTOP)
    begin = time.monotonic()
    ended |= run_until(engine, lambda: not engine.has_work)
    assert tokens(ended) == fake_answers(requests)
    assert time.monotonic() - begin < 20
    assert engine.num_restarts == 0
    os.kill(engine.pids[0], signal.SIGCONT)
    again = [ask(2000 + i) for i in range(100)]
    assert tokens(finish(engine, again)) == fake_answers(again)  # nothing old among it


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_poison_request_kills_twice_and_no_more(num_replicas: int, start: Start) -> None:
    engine = start(num_replicas=num_replicas)
    innocent = [ask(i) for i in range(300)]
    poison = fault("SIGKILL", once=False)
    ended = finish(engine, [*innocent[:200], poison, *innocent[200:]])
    failed = {i: o for i, o in ended.items() if isinstance(o, Failure)}
    assert poison.request_id in failed
    assert "signal 9" in failed[poison.request_id].message
    assert {failure.code for failure in failed.values()} == {"engine_died"}
    assert len(failed) <= 12  # no more than were in an engine beside it
    assert tokens(ended) == fake_answers(r for r in innocent if r.request_id not in failed)
    assert len(ended) == 301
    assert engine.num_restarts == 2


def test_a_poison_request_that_is_met_alone_fails_alone(start: Start) -> None:
    engine = start()
    poison = fault("SIGSEGV", once=False)
    ended = finish(engine, [poison])
    assert [type(output) for output in ended.values()] == [Failure]
    assert engine.num_restarts == 2
    others = [ask(i) for i in range(50)]
    assert tokens(finish(engine, others)) == fake_answers(others)


def test_a_replica_that_cannot_start_again_is_left_out_until_none_is_left(
    start: Start, tmp_path: Path
) -> None:
    engine = start()
    engine.wait_until_ready()
    watched = [replace(ask(i), reports_tokens=True) for i in range(100)]
    for request in watched:
        engine.add(request)
    ended = run_one_step(engine)
    (tmp_path / "die while loading").touch()
    os.kill(engine.pids[0], signal.SIGKILL)
    ended |= run_until(engine, lambda: not engine.has_work)
    assert tokens(ended) == fake_answers(watched)
    run_until(engine, lambda: engine.num_replicas == 1)
    assert engine.last_death is not None
    assert engine.last_death.endswith("the job goes on with 1 of 2 replicas")
    more = [ask(i) for i in range(100, 150)]
    assert tokens(finish(engine, more)) == fake_answers(more)
    os.kill(engine.pids[0], signal.SIGKILL)
    with pytest.raises(EngineDied, match="3 deaths"):
        finish(engine, [ask(1)])
    with pytest.raises(EngineDied, match="3 deaths"):
        engine.step()


def test_what_is_wrong_from_the_start_is_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "too little memory").touch()
    with pytest.raises(MemoryTooSmall, match="7 bytes"):
        start().wait_until_ready()
    (tmp_path / "no model").mkdir()
    engine = EngineReplicas(tmp_path / "no model", CONFIG, num_replicas=2)
    with pytest.raises(ModelError):
        engine.attention_backend  # noqa: B018
    engine.close()


# Requests


def test_a_slow_replica_gets_less(start: Start) -> None:
    engine = start(hang_seconds=60.0)
    engine.wait_until_ready()
    os.kill(engine.pids[0], signal.SIGSTOP)
    # Nobody helps out with those that report their tokens.
    requests = [replace(ask(i), reports_tokens=True) for i in range(200)]
    for request in requests:
        engine.add(request)
    ended = run_until(engine, lambda: engine.stats.num_completion_tokens >= 3 * (200 - 12))
    os.kill(engine.pids[0], signal.SIGCONT)
    assert tokens(ended | finish(engine)) == fake_answers(requests)


@pytest.mark.parametrize("rows", [[(40, 10), (10, 40)], [(1, 128), (1, 400)]])
def test_a_generated_token_is_more_to_do_than_one_of_a_prompt(
    rows: list[tuple[int, int]], start: Start
) -> None:
    engine = start()
    engine.wait_until_ready()
    light, heavy = rows
    for i, (num_prompt, num_tokens) in enumerate([light, heavy, light, light]):
        endless = ask(i, [5] * num_prompt, max_tokens=num_tokens, ignore_eos=True, seed=0)
        engine.add(endless)
    assert engine.num_waiting == 4
    engine.step()
    assert [sorted(replica.given) for replica in engine._replicas] == [[0, 2, 3], [1]]
    assert engine.num_waiting == 0


def test_an_aborted_request_gives_no_output(start: Start) -> None:
    engine = start()
    engine.wait_until_ready()
    endless = [ask(i, seed=0) for i in range(30)]  # more than there is room for
    for request in endless:
        engine.add(request)
    for _ in range(3):
        assert engine.step() == []
    os.kill(engine.pids[0], signal.SIGKILL)
    for request in endless[::2]:
        engine.abort(request.request_id)
    run_until(engine, lambda: engine.num_restarts == 1)
    for request in endless:
        engine.abort(request.request_id)
        engine.abort(request.request_id)
    assert not engine.has_work
    assert tokens(finish(engine, [ask(50)])) == fake_answers([ask(50)])


def test_an_abort_between_a_death_and_its_recovery_is_no_error(tmp_path: Path) -> None:
    spawn = partial(EngineChild, command=(sys.executable, str(WORKER), "fake", str(tmp_path)))
    engine = EngineProcess(MODEL, CONFIG, spawn=spawn)
    engine.wait_until_ready()
    engine.add(ask(1, seed=0))
    engine.step()
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    while is_running(pid):
        time.sleep(0.005)
    engine.step()  # sees the death; the next one deals with it
    assert engine.num_restarts == 0
    engine.abort(1)
    assert tokens(finish(engine, [ask(2)])) == fake_answers([ask(2)])
    engine.close()


def test_a_request_that_cannot_run_comes_back_as_its_failure(start: Start) -> None:
    engine = start()
    empty = replace(ask(1), prompt_token_ids=[])
    ended = finish(engine, [empty, ask(2), ask(3, [2**31]), ask(4, stop_token_ids=(2**40,))])
    assert {i: o.code for i, o in ended.items() if isinstance(o, Failure)} == {
        1: "bad_token_ids", 3: "bad_token_ids", 4: "bad_token_ids"
    }  # fmt: skip
    assert tokens(ended) == fake_answers([ask(2)])


def test_stats_are_those_of_all_replicas_and_stay_one_object(start: Start) -> None:
    engine = start()
    stats = engine.stats
    finish(engine, map(ask, range(60)))
    assert stats.num_completion_tokens == 180
    os.kill(engine.pids[1], signal.SIGKILL)
    run_until(engine, lambda: engine.num_restarts == 1)
    finish(engine, map(ask, range(60)))
    assert stats.num_completion_tokens == 360


def test_close_ends_all_at_once_whatever_they_do(start: Start) -> None:
    engine = start(num_replicas=4)
    engine.wait_until_ready()
    pids = engine.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # each alone is given five seconds
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 9
    assert not [pid for pid in pids if is_running(pid)]


# Shares of the machine


def test_each_replica_sees_its_share_of_the_visible_gpus() -> None:
    def shares(num_replicas: int, each: int, **environment: str) -> list[str]:
        of_each = device_shares(num_replicas, each, environment)
        return [share["CUDA_VISIBLE_DEVICES"] for share in of_each]

    assert shares(4, 1) == ["0", "1", "2", "3"]
    assert shares(2, 2) == ["0,1", "2,3"]
    assert shares(2, 2, CUDA_VISIBLE_DEVICES="7, 3,1,0,5") == ["7,3", "1,0"]
    assert shares(2, 1, CUDA_VISIBLE_DEVICES="GPU-ab,MIG-cd") == ["GPU-ab", "MIG-cd"]
    assert device_shares(1, 2, {"CUDA_VISIBLE_DEVICES": "3,4"}) == [{}]  # as it is


def test_a_process_gets_its_environment_and_the_gpus_of_its_share(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    files = iter([tmp_path / "0", tmp_path / "1"])

    def spawn(**options: object) -> EngineChild:
        return EngineChild(command=(sys.executable, "-c", code, str(next(files))), **options)

    for child in start_children(2, 2, spawn):
        wait_until(lambda child=child: not is_running(child.pid), 20)
        child.kill()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")
    assert (tmp_path / "0").read_text() == ",".join(visible[:2])
    assert (tmp_path / "1").read_text() == ",".join(visible[2:4])


def test_too_few_gpus_are_an_error_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_gpus(monkeypatch, *["H100"] * 3)
    children = start_children(2, 2)
    for device in ("auto", "cuda"):
        config = EngineConfig(device=device, tensor_parallel_size=2)
        with pytest.raises(UserError, match=r"2 replicas .* need 4 GPUs, and this job sees 3"):
            EngineReplicas(MODEL, config, num_replicas=2, children=children)
    assert not [child for child in children if is_running(child.pid)]
    assert share_machine(EngineConfig(), 3) == EngineConfig()
    stand_in_gpus(monkeypatch)
    with pytest.raises(UserError, match="this job sees 0"):
        share_machine(EngineConfig(device="cuda"), 2)


def test_replicas_on_a_cpu_share_out_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    config = EngineConfig(device="cpu")
    assert share_machine(config, 1) == config
    assert share_machine(config, 3).num_threads == 2
    assert share_machine(config, 16).num_threads == 1
    assert share_machine(replace(config, num_threads=5), 2).num_threads == 5


def test_a_prompt_goes_by_its_longest_known_prefix() -> None:
    homes = PrefixHomes(16)
    prompt = np.arange(100, dtype=np.int32)
    assert len(homes.prefixes_of(prompt)) == 2  # of 64 and 16 tokens
    assert homes.prefixes_of(prompt[:16]) == ()  # a token must follow
    other = np.concatenate([prompt[:20], prompt[:60]])
    homes.add(homes.prefixes_of(prompt), 0)
    assert homes.find(homes.prefixes_of(other)) == {0}
    homes.add(homes.prefixes_of(other), 1)
    assert homes.find(homes.prefixes_of(other)) == {1}
    assert homes.find(homes.prefixes_of(prompt)) == {0}
    assert homes.find(homes.prefixes_of(prompt[:30])) == {0, 1}
    homes.forget(0)
    assert homes.find(homes.prefixes_of(prompt)) == {1}
