"""The engine on tiny checkpoints: what it answers does not depend on how it gets there.

Equal means bitwise: the token ids, and the logits that every one of them was drawn from.
"""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.cpu_threads import CpuThreads
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.errors import MemoryTooSmall, UserError
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Request
from nanovllm_cli.core.sampler import sample
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.core.stats import EngineStats

VOCAB_SIZE = 160
BAD_TOKEN = 150  # its embedding is NaN in the poisoned checkpoint
BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * 16  # K and V, layers, heads, head_dim, fp32, tokens

MakeCheckpoint = Callable[..., Path]
RunEngine = Callable[[Engine, Iterable[Request]], dict[int, Completion | Failure]]


@dataclass(slots=True)
class Run:
    """What came of some requests, and the logits behind it: (seed, position) -> [vocab_size]."""

    outputs: dict[int, Completion | Failure]
    logits: dict[tuple[int, int], Tensor]
    stats: EngineStats

    def tokens(self, request_id: int) -> list[int]:
        output = self.outputs[request_id]
        assert isinstance(output, Completion), output
        return output.token_ids.tolist()


RunAll = Callable[..., Run]


@pytest.fixture(scope="module")
def run(run_engine: RunEngine) -> RunAll:
    """run(checkpoint, requests, **config): a fresh engine, the requests to their ends.

    Requests are told apart by their seeds in the logits, so each must have its own.
    """

    def run(path: Path, requests: Sequence[Request], **config: Any) -> Run:
        engine = Engine.from_checkpoint(path, EngineConfig(**{"block_size": 16, **config}))
        seen: dict[tuple[int, int], Tensor] = {}

        def recording_sample(
            logits: Tensor, table: SlotTable, slots: Tensor
        ) -> tuple[Tensor, Tensor]:
            for row, slot in zip(logits, slots.tolist(), strict=True):
                key = (int(table.seed[slot]), int(table.length[slot]))
                assert key not in seen, "a token was drawn twice"
                seen[key] = row.clone()
            return sample(logits, table, slots)

        assert len({request.sampling.seed for request in requests}) == len(requests)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanovllm_cli.core.cpu_runner.sample", recording_sample)
            outputs = run_engine(engine, requests)
        return Run(outputs=outputs, logits=seen, stats=engine.stats)

    return run


def ask(request_id: int, prompt: Sequence[int], **sampling: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"seed": request_id, **sampling}),
    )


WAYS_TO_DRAW: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.5},
    {"temperature": 3.0, "min_p": 0.1},
    {"temperature": 0.0, "stop_token_ids": (9, 80, 81)},
    {"temperature": 2.0, "stop_token_ids": tuple(range(12)), "min_tokens": 5},
]


