"""How each slot's logits are changed before a token is chosen, on the device: one row a slot.

There only where some sequence asked for it: a table of counts is as large as the vocabulary, and
lies outside of what the KV cache leaves. A row is written when its sequence is admitted, with the
tokens that it has by then, and moved on by each step, so that a window needs no look from the host.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import Adjustment, Int32
from nanovllm_cli.core.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.logit_bias import NO_TOKEN, bias_logits
from nanovllm_cli.kernels.penalties import NEVER, penalize
from nanovllm_cli.kernels.token_counts import MAX_COUNT, record_tokens


class AdjustmentTable:
    """Columns [max_num_seqs + 1], as the slot table's; its length and is_finished are read."""

    def __init__(self, table: SlotTable, vocab_size: int) -> None:
        num_slots, device = len(table.length), table.length.device

        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((num_slots, *shape), dtype=dtype, device=device)

        self._slots = table
        self.repetition = column(torch.float32)
        self.presence = column(torch.float32)
        self.frequency = column(torch.float32)
        self.thinking_end = column(torch.int32)
        self.end_token = column(torch.int32)
        self.bias_ids = column(torch.int32, MAX_LOGIT_BIAS)
        self.bias_values = column(torch.float32, MAX_LOGIT_BIAS)
        self.bad_words = column(torch.int32, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
        self.last_tokens = column(torch.int32, MAX_BAD_WORD_TOKENS)
        self.prompt_words = column(torch.int32, -(-vocab_size // 32))
        self.counts = column(torch.int16, vocab_size)

    def admit(self, adjustments: dict[int, Adjustment]) -> None:
        """Write the rows of sequences that enter their slots, or go on in them; by slot."""

        def columns(dtype: type, *names: str) -> dict[str, Any]:
            shapes = {name: getattr(self, name).shape[1:] for name in names}
            return {n: np.full((len(adjustments), *s), NO_TOKEN, dtype) for n, s in shapes.items()}

        reals = columns(np.float32, "repetition", "presence", "frequency", "bias_values")
        integers = columns(np.int32, "thinking_end", "end_token", "bias_ids", "bad_words")
        integers |= columns(np.int32, "last_tokens", "prompt_words")
        counted = []  # [3, number of different tokens]: slot, token, how often it came
        for i, (slot, a) in enumerate(adjustments.items()):
            row = {name: column[i, ...] for name, column in (reals | integers).items()}
            row["repetition"][...] = a.repetition_penalty
            row["presence"][...] = a.presence_penalty
            row["frequency"][...] = a.frequency_penalty
            row["thinking_end"][...] = NEVER if a.thinking_end is None else a.thinking_end
            if a.end_think_token_id is not None:
                row["end_token"][...] = a.end_think_token_id
            for place, (token_id, bias) in enumerate(a.logit_bias):
                row["bias_ids"][place], row["bias_values"][place] = token_id, bias
            for place, word in enumerate(a.bad_words):
                row["bad_words"][place, -len(word) :] = word
            num_tokens = len(a.prompt_token_ids) + len(a.completion_token_ids)
            last = _last_tokens(a, MAX_BAD_WORD_TOKENS)
            positions = np.arange(num_tokens - len(last), num_tokens)
            row["last_tokens"][positions % MAX_BAD_WORD_TOKENS] = last
            is_in_prompt = np.zeros(row["prompt_words"].size * 32, dtype=np.bool_)
            is_in_prompt[a.prompt_token_ids] = True
            bits = np.packbits(is_in_prompt, bitorder="little")
            row["prompt_words"][:] = bits.view(np.int32)
            ids, counts = np.unique(a.completion_token_ids, return_counts=True)
            counted.append(np.stack((np.full_like(ids, slot), ids, counts.clip(max=MAX_COUNT))))
        to_device = self._slots.to_device
        index = to_device(np.array(list(adjustments), dtype=np.int32)).long()
        for name, values in (reals | integers).items():
            column = getattr(self, name)
            column[index] = to_device(values.view(np.int32)).view(column.dtype)
        self.counts.index_fill_(0, index, 0)
        came = to_device(np.concatenate(counted, axis=1, dtype=np.int32))
        self.counts[came[0].long(), came[1].long()] = came[2].short()

    def adjust(self, logits: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Change some rows of logits, fp32 [num_rows, vocab_size], in place.

        rows: int [num_adjusted]; slots: theirs.
        """
        bias_logits(logits, rows, slots, self._slots.length, self)
        penalize(logits, rows, slots, self._slots.length, self)

    def record(self, rows: Tensor, slots: Tensor, sampled: Tensor) -> None:
        """Take in the tokens drawn for some rows, before the slot table moves on.

        sampled: int [num_rows], of all rows.
        """
        table = self._slots
        record_tokens(rows, slots, sampled, table.length, table.is_finished, self)


def _last_tokens(adjustment: Adjustment, count: int) -> Int32:
    completion = adjustment.completion_token_ids[-count:]
    missing = count - len(completion)
    prompt = adjustment.prompt_token_ids
    return np.concatenate((prompt[max(len(prompt) - missing, 0) :], completion))
