"""The fixed workloads of `nanovllm bench`: prompts as token ids, and how many tokens each gets.

nano is nano-vllm's bench.py to the draw (https://github.com/GeeeekExplorer/nano-vllm); the others
hold one thing each. A repeat keeps the lengths and draws other tokens, so that nothing is served
from what an earlier one left in the prefix cache.
"""

import random
from collections.abc import Callable

import numpy as np

from nanovllm_cli.core.request import TokenIds

Workload = list[tuple[TokenIds, int]]  # (prompt token ids, completion tokens)
_TOKENS = 10_001  # ids are drawn below it, as nano-vllm draws them


def nano(repeat: int) -> Workload:
    """256 sequences, 100 to 1024 tokens in and as many out."""
    lengths = random.Random(0)
    drawn = [
        [lengths.randint(0, _TOKENS - 1) for _ in range(lengths.randint(100, 1024))]
        for _ in range(256)
    ]
    outputs = [lengths.randint(100, 1024) for _ in range(256)]
    tokens = np.random.default_rng(repeat)
    return [
        (
            np.array(prompt, dtype=np.int32) if repeat == 0 else _draw(tokens, len(prompt)),
            num_tokens,
        )
        for prompt, num_tokens in zip(drawn, outputs, strict=True)
    ]


def _even(count: int, prompt: int, completion: int, shared: int = 0) -> Callable[[int], Workload]:
    def workload(repeat: int) -> Workload:
        tokens = np.random.default_rng([repeat, count, prompt])
        prefix = _draw(tokens, shared)
        return [
            (np.concatenate((prefix, _draw(tokens, prompt - shared))), completion)
            for _ in range(count)
        ]

    return workload


def _draw(tokens: np.random.Generator, count: int) -> TokenIds:
    return tokens.integers(0, _TOKENS, count, dtype=np.int32)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "nano": nano,
    "decode-heavy": _even(1024, 128, 1024),
    "prefill-heavy": _even(512, 2048, 16),
    "shared-prefix": _even(1000, 2048, 64, shared=1638),
    "short-answers": _even(4096, 128, 32),
}