def random_requests(num_requests: int, seed: int, max_tokens: int = 24) -> list[Request]:
    """Prompts of 1 to 70 tokens, many with a common beginning, drawn from in every way."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB_SIZE - 20) for _ in range(64)] for _ in range(3)]
    requests = []
    for i in range(num_requests):
        length = rng.choice((1, 2, 15, 16, 17, 31, 32, 33, 48, 64, rng.randint(1, 64)))
        prompt = rng.choice(stems)[:length]
        prompt = prompt + [rng.randrange(VOCAB_SIZE - 20) for _ in range(rng.choice((0, 0, 1, 6)))]
        sampling = WAYS_TO_DRAW[i % len(WAYS_TO_DRAW)]
        requests.append(ask(i, prompt, max_tokens=rng.randint(5, max_tokens), **sampling))
    return requests


def assert_same(actual: Run, expected: Run, request_ids: Iterable[int] | None = None) -> None:
    """Bitwise, for the requests of `actual` or those named."""
    ids = set(actual.outputs if request_ids is None else request_ids)
    for request_id in ids:
        ours, theirs = actual.outputs[request_id], expected.outputs[request_id]
        assert isinstance(ours, Completion)
        assert isinstance(theirs, Completion)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.finish_reason == theirs.finish_reason
    # Seeds are request ids.
    ours_seen = {key: row for key, row in actual.logits.items() if key[0] in ids}
    theirs_seen = {key: row for key, row in expected.logits.items() if key[0] in ids}
    assert ours_seen.keys() == theirs_seen.keys()
    for key, row in ours_seen.items():
        assert torch.equal(row, theirs_seen[key]), f"other logits at (seed, position) {key}"


def alone(run: RunAll, path: Path, requests: Sequence[Request], **config: Any) -> Run:
    """Every request by itself in an engine of its own."""
    runs = [run(path, [request], **config) for request in requests]
    return Run(
        outputs={key: value for one in runs for key, value in one.outputs.items()},
        logits={key: value for one in runs for key, value in one.logits.items()},
        stats=EngineStats(),
    )


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(std=0.3, vocab_size=VOCAB_SIZE, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return random_requests(28, seed=1)


@pytest.fixture(scope="module")
def reference(run: RunAll, checkpoint: Path, requests: list[Request]) -> Run:
    """Each of `requests` alone, token by token, with nothing cached and nothing clever."""
    return alone(run, checkpoint, requests, max_window_steps=1, enable_prefix_caching=False)


def test_the_requests_of_these_tests_are_of_every_kind(reference: Run) -> None:
    completions = [o for o in reference.outputs.values() if isinstance(o, Completion)]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert len({tuple(c.token_ids.tolist()) for c in completions}) > 20
    assert max(len(set(c.token_ids.tolist())) for c in completions) > 12  # not one token for ever


# The same answers, however the engine gets there


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 1},
        {"max_num_seqs": 5},
        {"max_window_steps": 1},
        {"max_window_steps": 16},
        {"max_launches_in_flight": 2},
        {"max_launches_in_flight": 3, "max_num_seqs": 6, "max_window_steps": 2},
        {"max_num_batched_tokens": 17},
        {"max_num_batched_tokens": 1, "max_num_seqs": 3},
        {"max_num_batched_tokens": 17, "max_launches_in_flight": 1, "max_num_seqs": 4},
        {"hash_bits": 1},
        {"num_threads": 2},
        {"num_threads": 3, "max_num_batched_tokens": 100},
        {"kv_cache_bytes": 9 * BLOCK_BYTES, "max_num_seqs": 8},
        {"kv_cache_bytes": 9 * BLOCK_BYTES, "max_launches_in_flight": 2},
        {"max_model_len": 100},
    ],
    ids=str,
)
def test_a_request_is_answered_in_a_batch_as_it_is_alone(
    config: dict[str, Any], run: RunAll, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    assert_same(run(checkpoint, requests, **config), reference)


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_50_random_batches_answer_as_each_request_does_alone(
    first: int, run: RunAll, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        config = {
            "max_num_seqs": rng.choice((2, 3, 8, 64)),
            "max_num_batched_tokens": rng.choice((5, 17, 40, 128, 8192)),
            "max_window_steps": rng.choice((1, 2, 4, 7, 16)),
            "max_launches_in_flight": rng.randint(0, 3),
            "enable_prefix_caching": rng.random() < 0.8,
            "hash_bits": rng.choice((4, 64)),
            "num_threads": rng.choice((1, 1, 2)),
            "kv_cache_bytes": rng.choice((8, 12, 200)) * BLOCK_BYTES,
        }
        chosen = rng.sample(requests, rng.randint(2, 16))
        assert_same(run(checkpoint, chosen, **config), reference)


def test_the_order_of_the_requests_changes_nothing(
    run: RunAll, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    for order in (requests[::-1], requests[14:] + requests[:14]):
        assert_same(run(checkpoint, order, max_num_seqs=6), reference)


def test_what_an_engine_has_run_before_changes_nothing(
    run_engine: RunEngine, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    engine = Engine.from_checkpoint(
        checkpoint,
        EngineConfig(block_size=16, max_num_seqs=5, kv_cache_bytes=20 * BLOCK_BYTES),
    )
    for order in (requests, requests[::-1], requests):
        outputs = run_engine(engine, order)
        assert outputs.keys() == reference.outputs.keys()
        for request_id, output in outputs.items():
            assert isinstance(output, Completion)
            assert output.token_ids.tolist() == reference.tokens(request_id)
    assert engine.stats.num_cached_tokens > 0


def test_a_preempted_request_is_answered_as_if_it_never_was(run: RunAll, checkpoint: Path) -> None:
    requests = [ask(i, range(i, i + 10 + i), max_tokens=45) for i in range(6)]
    expected = alone(run, checkpoint, requests)
    for config in ({}, {"enable_prefix_caching": False}, {"max_launches_in_flight": 2}):
        crowded = run(
            checkpoint, requests, kv_cache_bytes=10 * BLOCK_BYTES, max_num_seqs=6, **config
        )
        assert crowded.stats.num_preemptions > 0
        assert_same(crowded, expected)


def test_what_is_cached_is_counted_and_changes_nothing(run: RunAll, checkpoint: Path) -> None:
    stem = list(range(40))
    requests = [ask(i, [*stem, 100 + i, 7, i], max_tokens=6) for i in range(5)]
    requests += [ask(5, stem[:32], max_tokens=6), ask(6, stem[:32], max_tokens=6, temperature=0.0)]
    on = run(checkpoint, requests)
    off = run(checkpoint, requests, enable_prefix_caching=False)
    assert_same(on, off)
    assert (off.stats.num_cached_tokens, on.stats.num_cached_tokens) == (0, 4 * 32 + 2 * 16)
    assert on.stats.num_prompt_tokens == off.stats.num_prompt_tokens == 5 * 43 + 2 * 32
    cached = [o.num_cached_tokens for o in on.outputs.values() if isinstance(o, Completion)]
    assert sorted(cached) == [0, 16, 16, 32, 32, 32, 32]


@pytest.mark.parametrize("block_size", [32, 64])
def test_other_block_sizes_are_answered_in_a_batch_as_they_are_alone(
    block_size: int, run: RunAll, checkpoint: Path, requests: list[Request]
) -> None:
    # The block size is part of the arithmetic: its last bits are others than those of 16.
    some = requests[:9]
    expected = alone(run, checkpoint, some, block_size=block_size, max_window_steps=1)
    assert_same(run(checkpoint, some, block_size=block_size), expected)
    config = {"max_num_batched_tokens": 17, "kv_cache_bytes": 20 * BLOCK_BYTES}
    assert_same(run(checkpoint, some, block_size=block_size, **config), expected)


def test_decode_steps_shared_out_among_threads_have_the_same_bits(
    run: RunAll, checkpoint: Path
) -> None:
    requests = [ask(i, [i, 5, 2 * i], max_tokens=8) for i in range(50)]
    one = run(checkpoint, requests, num_threads=1)
    for num_threads in (2, 3):
        assert_same(run(checkpoint, requests, num_threads=num_threads), one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_answered_in_a_batch_as_it_is_alone(
    dtype: str, run: RunAll, checkpoint: Path, requests: list[Request]
) -> None:
    some = [replace(r, sampling=replace(r.sampling, max_tokens=8)) for r in requests[::3]]
    some = [r for r in some if r.sampling.min_tokens <= 8]
    expected = alone(run, checkpoint, some, dtype=dtype)
    assert next(iter(expected.logits.values())).dtype == getattr(torch, dtype)
    assert_same(run(checkpoint, some, dtype=dtype), expected)
    config = {"max_num_batched_tokens": 17, "max_launches_in_flight": 1, "max_window_steps": 2}
    assert_same(run(checkpoint, some, dtype=dtype, **config), expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 2), (4, 1), (5, 1), (8, 1)], ids=["1:1", "4:1", "5:1", "8:1"]
)
def test_other_groupings_of_heads_are_answered_in_a_batch_as_they_are_alone(
    heads: int, kv_heads: int, run: RunAll, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(std=0.3, num_attention_heads=heads, num_key_value_heads=kv_heads)
    some = random_requests(7, seed=2, max_tokens=9)
    expected = alone(run, path, some, max_window_steps=1)
    assert_same(run(path, some, max_num_batched_tokens=21, max_launches_in_flight=1), expected)
    assert_same(run(path, some), expected)


# Where a completion ends


def greedy(run: RunAll, path: Path, **sampling: Any) -> Completion:
    output = run(path, [ask(0, [57, 23, 82, 155, 58, 142], temperature=0.0, **sampling)]).outputs[0]
    assert isinstance(output, Completion)
    return output


def with_eos(path: Path, copy: Path, eos: int | list[int]) -> Path:
    shutil.copytree(path, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return copy


@pytest.fixture(scope="module")
def free_run(run: RunAll, checkpoint: Path) -> list[int]:
    """30 greedy tokens with nothing to stop at; some of them come once only."""
    tokens = greedy(run, checkpoint, max_tokens=30).token_ids.tolist()
    assert len(set(tokens)) > 20
    return tokens


def test_a_completion_ends_at_max_tokens(
    run: RunAll, checkpoint: Path, free_run: list[int]
) -> None:
    for max_tokens in (1, 2, 5, 16):
        completion = greedy(run, checkpoint, max_tokens=max_tokens)
        assert completion.token_ids.tolist() == free_run[:max_tokens]
        assert completion.finish_reason == "length"
        assert (completion.num_prompt_tokens, completion.num_cached_tokens) == (6, 0)


def test_a_completion_ends_with_the_first_of_its_stop_tokens(
    run: RunAll, checkpoint: Path, free_run: list[int]
) -> None:
    for stops in ((free_run[0],), (free_run[6],), (free_run[9], free_run[4], 159)):
        end = min(free_run.index(token) for token in stops if token in free_run) + 1
        completion = greedy(run, checkpoint, max_tokens=30, stop_token_ids=stops)
        assert completion.token_ids.tolist() == free_run[:end]
        assert completion.finish_reason == "stop"


def test_a_completion_ends_with_either_of_the_checkpoints_two_eos_tokens(
    run: RunAll, checkpoint: Path, free_run: list[int], tmp_path: Path
) -> None:
    tokens = sorted(set(free_run), key=free_run.index)
    early, late = tokens[2], tokens[5]
    for name, eos, first in (
        ("both", [late, early], early),
        ("swapped", [early, late], early),
        ("late", [late], late),
        ("one", late, late),
    ):
        completion = greedy(run, with_eos(checkpoint, tmp_path / name, eos), max_tokens=30)
        assert completion.token_ids.tolist() == free_run[: free_run.index(first) + 1]
        assert completion.finish_reason == "stop"


def test_ignore_eos_ignores_eos_and_not_the_requests_own_stop_tokens(
    run: RunAll, checkpoint: Path, free_run: list[int], tmp_path: Path
) -> None:
    tokens = sorted(set(free_run), key=free_run.index)
    path = with_eos(checkpoint, tmp_path / "eos", [tokens[1], tokens[2]])
    assert greedy(run, path, max_tokens=30, ignore_eos=True).token_ids.tolist() == free_run
    stopped = greedy(run, path, max_tokens=30, ignore_eos=True, stop_token_ids=(tokens[4],))
    assert stopped.token_ids.tolist() == free_run[: free_run.index(tokens[4]) + 1]


def test_no_stop_token_comes_before_min_tokens_and_one_may_come_right_after(
    run: RunAll, checkpoint: Path, free_run: list[int]
) -> None:
    late = sorted(set(free_run), key=free_run.index)[12]
    index = free_run.index(late)
    sampling = {"max_tokens": 30, "stop_token_ids": (late,)}
    allowed = greedy(run, checkpoint, min_tokens=index, **sampling)
    assert allowed.token_ids.tolist() == free_run[: index + 1]
    assert allowed.finish_reason == "stop"
    forbidden = greedy(run, checkpoint, min_tokens=index + 1, **sampling).token_ids.tolist()
    assert forbidden[:index] == free_run[:index]
    assert late not in forbidden[: index + 1]
    assert len(forbidden) > index + 1


def test_stop_tokens_outside_the_vocabulary_harm_nobody(run: RunAll, checkpoint: Path) -> None:
    requests = [
        ask(0, [1, 2, 3], max_tokens=4, min_tokens=2, stop_token_ids=(VOCAB_SIZE + 5,)),
        ask(1, [1, 2, 3], max_tokens=4, min_tokens=2, stop_token_ids=(2**31 - 1, 5)),
        ask(2, [4, 5, 6], max_tokens=4),
    ]
    together = run(checkpoint, requests)
    assert_same(together, run(checkpoint, requests[2:]), request_ids=[2])
    assert together.outputs.keys() == {0, 1, 2}


def test_a_completion_ends_at_max_model_len(run: RunAll, checkpoint: Path) -> None:
    for config in ({"max_model_len": 37}, {"max_model_len": 16}):
        completion = run(checkpoint, [ask(0, [1] * 7)], **config).outputs[0]
        assert isinstance(completion, Completion)
        assert 7 + len(completion.token_ids) == config["max_model_len"]
        assert completion.finish_reason == "length"


def test_a_full_length_sequence_uses_the_last_position_of_the_model(
    run: RunAll, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(std=0.3, max_position_embeddings=50)
    completion = run(path, [ask(0, [1] * 49)]).outputs[0]
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 1
    completion = run(path, [ask(0, [1] * 3)]).outputs[0]
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 47


# Seeds


def test_the_same_seed_draws_the_same_and_another_another(run: RunAll, checkpoint: Path) -> None:
    def drawn(seed: int) -> list[int]:
        return run(checkpoint, [ask(0, [1, 2, 3], seed=seed, max_tokens=12)]).tokens(0)

    seeds = (0, 1, 2, 2**32, 2**63, 2**64 - 1)
    assert len({tuple(drawn(seed)) for seed in seeds}) == len(seeds)
    assert drawn(2**63) == drawn(2**63)


def test_equal_prompts_with_equal_seeds_are_answered_alike(
    run_engine: RunEngine, checkpoint: Path
) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(block_size=16))
    outputs = run_engine(engine, [ask(i, [9] * 20, seed=5, max_tokens=9) for i in range(4)])
    tokens = {tuple(o.token_ids.tolist()) for o in outputs.values() if isinstance(o, Completion)}
    assert (len(outputs), len(tokens)) == (4, 1)


def test_greedy_takes_no_notice_of_the_seed(run: RunAll, checkpoint: Path) -> None:
    requests = [ask(i, [9] * 20, temperature=0.0, max_tokens=9) for i in range(4)]
    together = run(checkpoint, requests)
    assert len({tuple(together.tokens(i)) for i in range(4)}) == 1


# Coming and going


def test_an_aborted_request_leaves_the_others_as_they_were(
    run_engine: RunEngine, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    for max_launches_in_flight in (0, 2):
        engine = Engine.from_checkpoint(
            checkpoint,
            EngineConfig(
                block_size=16, max_num_seqs=4, max_launches_in_flight=max_launches_in_flight
            ),
        )
        for request in requests[:10]:
            assert engine.add(request) is None
        outputs = engine.step() + engine.step()
        assert engine.num_running == 4
        for request_id in (0, 2, 8):  # two that run, one that waits
            engine.abort(request_id)
        engine.abort(0)
        ended = run_engine(engine, requests[10:14])
        ended.update({o.request_id: o for o in outputs if isinstance(o, Completion)})
        assert ended.keys() == set(range(14)) - {0, 2, 8}
        for request_id, output in ended.items():
            assert isinstance(output, Completion)
            assert output.token_ids.tolist() == reference.tokens(request_id)
        assert (engine.num_running, engine.num_waiting, engine.has_work) == (0, 0, False)


def test_requests_may_come_while_others_run(
    checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(block_size=16, max_num_seqs=6))
    coming = list(requests)
    ended: dict[int, Completion] = {}
    while coming or engine.has_work:
        if coming:
            assert engine.add(coming.pop()) is None
        ended.update({o.request_id: o for o in engine.step() if isinstance(o, Completion)})
    assert {i: c.token_ids.tolist() for i, c in ended.items()} == {
        r.request_id: reference.tokens(r.request_id) for r in requests
    }


def test_new_tokens_and_the_completion_tell_the_same_story(checkpoint: Path) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(block_size=16))
    engine.add(replace(ask(0, [1, 2, 3], max_tokens=20), reports_tokens=True))
    engine.add(ask(1, [1, 2, 3], max_tokens=20))
    reported: list[int] = []
    completions = {}
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, NewTokens):
                assert output.request_id == 0
                reported += output.token_ids.tolist()
            else:
                assert isinstance(output, Completion)
                completions[output.request_id] = output.token_ids.tolist()
    assert 0 < len(reported) < 20
    assert completions[0][: len(reported)] == reported


def test_an_engine_without_work_makes_no_launch(checkpoint: Path) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(block_size=16))
    assert engine.step() == []
    assert engine.stats.num_prefill_launches == 0


def test_the_stats_count_what_was_done(run: RunAll, checkpoint: Path) -> None:
    requests = [ask(i, [i] * 20, max_tokens=5) for i in range(3)]
    stats = run(checkpoint, requests).stats
    assert stats.num_prompt_tokens == 60
    assert stats.num_completion_tokens == 15
    assert stats.num_prefill_launches == 1
    assert (stats.num_decode_steps, stats.num_decode_slots) == (4, 12)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


# Rows that fail alone


def test_a_request_that_can_never_run_is_a_failure_and_the_others_run(
    run: RunAll, checkpoint: Path, requests: list[Request], reference: Run
) -> None:
    bad = [
        ask(100, []),
        ask(101, [VOCAB_SIZE]),
        ask(102, [0, -1]),
        ask(103, [0] * 5000),
        ask(104, [0], stop_token_ids=tuple(range(17))),
    ]
    together = run(checkpoint, [bad[0], *requests[:3], *bad[1:], *requests[3:6]])
    codes = [output.code for output in together.outputs.values() if isinstance(output, Failure)]
    assert codes == ["bad_token_ids"] * 3 + ["prompt_too_long", "bad_parameters"]
    assert_same(together, reference, request_ids=range(6))


@pytest.fixture(scope="module")
def poisoned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with NaN for BAD_TOKEN's embedding. (Its lm_head is another matrix.)"""
    path = tmp_path_factory.mktemp("poisoned") / "checkpoint"
    shutil.copytree(checkpoint, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD_TOKEN] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 17},
        {"max_launches_in_flight": 2, "max_window_steps": 16},
        {"max_num_seqs": 3, "kv_cache_bytes": 8 * BLOCK_BYTES},
        {"num_threads": 2},
    ],
    ids=str,
)
def test_nan_fails_the_rows_that_touch_it_and_no_other(
    config: dict[str, Any],
    run: RunAll,
    checkpoint: Path,
    poisoned: Path,
    requests: list[Request],
    reference: Run,
) -> None:
    rng = random.Random(0)
    mixed: list[Request] = []
    bad_ids = []
    for request in requests:
        mixed.append(request)
        if request.request_id % 2:
            prompt = list(request.prompt_token_ids)
            prompt.insert(rng.randint(0, len(prompt)), BAD_TOKEN)
            bad_ids.append(100 + request.request_id)
            sampling = replace(request.sampling, seed=bad_ids[-1])
            mixed.append(
                Request(request_id=bad_ids[-1], prompt_token_ids=prompt, sampling=sampling)
            )
    together = run(poisoned, mixed, **config)
    failures = {i: o.code for i, o in together.outputs.items() if isinstance(o, Failure)}
    # A token drawn that is the bad one fails its row too, later.
    touched = {i for i in range(28) if BAD_TOKEN in reference.tokens(i)[:-1]}
    assert failures == dict.fromkeys({*bad_ids, *touched}, "nan_logits")
    assert_same(together, reference, request_ids=set(range(28)) - touched)


