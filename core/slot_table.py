"""The state of every running sequence, on the device: one row a slot.

The host writes a row when a sequence enters its slot, and new block-table entries as they are
allocated. Everything else is advanced by the steps themselves, so that a window of steps needs no
look from the host.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import Admission, BlockTableUpdate
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS
from nanovllm_cli.core.staging import Staging

NO_TOKEN = -1  # fills the unused columns of stop_token_ids; no token compares equal to it


class SlotTable:
    """Columns [max_num_seqs + 1]: integers int64 on a CPU and int32 on a GPU, the others fp32.

    The last row belongs to no sequence and is always finished: it fills a batch up.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        device: torch.device,
        staging: Staging | None = None,
    ) -> None:
        integer = torch.int64 if device.type == "cpu" else torch.int32

        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((max_num_seqs + 1, *shape), dtype=dtype, device=device)

        self._staging = staging
        self.idle_slot = max_num_seqs
        self.last_token = column(integer)
        self.length = column(integer)  # tokens known, the last one's KV not yet stored
        self.min_length = column(integer)
        self.max_length = column(integer)
        self.is_finished = column(torch.bool).fill_(True)
        self.stop_token_ids = column(integer, MAX_STOP_TOKEN_IDS).fill_(NO_TOKEN)
        self.seed = column(torch.int64)  # the bits of an unsigned one
        self.temperature = column(torch.float32)
        self.top_k = column(integer)
        self.top_p = column(torch.float32)
        self.min_p = column(torch.float32)
        self.block_table = column(integer, max_blocks_per_seq).fill_(SCRATCH_BLOCK)

    def admit(self, admissions: tuple[Admission, ...]) -> None:
        """Write the rows of sequences that enter their slots."""
        if not admissions:
            return
        slots = self.to_device([a.slot for a in admissions], torch.int64)
        self.is_finished[slots] = False
        for name in ("min_length", "max_length", "temperature", "top_k", "top_p", "min_p"):
            column = getattr(self, name)
            values = [getattr(admission, name) for admission in admissions]
            column[slots] = self.to_device(values, column.dtype)
        seeds = [a.seed - (1 << 64) if a.seed >= 1 << 63 else a.seed for a in admissions]
        self.seed[slots] = self.to_device(seeds, torch.int64)
        stops = [a.stop_token_ids for a in admissions]
        padded = [[*ids, *[NO_TOKEN] * (MAX_STOP_TOKEN_IDS - len(ids))] for ids in stops]
        self.stop_token_ids[slots] = self.to_device(padded, self.stop_token_ids.dtype)

    def extend_block_tables(self, update: BlockTableUpdate) -> None:
        """Write new block-table entries."""
        if len(update.slots):
            rows = np.stack((update.slots, update.indices, update.block_ids))
            slots, indices, block_ids = self.to_device(rows, torch.int64)
            self.block_table[slots, indices] = block_ids.to(self.block_table.dtype)

    def to_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A host array or list as a tensor beside the table, copied without waiting."""
        host = torch.as_tensor(np.asarray(values)).to(dtype)
        if self._staging is not None:
            return self._staging.to_device(host)
        return host.to(self.length.device)
