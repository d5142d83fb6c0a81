"""GpuPrefill: a PrefillBatch as tensors on a GPU, brought there in two copies."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanovllm_cli.core.attention_backend import AttentionBackend, PackedSequences
from nanovllm_cli.core.batch import PrefillBatch, packed_positions
from nanovllm_cli.core.gpu_attention import PrefillAttention
from nanovllm_cli.core.slot_table import SlotTable


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPrefill:
    """All int32; rows are those of the result: the sequences', then their twins'."""

    token_ids: Tensor  # [num_tokens]
    attention: PrefillAttention
    row_slots: Tensor  # [num_rows]
    sampling_slots: Tensor  # [num_rows]; the idle slot where a chunk is not the last
    last_tokens: Tensor  # [num_rows], which of the tokens a row is drawn after
    row_lengths: Tensor  # [num_rows], tokens that are known when these are computed
    block_copies: list[Tensor]  # sources and targets of twins' blocks, or nothing

    @classmethod
    def of(
        cls, batch: PrefillBatch, table: SlotTable, block_size: int, backend: AttentionBackend
    ) -> "GpuPrefill":
        """Of slots that have been admitted and have their blocks; copied without waiting."""
        token_ids, rows, positions = table.all_to_device(
            batch.token_ids, *packed_positions(batch.query_lens, batch.start_positions)
        )
        kv_lens = batch.start_positions + batch.query_lens
        ends = np.cumsum(batch.query_lens)
        row_slots, drawn_after = batch.row_slots, batch.row_sequences
        twins = batch.twins
        slots, all_slots, sampling_slots, last_tokens, row_lengths, *of_sequences = (
            table.all_to_device(
                batch.slots,
                row_slots,
                np.where(batch.is_last_chunk[drawn_after], row_slots, table.idle_slot),
                (ends - 1)[drawn_after],
                kv_lens[drawn_after],
                np.arange(len(batch.slots)),
                batch.start_positions,
                kv_lens,
                np.concatenate(([0], ends)),
                np.concatenate(([0], np.cumsum(kv_lens))),
                *(() if twins is None else (twins.sources, twins.targets)),
            )
        )
        sequence_rows, starts, lengths, sums_q, sums_k, *block_copies = of_sequences
        block_tables = table.block_table[slots.long()]
        block_indices = (positions // block_size).long()
        block_ids = block_tables[rows.long(), block_indices].long()
        attention = PrefillAttention(
            positions=positions,
            slot_mapping=block_ids * block_size + positions % block_size,
            sequences=PackedSequences(
                block_tables=block_tables,
                rows=sequence_rows,
                start_positions=starts,
                kv_lens=lengths,
                cu_seqlens_q=sums_q,
                cu_seqlens_k=sums_k,
                max_query_len=int(batch.query_lens.max()),
                max_kv_len=int(kv_lens.max()),
            ),
            backend=backend,
        )
        return cls(
            token_ids=token_ids,
            attention=attention,
            row_slots=all_slots,
            sampling_slots=sampling_slots,
            last_tokens=last_tokens,
            row_lengths=row_lengths,
            block_copies=block_copies,
        )