def test_a_launch_of_nothing_but_nan_fails_its_rows_and_the_engine_runs_on(
    run_engine: RunEngine, poisoned: Path, reference: Run, requests: list[Request]
) -> None:
    engine = Engine.from_checkpoint(poisoned, EngineConfig(block_size=16))
    for i, sampling in enumerate(WAYS_TO_DRAW):
        outputs = run_engine(engine, [ask(i, [1, BAD_TOKEN], max_tokens=9, **sampling)])
        assert isinstance(outputs[i], Failure)
    outputs = run_engine(engine, [requests[1]])
    completion = outputs[1]
    assert isinstance(completion, Completion)
    assert completion.token_ids.tolist() == reference.tokens(1)


def test_who_reuses_the_blocks_of_a_row_of_nan_does_not_notice(
    run: RunAll, poisoned: Path, requests: list[Request], reference: Run
) -> None:
    # Six blocks: the bad rows fill all of them with NaN, again and again.
    bad = [ask(100 + i, [i] * (90 - i) + [BAD_TOKEN], max_tokens=3) for i in range(4)]
    untouched = [r for r in requests if BAD_TOKEN not in reference.tokens(r.request_id)][:4]
    mixed = [request for pair in zip(bad, untouched, strict=True) for request in pair]
    together = run(poisoned, mixed, kv_cache_bytes=7 * BLOCK_BYTES, max_num_seqs=1)
    assert all(isinstance(together.outputs[request.request_id], Failure) for request in bad)
    assert_same(together, reference, request_ids=[r.request_id for r in untouched])


