"""Runners driven directly: decode steps in two halves, masks, and slots that are admitted again."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nanovllm_cli.core.batch import (
    DRAWN_LAST,
    Admission,
    BatchResult,
    BlockTableUpdate,
    DecodeBatch,
    ForcedTokens,
    ForwardBatch,
    Int32,
    PrefillBatch,
    RowNeeds,
    SampleBatch,
    TokenMasks,
)
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import make_runner
from nanovllm_cli.core.runner import Runner

from .gpu_tests import model_config, random_model

ON_CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB_SIZE = 160
BLOCKS_PER_SLOT = 4
BLOCK_SIZE = 16
PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], [11, 12, 13, 14]]


def ints(values: Sequence[int]) -> Int32:
    return np.array(values, dtype=np.int32)


NOTHING = BlockTableUpdate(slots=ints([]), indices=ints([]), block_ids=ints([]))


def make(device: str) -> Runner:
    config = EngineConfig(
        device=device,  # type: ignore[arg-type]
        dtype="float32",
        block_size=BLOCK_SIZE,
        max_model_len=BLOCKS_PER_SLOT * BLOCK_SIZE,
        max_num_seqs=5,
        max_window_steps=9,
        kv_cache_bytes=1 << 24,
        num_threads=1,
    )
    return make_runner(random_model(model_config(), config, std=0.08), config)


def admit(slot: int, **changes: Any) -> Admission:
    defaults: dict[str, Any] = {
        "slot": slot, "seed": slot, "temperature": 1.0, "top_k": VOCAB_SIZE, "top_p": 1.0,
        "min_p": 0.0, "min_length": 0, "max_length": 60, "stop_token_ids": (),
    }  # fmt: skip
    return Admission(**{**defaults, **changes})


def run(runner: Runner, batch: PrefillBatch | DecodeBatch | SampleBatch) -> BatchResult:
    launch = runner.launch(batch)
    assert launch is not None
    return launch.result()


def prefill(runner: Runner, prompts: Sequence[Sequence[int]], **more: Any) -> list[int]:
    """Prompt i in slot i, with blocks for all its tokens: the first token of each."""
    slots = range(len(prompts))
    batch = PrefillBatch(
        admissions=more.pop("admissions", tuple(admit(slot) for slot in slots)),
        block_table_update=BlockTableUpdate(
            slots=ints([slot for slot in slots for _ in range(BLOCKS_PER_SLOT)]),
            indices=ints(list(range(BLOCKS_PER_SLOT)) * len(prompts)),
            block_ids=ints(list(range(1, 1 + BLOCKS_PER_SLOT * len(prompts)))),
        ),
        slots=ints(list(slots)),
        token_ids=ints([token for prompt in prompts for token in prompt]),
        start_positions=ints([0] * len(prompts)),
        query_lens=ints([len(prompt) for prompt in prompts]),
        is_last_chunk=np.ones(len(prompts), dtype=np.bool_),
        **more,
    )
    tokens: list[int] = run(runner, batch).token_ids[:, 0].tolist()
    return tokens


def window(runner: Runner, slots: Sequence[int], num_steps: int) -> BatchResult:
    return run(
        runner,
        DecodeBatch(block_table_update=NOTHING, slots=ints(slots), num_steps=num_steps),
    )


def step(
    runner: Runner,
    slots: Sequence[int],
    needs: RowNeeds | None = None,
    forced: ForcedTokens | None = None,
) -> BatchResult:
    """Both halves of a decode step."""
    forward = ForwardBatch(block_table_update=NOTHING, slots=ints(slots), forced=forced)
    assert runner.launch(forward) is None, "nothing comes back of it"
    return run(runner, SampleBatch(slots=ints(slots), needs=needs))


def force(tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> ForcedTokens:
    """Each slot's tokens, from a position on."""
    return ForcedTokens(
        token_ids=ints([token for part in tokens for token in part]),
        start_positions=ints(starts),
        query_lens=ints([len(part) for part in tokens]),
    )


