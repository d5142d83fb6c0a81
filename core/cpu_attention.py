"""CpuAttention: a prefill or a decode step on a CPU, by the plain PyTorch reference."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_cli.core.batch import Int32, packed_positions
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.core.kv_cache import KVCache
from nanovllm_cli.kernels.paged_attention import QueryTiles, paged_attention_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuAttention:
    """Prefill or decode on a CPU, by the plain PyTorch reference."""

    positions: Tensor  # int64
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    tiles: QueryTiles
    is_finite: bool  # all that the pages hold
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
        is_finite: bool = False,
        all_stored: threading.Barrier | None = None,
    ) -> "CpuAttention":
        """Of packed sequences; those with `is_parked` write to the scratch block."""
        rows, positions = map(torch.from_numpy, packed_positions(query_lens, start_positions))
        block_ids = block_tables[rows, positions // block_size]
        block_ids = block_ids.masked_fill(is_parked[rows], SCRATCH_BLOCK)
        return cls(
            positions=positions,
            slot_mapping=block_ids * block_size + positions % block_size,
            block_tables=block_tables,
            tiles=QueryTiles.of(
                query_lens, start_positions, group_size=group_size, block_size=block_size
            ),
            is_finite=is_finite,
            all_stored=all_stored,
        )

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        if self.all_stored is not None:
            self.all_stored.wait()
        return paged_attention_reference(
            q, kv_cache.k, kv_cache.v, self.block_tables, self.tiles, is_finite=self.is_finite
        )