@pytest.mark.parametrize("max_num_batched_tokens", [13, 14, 15, 8192])
def test_who_shares_the_blocks_before_a_row_of_nan_does_not_notice(
    max_num_batched_tokens: int, run: RunAll, poisoned: Path
) -> None:
    stem = list(range(20, 36))  # one block
    requests = [ask(0, [*stem, 1, BAD_TOKEN, 2], max_tokens=3), ask(1, [*stem, 3], max_tokens=3)]
    together = run(poisoned, requests, max_num_batched_tokens=max_num_batched_tokens)
    assert isinstance(together.outputs[0], Failure)
    assert_same(together, run(poisoned, requests[1:]), request_ids=[1])


# Memory and limits


def test_a_cache_smaller_than_two_blocks_is_refused_with_the_bytes_it_needs(
    checkpoint: Path,
) -> None:
    config = EngineConfig(block_size=16, kv_cache_bytes=2 * BLOCK_BYTES - 1)
    with pytest.raises(MemoryTooSmall, match=str(2 * BLOCK_BYTES)) as caught:
        Engine.from_checkpoint(checkpoint, config)
    assert caught.value.hint is not None


def test_a_small_cache_shortens_what_can_be_asked_for(run: RunAll, checkpoint: Path) -> None:
    requests = [ask(0, [1] * 31, max_tokens=9), ask(1, [1] * 32), ask(2, [2] * 3, max_tokens=2)]
    outputs = run(checkpoint, requests, kv_cache_bytes=3 * BLOCK_BYTES).outputs
    completion, failure = outputs[0], outputs[1]
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 1
    assert isinstance(failure, Failure)
    assert failure.code == "prompt_too_long"
    assert isinstance(outputs[2], Completion)


