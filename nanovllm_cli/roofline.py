"""The bound of a workload: the least time in which this machine can do what must be done.

Matrix products and attention run one after the other, as in any engine that is no single kernel;
each takes the longer of its arithmetic and its bytes. Counted are the weights, once a step, K and V
of every running token, once a step, and the products' FLOPs. Not counted is what an engine pays
besides: activations, logits, launches, sampling, the host. Tokens that several prompts begin with
are computed once, and their K and V read once a step.

All prompts are prefilled as one, in launches of `max_num_batched_tokens`; `max_num_seqs` sequences
run at a time, a new one as soon as one ends. K and V are taken to fit in memory.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.machine_rates import MachineRates
from nanovllm_cli.core.request import TokenIds


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one sequence asks for, in tokens."""

    prompt: int
    own_prompt: int  # of the prompt, those that no other sequence counts as its own
    completion: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The least seconds for a workload."""

    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


def loads(workload: Sequence[tuple[TokenIds, int]], *, is_shared: bool) -> list[Load]:
    """What each sequence asks for; not `is_shared`: every prompt is all its own.

    In sorted order a prompt's own tokens are those after what it shares with the one before: every
    distinct prefix is counted exactly once, so what is computed or read can never be less.
    """
    prompts = [np.asarray(prompt, dtype=">i4") for prompt, _ in workload]
    own = [len(prompt) for prompt in prompts]
    if is_shared:
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].tobytes())
        for before, i in pairwise(order):
            own[i] -= _num_shared(prompts[before], prompts[i])
            own[i] = max(own[i], 1)  # the last token is always computed
    return [
        Load(prompt=len(prompt), own_prompt=num_own, completion=completion)
        for (prompt, completion), num_own in zip(workload, own, strict=True)
    ]


def _num_shared(a: TokenIds, b: TokenIds) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


def bound(
    model: ModelConfig,
    dtype_bytes: int,
    sequences: Sequence[Load],
    rates: MachineRates,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Bound:
    """The least time for `sequences`, every one to its last token."""
    sizes = _Sizes.of(model, dtype_bytes)
    return Bound(
        prefill_seconds=_prefill_seconds(sizes, sequences, rates, max_num_batched_tokens),
        decode_seconds=_decode_seconds(sizes, sequences, rates, max_num_seqs),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """What a forward pass costs; a product of a weight and a token is 2 FLOPs."""

    layer_weights: int
    head_weights: int
    weight_bytes: int  # of the layers and the head, read once a step
    kv_bytes: int  # of one token
    attention_flops: int  # of one query and one position

    @classmethod
    def of(cls, model: ModelConfig, dtype_bytes: int) -> "_Sizes":
        heads = 2 * (model.num_attention_heads + model.num_key_value_heads)
        layer = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)
        layer_weights = model.num_hidden_layers * layer
        head_weights = model.vocab_size * model.hidden_size
        return cls(
            layer_weights=layer_weights,
            head_weights=head_weights,
            weight_bytes=(layer_weights + head_weights) * dtype_bytes,
            kv_bytes=model.kv_bytes_per_token(dtype_bytes),
            attention_flops=4
            * model.num_hidden_layers
            * model.num_attention_heads
            * model.head_dim,
        )


def _prefill_seconds(
    sizes: _Sizes, sequences: Sequence[Load], rates: MachineRates, max_num_batched_tokens: int
) -> float:
    num_tokens = sum(load.own_prompt for load in sequences)
    positions = sum(
        load.own_prompt * (2 * load.prompt - load.own_prompt + 1) / 2 for load in sequences
    )
    flops = (
        2 * sizes.layer_weights * num_tokens
        + 2 * sizes.head_weights * len(sequences)
        + sizes.attention_flops * positions
    )
    num_launches = -(-num_tokens // max_num_batched_tokens)
    num_bytes = num_launches * sizes.weight_bytes + num_tokens * sizes.kv_bytes
    return max(flops / rates.flops_per_second, num_bytes / rates.bytes_per_second)


def _decode_seconds(
    sizes: _Sizes, sequences: Sequence[Load], rates: MachineRates, max_num_seqs: int
) -> float:
    """Step by step, but stretches in which nobody ends are summed at once.

    The first token comes of the prefill: a sequence takes one step fewer than it has tokens.
    """
    waiting = [load for load in reversed(sequences) if load.completion > 1]
    running: list[tuple[int, int, int, int]] = []  # (its last step, steps, prompt, own prompt)
    step, seconds = 0, 0.0
    num_context = num_held = 0  # tokens attended to, and those read, before the next step
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            load = waiting.pop()
            steps = load.completion - 1
            heapq.heappush(running, (step + steps, steps, load.prompt, load.own_prompt))
            num_context += load.prompt
            num_held += load.own_prompt
        batch, num_steps = len(running), running[0][0] - step
        i = np.arange(1, num_steps + 1, dtype=np.float64)
        flops = 2.0 * (sizes.layer_weights + sizes.head_weights) * batch
        seconds += num_steps * max(
            sizes.weight_bytes / rates.bytes_per_second, flops / rates.flops_per_second
        )
        # Each step reads what there is, its own tokens included, and writes those.
        num_bytes = (num_held + batch * (i + 1)) * sizes.kv_bytes
        attention = sizes.attention_flops * (num_context + batch * i)
        seconds += float(
            np.maximum(num_bytes / rates.bytes_per_second, attention / rates.flops_per_second).sum()
        )
        step += num_steps
        num_context += batch * num_steps
        num_held += batch * num_steps
        while running and running[0][0] == step:
            _, steps, prompt, own_prompt = heapq.heappop(running)
            num_context -= prompt + steps
            num_held -= own_prompt + steps
    return seconds
