"""Logit bias and bad words: a few logits of a row changed, in place.

A token's bias is added to its logit. A bad word is a run of tokens that must not come: where the
last tokens of a sequence are all of it but one, that one's logit becomes minus infinity.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

NO_TOKEN = -1  # fills what is unused
NEVER_A_TOKEN = -2  # before a sequence's first token: equal to nothing, NO_TOKEN included


def bias_logits_reference(
    logits: Tensor, rows: Tensor, slots: Tensor, length: Tensor, table: Any
) -> None:
    """Change some rows of logits: fp32 [num_rows, vocab_size], in place.

    rows, slots: int [num_changed], of logits and of the columns; length: tokens known, int
    [num_slots]. Columns of `table`, int32: bias_ids [num_slots, num_biases] and bias_values (fp32);
    bad_words [num_slots, num_words, width], each word at the right end; last_tokens [num_slots,
    width], that of position p at p % width.
    """
    width = table.last_tokens.shape[1]
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        ids = table.bias_ids[slot].long()
        is_used = ids != NO_TOKEN
        logits[row, ids[is_used]] += table.bias_values[slot, is_used]
        words = table.bad_words[slot].long()
        words = words[words[:, -1] != NO_TOKEN]
        positions = int(length[slot]) - (width - 1) + torch.arange(width - 1)
        recent = table.last_tokens[slot].long()[positions % width]
        recent = recent.masked_fill(positions < 0, NEVER_A_TOKEN)
        is_next = ((words[:, :-1] == recent) | (words[:, :-1] == NO_TOKEN)).all(dim=1)
        logits[row, words[is_next, -1]] = -torch.inf


@triton.jit
def bias_logits_kernel(
    logits_ptr,
    rows_ptr,
    slots_ptr,
    length_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    bad_words_ptr,
    last_tokens_ptr,
    logits_stride,
    NUM_BIASES: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_BIASES: tl.constexpr,
):
    """One program: one row."""
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    biases = tl.arange(0, BLOCK_BIASES)
    is_bias = biases < NUM_BIASES
    ids = tl.load(bias_ids_ptr + slot * NUM_BIASES + biases, mask=is_bias, other=-1)
    values = tl.load(bias_values_ptr + slot * NUM_BIASES + biases, mask=is_bias, other=0.0)
    logits = tl.load(row_ptr + ids, mask=ids >= 0, other=0.0)
    tl.store(row_ptr + ids, logits + values, mask=ids >= 0)
    tl.debug_barrier()  # a token may have a bias and end a bad word

    columns = tl.arange(0, WIDTH)
    positions = tl.load(length_ptr + slot) - (WIDTH - 1) + columns
    is_before = (columns < WIDTH - 1) & (positions >= 0)
    places = last_tokens_ptr + slot * WIDTH + (positions + WIDTH) % WIDTH
    recent = tl.load(places, mask=is_before, other=-2)
    words = tl.arange(0, NUM_WORDS)
    word_ptrs = bad_words_ptr + (slot * NUM_WORDS + words) * WIDTH
    tokens = tl.load(word_ptrs[:, None] + columns[None, :])
    is_same = (tokens == recent[None, :]) | (tokens == -1) | (columns == WIDTH - 1)[None, :]
    is_next = tl.min(is_same.to(tl.int32), axis=1) != 0
    last = tl.load(word_ptrs + WIDTH - 1)
    banned = tl.full([NUM_WORDS], float("-inf"), tl.float32)
    tl.store(row_ptr + last, banned, mask=is_next & (last >= 0))


def bias_logits(logits: Tensor, rows: Tensor, slots: Tensor, length: Tensor, table: Any) -> None:
    """`bias_logits_reference`, on a GPU by one program a row."""
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    if not runs_on_triton(logits):
        bias_logits_reference(logits, rows, slots, length, table)
        return
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    num_biases, num_words = table.bias_ids.shape[1], table.bad_words.shape[1]
    bias_logits_kernel[(len(rows),)](
        logits,
        rows,
        slots,
        length,
        table.bias_ids,
        table.bias_values,
        table.bad_words,
        table.last_tokens,
        logits.stride(0),
        NUM_BIASES=num_biases,
        NUM_WORDS=num_words,
        WIDTH=table.last_tokens.shape[1],
        BLOCK_BIASES=triton.next_power_of_2(num_biases),
    )
