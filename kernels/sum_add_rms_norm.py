"""The sum over ranks, the residual stream and its RMSNorm, in one kernel on several GPUs.

    residual += sum of every rank's terms;  out = norm(residual)

Each rank does this for every NUM_RANKS-th row: it reads the others' terms of that row in their
memory and stores the norm in everyone's. So a row's residual is kept by one rank alone, and is
never sent. It takes the place of an all-reduce (two-shot: reduce, then gather) and of a norm that
every rank would make of every row.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.meeting import max_blocks, meet, note_meetings, num_meetings
from nanovllm_cli.kernels.rms_norm import normalized, rms_norm_reference, warps_of_row
from nanovllm_cli.kernels.triton_import import tl, triton


def sum_add_rms_norm_reference(
    terms: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """terms: [num_ranks, num_rows, size]; residual: [num_rows, size], changed in place."""
    residual.copy_(residual.float() + terms.float().sum(dim=0))
    return rms_norm_reference(residual, weight, eps)


@triton.jit
def load_row(ptr, row, num_rows, size, offsets):
    """Zeros beyond the last."""
    mask = (offsets < size) & (row + 0 * offsets < num_rows)
    return tl.load(ptr + tl.cast(row, tl.int64) * size + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def sum_add_rms_norm_kernel(
    term_ptrs,  # int64 [NUM_RANKS], addresses of [num_rows, size]
    out_ptrs,  # int64 [NUM_RANKS], likewise
    signal_ptrs,  # int64 [NUM_RANKS], addresses of int32 [blocks, NUM_RANKS], zeros at first
    residual_ptr,  # [num_rows, size], changed in place
    weight_ptr,  # [size]
    eps,
    num_rows,
    size,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some of this rank's rows, one after the other. Sums in fp32, in ranks' order.

    What is this GPU's own is loaded before the others are waited for.
    """
    block = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    own_terms = tl.multiple_of(tl.load(term_ptrs + RANK).to(weight_ptr.dtype), 16)
    count = num_meetings(signal_ptrs, block, RANK, NUM_RANKS)
    row = block * NUM_RANKS + RANK
    residual = load_row(residual_ptr, row, num_rows, size, offsets)
    own = load_row(own_terms, row, num_rows, size, offsets)
    meet(signal_ptrs, block, count + 1, RANK, NUM_RANKS)
    while row < num_rows:
        start = tl.cast(row, tl.int64) * size
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(NUM_RANKS):
            x = own
            if rank != RANK:
                terms = tl.multiple_of(tl.load(term_ptrs + rank).to(weight_ptr.dtype), 16)
                # .cg: a peer's memory is read past L1, which may hold an older line of it.
                x = tl.load(terms + start + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            total += x.to(tl.float32)
        total = (residual.to(tl.float32) + total).to(residual.dtype)
        tl.store(residual_ptr + start + offsets, total, mask=mask)
        norm = normalized(total.to(tl.float32), weight, eps, size)
        for rank in tl.static_range(NUM_RANKS):
            out = tl.multiple_of(tl.load(out_ptrs + rank).to(weight_ptr.dtype), 16)
            tl.store(out + start + offsets, norm, mask=mask)
        row += tl.num_programs(0) * NUM_RANKS
        residual = load_row(residual_ptr, row, num_rows, size, offsets)
        own = load_row(own_terms, row, num_rows, size, offsets)
    meet(signal_ptrs, block, count + 2, RANK, NUM_RANKS)
    note_meetings(signal_ptrs, block, count + 2, RANK, NUM_RANKS)


def sum_add_rms_norm(
    term_ptrs: Tensor,
    out_ptrs: Tensor,
    signal_ptrs: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    rank: int,
    signal_bytes: int,
) -> None:
    """Add every rank's terms to this rank's rows of residual; their norms go to every rank's out.

    residual: [num_rows, size], changed in place in rows rank, rank + num_ranks, ...; the pointers:
    int64 [num_ranks], by rank, of memory that this GPU reaches: terms and out like residual,
    contiguous, and signals, `signal_bytes` that were zeros before the first call of any kernel that
    meets there. Every rank makes the same calls in the same order, on one stream.
    """
    num_rows, size = residual.shape
    num_ranks = len(term_ptrs)
    pointers = (term_ptrs, out_ptrs, signal_ptrs)
    assert all(p.dtype == torch.int64 and len(p) == num_ranks for p in pointers), "bad pointers"
    assert weight.shape == (size,), f"weight {tuple(weight.shape)} for rows of {size}"
    assert residual.dtype == weight.dtype, "residual and weight differ in dtype"
    assert residual.is_contiguous(), "residual is not contiguous"
    assert weight.is_contiguous(), "weight is not contiguous"
    if num_rows:
        block = triton.next_power_of_2(size)
        num_blocks = min(triton.cdiv(num_rows, num_ranks), max_blocks(num_ranks, signal_bytes))
        sum_add_rms_norm_kernel[(num_blocks,)](
            *pointers,
            residual,
            weight,
            eps,
            num_rows,
            size,
            RANK=rank,
            NUM_RANKS=num_ranks,
            BLOCK=block,
            num_warps=warps_of_row(block),
        )
