"""Attention over pages: where the tokens of one launch or step lie, and how they are attended to.

An AttentionPlan is made once for a launch or a step and serves every layer. The K and V of all its
tokens are stored before any is attended to, so that sequences of one launch may share a block that
one of them computes.
"""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import Int32
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.kernels.decode_attention import DecodePlan, decode_attention
from nanovllm_cli.kernels.paged_attention import QueryTiles, paged_attention_reference
from nanovllm_cli.kernels.prefill_attention import prefill_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """One layer's pages: k, v [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: Tensor
    v: Tensor


class AttentionPlan(Protocol):
    """positions, slot_mapping (where each token's K and V go): int [num_tokens]."""

    @property
    def positions(self) -> Tensor: ...

    @property
    def slot_mapping(self) -> Tensor: ...

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same; K and V are in their pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuAttention:
    """Prefill or decode on a CPU, by the plain PyTorch reference."""

    positions: Tensor  # int64
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    tiles: QueryTiles
    all_stored: threading.Barrier | None  # where other threads store K and V we may read

    @classmethod
    def of(
        cls,
        *,
        query_lens: Int32,
        start_positions: Int32,
        block_tables: Tensor,
        is_parked: Tensor,
        group_size: int,
        block_size: int,
        all_stored: threading.Barrier | None = None,
    ) -> "CpuAttention":
        """Of packed sequences; those with `is_parked` write to the scratch block."""
        sequences = np.repeat(np.arange(len(query_lens)), query_lens)
        starts = np.cumsum(query_lens) - query_lens
        offsets = np.arange(len(sequences)) - starts[sequences]
        positions = torch.from_numpy(start_positions[sequences].astype(np.int64) + offsets)
        rows = torch.from_numpy(sequences)
        block_ids = block_tables[rows, positions // block_size]
        block_ids = block_ids.masked_fill(is_parked[rows], SCRATCH_BLOCK)
        return cls(
            positions=positions,
            slot_mapping=block_ids * block_size + positions % block_size,
            block_tables=block_tables,
            tiles=QueryTiles.of(
                query_lens, start_positions, group_size=group_size, block_size=block_size
            ),
            all_stored=all_stored,
        )

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        if self.all_stored is not None:
            self.all_stored.wait()
        return paged_attention_reference(q, kv_cache.k, kv_cache.v, self.block_tables, self.tiles)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillAttention:
    """A packed prefill on a GPU."""

    positions: Tensor  # int32
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int32 [num_slots, max_blocks]
    slots: Tensor  # int32 [num_sequences]
    cu_seqlens_q: Tensor  # int32 [num_sequences + 1]
    start_positions: Tensor  # int32 [num_sequences]
    max_query_len: int

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        return prefill_attention(
            q,
            kv_cache.k,
            kv_cache.v,
            self.block_tables,
            self.slots,
            self.cu_seqlens_q,
            self.start_positions,
            self.max_query_len,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeAttention:
    """One token of each slot, on a GPU, in a captured step: nothing here depends on lengths."""

    positions: Tensor  # int32
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int32 [num_slots, max_blocks]
    plan: DecodePlan

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        return decode_attention(q, kv_cache.k, kv_cache.v, self.block_tables, self.plan)
