"""Every rank's columns of a matrix side by side, read by each GPU out of the others' memory.

    out[row, rank * part + column] = columns of rank[row, column]

It takes the place of an all-gather, which stacks the parts, and of the copy that then lays them out
in rows.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.meeting import max_blocks, meet, note_meetings, num_meetings
from nanovllm_cli.kernels.triton_import import tl, triton

_TILE = 8192  # columns a program moves at once: 16 KiB under way for each multiprocessor
_NUM_WARPS = 16


def join_columns_reference(parts: Tensor, num_columns: int) -> Tensor:
    """parts: [num_ranks, num_rows, part] -> [num_rows, num_columns], the rest left out."""
    return parts.transpose(0, 1).reshape(parts.shape[1], -1)[:, :num_columns]


@triton.jit(do_not_specialize=["num_tiles"])
def join_columns_kernel(
    part_ptrs,  # int64 [NUM_RANKS], addresses of [num_rows, part]
    signal_ptrs,  # int64 [NUM_RANKS]
    out_ptr,  # [num_rows, num_columns]
    num_tiles,  # of all rows of one part
    part,
    num_columns,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: some tiles of a row, of every rank's part; its own rank's last."""
    block = tl.program_id(0)
    tiles_per_row = tl.cdiv(part, TILE)
    count = num_meetings(signal_ptrs, block, RANK, NUM_RANKS)
    meet(signal_ptrs, block, count + 1, RANK, NUM_RANKS)
    for tile in range(block, num_tiles, tl.num_programs(0)):
        row = tl.cast(tile // tiles_per_row, tl.int64)
        columns = tile % tiles_per_row * TILE + tl.arange(0, TILE)
        for distance in tl.static_range(1, NUM_RANKS + 1):
            rank = (RANK + distance) % NUM_RANKS
            mask = (columns < part) & (rank * part + columns < num_columns)
            parts = tl.multiple_of(tl.load(part_ptrs + rank).to(out_ptr.dtype), 16)
            # .cg: a peer's memory is read past L1, which may hold an older line of it.
            x = tl.load(parts + row * part + columns, mask=mask, cache_modifier=".cg")
            tl.store(out_ptr + row * num_columns + rank * part + columns, x, mask=mask)
    meet(signal_ptrs, block, count + 2, RANK, NUM_RANKS)
    note_meetings(signal_ptrs, block, count + 2, RANK, NUM_RANKS)


def join_columns(
    part_ptrs: Tensor,
    signal_ptrs: Tensor,
    out: Tensor,
    part: int,
    *,
    rank: int,
    signal_bytes: int,
) -> None:
    """Fill out, [num_rows, num_columns], from every rank's [num_rows, part], contiguous.

    The pointers: int64 [num_ranks], by rank, of memory that this GPU reaches; signals:
    `signal_bytes` that were zeros before the first call of any kernel that meets there. Every rank
    makes the same calls in the same order, on one stream.
    """
    num_rows, num_columns = out.shape
    num_ranks = len(part_ptrs)
    assert part_ptrs.dtype == signal_ptrs.dtype == torch.int64, "a pointer is not int64"
    assert len(signal_ptrs) == num_ranks, "pointers of another number of ranks"
    assert num_columns <= num_ranks * part, f"{num_columns} columns of {num_ranks} x {part}"
    assert out.is_contiguous(), "out is not contiguous"
    if num_rows:
        num_tiles = num_rows * triton.cdiv(part, _TILE)
        join_columns_kernel[(min(num_tiles, max_blocks(num_ranks, signal_bytes)),)](
            part_ptrs,
            signal_ptrs,
            out,
            num_tiles,
            part,
            num_columns,
            RANK=rank,
            NUM_RANKS=num_ranks,
            TILE=_TILE,
            num_warps=_NUM_WARPS,
        )
