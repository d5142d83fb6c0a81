"""Penalties on tokens that were there before, and the one token that a spent budget leaves.

    repetition: logit * penalty where the logit is negative, else logit / penalty, of tokens of
        prompt and completion (https://arxiv.org/abs/1909.05858, as transformers applies it)
    frequency and presence: logit - count * frequency - (count > 0) * presence, of tokens of the
        completion (OpenAI's)

Where a sequence's thinking is at its end, only the token that ends it may be drawn.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

NEVER = 2**31 - 1  # a thinking_end that no length reaches
_TILE_TOKENS = 4096


def penalize_reference(
    logits: Tensor, rows: Tensor, slots: Tensor, length: Tensor, table: Any
) -> None:
    """Change some rows of logits: fp32 [num_rows, vocab_size], in place.

    rows, slots: int [num_changed], of logits and of the columns; length: tokens known, int
    [num_slots]. Columns of `table`: prompt_words, int32 [num_slots, ceil(vocab_size / 32)], the
    prompt's tokens as bits; counts, int16 [num_slots, vocab_size], the completion's; repetition,
    presence, frequency: fp32 [num_slots]; thinking_end (the length from which on only end_token may
    be drawn) and end_token: int32 [num_slots].
    """
    vocab_size = logits.shape[1]
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        x, counts, repetition = logits[row], table.counts[slot], table.repetition[slot]
        is_there = (counts > 0) | unpack_bits(table.prompt_words[slot], vocab_size)
        x = torch.where(is_there, torch.where(x < 0, x * repetition, x / repetition), x)
        x = x - counts * table.frequency[slot] - (counts > 0) * table.presence[slot]
        if length[slot] >= table.thinking_end[slot]:
            forced = torch.where(x.isnan(), x, 0.0)
            is_end = torch.arange(vocab_size, device=x.device) == table.end_token[slot]
            x = torch.where(is_end, forced, -torch.inf)
        logits[row] = x


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The first `count` bits of int32 words [.., num_words], the lowest of a word first: bool."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return bits.flatten(-2)[..., :count] != 0


@triton.jit
def penalize_kernel(
    logits_ptr,
    rows_ptr,
    slots_ptr,
    length_ptr,
    prompt_words_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    thinking_end_ptr,
    end_token_ptr,
    logits_stride,
    num_words,
    vocab_size,
    TILE: tl.constexpr,
):
    """One program: TILE tokens of one row; it leaves at once where they stay as they are."""
    slot = tl.load(slots_ptr + tl.program_id(1)).to(tl.int64)
    repetition = tl.load(repetition_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    is_over = tl.load(length_ptr + slot) >= tl.load(thinking_end_ptr + slot)
    has_penalty = (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
    if (is_over | has_penalty) == 0:
        return
    row = tl.load(rows_ptr + tl.program_id(1)).to(tl.int64)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_token = ids < vocab_size
    tokens_ptr = logits_ptr + row * logits_stride + ids
    x = tl.load(tokens_ptr, mask=is_token, other=0.0)
    if has_penalty:
        count = tl.load(counts_ptr + slot * vocab_size + ids, mask=is_token, other=0)
        word = tl.load(prompt_words_ptr + slot * num_words + ids // 32, mask=is_token, other=0)
        is_there = (count > 0) | (((word >> (ids % 32)) & 1) != 0)
        penalized = tl.where(x < 0, x * repetition, x / repetition)
        x = tl.where(is_there, penalized, x)
        x = x - count.to(tl.float32) * frequency - tl.where(count > 0, presence, 0.0)
    if is_over:
        forced = tl.where(x != x, x, 0.0)
        x = tl.where(ids == tl.load(end_token_ptr + slot), forced, float("-inf"))
    tl.store(tokens_ptr, x, mask=is_token)


def penalize(logits: Tensor, rows: Tensor, slots: Tensor, length: Tensor, table: Any) -> None:
    """`penalize_reference`, on a GPU by a program for each row and tile of tokens."""
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    if not runs_on_triton(logits):
        penalize_reference(logits, rows, slots, length, table)
        return
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    vocab_size = logits.shape[1]
    penalize_kernel[(triton.cdiv(vocab_size, _TILE_TOKENS), len(rows))](
        logits,
        rows,
        slots,
        length,
        table.prompt_words,
        table.counts,
        table.repetition,
        table.presence,
        table.frequency,
        table.thinking_end,
        table.end_token,
        logits.stride(0),
        table.prompt_words.shape[1],
        vocab_size,
        TILE=_TILE_TOKENS,
    )
