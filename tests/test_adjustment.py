"""Penalties, bias, bad words and thinking budgets: transformers' numbers, whatever runs beside."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from nanovllm_cli.core.adjustment_table import AdjustmentTable
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Failure
from nanovllm_cli.core.row_needs import adjustment_of
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.slot_table import SlotTable

from .gpu_tests import answers, ask, model_config, tiny_engine
from .row_tests import (
    VOCAB_SIZE,
    WAYS_TO_ADJUST,
    adjusted_reference,
    adjusted_requests,
    assert_equal_completions,
)

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
BLOCK_BYTES = model_config().kv_bytes_per_token(4) * 16  # of tiny_engine


@pytest.mark.parametrize("way", WAYS_TO_ADJUST, ids=str)
def test_adjusted_logits_are_those_of_transformers_processors(way: dict[str, Any]) -> None:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    num_slots = 6
    slot_table = SlotTable(num_slots, 4, CPU)
    slot_table.is_finished[:] = False
    table = AdjustmentTable(slot_table, VOCAB_SIZE)
    sequences = {}
    for slot in (4, 0, 5, 2):
        request = ask(slot, [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))], **way)
        sequence = Sequence(request, 200, ())
        known = rng.choice((0, 0, 3, 20))  # of one that was preempted, and comes back
        sequence.append(np.array(rng.choices(range(VOCAB_SIZE), k=known), dtype=np.int32))
        sequences[slot] = sequence
        slot_table.length[slot] = sequence.num_tokens
    adjustments = {slot: adjustment_of(sequence) for slot, sequence in sequences.items()}
    table.admit({slot: a for slot, a in adjustments.items() if a is not None})
    slots = torch.tensor(list(sequences))
    rows = torch.tensor([3, 0, 2, 1])
    for _ in range(20):
        raw = torch.randn(4, VOCAB_SIZE, generator=generator) * 3
        adjusted = raw.clone()
        table.adjust(adjusted, rows, slots[rows])
        # Few different tokens: words come about, and counts grow.
        drawn = torch.tensor([rng.choice((3, 7, 8, 9, 40, 41, 99)) for _ in range(4)])
        table.record(rows, slots[rows], drawn)
        for row, sequence in enumerate(sequences.values()):
            prompt = sequence.token_ids[: sequence.num_prompt_tokens].tolist()
            completion = sequence.completion_token_ids.tolist()
            expected = adjusted_reference(raw[row], prompt, completion, sequence.request.sampling)
            assert torch.equal(adjusted[row].isinf(), expected.isinf())
            finite = expected.isfinite()
            assert (adjusted[row][finite] - expected[finite]).abs().max() < 1e-4
            sequence.append(drawn[row : row + 1].int().numpy())
        slot_table.length[slots] += 1


def test_greedy_completions_are_those_of_a_loop_over_transformers(
    make_checkpoint: MakeCheckpoint,
) -> None:
    path = make_checkpoint(vocab_size=VOCAB_SIZE, std=0.3)
    engine = Engine.from_checkpoint(path, EngineConfig(block_size=16, num_threads=1))
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    requests = [
        ask(i, request.prompt_token_ids, **{**way, "temperature": 0.0, "max_tokens": 16})
        for i, (request, way) in enumerate(
            zip(adjusted_requests(22), [*WAYS_TO_ADJUST, *WAYS_TO_ADJUST], strict=True)
        )
    ]
    got = answers(engine, requests)
    num_changed = 0
    for request in requests:
        prompt, completion = list(request.prompt_token_ids), []
        for _ in range(16):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + completion])).logits[0, -1]
            adjusted = adjusted_reference(logits, prompt, completion, request.sampling)
            completion.append(int(adjusted.argmax()))
            num_changed += completion[-1] != int(logits.argmax())
        assert got[request.request_id].token_ids.tolist() == completion, request.sampling
    assert num_changed > 50, "the settings change next to nothing"


def alone(requests: list[Any], **config: Any) -> dict[int, Completion]:
    engine = tiny_engine(max_num_seqs=1, enable_prefix_caching=False, **config)
    return {key: c for r in requests for key, c in answers(engine, [r]).items()}


@pytest.fixture(scope="module")
def expected() -> dict[int, Completion]:
    return alone(adjusted_requests(), max_window_steps=24)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_window_steps": 1},
        {"max_num_seqs": 4, "max_num_batched_tokens": 17},
        {"max_num_seqs": 8, "kv_cache_bytes": 10 * BLOCK_BYTES},
        {"max_launches_in_flight": 2, "max_window_steps": 5},
    ],
    ids=str,
)
def test_a_row_that_adjusts_is_answered_as_it_is_alone(
    settings: dict[str, Any], expected: dict[int, Completion]
) -> None:
    engine = tiny_engine(**{"max_num_seqs": 16, **settings})
    assert_equal_completions(answers(engine, adjusted_requests()), expected)
    if "kv_cache_bytes" in settings:
        assert engine.stats.num_preemptions > 0


def test_a_slot_keeps_nothing_of_the_row_before() -> None:
    requests = adjusted_requests(12)
    engine = tiny_engine(max_num_seqs=2)
    once = answers(engine, requests)
    assert_equal_completions(answers(engine, requests[::-1]), once)


def test_rows_that_ask_for_nothing_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("there is nothing to adjust")

    monkeypatch.setattr("nanovllm_cli.core.token_choice.AdjustmentTable", refuse)
    monkeypatch.setattr("nanovllm_cli.core.token_choice.TokenChoice.choose", refuse)
    plain = [r for r in adjusted_requests(9) if not r.sampling.adjusts_logits]
    assert len(answers(tiny_engine(), plain)) == 3


def test_a_forced_end_of_thinking_comes_once_and_the_rest_is_free() -> None:
    settings: dict[str, Any] = {"thinking_budget": 3, "end_think_token_id": 99, "max_tokens": 12}
    [completion] = answers(tiny_engine(), [ask(0, [1, 2, 3], **settings)]).values()
    tokens = completion.token_ids.tolist()
    assert tokens[3] == 99
    assert 99 not in tokens[:3]
    assert len(set(tokens[4:])) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": ((VOCAB_SIZE, 1.0),)},
        {"bad_words": ((1, -1),)},
        {"thinking_budget": 1, "end_think_token_id": VOCAB_SIZE},
    ],
    ids=str,
)
def test_a_setting_that_names_no_token_is_that_rows_failure(wrong: dict[str, Any]) -> None:
    failure = tiny_engine().add(ask(0, [1, 2], **wrong))
    assert isinstance(failure, Failure)
    assert failure.code == "bad_parameters"
    assert "vocabulary of 160" in failure.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((i, 0.0) for i in range(301))},
        {"bad_words": ((),)},
        {"bad_words": (tuple(range(17)),)},
        {"bad_words": ((1,),) * 65},
        {"thinking_budget": 3},
        {"thinking_budget": -1, "end_think_token_id": 1},
    ],
    ids=lambda wrong: f"{next(iter(wrong))}",
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))[:8] + "|bad word|end_think"):
        SamplingParams(**wrong)
