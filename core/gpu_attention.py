"""Attention over pages on a GPU: a packed prefill, and one token of each slot."""

from dataclasses import dataclass

from torch import Tensor

from nanovllm_cli.core.attention_backend import AttentionBackend, PackedSequences
from nanovllm_cli.core.kv_cache import KVCache
from nanovllm_cli.kernels.decode_attention import DecodePlan, decode_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillAttention:
    """A packed prefill on a GPU, by the backend that was chosen."""

    positions: Tensor  # int32
    slot_mapping: Tensor  # int64
    sequences: PackedSequences
    backend: AttentionBackend

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        return self.backend.prefill(q, kv_cache.k, kv_cache.v, self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeAttention:
    """One token of each slot, on a GPU, in a captured step: nothing here depends on lengths."""

    positions: Tensor  # int32
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int32 [num_slots, max_blocks]
    plan: DecodePlan

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        return decode_attention(q, kv_cache.k, kv_cache.v, self.block_tables, self.plan)
