"""TensorParallel: a rank's part of every matrix, and how the ranks' results come together.

Megatron's layout (https://arxiv.org/abs/1909.08053): q, k, v, gate and up are cut by their outputs,
o and down by their inputs, so that attention and MLP need one sum over the ranks each; embedding
and lm_head are cut by the vocabulary. Of more ranks than kv heads, some hold the same head.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from nanovllm_cli.core.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Entries start .. stop - 1 of a dimension that has `whole`; `length` are allocated."""

    start: int
    stop: int
    whole: int
    length: int  # more than stop - start where the last ranks have less


def whole(size: int) -> Shard:
    """All of a dimension."""
    return Shard(0, size, size, size)


class Collectives(Protocol):
    """How tensors travel between ranks. Every rank makes the same calls in the same order."""

    all_reduce: str  # how sums are made, for people

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on each; perhaps x itself."""

    def buffer(self, num_rows: int, num_columns: int) -> Tensor | None:
        """Where `sum` would like its x to be; good until the next call."""

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x: [size, *x.shape]."""

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""

    def close(self) -> None:
        """The other ranks have ended; on a GPU the graphs that hold collectives are gone."""


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank of `size`."""

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None  # None for one rank alone

    def shard(self, size: int) -> Shard:
        """This rank's part of a dimension: equal parts, the last ones cut short."""
        length = -(-size // self.size)
        start = min(self.rank * length, size)
        return Shard(start, min(start + length, size), size, length)

    def kv_shard(self, num_kv_heads: int, head_dim: int) -> Shard:
        """The kv heads of this rank's query heads."""
        num_own = max(num_kv_heads // self.size, 1)
        first = self.rank * num_kv_heads // self.size
        start, length = first * head_dim, num_own * head_dim
        return Shard(start, start + length, num_kv_heads * head_dim, length)

    def part_of(self, config: ModelConfig) -> ModelConfig:
        """The sizes of what one rank holds."""
        if self.size == 1:
            return config
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=max(config.num_key_value_heads // self.size, 1),
            intermediate_size=config.intermediate_size // self.size,
            vocab_size=-(-config.vocab_size // self.size),
        )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; perhaps in place."""
        return x if self.collectives is None else self.collectives.sum(x)

    def buffer(self, num_rows: int, num_columns: int) -> Tensor | None:
        """Where to put what is to be summed next; None: anywhere."""
        return None if self.collectives is None else self.collectives.buffer(num_rows, num_columns)

    def join_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """Every rank's columns side by side, the padding of the last ones left out.

        x: [num_rows, columns of a rank] -> [num_rows, num_columns].
        """
        if self.collectives is None:
            return x
        parts = self.collectives.gather(x)
        return parts.transpose(0, 1).reshape(len(x), -1)[:, :num_columns]

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""
        return value if self.collectives is None else self.collectives.minimum(value)


ALONE = TensorParallel()
