"""Tensor parallelism with real processes and gloo: the answers of 1, 2 and 4 ranks, and their ends.

In fp32 the logits of another number of ranks differ in their last bits, and here no token hangs on
those. Faults are signals to the processes of a real engine.
"""

import os
import random
import re
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
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist

from nanovllm_cli.core.batch import (
    Adjustment,
    Admission,
    Batch,
    BlockTableUpdate,
    DecodeBatch,
    ForcedTokens,
    ForwardBatch,
    PrefillBatch,
    PromptTargets,
    RowNeeds,
    SampleBatch,
    TokenMasks,
    Twins,
)
from nanovllm_cli.core.batch_layout import decode_batch, encode_batch
from nanovllm_cli.core.collectives import check_collectives
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.connection_errors import connection_errors
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.errors import ModelError, NotConnected, UserError
from nanovllm_cli.core.parallel import TensorParallel
from nanovllm_cli.core.request import Completion, Output, Request
from nanovllm_cli.core.resolved_config import check_ranks, resolve
from nanovllm_cli.core.sampler import sample
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.slot_table import SlotTable

from . import gpu_tests
from .cli import MODEL, ROOT, processes_with
from .schemas import grammar_of_schema, random_schema
from .stand_in_gpus import stand_in_gpus

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE = 162  # no multiple of 4
BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * 16  # K and V, layers, heads, head_dim, fp32, tokens
WAYS_TO_DRAW: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 3.0, "min_p": 0.1},
    {"temperature": 2.0, "stop_token_ids": tuple(range(12)), "min_tokens": 3},
]
LONGEST_SECONDS = 60.0  # only what hangs takes so long


def ask(request_id: int, prompt: Iterable[int], **sampling: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**{"seed": request_id, **sampling}),
    )


def requests(count: int = 16, *, longest: int = 8) -> list[Request]:
    """Prompts of 1 to 70 tokens, many with a common beginning, drawn from in every way."""
    rng = random.Random(0)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(64)] for _ in range(2)]
    made = []
    for i in range(count):
        prompt = rng.choice(stems)[: rng.choice((1, 15, 16, 17, 33, 64))]
        prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 1, 6)))]
        made.append(ask(i, prompt, max_tokens=rng.randint(3, longest), **WAYS_TO_DRAW[i % 5]))
    return made


def finish(engine: Engine | EngineProcess, asked: Iterable[Request] = ()) -> dict[int, list[int]]:
    """Run everything to its end: the tokens of every request."""
    give_up = time.monotonic() + LONGEST_SECONDS
    for request in asked:
        assert engine.add(request) is None
    ended: dict[int, list[int]] = {}
    while engine.has_work:
        assert time.monotonic() < give_up, "the engine hangs"
        for output in engine.step():
            assert isinstance(output, Completion), output
            ended[output.request_id] = output.token_ids.tolist()
    return ended


def config(size: int, **more: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"block_size": 16, "max_model_len": 128, "num_threads": 1}
    return EngineConfig(tensor_parallel_size=size, **{**defaults, **more})


Answer = Callable[..., tuple[dict[int, list[int]], Engine]]


@pytest.fixture
def answer() -> Iterator[Answer]:
    """answer(path, size, requests, ...): their tokens, and the engine, which is closed already."""
    engines = []

    def answer(
        path: Path, size: int, asked: Iterable[Request], **more: Any
    ) -> tuple[dict[int, list[int]], Engine]:
        engine = Engine.load(path, config(size, **more))
        engines.append(engine)
        try:
            return finish(engine, asked), engine
        finally:
            engine.close()

    yield answer
    assert not children_of(os.getpid()), "a rank outlives its engine"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(vocab_size=VOCAB_SIZE, tie_word_embeddings=False)


# Answers


@pytest.mark.parametrize(
    "more",
    [{}, {"max_num_batched_tokens": 29, "max_window_steps": 4}],
    ids=["prefix caching", "chunked prefills and windows"],
)
def test_the_tokens_of_1_2_and_4_ranks_are_the_same(
    checkpoint: Path, answer: Answer, more: dict[str, Any]
) -> None:
    asked = requests()
    expected, alone = answer(checkpoint, 1, asked, **more)
    assert alone.stats.num_cached_tokens > 0
    for size in (2, 4):
        tokens, engine = answer(checkpoint, size, asked, **more)
        assert tokens == expected
        assert engine.all_reduce == "gloo"
        for name in ("num_cached_tokens", "num_prefill_launches", "num_decode_steps"):
            assert getattr(engine.stats, name) == getattr(alone.stats, name)


