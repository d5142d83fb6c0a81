"""CpuRunner: a CPU's weights, KV cache and slot table: Batch -> token ids.

On a CPU a launch runs at once and eagerly, with the kernels' plain PyTorch references. A decode
window is the same steps that a GPU replays: read each slot's last token, run the model, sample,
advance the slot; a slot that has finished is parked, and writes to the scratch block. What some
rows ask beyond a token is token_choice.py's.
"""

import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import (
    DRAWN_LAST,
    Admission,
    Batch,
    BatchResult,
    DecodeBatch,
    ForcedTokens,
    Int32,
    PrefillBatch,
    RowNeeds,
    SampleBatch,
    packed_positions,
)
from nanovllm_cli.core.cpu_attention import CpuAttention
from nanovllm_cli.core.cpu_threads import CpuThreads
from nanovllm_cli.core.kv_cache import allocate_kv_caches, copy_blocks
from nanovllm_cli.core.kv_sizes import blocks_per_sequence, cpu_kv_bytes, num_kv_blocks
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.resolved_config import ResolvedConfig
from nanovllm_cli.core.sampler import sample
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.core.token_choice import (
    DeviceNeeds,
    TokenChoice,
    prompt_logprobs,
    unpack,
    unpack_steps,
)
from nanovllm_cli.kernels.linear import ROWS_PER_TILE

# A thread's share of a launch, parameters x tokens, where no number of threads is asked for. Below
# it threads wait for each other's Python: with 2M parameters and 45 tokens a step two threads took
# 1.3 times as long as one.
_PARAMETERS_PER_PART = 1 << 28


@dataclass(frozen=True, slots=True)
class CpuLaunch:
    """A launch that has run already."""

    _result: BatchResult

    def result(self) -> BatchResult:
        return self._result


