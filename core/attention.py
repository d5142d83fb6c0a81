"""Attention of one layer: store the new K and V in their pages, then attend over the pages."""

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import Int32
from nanovllm_cli.kernels.kv_store import kv_store_reference
from nanovllm_cli.kernels.paged_attention import QueryTiles, paged_attention_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """One layer's pages: k, v [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one launch or step lie; the same for all layers."""

    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens], where each token's K and V go
    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    tiles: QueryTiles
    all_stored: threading.Barrier | None = None  # where other threads store K and V we may read

    @classmethod
    def of(
        cls,
        *,
        query_lens: Int32,
        start_positions: Int32,
        block_tables: Tensor,
        is_parked: Tensor | None,
        group_size: int,
        block_size: int,
        all_stored: threading.Barrier | None,
    ) -> "AttentionMetadata":
        """Of packed sequences; those with `is_parked` write to the scratch block."""
        sequences = np.repeat(np.arange(len(query_lens)), query_lens)
        starts = np.cumsum(query_lens) - query_lens
        offsets = np.arange(len(sequences)) - starts[sequences]
        positions = torch.from_numpy(start_positions[sequences].astype(np.int64) + offsets)
        sequence_ids = torch.from_numpy(sequences)
        block_ids = block_tables[sequence_ids, positions // block_size]
        if is_parked is not None:
            block_ids = block_ids.masked_fill(is_parked[sequence_ids], 0)
        return cls(
            positions=positions,
            slot_mapping=block_ids * block_size + positions % block_size,
            block_tables=block_tables,
            tiles=QueryTiles.of(
                query_lens, start_positions, group_size=group_size, block_size=block_size
            ),
            all_stored=all_stored,
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, kv_cache: KVCache, metadata: AttentionMetadata
) -> Tensor:
    """Store k and v, in place, and attend with q to each token's own past.

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim] -> q's shape.
    Every token of the launch is stored before any is attended to, so that sequences of one launch
    may share a block that one of them computes.
    """
    kv_store_reference(k, v, kv_cache.k, kv_cache.v, metadata.slot_mapping)
    if metadata.all_stored is not None:
        metadata.all_stored.wait()
    return paged_attention_reference(
        q, kv_cache.k, kv_cache.v, metadata.block_tables, metadata.tiles
    )