def test_rows_with_grammars_have_the_same_tokens_on_two_ranks(answer: Answer) -> None:
    asked = [
        ask(i, range(5, 9 + i), max_tokens=40, grammar=grammar_of_schema(random_schema(i)))
        if i % 3
        else ask(i, range(5, 9 + i), max_tokens=20)
        for i in range(12)
    ]
    asked[4] = replace(
        asked[4], sampling=replace(asked[4].sampling, logprobs=2, repetition_penalty=1.2)
    )
    expected, alone = answer(MODEL, 1, asked)
    tokens, engine = answer(MODEL, 2, asked)
    assert tokens == expected
    assert engine.stats.num_forced_tokens == alone.stats.num_forced_tokens > 50


@pytest.mark.long
def test_the_tokens_of_8_ranks_are_the_same(
    make_checkpoint: MakeCheckpoint, answer: Answer
) -> None:
    path = make_checkpoint(
        vocab_size=VOCAB_SIZE, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96
    )
    expected, _ = answer(path, 1, requests())
    tokens, _ = answer(path, 8, requests())
    assert tokens == expected


def test_the_tokens_of_preempted_sequences_are_the_same(checkpoint: Path, answer: Answer) -> None:
    asked = [ask(i, range(i, i + 10 + i), max_tokens=45) for i in range(6)]
    expected, alone = answer(checkpoint, 1, asked, kv_cache_bytes=10 * BLOCK_BYTES)
    # Each of two ranks holds one of the two kv heads, so a block has half the bytes.
    tokens, engine = answer(checkpoint, 2, asked, kv_cache_bytes=5 * BLOCK_BYTES)
    assert tokens == expected
    assert engine.num_blocks == alone.num_blocks == 10
    assert engine.stats.num_preemptions == alone.stats.num_preemptions > 0


def test_what_rows_ask_beyond_a_token_is_the_same_for_two_ranks(checkpoint: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"logprobs": 3, "prompt_logprobs": 2},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "logprobs": 0},
        {"logit_bias": ((4, 50.0), (160, -3.0)), "bad_words": ((4, 4), (9,))},
        {"thinking_budget": 2, "end_think_token_id": 161, "temperature": 0.0},
        {},
    ]
    asked = [
        ask(i, range(i, i + 4 * i + 1), **{"max_tokens": 9, **ways[i % len(ways)]})
        for i in range(10)
    ]
    completions: list[dict[int, Completion]] = []
    for size in (1, 2):
        engine = Engine.load(checkpoint, config(size, max_num_batched_tokens=29))
        try:
            completions.append(gpu_tests.answers(engine, asked))
        finally:
            engine.close()
    alone, shared = completions
    assert gpu_tests.differing(shared, alone) == []
    for key, completion in alone.items():
        for name in ("logprobs", "prompt_logprobs"):
            expected, actual = getattr(completion, name), getattr(shared[key], name)
            assert (expected is None) == (actual is None)
            if expected is not None:
                assert np.array_equal(actual.top_ids, expected.top_ids)
                assert np.abs(actual.values - expected.values).max(initial=0) < 1e-4


def test_tied_weights_are_shared_out_too(make_checkpoint: MakeCheckpoint, answer: Answer) -> None:
    path = make_checkpoint(vocab_size=VOCAB_SIZE)
    asked = requests(10)
    assert answer(path, 2, asked)[0] == answer(path, 1, asked)[0]


def test_the_sample_models_answers_are_the_same_for_1_and_4_ranks(answer: Answer) -> None:
    rng = random.Random(5)
    asked = [
        ask(i, [rng.randrange(1000) for _ in range(9)], temperature=i % 2 * 0.8, max_tokens=6)
        for i in range(8)
    ]
    expected, _ = answer(MODEL, 1, asked, dtype="float32")
    assert answer(MODEL, 4, asked, dtype="float32")[0] == expected