class CpuRunner:
    """Runs launches one after the other, in the order they come."""

    def __init__(self, model: Qwen3, config: ResolvedConfig) -> None:
        sizes, weight = model.part, model.embed_tokens.weight
        self._model = model
        self._threads = CpuThreads(config.num_threads)
        self._block_size = config.block_size
        self._group_size = sizes.num_attention_heads // sizes.num_key_value_heads
        kv_bytes = model.parallel.minimum(cpu_kv_bytes(sizes, config))
        self.num_blocks = num_kv_blocks(kv_bytes, sizes, config)
        self._kv_caches = allocate_kv_caches(self.num_blocks, sizes, config)
        self._table = SlotTable(config.max_num_seqs, blocks_per_sequence(config), weight.device)
        self._choice = TokenChoice(self._table, model.config.vocab_size, model.parallel)
        self._half_step: tuple[Tensor, Tensor] | None = None  # a ForwardBatch's live rows, logits
        # Whether all that was ever stored in the pages is: a K or V that is not makes its own
        # token's hidden state so.
        self._is_finite = True
        self._rows_per_part = ROWS_PER_TILE
        if config.num_threads is None:
            rows = _PARAMETERS_PER_PART // sizes.num_parameters
            self._rows_per_part = max(rows, ROWS_PER_TILE)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> CpuLaunch | None:
        """Run one launch to its end."""
        if isinstance(batch, SampleBatch):
            return CpuLaunch(self._sample(batch))
        self._table.extend_block_tables(batch.block_table_update)
        if isinstance(batch, PrefillBatch):
            return CpuLaunch(self._prefill(batch))
        if isinstance(batch, DecodeBatch):
            return CpuLaunch(self._decode(batch))
        slots = torch.from_numpy(batch.slots).long()
        if batch.forced is None:
            self._half_step = self._step_logits(slots)
        else:
            self._table.force(batch.slots, batch.forced)
            self._half_step = self._forced_logits(slots, batch.forced)
        return None

    def _admit(self, admissions: tuple[Admission, ...]) -> None:
        self._table.admit(admissions)
        self._choice.admit(admissions)

    def _prefill(self, batch: PrefillBatch) -> BatchResult:
        self._admit(batch.admissions)
        slots = torch.from_numpy(batch.slots).long()
        hidden = self._forward(
            torch.from_numpy(batch.token_ids).long(), slots, batch.query_lens, batch.start_positions
        )
        if batch.twins is not None:
            sources, targets = map(torch.from_numpy, (batch.twins.sources, batch.twins.targets))
            copy_blocks(self._kv_caches, sources, targets)
        slots = torch.from_numpy(batch.row_slots).long()
        sequences = torch.from_numpy(batch.row_sequences)
        last_rows = torch.from_numpy(np.cumsum(batch.query_lens) - 1)[sequences]
        is_last = torch.from_numpy(batch.is_last_chunk)[sequences]
        lengths = torch.from_numpy(batch.start_positions + batch.query_lens).long()
        self._table.length[slots] = lengths[sequences]
        window = self._window(slots, 1, batch.needs)
        if batch.prompt_targets is not None:
            window.prompt_logprobs = prompt_logprobs(
                hidden, batch.prompt_targets, self._table, self._logits
            )
        if is_last.any():
            rows = torch.nonzero(is_last).squeeze(1)
            self._advance(window, 0, rows, self._logits(hidden[last_rows[rows]]))
        return window.result()

    def _decode(self, batch: DecodeBatch) -> BatchResult:
        slots = torch.from_numpy(batch.slots).long()
        window = self._window(slots, batch.num_steps, batch.needs)
        for step in range(batch.num_steps):
            self._advance(window, step, *self._step_logits(slots))
        return window.result()

    def _sample(self, batch: SampleBatch) -> BatchResult:
        assert self._half_step is not None, "no ForwardBatch before"
        rows_and_logits, self._half_step = self._half_step, None
        window = self._window(torch.from_numpy(batch.slots).long(), 1, batch.needs)
        self._advance(window, 0, *rows_and_logits)
        return window.result()

    def _window(self, slots: Tensor, num_steps: int, needs: RowNeeds | None) -> "_Window":
        device_needs = None if needs is None else DeviceNeeds.of(needs, self._table)
        return _Window(slots, num_steps, device_needs)

    def _step_logits(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The model run on the last tokens of `slots`: which are live, and the logits of those."""
        rows = torch.nonzero(~self._table.is_finished[slots]).squeeze(1)
        query_lens = np.ones(len(slots), dtype=np.int32)
        positions = (self._table.length[slots] - 1).numpy().astype(np.int32)
        hidden = self._forward(self._table.last_token[slots], slots, query_lens, positions)
        return rows, self._logits(hidden[rows])

    def _forced_logits(self, slots: Tensor, forced: ForcedTokens) -> tuple[Tensor, Tensor]:
        """As `_step_logits`, after forced tokens or the last one."""
        table = self._table
        rows_of_tokens, _ = packed_positions(forced.query_lens, forced.start_positions)
        token_ids = torch.from_numpy(forced.token_ids).long()
        drawn = table.last_token[slots][rows_of_tokens]
        token_ids = torch.where(token_ids == DRAWN_LAST, drawn, token_ids)
        rows = torch.nonzero(~table.is_finished[slots]).squeeze(1)
        hidden = self._forward(token_ids, slots, forced.query_lens, forced.start_positions)
        last_tokens = torch.from_numpy(np.cumsum(forced.query_lens) - 1)
        return rows, self._logits(hidden[last_tokens[rows]])

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
                is_finite=self._is_finite,
                all_stored=barrier,
            )
            return self._model(token_ids[start:end], self._kv_caches, metadata)

        parts = _even_parts(len(token_ids), num_parts)
        hidden = torch.cat(self._threads.map(run, parts, barrier))
        self._is_finite = self._is_finite and bool(hidden.isfinite().all())
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        parts = _even_parts(len(hidden), self._num_parts(len(hidden)))
        return torch.cat(
            self._threads.map(lambda p: self._model.logits(hidden[p[0] : p[1]]), parts)
        )

    def _num_parts(self, num_rows: int) -> int:
        """One for each thread, but none too small to be worth a thread."""
        return max(1, min(self._threads.num_threads, num_rows // self._rows_per_part))

    def _advance(self, window: "_Window", step: int, rows: Tensor, logits: Tensor) -> None:
        """Sample the next tokens of some rows of a launch and move their slots on."""
        table, slots = self._table, window.slots[rows]
        if window.needs is None:
            token_ids, is_nan = sample(logits, table, slots)
        else:
            needs, is_asked = window.needs.among(rows)
            token_ids, is_nan, packed = self._choice.choose(
                logits, slots, needs, lambda logits, slots: sample(logits, table, slots)
            )
            if packed is not None:
                window.logprobs[step, is_asked] = packed
        is_stopped = (token_ids.unsqueeze(1) == table.stop_token_ids[slots]).any(dim=1) & ~is_nan
        table.last_token[slots] = token_ids
        table.length[slots] += 1
        is_full = table.length[slots] >= table.max_length[slots]
        table.is_finished[slots] = is_stopped | is_nan | is_full
        window.add(step, rows, token_ids, is_stopped, is_nan)


def _even_parts(num_rows: int, num_parts: int) -> list[tuple[int, int]]:
    """(start, end) of each part."""
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return list(pairwise(bounds))


class _Window:
    """The tokens of a launch, gathered step by step."""

    def __init__(self, slots: Tensor, num_steps: int, needs: DeviceNeeds | None) -> None:
        self.slots = slots
        self.needs = needs
        self.prompt_logprobs: Tensor | None = None  # packed, as the others
        if needs is not None:
            width = 1 + 2 * needs.num_logprobs
            self.logprobs = torch.zeros(
                (num_steps, len(needs.logprob_rows), width), dtype=torch.int32
            )
        self._token_ids = torch.zeros((len(slots), num_steps), dtype=torch.int32)
        self._num_tokens = torch.zeros(len(slots), dtype=torch.int32)
        self._is_stopped = torch.zeros(len(slots), dtype=torch.bool)
        self._is_nan = torch.zeros(len(slots), dtype=torch.bool)

    def add(
        self, step: int, rows: Tensor, token_ids: Tensor, is_stopped: Tensor, is_nan: Tensor
    ) -> None:
        self._token_ids[rows, step] = token_ids.int()
        self._num_tokens[rows] += 1
        self._is_stopped[rows] = is_stopped
        self._is_nan[rows] = is_nan

    def result(self) -> BatchResult:
        logprobs = None
        if self.needs is not None and len(self.needs.logprob_rows):
            logprobs = unpack_steps(self.needs.logprob_rows.numpy(), self.logprobs.numpy())
        prompt = self.prompt_logprobs
        return BatchResult(
            token_ids=self._token_ids.numpy(),
            num_tokens=self._num_tokens.numpy(),
            is_stopped=self._is_stopped.numpy(),
            is_nan=self._is_nan.numpy(),
            logprobs=logprobs,
            prompt_logprobs=None if prompt is None else unpack(prompt.numpy()),
        )
