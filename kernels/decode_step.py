"""The two ends of a captured decode step: read the slots' state, and move it on.

A step knows its batch only as a list of slots. `prepare` gathers what the model needs of them;
`advance` stores the tokens that were drawn, and finishes the sequences that are at their end. A
finished slot stays in the batch until the host drops it: it attends to nothing, writes its K and V
to the scratch block and gives no tokens.

The window's output has one row a number and one column a row of the batch: tokens that count,
whether the last one is a stop token, whether the logits were not finite, then the tokens of step
0, 1, ... `step` counts them; `prepare` moves it on before `advance` reads it.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import tl, triton

OUT_ROWS_BEFORE_TOKENS = 3
_ROWS_PER_PROGRAM = 128


@triton.jit(do_not_specialize=["num_rows", "block_table_stride"])
def prepare_kernel(
    slots_ptr,
    last_token_ptr,
    length_ptr,
    is_finished_ptr,
    block_table_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    context_lens_ptr,
    step_ptr,
    num_rows,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS rows of the batch; the first one also counts the step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
    length = tl.load(length_ptr + slots, mask=is_row, other=0)
    is_live = is_row & (tl.load(is_finished_ptr + slots, mask=is_row, other=1) == 0)
    positions = tl.where(is_live, length - 1, 0)
    entries = block_table_ptr + slots.to(tl.int64) * block_table_stride + positions // BLOCK_SIZE
    block_ids = tl.load(entries, mask=is_live, other=0).to(tl.int64)
    tokens = tl.load(last_token_ptr + slots, mask=is_live, other=0)
    tl.store(token_ids_ptr + rows, tokens, mask=is_row)
    tl.store(positions_ptr + rows, positions, mask=is_row)
    tl.store(slot_mapping_ptr + rows, block_ids * BLOCK_SIZE + positions % BLOCK_SIZE, mask=is_row)
    # By slot, not by row: rows that fill the batch up share the idle slot, and all store its 0.
    tl.store(context_lens_ptr + slots, tl.where(is_live, length, 0), mask=is_row)
    if tl.program_id(0) == 0:
        tl.store(step_ptr, tl.load(step_ptr) + 1)


@triton.jit(do_not_specialize=["num_rows", "out_stride"])
def advance_kernel(
    slots_ptr,
    sampled_ptr,
    is_nan_ptr,
    last_token_ptr,
    length_ptr,
    max_length_ptr,
    is_finished_ptr,
    stop_token_ids_ptr,
    out_ptr,
    step_ptr,
    num_rows,
    out_stride,
    FIRST_TOKEN_ROW: tl.constexpr,
    STOPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS rows of the batch."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
    is_live = is_row & (tl.load(is_finished_ptr + slots, mask=is_row, other=1) == 0)
    tokens = tl.load(sampled_ptr + rows, mask=is_live, other=0)
    is_nan = tl.load(is_nan_ptr + rows, mask=is_live, other=0) != 0
    stops = stop_token_ids_ptr + slots[:, None].to(tl.int64) * STOPS + tl.arange(0, STOPS)[None, :]
    hits = tl.load(stops, mask=is_live[:, None], other=-1) == tokens[:, None]
    is_stopped = (tl.max(hits.to(tl.int32), axis=1) > 0) & ~is_nan
    length = tl.load(length_ptr + slots, mask=is_live, other=0) + 1
    is_full = length >= tl.load(max_length_ptr + slots, mask=is_live, other=0)
    tl.store(last_token_ptr + slots, tokens, mask=is_live)
    tl.store(length_ptr + slots, length, mask=is_live)
    tl.store(is_finished_ptr + slots, (is_stopped | is_nan | is_full).to(tl.int8), mask=is_live)
    step = tl.load(step_ptr) - 1
    counts = tl.load(out_ptr + rows, mask=is_live, other=0)
    tl.store(out_ptr + rows, counts + 1, mask=is_live)
    tl.store(out_ptr + out_stride + rows, is_stopped.to(tl.int32), mask=is_live)
    tl.store(out_ptr + 2 * out_stride + rows, is_nan.to(tl.int32), mask=is_live)
    out = out_ptr + (FIRST_TOKEN_ROW + step).to(tl.int64) * out_stride
    tl.store(out + rows, tokens, mask=is_live)


def prepare(
    slots: Tensor,
    table: Any,
    *,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    step: Tensor,
    block_size: int,
) -> None:
    """Fill the step's inputs of `slots`, int32 [num_rows], from the columns of `table`.

    token_ids, positions: int32 [num_rows]; slot_mapping: int64 [num_rows]; context_lens: int32
    [num_slots], by slot; step: int32 [1].
    """
    num_rows = len(slots)
    prepare_kernel[(triton.cdiv(num_rows, _ROWS_PER_PROGRAM),)](
        slots,
        table.last_token,
        table.length,
        table.is_finished.view(torch.int8),
        table.block_table,
        token_ids,
        positions,
        slot_mapping,
        context_lens,
        step,
        num_rows,
        table.block_table.stride(0),
        BLOCK_SIZE=block_size,
        ROWS=_ROWS_PER_PROGRAM,
    )


def advance(
    slots: Tensor, sampled: Tensor, is_nan: Tensor, table: Any, *, out: Tensor, step: Tensor
) -> None:
    """Store what was drawn for `slots` and move the columns of `table` on, in place.

    slots, sampled: int32 [num_rows]; is_nan: int8 [num_rows]; out: int32 [3 + steps, >= num_rows],
    the window's output; step: int32 [1], the steps begun.
    """
    num_rows = len(slots)
    advance_kernel[(triton.cdiv(num_rows, _ROWS_PER_PROGRAM),)](
        slots,
        sampled,
        is_nan,
        table.last_token,
        table.length,
        table.max_length,
        table.is_finished.view(torch.int8),
        table.stop_token_ids,
        out,
        step,
        num_rows,
        out.stride(0),
        FIRST_TOKEN_ROW=OUT_ROWS_BEFORE_TOKENS,
        STOPS=table.stop_token_ids.shape[1],
        ROWS=_ROWS_PER_PROGRAM,
    )