@pytest.mark.parametrize(("size", "count"), [(2, 5), (4, 2)])
def test_a_rows_bits_do_not_depend_on_its_batch(
    checkpoint: Path, answer: Answer, size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, int], Tensor] = {}

    def recording_sample(logits: Tensor, table: SlotTable, slots: Tensor) -> tuple[Tensor, Tensor]:
        for row, slot in zip(logits, slots.tolist(), strict=True):
            seen[int(table.seed[slot]), int(table.length[slot])] = row.clone()
        return sample(logits, table, slots)

    monkeypatch.setattr("nanovllm_cli.core.cpu_runner.sample", recording_sample)
    asked = requests(count, longest=5)
    together, _ = answer(checkpoint, size, asked)
    in_a_batch = dict(seen)
    seen.clear()
    engine = Engine.load(checkpoint, config(size, enable_prefix_caching=False))
    try:
        for request in asked:
            assert finish(engine, [request]) == {request.request_id: together[request.request_id]}
    finally:
        engine.close()
    assert seen.keys() == in_a_batch.keys()
    assert all(torch.equal(seen[key], in_a_batch[key]) for key in seen)


def test_the_kv_cache_has_as_many_blocks_as_the_poorest_rank_can_hold(
    checkpoint: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, alike = answer(checkpoint, 2, [], max_num_seqs=4)
    monkeypatch.setattr("nanovllm_cli.core.cpu_runner.cpu_kv_bytes", lambda *_: 1 << 40)
    _, rich_leader = answer(checkpoint, 2, [], max_num_seqs=4)
    assert rich_leader.num_blocks == alike.num_blocks
    monkeypatch.setattr(
        "nanovllm_cli.core.cpu_runner.cpu_kv_bytes", lambda *_: 3 * BLOCK_BYTES // 2
    )
    assert answer(checkpoint, 2, [], max_num_seqs=4)[1].num_blocks == 3


# What cannot be shared out


def sizes(**more: Any) -> ModelConfig:
    whole = ModelConfig.from_directory(MODEL)
    return ModelConfig(**{name: more.get(name, getattr(whole, name)) for name in whole.__slots__})


@pytest.mark.parametrize(
    ("size", "model", "message"),
    [
        (3, {}, "is 3, and the model has 4 attention heads"),
        (8, {}, "is 8, and the model has 4 attention heads"),
        (2, {"num_attention_heads": 6, "num_key_value_heads": 3}, "has 3 key/value heads"),
        (4, {"intermediate_size": 510}, "has an intermediate size of 510"),
    ],
)
def test_a_model_that_cannot_be_shared_out_is_named(
    size: int, model: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(config(size), sizes(**model))
    assert caught.value.hint is not None
    assert "Choose one of 1" in caught.value.hint


def test_more_ranks_than_gpus_and_a_torch_without_nccl_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_gpus(monkeypatch, "H100")
    with pytest.raises(UserError, match="is 2, and this job sees 1 GPUs"):
        check_ranks(2, "cuda", sizes())
    stand_in_gpus(monkeypatch, "H100", "H100")
    check_ranks(2, "cuda", sizes())
    resolved = resolve(EngineConfig(tensor_parallel_size=2), sizes())
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="has no NCCL"):
        check_collectives(resolved)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    check_collectives(resolved)


def test_ranks_on_gpus_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch, "H100", "H100", "H100", "A100")
    check_ranks(2, "cuda", sizes())
    with pytest.raises(UserError, match="is 4, and the GPUs differ: H100, A100"):
        check_ranks(4, "cuda", sizes())


def test_ranks_that_cannot_connect_say_what_they_need_and_none_is_left(checkpoint: Path) -> None:
    code = (
        "import sys\n"
        "from tests.test_tensor_parallel import *\n"
        "try: Engine.load(Path(sys.argv[1]), config(2))\n"
        "except NotConnected as error: print(error.message, error.hint)\n"
        "assert not children_of(os.getpid())"
    )
    # In a process of its own: torch counts a group that failed, and the next ranks would not meet.
    ended = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "nowhere"},
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert "the ranks cannot connect: " in ended.stdout
    assert "address for: nowhere" in ended.stdout
    assert "loopback interface" in ended.stdout


