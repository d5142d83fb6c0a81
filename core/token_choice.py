"""TokenChoice: the next tokens of rows that ask for more than a draw, on any device.

The model's logits -> log-probabilities -> masks and adjustments -> the draw that every row has ->
what is kept of the tokens. Launches in which no row asks for anything do not come here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.adjustment_table import AdjustmentTable
from nanovllm_cli.core.batch import Admission, Int32, PromptTargets, RowLogprobs, RowNeeds, no_rows
from nanovllm_cli.core.parallel import TensorParallel
from nanovllm_cli.core.request import Float32, Logprobs
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.logprobs import likeliest
from nanovllm_cli.kernels.token_mask import mask_tokens

# Logits, perhaps changed in place, and slots -> the next tokens; and whether a row was not finite.
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Prompt tokens whose logits are there at a time: 156 MB at 151,936 tokens in bfloat16; on a CPU,
# where the reference makes several fp32 copies, 39 MB each.
_ROWS_AT_A_TIME = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceNeeds:
    """RowNeeds as int32 tensors."""

    adjusted_rows: Tensor
    logprob_rows: Tensor
    num_logprobs: int
    is_masked: bool
    mask_rows: Tensor
    mask_words: Tensor | None  # the first rank's alone

    @classmethod
    def of(cls, needs: RowNeeds, table: SlotTable) -> "DeviceNeeds":
        """Copied without waiting."""
        masks = needs.masks
        rows = [needs.adjusted_rows, needs.logprob_rows]
        rows.append(no_rows() if masks is None else masks.rows)
        adjusted, logprobs, masked = table.all_to_device(*rows)
        return cls(
            adjusted_rows=adjusted,
            logprob_rows=logprobs,
            num_logprobs=needs.num_logprobs,
            is_masked=masks is not None,
            mask_rows=masked,
            mask_words=(
                table.to_device(masks.words) if masks is not None and masks.words.size else None
            ),
        )

    def among(self, live_rows: Tensor) -> tuple["DeviceNeeds", Tensor]:
        """Those of some rows, ascending, by their places there; and which logprob_rows it has."""

        def places(rows: Tensor) -> tuple[Tensor, Tensor]:
            is_live = torch.isin(rows, live_rows)
            return torch.searchsorted(live_rows, rows[is_live].to(live_rows.dtype)), is_live

        logprob_rows, is_asked = places(self.logprob_rows)
        mask_rows, is_masked = places(self.mask_rows)
        needs = DeviceNeeds(
            adjusted_rows=places(self.adjusted_rows)[0],
            logprob_rows=logprob_rows,
            num_logprobs=self.num_logprobs,
            is_masked=self.is_masked,
            mask_rows=mask_rows,
            mask_words=None if self.mask_words is None else self.mask_words[is_masked],
        )
        return needs, is_asked


class TokenChoice:
    """Beside a slot table. Its own is allocated when the first sequence comes that needs one."""

    def __init__(self, table: SlotTable, vocab_size: int, parallel: TensorParallel) -> None:
        self._table = table
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._adjustments: AdjustmentTable | None = None

    def admit(self, admissions: tuple[Admission, ...]) -> None:
        """Take in how sequences that enter their slots want their logits changed."""
        asking = {a.slot: a.adjustment for a in admissions if a.adjustment is not None}
        if asking:
            if self._adjustments is None:
                self._adjustments = AdjustmentTable(self._table, self._vocab_size)
            self._adjustments.admit(asking)

    def kernels(self, dtype: torch.dtype, draw: Draw) -> list[Callable[[], object]]:
        """Calls that run what takes longest to compile, over zeros and on the idle slot."""
        device = self._table.length.device
        row = torch.zeros(1, dtype=torch.int32, device=device)
        words = torch.zeros(1, -(-self._vocab_size // 32), dtype=torch.int32, device=device)

        def logits(dtype: torch.dtype) -> Tensor:
            return torch.zeros(1, self._vocab_size, dtype=dtype, device=device)

        return [
            lambda: draw(logits(torch.float32), row + self._table.idle_slot),
            lambda: likeliest(logits(dtype), row, 1),
            lambda: mask_tokens(logits(dtype), row, words),
        ]

    def choose(
        self,
        logits: Tensor,
        slots: Tensor,
        needs: DeviceNeeds,
        draw: Draw,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `draw` gives for logits, adjusted, and slots; and packed log-probabilities.

        logits: [num_rows, vocab_size], perhaps changed in place; slots: int [num_rows].
        """
        own, changed = logits, needs.adjusted_rows
        top = None
        if len(needs.logprob_rows):
            top = likeliest(logits, needs.logprob_rows, needs.num_logprobs)
        if len(changed):  # a copy: bfloat16 would lose what penalties do
            logits = logits.to(torch.float32, copy=True)
        if needs.mask_words is not None:
            mask_tokens(logits, needs.mask_rows, needs.mask_words)
        if len(changed):
            assert self._adjustments is not None, "no admission has asked for it"
            self._adjustments.adjust(logits, changed, slots[changed])
        token_ids, is_nan = draw(logits, slots)
        if needs.is_masked and self._parallel.size > 1:
            chosen = torch.stack((token_ids, is_nan.to(token_ids.dtype)))
            self._parallel.take_first(chosen)
            token_ids, is_nan = chosen[0], chosen[1] != 0
        packed = None
        if top is not None:
            rows = needs.logprob_rows
            # What drawing and masks overwrite is never a token that was drawn.
            packed = _pack(own[rows, token_ids[rows]], *top)
        if len(changed):
            assert self._adjustments is not None, "no admission has asked for it"
            self._adjustments.record(changed, slots[changed], token_ids)
        return token_ids, is_nan, packed


def prompt_logprobs(
    hidden: Tensor,
    targets: PromptTargets,
    table: SlotTable,
    logits_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Packed log-probabilities of a prefill's prompt tokens, from its hidden states.

    Not all logits are there at once, whatever the length of the prompts.
    """
    rows, token_ids = table.to_device(targets.hidden_rows), table.to_device(targets.token_ids)
    size = _ROWS_AT_A_TIME[hidden.device.type]
    parts = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        logits = logits_of(hidden[rows[part]])
        index = torch.arange(len(logits), dtype=torch.int32, device=hidden.device)
        top = likeliest(logits, index, targets.num_logprobs)
        parts.append(_pack(logits[index, token_ids[part]], *top))
    return torch.cat(parts)


def _pack(logits: Tensor, normalizer: Tensor, top_ids: Tensor, top_values: Tensor) -> Tensor:
    """int32 [num_rows, 1 + 2 * k]: a token's own log-probability, k ids and k log-probabilities."""
    values = (logits.float() - normalizer).unsqueeze(1)
    return torch.cat((values.view(torch.int32), top_ids, top_values.view(torch.int32)), dim=1)


def unpack(packed: Int32) -> Logprobs:
    """Of packed rows [.., 1 + 2 * k]; nothing is shared with them."""
    k = packed.shape[-1] // 2

    def floats(part: Int32) -> Float32:
        return part.copy().view(np.float32)

    return Logprobs(
        values=floats(packed[..., 0]),
        top_ids=packed[..., 1 : 1 + k].copy(),
        top_values=floats(packed[..., 1 + k :]),
    )


def unpack_steps(rows: Int32, packed: Int32) -> RowLogprobs:
    """Of a launch's steps: [num_steps, num_rows, 1 + 2 * k]."""
    by_row = unpack(packed.swapaxes(0, 1))
    return RowLogprobs(
        rows=rows, values=by_row.values, top_ids=by_row.top_ids, top_values=by_row.top_values
    )
