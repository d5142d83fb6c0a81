"""What is kept of the tokens drawn: how often each came, the last few, whether thinking is over."""

from typing import Any

import torch
from torch import Tensor

from nanovllm_cli.kernels.penalties import NEVER
from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

_ROWS_PER_PROGRAM = 128
MAX_COUNT = 2**15 - 1


def record_tokens_reference(
    rows: Tensor, slots: Tensor, sampled: Tensor, length: Tensor, is_finished: Tensor, table: Any
) -> None:
    """Take in the tokens just drawn, before their slots are moved on.

    rows, slots: int [num_recorded], of sampled and of the columns; sampled: int [num_rows]; length
    (the new token's position), is_finished: [num_slots]. Columns of `table`, changed in place:
    counts, int16 [num_slots, vocab_size]; last_tokens, int32 [num_slots, width], that of position p
    at p % width; thinking_end and end_token, int32 [num_slots].
    """
    is_live = ~is_finished[slots]
    slots, tokens = slots[is_live], sampled[rows[is_live]].int()
    counts = table.counts[slots, tokens].int() + 1
    table.counts[slots, tokens] = counts.clamp(max=MAX_COUNT).short()
    table.last_tokens[slots, length[slots] % table.last_tokens.shape[1]] = tokens
    table.thinking_end[slots[tokens == table.end_token[slots]]] = NEVER


@triton.jit(do_not_specialize=["num_rows"])
def record_tokens_kernel(
    rows_ptr,
    slots_ptr,
    sampled_ptr,
    length_ptr,
    is_finished_ptr,
    counts_ptr,
    last_tokens_ptr,
    thinking_end_ptr,
    end_token_ptr,
    num_rows,
    vocab_size,
    WIDTH: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    NEVER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS of the rows."""
    indices = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = indices < num_rows
    rows = tl.load(rows_ptr + indices, mask=is_row, other=0)
    slots = tl.load(slots_ptr + indices, mask=is_row, other=0).to(tl.int64)
    is_live = is_row & (tl.load(is_finished_ptr + slots, mask=is_row, other=1) == 0)
    tokens = tl.load(sampled_ptr + rows, mask=is_live, other=0)
    count_ptrs = counts_ptr + slots * vocab_size + tokens
    counts = tl.load(count_ptrs, mask=is_live, other=0).to(tl.int32) + 1
    tl.store(count_ptrs, tl.minimum(counts, MAX_COUNT).to(tl.int16), mask=is_live)
    places = tl.load(length_ptr + slots, mask=is_live, other=0) % WIDTH
    tl.store(last_tokens_ptr + slots * WIDTH + places, tokens, mask=is_live)
    is_end = tokens == tl.load(end_token_ptr + slots, mask=is_live, other=-1)
    never = tl.zeros([ROWS], tl.int32) + NEVER
    tl.store(thinking_end_ptr + slots, never, mask=is_live & is_end)


def record_tokens(
    rows: Tensor, slots: Tensor, sampled: Tensor, length: Tensor, is_finished: Tensor, table: Any
) -> None:
    """`record_tokens_reference`, on a GPU by one small kernel."""
    if not runs_on_triton(sampled):
        record_tokens_reference(rows, slots, sampled, length, is_finished, table)
        return
    record_tokens_kernel[(triton.cdiv(len(rows), _ROWS_PER_PROGRAM),)](
        rows,
        slots,
        sampled,
        length,
        is_finished.view(torch.int8),
        table.counts,
        table.last_tokens,
        table.thinking_end,
        table.end_token,
        len(rows),
        table.counts.shape[1],
        WIDTH=table.last_tokens.shape[1],
        MAX_COUNT=MAX_COUNT,
        NEVER=NEVER,
        ROWS=_ROWS_PER_PROGRAM,
    )