def test_an_error_of_nccl_comes_with_the_shared_memory_it_needs() -> None:
    message = (
        "NCCL error in: ProcessGroupNCCL.cpp:3370, unhandled system error (run with ...)\n"
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.\n"
        "Last error:\n\nError while creating shared memory segment nccl-1\n"
    )
    with pytest.raises(NotConnected) as caught, connection_errors():
        raise dist.DistBackendError(message)
    assert caught.value.message.startswith("the ranks cannot connect: NCCL error in: ")
    assert caught.value.message.endswith("; Error while creating shared memory segment nccl-1")
    assert re.search(r"10 MiB of /dev/shm .*: (\d+ MiB are free|none is)", str(caught.value.hint))
    with pytest.raises(UserError, match="mine"), connection_errors():
        raise UserError("mine")  # a rank's death goes through


def test_a_checkpoint_that_cannot_be_used_is_named_and_no_rank_is_left(
    checkpoint: Path, tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        Engine.load(tmp_path, config(2))
    assert not children_of(os.getpid())


def test_a_cache_too_small_on_every_rank_is_named_and_no_rank_is_left(checkpoint: Path) -> None:
    code = (
        "import sys\n"
        "from tests.test_tensor_parallel import *\n"
        "try: Engine.load(Path(sys.argv[1]), config(2, kv_cache_bytes=1000))\n"
        "except UserError as error: print(error, children_of(os.getpid()), flush=True)\n"
        "time.sleep(1)\n"  # a death that nobody takes notice of would end the process
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1000 bytes are left for the KV cache")
    assert run.stdout.endswith(" []\n")


# What is sent at every launch

int32s = st.integers(-(2**31), 2**31 - 1)
counts = st.integers(0, 2**31 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)


def arrays(length: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(int32s, min_size=length, max_size=length).map(partial(np.array, dtype=np.int32))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    num_entries, num_seqs = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    update = BlockTableUpdate(
        slots=draw(arrays(num_entries)),
        indices=draw(arrays(num_entries)),
        block_ids=draw(arrays(num_entries)),
    )
    slots = draw(arrays(num_seqs))
    kind = draw(st.sampled_from([PrefillBatch, DecodeBatch, ForwardBatch, SampleBatch]))
    needs = draw(st.none() | row_needs())
    if kind is SampleBatch:
        return SampleBatch(slots=slots, needs=needs)
    if kind is DecodeBatch:
        num_steps = draw(st.integers(1, 2**31 - 1))
        return DecodeBatch(block_table_update=update, slots=slots, num_steps=num_steps, needs=needs)
    adjustment = st.builds(
        Adjustment,
        repetition_penalty=reals,
        presence_penalty=reals,
        frequency_penalty=reals,
        logit_bias=st.lists(st.tuples(counts, reals), max_size=3).map(tuple),
        bad_words=st.lists(st.lists(counts, max_size=3).map(tuple), max_size=3).map(tuple),
        thinking_end=st.none() | counts,
        end_think_token_id=st.none() | counts,
        prompt_token_ids=arrays(3),
        completion_token_ids=arrays(2),
    )
    admission = st.builds(
        Admission,
        slot=counts,
        seed=st.integers(0, 2**64 - 1),
        temperature=reals,
        top_k=counts,
        top_p=reals,
        min_p=reals,
        min_length=counts,
        max_length=counts,
        stop_token_ids=st.lists(counts, max_size=4).map(tuple),
        adjustment=st.none() | adjustment,
    )
    admissions = tuple(draw(st.lists(admission, max_size=3)))
    forced = st.none() | st.builds(
        ForcedTokens,
        token_ids=arrays(4),
        start_positions=arrays(num_seqs),
        query_lens=arrays(num_seqs),
    )
    if kind is ForwardBatch:
        return ForwardBatch(block_table_update=update, slots=slots, forced=draw(forced))
    is_last_chunk = st.lists(st.booleans(), min_size=num_seqs, max_size=num_seqs)
    pairs = {"slots": arrays(2), "leaders": arrays(2)}
    twins = st.builds(Twins, **pairs, sources=arrays(1), targets=arrays(1))
    targets = st.builds(
        PromptTargets, hidden_rows=arrays(2), token_ids=arrays(2), num_logprobs=counts
    )
    return PrefillBatch(
        admissions=admissions,
        block_table_update=update,
        slots=slots,
        token_ids=draw(arrays(draw(st.integers(0, 9)))),
        start_positions=draw(arrays(num_seqs)),
        query_lens=draw(arrays(num_seqs)),
        is_last_chunk=np.array(draw(is_last_chunk)),
        twins=draw(st.none() | twins),
        needs=needs,
        prompt_targets=draw(st.none() | targets),
    )


@st.composite
def row_needs(draw: st.DrawFn) -> RowNeeds:
    num_masks = draw(st.integers(0, 3))
    words = arrays(num_masks * 5).map(lambda words: words.reshape(-1, 5))
    masks = st.builds(TokenMasks, rows=arrays(num_masks), words=words) if num_masks else st.none()
    return RowNeeds(
        adjusted_rows=draw(arrays(draw(st.integers(0, 3)))),
        logprob_rows=draw(arrays(draw(st.integers(0, 3)))),
        num_logprobs=draw(counts),
        masks=draw(masks),
    )


PLAIN = (
    PrefillBatch, DecodeBatch, ForwardBatch, SampleBatch, BlockTableUpdate, Admission, Adjustment,
    RowNeeds, TokenMasks, PromptTargets, Twins, ForcedTokens,
)  # fmt: skip


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        assert actual.tolist() == expected.tolist()
        assert actual.flags.writeable, "torch warns of others"
    elif isinstance(expected, tuple) and expected and isinstance(expected[0], Admission):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, PLAIN):
        assert type(actual) is type(expected)
        for name in expected.__slots__:
            assert_same(getattr(actual, name), getattr(expected, name))
    else:
        assert actual == expected


@given(batches())
def test_a_batch_comes_out_of_its_bytes_as_it_was_but_for_the_words_of_masks(batch: Batch) -> None:
    expected = batch
    if not isinstance(batch, ForwardBatch) and batch.needs and batch.needs.masks:
        masks = replace(batch.needs.masks, words=batch.needs.masks.words[:, :0])
        expected = replace(batch, needs=replace(batch.needs, masks=masks))
    assert_same(decode_batch(encode_batch(batch)), expected)


# Parts


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("whole", [1, 8, 160, 162])
def test_the_shards_of_all_ranks_are_the_whole(size: int, whole: int) -> None:
    shards = [TensorParallel(rank, size).shard(whole) for rank in range(size)]
    assert [i for s in shards for i in range(s.start, s.stop)] == list(range(whole))
    assert len({shard.length for shard in shards}) == 1
    assert all(shard.stop - shard.start <= shard.length for shard in shards)


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "expected"),
    [
        (8, 2, [range(4), range(4, 8)]),
        (2, 2, [range(1), range(1, 2)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),
        (1, 4, [range(1)] * 4),
    ],
)
def test_a_rank_has_the_kv_heads_of_its_query_heads(
    num_kv_heads: int, size: int, expected: list[range]
) -> None:
    for rank, heads in enumerate(expected):
        shard = TensorParallel(rank, size).kv_shard(num_kv_heads, 64)
        assert (shard.start, shard.stop) == (heads.start * 64, heads.stop * 64)


# Faults


def children_of(pid: int) -> list[int]:
    """The ranks that a process has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == pid and state != "Z" and b"rank_worker" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_gone(pids: Iterable[int], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < give_up, f"{running} still run"
        time.sleep(0.005)


Start = Callable[..., EngineProcess]
PROCESS_CONFIG = EngineConfig(
    tensor_parallel_size=2, dtype="float32", max_model_len=256, num_threads=1
)


@pytest.fixture
def start() -> Iterator[Start]:
    """start(): the sample model's engine of two ranks in a process of its own."""
    started: list[EngineProcess] = []

    def start(hang_seconds: float = 25.0) -> EngineProcess:
        spawn = partial(EngineChild, hang_seconds=hang_seconds)
        started.append(EngineProcess(MODEL, PROCESS_CONFIG, spawn=spawn))
        return started[-1]

    yield start
    pids = [pid for engine in started for pid in (engine.pid, *children_of(engine.pid))]
    for engine in started:
        engine.close()
    until_gone(pids, 2.0)


def work() -> list[Request]:
    return [ask(i, [i + 5, 7], temperature=0.8, max_tokens=40, ignore_eos=True) for i in range(4)]


@pytest.fixture(scope="module")
def expected() -> dict[int, list[int]]:
    engine = Engine.load(MODEL, PROCESS_CONFIG)
    try:
        return finish(engine, work())
    finally:
        engine.close()


def begin(engine: EngineProcess) -> list[int]:
    """Until the engine has begun to decode; its other ranks."""
    engine.wait_until_ready()
    for request in work():
        assert engine.add(request) is None
    while engine.stats.num_decode_steps < 3:
        outputs: list[Output] = engine.step()
        assert not outputs, "too short to be disturbed"
    ranks = children_of(engine.pid)
    assert len(ranks) == 1
    return ranks


def test_the_engine_ends_with_a_rank_and_starts_again(
    start: Start, expected: dict[int, list[int]]
) -> None:
    engine = start()
    [rank] = begin(engine)
    pid = engine.pid
    os.kill(rank, signal.SIGKILL)
    until_gone([pid, rank], 1.0)
    assert finish(engine) == expected
    assert engine.num_restarts == 1
    assert engine.last_death is not None
    assert "rank 1 was killed by signal 9" in engine.last_death


def test_an_engine_with_nothing_to_do_ends_with_a_rank_too(start: Start) -> None:
    engine = start()
    engine.wait_until_ready()
    [rank] = children_of(engine.pid)
    os.kill(rank, signal.SIGKILL)
    until_gone([engine.pid, rank], 1.0)


def test_a_rank_that_stands_still_is_a_hang_of_the_engine(
    start: Start, expected: dict[int, list[int]]
) -> None:
    engine = start(hang_seconds=3.0)
    [rank] = begin(engine)
    pid = engine.pid
    os.kill(rank, signal.SIGSTOP)
    assert finish(engine) == expected
    assert engine.num_restarts == 1
    until_gone([pid, rank], 1.0)


# In a rank, what a signal to it brings about.
FAULTS = {
    "SIGKILL": signal.SIGKILL,
    "SIGSEGV": signal.SIGSEGV,
    "SIGSTOP": signal.SIGSTOP,
    "exit 0": signal.SIGUSR2,
    "exception": signal.SIGRTMIN,
}
IN_A_RANK = """
import os, signal, sys
def fail(number, frame): raise RuntimeError("this rank fails")
if "nanovllm_cli.core.rank_worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGRTMIN, fail)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_five_ends_of_a_rank_in_one_job_change_no_answer(
    name: str,
    start: Start,
    expected: dict[int, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(IN_A_RANK)
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = start(hang_seconds=3.0)
    for trial in range(5):
        [rank] = begin(engine)
        pid = engine.pid
        os.kill(rank, FAULTS[name])
        assert finish(engine) == expected
        assert engine.num_restarts == trial + 1
        until_gone([pid, rank], 1.0)


@pytest.mark.parametrize("number", [1, pytest.param(20, marks=pytest.mark.long)])
def test_no_rank_outlives_the_job_that_is_killed(number: int, tmp_path: Path) -> None:
    code = (
        "from tests.test_tensor_parallel import *\n"
        "engine = EngineProcess(MODEL, PROCESS_CONFIG)\n"
        "begin(engine)\n"
        "print(flush=True)\n"
        "while True: engine.step()\n"
    )
    chance, longest = random.Random(number), 0.0
    for trial in range(number):
        before = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "MARK": str(tmp_path)},
            stdout=subprocess.PIPE,
        ) as job:
            assert job.stdout is not None
            if trial == 0:
                assert job.stdout.readline()  # it decodes
                longest = time.monotonic() - before
                assert len(processes_with(tmp_path)) == 3
            else:
                time.sleep(chance.random() * longest)
            job.kill()
        killed = time.monotonic()
        while processes_with(tmp_path):
            assert time.monotonic() - killed < 2.0
            time.sleep(0.005)


def test_two_groups_at_once_do_not_meet(start: Start, expected: dict[int, list[int]]) -> None:
    engines = [start(), start()]
    for engine in engines:
        for request in work():
            assert engine.add(request) is None
    for engine in engines:
        assert finish(engine) == expected
        assert engine.num_restarts == 0
