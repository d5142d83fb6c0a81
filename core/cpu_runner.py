"""CpuRunner: a CPU's weights, KV cache and slot table: Batch -> token ids.

On a CPU a launch runs at once and eagerly, with the kernels' plain PyTorch references. A decode
window is the same steps that a GPU replays: read each slot's last token, run the model, sample,
advance the slot; a slot that has finished is parked, and writes to the scratch block.
"""

import os
import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.attention import KVCache
from nanovllm_cli.core.batch import Batch, BatchResult, DecodeBatch, Int32, PrefillBatch
from nanovllm_cli.core.cpu_attention import CpuAttention
from nanovllm_cli.core.cpu_threads import CpuThreads
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.resolved_config import ResolvedConfig
from nanovllm_cli.core.sampler import sample
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.linear import ROWS_PER_TILE

_KV_TOKENS_PER_SEQ = 256  # the default cache holds so many of each running sequence
_KV_BYTES = 4 << 30  # and is no larger than this, nor than half the free memory


@dataclass(frozen=True, slots=True)
class CpuLaunch:
    """A launch that has run already."""

    _result: BatchResult

    def result(self) -> BatchResult:
        return self._result


class CpuRunner:
    """Runs launches one after the other, in the order they come."""

    def __init__(self, model: Qwen3, config: ResolvedConfig) -> None:
        sizes, weight = model.config, model.embed_tokens.weight
        self._model = model
        self._threads = CpuThreads(config.num_threads)
        self._block_size = config.block_size
        self._group_size = sizes.num_attention_heads // sizes.num_key_value_heads
        blocks_per_seq = -(-config.max_model_len // config.block_size)
        self.num_blocks = _num_blocks(
            config, blocks_per_seq, sizes.kv_bytes_per_token(weight.element_size())
        )
        # Zeroed and so really there: memory that is short fails now, not in the night.
        shape = (self.num_blocks, sizes.num_key_value_heads, config.block_size, sizes.head_dim)
        self._kv_caches = [
            KVCache(
                k=torch.empty(shape, dtype=weight.dtype).fill_(0),
                v=torch.empty(shape, dtype=weight.dtype).fill_(0),
            )
            for _ in range(sizes.num_hidden_layers)
        ]
        self._table = SlotTable(config.max_num_seqs, blocks_per_seq, weight.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> CpuLaunch:
        """Run one launch to its end."""
        self._table.extend_block_tables(batch.block_table_update)
        if isinstance(batch, PrefillBatch):
            return CpuLaunch(self._prefill(batch))
        return CpuLaunch(self._decode(batch))

    def _prefill(self, batch: PrefillBatch) -> BatchResult:
        self._table.admit(batch.admissions)
        slots = torch.from_numpy(batch.slots).long()
        hidden = self._forward(
            torch.from_numpy(batch.token_ids).long(), slots, batch.query_lens, batch.start_positions
        )
        ends = torch.from_numpy(np.cumsum(batch.query_lens))
        is_last = torch.from_numpy(batch.is_last_chunk)
        lengths = torch.from_numpy(batch.start_positions + batch.query_lens).long()
        self._table.length[slots] = lengths
        window = _Window(len(slots), num_steps=1)
        if is_last.any():
            window.add(0, is_last, *self._advance(hidden[ends[is_last] - 1], slots[is_last]))
        return window.result()

    def _decode(self, batch: DecodeBatch) -> BatchResult:
        slots = torch.from_numpy(batch.slots).long()
        window = _Window(len(slots), batch.num_steps)
        query_lens = np.ones(len(slots), dtype=np.int32)
        for step in range(batch.num_steps):
            is_live = ~self._table.is_finished[slots]
            positions = (self._table.length[slots] - 1).numpy().astype(np.int32)
            hidden = self._forward(self._table.last_token[slots], slots, query_lens, positions)
            window.add(step, is_live, *self._advance(hidden[is_live], slots[is_live]))
        return window.result()

    def _forward(
        self, token_ids: Tensor, slots: Tensor, query_lens: Int32, start_positions: Int32
    ) -> Tensor:
        """The hidden states of packed sequences, their tokens shared out among the threads."""
        num_parts = self._num_parts(len(token_ids))
        barrier = threading.Barrier(num_parts) if num_parts > 1 else None
        block_tables, is_parked = self._table.block_table[slots], self._table.is_finished[slots]
        sequence_ends = np.cumsum(query_lens)
        sequence_starts = sequence_ends - query_lens

        def run(part: tuple[int, int]) -> Tensor:
            start, end = part
            first = int(np.searchsorted(sequence_ends, start, side="right"))
            last = int(np.searchsorted(sequence_starts, end, side="left"))
            own = slice(first, last)  # the sequences with tokens in start .. end - 1
            begins = np.maximum(sequence_starts[own], start)
            metadata = CpuAttention.of(
                query_lens=np.minimum(sequence_ends[own], end) - begins,
                start_positions=start_positions[own] + (begins - sequence_starts[own]),
                block_tables=block_tables[own],
                is_parked=is_parked[own],
                group_size=self._group_size,
                block_size=self._block_size,
                all_stored=barrier,
            )
            return self._model(token_ids[start:end], self._kv_caches, metadata)

        parts = _even_parts(len(token_ids), num_parts)
        return torch.cat(self._threads.map(run, parts, barrier))

    def _logits(self, hidden: Tensor) -> Tensor:
        parts = _even_parts(len(hidden), self._num_parts(len(hidden)))
        return torch.cat(
            self._threads.map(lambda p: self._model.logits(hidden[p[0] : p[1]]), parts)
        )

    def _num_parts(self, num_rows: int) -> int:
        """One for each thread, but none smaller than a tile of the products."""
        return max(1, min(self._threads.num_threads, num_rows // ROWS_PER_TILE))

    def _advance(self, hidden: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample the slots' next tokens and move the slots on; also says who stopped or failed."""
        table = self._table
        token_ids, is_nan = sample(self._logits(hidden), table, slots)
        is_stopped = (token_ids.unsqueeze(1) == table.stop_token_ids[slots]).any(dim=1) & ~is_nan
        table.last_token[slots] = token_ids
        table.length[slots] += 1
        is_full = table.length[slots] >= table.max_length[slots]
        table.is_finished[slots] = is_stopped | is_nan | is_full
        return token_ids, is_stopped, is_nan


def _num_blocks(config: ResolvedConfig, blocks_per_seq: int, bytes_per_token: int) -> int:
    """Blocks of the KV cache, the scratch block included; raises MemoryTooSmall."""
    block_bytes = bytes_per_token * config.block_size
    most = config.max_num_seqs * blocks_per_seq + 1
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        wanted = config.max_num_seqs * min(config.max_model_len, _KV_TOKENS_PER_SEQ)
        wanted_blocks = max(-(-wanted // config.block_size), blocks_per_seq) + 1
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kv_cache_bytes = min(wanted_blocks * block_bytes, _KV_BYTES, free // 2)
    num_blocks = min(kv_cache_bytes // block_bytes, most)
    if num_blocks < 2:
        raise MemoryTooSmall(
            f"the KV cache has {kv_cache_bytes} bytes; one block of {config.block_size} tokens "
            f"and the scratch block need {2 * block_bytes}",
            "Raise --kv-cache-memory or lower --block-size.",
        )
    return num_blocks


def _even_parts(num_rows: int, num_parts: int) -> list[tuple[int, int]]:
    """(start, end) of each part."""
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return list(pairwise(bounds))


class _Window:
    """The tokens of a launch, gathered step by step."""

    def __init__(self, num_sequences: int, num_steps: int) -> None:
        self._token_ids = torch.zeros((num_sequences, num_steps), dtype=torch.int32)
        self._num_tokens = torch.zeros(num_sequences, dtype=torch.int32)
        self._is_stopped = torch.zeros(num_sequences, dtype=torch.bool)
        self._is_nan = torch.zeros(num_sequences, dtype=torch.bool)

    def add(
        self, step: int, is_live: Tensor, token_ids: Tensor, is_stopped: Tensor, is_nan: Tensor
    ) -> None:
        self._token_ids[is_live, step] = token_ids.int()
        self._num_tokens += is_live
        self._is_stopped[is_live] = is_stopped
        self._is_nan[is_live] = is_nan

    def result(self) -> BatchResult:
        return BatchResult(
            token_ids=self._token_ids.numpy(),
            num_tokens=self._num_tokens.numpy(),
            is_stopped=self._is_stopped.numpy(),
            is_nan=self._is_nan.numpy(),
        )