def test_the_cache_is_no_larger_than_the_running_sequences_can_fill(checkpoint: Path) -> None:
    config = EngineConfig(block_size=16, max_model_len=40, max_num_seqs=3, kv_cache_bytes=1 << 30)
    engine = Engine.from_checkpoint(checkpoint, config)
    assert engine.num_blocks == 3 * 3 + 1
    assert engine.max_model_len == 40


def test_the_default_cache_holds_a_whole_sequence(checkpoint: Path) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(max_num_seqs=1))
    assert engine.max_model_len == 512
    assert engine.num_blocks == 512 // 64 + 1


def test_a_longer_max_model_len_than_the_models_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"513.*512"):
        Engine.from_checkpoint(checkpoint, EngineConfig(max_model_len=513))


# Threads


def test_an_error_in_one_thread_comes_out_and_leaves_no_other_waiting() -> None:
    threads = CpuThreads(3)
    barrier = threading.Barrier(3)

    def work(part: int) -> int:
        if part == 1:
            raise ZeroDivisionError("one of three")
        barrier.wait(timeout=60)
        return part

    with pytest.raises(ZeroDivisionError, match="one of three"):
        threads.map(work, [0, 1, 2], barrier)
    assert threads.map(lambda part: part * 2, [1, 2, 3]) == [2, 4, 6]
