"""TensorParallel: a rank's part of every matrix, and how the ranks' results come together.

Megatron's layout (https://arxiv.org/abs/1909.08053): q, k, v, gate and up are cut by their outputs,
o and down by their inputs, so that attention and MLP need one sum over the ranks each; embedding
and lm_head are cut by the vocabulary. Of more ranks than kv heads, some hold the same head.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nanovllm_cli.kernels.rms_norm import add_rms_norm


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

    def sum_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add the sum of every rank's x to residual, in place; the norm of it, good until the next.

        The same bits on each rank. A rank may keep only some rows of residual up to date, as long
        as those are the same ones at every call.
        """

    def term_buffer(self, num_rows: int) -> Tensor | None:
        """Where the next sum would like its x to be; None: anywhere."""

    def join_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """Every rank's columns side by side, the padding of the last ones left out.

        x: [num_rows, columns of a rank] -> [num_rows, num_columns].
        """

    def column_buffer(self, num_rows: int) -> Tensor | None:
        """Where `join_columns` would like its x to be; None: anywhere."""

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""

    def take_first(self, x: Tensor) -> None:
        """Make x the first rank's, in place."""

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

    def sum_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As Collectives has it; of one rank alone, the norm of x + residual."""
        if self.collectives is None:
            return add_rms_norm(x, residual, weight, eps)
        return self.collectives.sum_add_rms_norm(x, residual, weight, eps)

    def term_buffer(self, num_rows: int) -> Tensor | None:
        """As Collectives has it."""
        return None if self.collectives is None else self.collectives.term_buffer(num_rows)

    def join_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """As Collectives has it; of one rank alone, x."""
        return x if self.collectives is None else self.collectives.join_columns(x, num_columns)

    def column_buffer(self, num_rows: int) -> Tensor | None:
        """As Collectives has it."""
        return None if self.collectives is None else self.collectives.column_buffer(num_rows)

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""
        return value if self.collectives is None else self.collectives.minimum(value)

    def take_first(self, x: Tensor) -> None:
        """As Collectives has it; of one rank alone, nothing."""
        if self.collectives is not None:
            self.collectives.take_first(x)


ALONE = TensorParallel()
