"""The state of every running sequence, on the device: one row a slot.

The host writes a row when a sequence enters its slot, and new block-table entries as they are
allocated. Everything else is advanced by the steps themselves, so that a window of steps needs no
look from the host.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm_cli.core.batch import Admission, BlockTableUpdate, ForcedTokens, Int32
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
        integers = np.full((len(admissions), 6 + MAX_STOP_TOKEN_IDS), NO_TOKEN, dtype=np.int32)
        reals = np.empty((len(admissions), 3), dtype=np.float32)
        for row, real, a in zip(integers, reals, admissions, strict=True):
            seed = a.seed.to_bytes(8, "little")
            row[:4] = a.slot, a.min_length, a.max_length, a.top_k
            row[4:6] = np.frombuffer(seed, dtype=np.int32)
            row[6 : 6 + len(a.stop_token_ids)] = a.stop_token_ids
            real[:] = a.temperature, a.top_p, a.min_p
        rows = self.to_device(np.hstack((integers, reals.view(np.int32))))
        slots = rows[:, 0].long()
        self.is_finished.index_fill_(0, slots, False)
        for column, values in (
            (self.min_length, rows[:, 1]),
            (self.max_length, rows[:, 2]),
            (self.top_k, rows[:, 3]),
            (self.seed, (rows[:, 4].long() & 0xFFFFFFFF) | (rows[:, 5].long() << 32)),
            (self.stop_token_ids, rows[:, 6:-3]),
            (self.temperature, rows[:, -3].view(torch.float32)),
            (self.top_p, rows[:, -2].view(torch.float32)),
            (self.min_p, rows[:, -1].view(torch.float32)),
        ):
            column[slots] = values.to(column.dtype)

    def force(self, slots: Int32, forced: ForcedTokens) -> None:
        """Let those of a step's slots that have forced tokens go on after them."""
        rows, lengths = forced.rows, forced.start_positions + forced.query_lens
        forced_slots, forced_lengths = self.all_to_device(slots[rows], lengths[rows])
        indices = forced_slots.long()
        self.length[indices] = forced_lengths.to(self.length.dtype)
        self.is_finished.index_fill_(0, indices, False)

    def extend_block_tables(self, update: BlockTableUpdate) -> None:
        """Write new block-table entries."""
        if len(update.slots):
            rows = self.to_device(np.stack((update.slots, update.indices, update.block_ids)))
            slots, indices, block_ids = rows
            self.block_table[slots.long(), indices.long()] = block_ids.to(self.block_table.dtype)

    def all_to_device(self, *rows: npt.NDArray[np.integer]) -> list[Tensor]:
        """Host arrays as int32 tensors, in one copy.

        Each begins at a multiple of 16 bytes: for other pointers Triton compiles a kernel anew.
        """
        width = -(-max(map(len, rows)) // 4) * 4
        host = np.zeros((len(rows), width), dtype=np.int32)
        for row, values in zip(host, rows, strict=True):
            row[: len(values)] = values
        device = self.to_device(host)
        return [row[: len(values)] for row, values in zip(device, rows, strict=True)]

    def to_device(self, values: Int32) -> Tensor:
        """A host array as an int32 tensor beside the table, copied without waiting."""
        if self._staging is not None:
            return self._staging.to_device(values)
        return torch.from_numpy(values).to(self.length.device)
