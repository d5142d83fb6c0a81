"""The state of every running sequence, on the device: one row a slot.

The host writes a row when a sequence enters its slot, and new block-table entries as they are
allocated. Everything else is advanced by the steps themselves, so that a window of steps needs no
look from the host.
"""

import torch
from torch import Tensor

from nanovllm_cli.core.batch import Admission, BlockTableUpdate
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS

NO_TOKEN = -1  # fills the unused columns of stop_token_ids; no token compares equal to it


class SlotTable:
    """Columns [max_num_seqs]; int64 where they index or count, fp32 where they scale."""

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int, device: torch.device) -> None:
        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((max_num_seqs, *shape), dtype=dtype, device=device)

        self.last_token = column(torch.int64)
        self.length = column(torch.int64)  # tokens known, the last one's KV not yet stored
        self.min_length = column(torch.int64)
        self.max_length = column(torch.int64)
        self.is_finished = column(torch.bool)
        self.stop_token_ids = column(torch.int64, MAX_STOP_TOKEN_IDS)
        self.seed = column(torch.int64)  # the bits of an unsigned one
        self.temperature = column(torch.float32)
        self.top_k = column(torch.int64)
        self.top_p = column(torch.float32)
        self.min_p = column(torch.float32)
        self.block_table = column(torch.int64, max_blocks_per_seq).fill_(SCRATCH_BLOCK)

    def admit(self, admissions: tuple[Admission, ...]) -> None:
        """Write the rows of sequences that enter their slots."""
        if not admissions:
            return
        slots = torch.tensor([a.slot for a in admissions])
        self.is_finished[slots] = False
        for name in ("min_length", "max_length", "temperature", "top_k", "top_p", "min_p"):
            column = getattr(self, name)
            values = [getattr(admission, name) for admission in admissions]
            column[slots] = torch.tensor(values, dtype=column.dtype)
        seeds = [a.seed - (1 << 64) if a.seed >= 1 << 63 else a.seed for a in admissions]
        self.seed[slots] = torch.tensor(seeds)
        stops = [a.stop_token_ids for a in admissions]
        padded = [[*ids, *[NO_TOKEN] * (MAX_STOP_TOKEN_IDS - len(ids))] for ids in stops]
        self.stop_token_ids[slots] = torch.tensor(padded)

    def extend_block_tables(self, update: BlockTableUpdate) -> None:
        """Write new block-table entries."""
        if len(update.slots):
            slots, indices = torch.from_numpy(update.slots), torch.from_numpy(update.indices)
            self.block_table[slots.long(), indices.long()] = torch.from_numpy(
                update.block_ids
            ).long()
