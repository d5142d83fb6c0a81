"""The layers Qwen3 is made of: linear, embedding, RMSNorm and the rotary tables.

A layer only holds its rank's part of a weight, and picks the implementation for its device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovllm_cli.core.config import RopeConfig
from nanovllm_cli.core.parallel import ALONE, Shard, TensorParallel, whole
from nanovllm_cli.kernels.linear import linear


class Linear(nn.Module):
    """x @ weight.T; several checkpoint matrices with one input are stacked into one weight.

    weight: [sum(out_features), in_features], of each the part that this rank holds.
    """

    def __init__(self, in_features: int | Shard, *out_features: int | Shard) -> None:
        super().__init__()
        self.in_shard = _as_shard(in_features)
        self.out_shards = [_as_shard(features) for features in out_features]
        num_inputs = self.in_shard.length
        num_outputs = sum(shard.length for shard in self.out_shards)
        weight = torch.empty(num_outputs, num_inputs)
        if weight.is_cpu:  # laid out as products read it: 1.5 times as fast
            weight = torch.empty(num_inputs, num_outputs).t()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [num_rows, in_features] -> [num_rows, sum(out_features)]; in `out` if it is given."""
        return linear(x, self.weight) if out is None else torch.mm(x, self.weight.t(), out=out)


class RowParallelLinear(Linear):
    """A Linear cut by its inputs: each rank's product is a term of the whole one."""

    def __init__(self, in_features: Shard, out_features: int, parallel: TensorParallel) -> None:
        super().__init__(in_features, out_features)
        self.parallel = parallel

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [num_rows, this rank's in_features] -> [num_rows, out_features], a term of the sum."""
        return super().forward(x, out if out is not None else self.parallel.term_buffer(len(x)))


class Embedding(nn.Module):
    """One row a token id. weight: [this rank's part of the vocabulary, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: TensorParallel = ALONE) -> None:
        super().__init__()
        self.parallel = parallel
        self.shard = parallel.shard(vocab_size)
        weight = torch.empty(self.shard.length, hidden_size)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64 [num_tokens] -> [num_tokens, hidden_size], of several ranks a term."""
        if self.parallel.size == 1:
            return self.weight[token_ids]
        own_ids = token_ids - self.shard.start
        rows = own_ids.clamp(0, self.shard.length - 1)
        is_elsewhere = (rows != own_ids).unsqueeze(1)
        return self.weight[rows].masked_fill_(is_elsewhere, 0.0)


class RMSNorm(nn.Module):
    """Over the last dimension. weight: [size]."""

    def __init__(self, size: int, eps: float, parallel: TensorParallel = ALONE) -> None:
        super().__init__()
        self.parallel = parallel
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, summed over ranks, in place; the norm of it. Both [num_rows, size]."""
        return self.parallel.sum_add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sin of every position's angles: fp32 [num_positions, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor


def rotary_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> RotaryTables:
    """The tables on the current default device; fp32 whatever the weights' dtype is."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    scale = 1.0
    if rope.rope_type == "yarn":
        frequencies, scale = _yarn(rope, frequencies, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return RotaryTables(angles.cos() * scale, angles.sin() * scale)


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN's frequencies and the factor on cos and sin (https://arxiv.org/abs/2309.00071, 3.2).

    Frequencies that turn more than beta_fast times over the original context stay, those that turn
    less than beta_slow times are divided by `factor`, and a ramp joins them.
    """

    def dimension_of(num_turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp), scale


def _as_shard(features: int | Shard) -> Shard:
    return features if isinstance(features, Shard) else whole(features)
