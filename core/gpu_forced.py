"""ForcedSteps: decode steps that take several tokens of some slots, on a GPU.

They are short prefills whose inputs lie at fixed places, padded to one of a few numbers of tokens,
so that they can be captured like the steps of one token: a prefill of a few hundred tokens spends
more time in its launches than in its kernels (7.4 and 2.4 ms, 64 sequences of the 0.6B, H100).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import (
    DRAWN_LAST,
    MAX_FORCED_TOKENS,
    ForcedTokens,
    Int32,
    packed_positions,
)
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.core.kv_cache import KVCache
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.prefill_attention import prefill_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortAttention:
    """At most MAX_FORCED_TOKENS new tokens of each slot; nothing here depends on how many."""

    positions: Tensor  # int32
    slot_mapping: Tensor  # int64
    block_tables: Tensor  # int32 [num_slots, max_blocks]
    slots: Tensor  # int32 [max_num_seqs]
    start_positions: Tensor  # int32 [max_num_seqs]
    cu_seqlens_q: Tensor  # int32 [max_num_seqs + 1]

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        return prefill_attention(
            q,
            kv_cache.k,
            kv_cache.v,
            self.block_tables,
            self.slots,
            self.cu_seqlens_q,
            self.start_positions,
            MAX_FORCED_TOKENS,
        )


def padded_size(num_tokens: int) -> int:
    """Tokens that a step is filled up to: a power of two, then steps of an eighth to a quarter."""
    if num_tokens <= 64:
        return max(16, 1 << (num_tokens - 1).bit_length())
    step = max(64, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // step) * step


class ForcedSteps:
    """Beside a slot table: the inputs of one step at a time."""

    def __init__(self, table: SlotTable, max_num_seqs: int, block_size: int, model: Qwen3) -> None:
        weight = model.embed_tokens.weight
        self._table = table
        self._max_num_seqs = max_num_seqs
        self._block_size = block_size
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # by padded size
        self._hidden = weight.new_zeros(max_num_seqs, weight.shape[1])  # of each slot's last token

    def put(self, slots: Int32, forced: ForcedTokens) -> int:
        """Copy a step's inputs to their places, without waiting; its padded size."""
        num_seqs, num_tokens = len(slots), len(forced.token_ids)
        size, table = padded_size(num_tokens), self._table
        rows, positions = packed_positions(forced.query_lens, forced.start_positions)
        ends = np.cumsum(forced.query_lens)
        tokens = np.zeros((3, size), dtype=np.int32)
        tokens[1] = table.idle_slot
        tokens[:, :num_tokens] = forced.token_ids, slots[rows], positions
        # One column more than sequences; rows at multiples of 16 bytes, as Triton expects them.
        sequences = np.zeros((4, self._max_num_seqs // 4 * 4 + 4), dtype=np.int32)
        sequences[0] = table.idle_slot
        sequences[0, :num_seqs] = slots
        sequences[1, :num_seqs] = forced.start_positions
        sequences[2, 1 : num_seqs + 1] = ends
        sequences[2, num_seqs + 1 :] = num_tokens
        sequences[3, :num_seqs] = ends - 1
        if size not in self._inputs:
            self._inputs[size] = (
                self._hidden.new_zeros(tokens.shape, dtype=torch.int32),
                self._hidden.new_zeros(sequences.shape, dtype=torch.int32),
            )
        for place, values in zip(self._inputs[size], (tokens, sequences), strict=True):
            place.copy_(table.to_device(values))
        table.force(slots, forced)
        return size

    def hidden(self, size: int, model: Qwen3, kv_caches: list[KVCache]) -> Tensor:
        """The hidden states after each slot's tokens, [max_num_seqs, hidden_size], at one place.

        A slot that has finished writes to the scratch block.
        """
        table, (tokens, sequences) = self._table, self._inputs[size]
        given, token_slots, positions = tokens
        slots, starts, cu_seqlens, last_tokens = sequences
        indices = token_slots.long()
        token_ids = torch.where(given == DRAWN_LAST, table.last_token[indices], given)
        block_ids = table.block_table[indices, (positions // self._block_size).long()].long()
        block_ids = block_ids.masked_fill(table.is_finished[indices], SCRATCH_BLOCK)
        attention = ShortAttention(
            positions=positions,
            slot_mapping=block_ids * self._block_size + positions % self._block_size,
            block_tables=table.block_table,
            slots=slots[: self._max_num_seqs],
            start_positions=starts[: self._max_num_seqs],
            cu_seqlens_q=cu_seqlens[: self._max_num_seqs + 1],
        )
        hidden = model(token_ids, kv_caches, attention)
        return torch.index_select(hidden, 0, last_tokens[: self._max_num_seqs], out=self._hidden)
