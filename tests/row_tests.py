"""What the tests of settings that few rows have share: such rows, and the same truth for all."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from nanovllm_cli.core.request import Completion, Logprobs, Request
from nanovllm_cli.core.sampling_params import SamplingParams

from .gpu_tests import ask, random_prompts

VOCAB_SIZE = 160
SEVERAL_BIASES = tuple((token, (-1.0) ** token * token / 20) for token in range(0, VOCAB_SIZE, 2))

# Bad words of one token, of several, longer than a prompt, and as likely as a small vocabulary has.
BAD_WORDS = ((3,), (40, 41), (7, 8, 9), tuple(range(16)), *((i, i + 1) for i in range(60)))

WAYS_TO_ADJUST: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 0.8},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.9, "presence_penalty": -0.4},
    {"logit_bias": ((5, 100.0), (80, -100.0))},
    {"logit_bias": SEVERAL_BIASES, "temperature": 1.0, "top_k": 10},
    {"bad_words": BAD_WORDS[:64]},
    {"bad_words": ((17,), (17, 18)), "logit_bias": ((17, 100.0), (18, 60.0))},
    {"thinking_budget": 4, "end_think_token_id": 99},
    {"thinking_budget": 0, "end_think_token_id": 99, "temperature": 1.0},
    {
        "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5,
        "logit_bias": SEVERAL_BIASES, "bad_words": BAD_WORDS[:64], "thinking_budget": 6,
        "end_think_token_id": 3, "temperature": 0.7, "top_p": 0.9,
    },
]  # fmt: skip


def adjusted_requests(count: int = 33, *, seed: int = 1, longest: int = 40) -> list[Request]:
    """Greedy where nothing else is said; every third row asks for nothing."""
    rng = random.Random(seed)
    made = []
    for i, prompt in enumerate(random_prompts(count, seed=seed)):
        way = WAYS_TO_ADJUST[(i // 3 * 2 + i % 3) % len(WAYS_TO_ADJUST)] if i % 3 else {}
        settings: dict[str, Any] = {"temperature": 0.0, **way}
        made.append(ask(i, prompt, max_tokens=rng.randint(5, longest), **settings))
    return made


def adjusted_reference(
    logits: torch.Tensor, prompt: list[int], completion: list[int], sampling: SamplingParams
) -> torch.Tensor:
    """transformers' processors, OpenAI's formula and the budget's meaning: fp32 [vocab_size]."""
    tokens = [prompt + completion]
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if sampling.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    out = processors(torch.tensor(tokens), logits.float().unsqueeze(0))[0]
    counts = torch.bincount(torch.tensor(completion, dtype=torch.int64), minlength=len(logits))
    out = out - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    budget = sampling.thinking_budget
    end = sampling.end_think_token_id
    if budget is not None and len(completion) >= budget and end not in completion:
        forced = torch.full_like(out, -torch.inf)
        forced[end] = 0.0
        return forced
    return out


def assert_equal_logprobs(actual: Logprobs | None, expected: Logprobs | None) -> None:
    """Bitwise."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    for name in ("values", "top_ids", "top_values"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), name


def assert_equal_completions(
    actual: dict[int, Completion], expected: dict[int, Completion], ids: Iterable[int] | None = None
) -> None:
    """Bitwise: tokens, reasons, log-probabilities."""
    for request_id in actual if ids is None else ids:
        ours, theirs = actual[request_id], expected[request_id]
        assert ours.token_ids.tolist() == theirs.token_ids.tolist(), request_id
        assert ours.finish_reason == theirs.finish_reason
        assert_equal_logprobs(ours.logprobs, theirs.logprobs)
        assert_equal_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)