def masks(allowed: dict[int, Sequence[int]]) -> TokenMasks:
    """Of some rows, the tokens that they may draw."""
    words = np.zeros((len(allowed), VOCAB_SIZE // 32), dtype=np.uint32)
    for row, tokens in zip(words, allowed.values(), strict=True):
        for token in tokens:
            row[token // 32] |= np.uint32(1 << token % 32)
    return TokenMasks(rows=ints(list(allowed)), words=words.view(np.int32))


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_two_halves_are_a_step(device: str) -> None:
    runner = make(device)
    first = prefill(runner, PROMPTS)
    whole = window(runner, [2, 0, 3], 5).token_ids
    assert prefill(runner, PROMPTS) == first
    halves = [step(runner, [2, 0, 3]) for _ in range(5)]
    assert np.hstack([half.token_ids for half in halves]).tolist() == whole.tolist()
    assert all(half.num_tokens.tolist() == [1, 1, 1] for half in halves)


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_half_steps_and_windows_may_alternate(device: str) -> None:
    runner = make(device)
    prefill(runner, PROMPTS)
    expected = {slot: window(runner, [slot], 9).token_ids[0].tolist() for slot in range(4)}
    prefill(runner, PROMPTS)
    actual: dict[int, list[int]] = {slot: [] for slot in range(4)}

    def take(slots: Sequence[int], result: BatchResult) -> None:
        for slot, tokens in zip(slots, result.token_ids.tolist(), strict=True):
            actual[slot] += tokens

    for _ in range(3):
        take([0, 1], step(runner, [0, 1]))
        take([3, 0, 2], window(runner, [3, 0, 2], 2))
        take([1], window(runner, [1], 2))
        take([3, 2], step(runner, [3, 2]))
    assert actual == expected


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_a_masked_row_draws_what_is_allowed_and_the_others_what_they_would(device: str) -> None:
    runner = make(device)
    assert prefill(runner, PROMPTS, needs=RowNeeds(masks=masks({1: [31, 32]})))[1] in (31, 32)
    first = prefill(runner, PROMPTS)
    free = window(runner, [0, 1, 2], 1).token_ids.tolist()
    assert prefill(runner, PROMPTS) == first
    taken = step(runner, [0, 1, 2], RowNeeds(masks=masks({0: [63], 2: [0, 159]})))
    assert taken.token_ids[0, 0] == 63
    assert taken.token_ids[1].tolist() == free[1]
    assert taken.token_ids[2, 0] in (0, 159)
    nothing = step(runner, [0, 1, 2], RowNeeds(masks=masks({1: []})))
    assert nothing.is_nan.tolist() == [False, True, False], "no token may be drawn"


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_a_finished_slot_gives_no_token_of_either_half_until_tokens_are_forced(
    device: str,
) -> None:
    runner = make(device)
    [first] = prefill(runner, PROMPTS[:1])
    [rest] = window(runner, [0], 4).token_ids.tolist()
    assert first not in rest[:-1], "the test needs tokens that differ"
    stops = (admit(0, stop_token_ids=(first,)),)
    prefill(runner, PROMPTS[:1], admissions=stops)
    over = step(runner, [0])
    assert over.num_tokens.tolist() == [0]
    assert step(runner, [0], forced=force([[DRAWN_LAST]], [len(PROMPTS[0])])).num_tokens == [0]
    again = step(runner, [0], forced=force([[first]], [len(PROMPTS[0])]))
    assert again.token_ids.tolist() == [rest[:1]]
    assert window(runner, [0], 3).token_ids.tolist() == [rest[1:]]


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_forced_tokens_are_as_if_they_had_been_drawn_whatever_was_drawn_before(
    device: str,
) -> None:
    runner = make(device)
    first = prefill(runner, PROMPTS)
    put = {0: [33, 44, 55], 2: [66]}
    longer = [[*prompt, *put.get(slot, [])] for slot, prompt in enumerate(PROMPTS)]
    for slot in (1, 3):  # they go on with what they have drawn
        longer[slot].append(first[slot])
    expected = prefill(runner, longer)
    expected = [
        [token, *rest]
        for token, rest in zip(
            expected, window(runner, range(4), 3).token_ids.tolist(), strict=True
        )
    ]
    assert prefill(runner, PROMPTS) == first
    starts = [len(prompt) for prompt in PROMPTS]
    tokens = [put.get(slot, [DRAWN_LAST]) for slot in range(4)]
    order = [2, 0, 3, 1]
    taken = step(
        runner, order, forced=force([tokens[i] for i in order], [starts[i] for i in order])
    )
    drawn = dict(zip(order, taken.token_ids[:, 0].tolist(), strict=True))
    assert taken.num_tokens.tolist() == [1] * 4
    rest = window(runner, range(4), 3).token_ids.tolist()
    assert [[drawn[slot], *rest[slot]] for slot in range(4)] == expected


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_tokens_put_after_a_running_slots_own_are_as_if_it_had_drawn_them(device: str) -> None:
    runner = make(device)
    first = prefill(runner, PROMPTS)
    put = [33, 44, 55]
    onto = PrefillBatch(
        admissions=(),
        block_table_update=NOTHING,
        slots=ints([1]),
        token_ids=ints([first[1], *put]),  # the last token's K and V are not there yet
        start_positions=ints([len(PROMPTS[1])]),
        query_lens=ints([1 + len(put)]),
        is_last_chunk=np.ones(1, dtype=np.bool_),
    )
    tokens = run(runner, onto).token_ids[0].tolist()
    tokens += window(runner, [1], 4).token_ids[0].tolist()
    longer = [*PROMPTS[:1], [*PROMPTS[1], first[1], *put]]
    expected = [prefill(runner, longer)[1], *window(runner, [1], 4).token_ids[0].tolist()]
    assert tokens == expected


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_half_a_step_gives_the_log_probabilities_of_its_rows(device: str) -> None:
    runner = make(device)
    prefill(runner, PROMPTS)
    needs = RowNeeds(logprob_rows=ints([0, 2]), num_logprobs=3)
    result = step(runner, [3, 1, 0], needs)
    asked = result.logprobs
    assert asked is not None
    assert asked.rows.tolist() == [0, 2]
    assert asked.values.shape == (2, 1)
    assert asked.top_ids.shape == asked.top_values.shape == (2, 1, 3)
    assert (np.diff(asked.top_values) <= 0).all()
    assert (asked.values <= asked.top_values[..., 0]).all()
    assert (asked.top_values < 0).all()
