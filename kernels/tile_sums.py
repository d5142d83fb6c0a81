"""The sum of each tile of a vector: the least work that reads a whole buffer.

What it takes for gigabytes is the machine's read bandwidth. torch's own reductions do not reach it.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

BLOCK = 8192  # 32 KiB a program: eight loads of 16 bytes under way in each of 256 threads


def tile_sums_reference(x: Tensor) -> Tensor:
    """x: float32 [num_tiles * BLOCK] -> [num_tiles]."""
    return x.view(-1, BLOCK).sum(dim=1)


@triton.jit
def tile_sums_kernel(
    x_ptr,  # [num_tiles * BLOCK]
    out_ptr,  # [num_tiles]
    BLOCK: tl.constexpr,
):
    """One program: one tile, in fp32."""
    tile = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + tile * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tile, tl.sum(x, axis=0))


def tile_sums(x: Tensor, out: Tensor) -> None:
    """x: float32 [num_tiles * BLOCK] -> out [num_tiles], in place."""
    assert x.dtype == torch.float32, x.dtype
    assert x.shape == (len(out) * BLOCK,), f"{tuple(x.shape)}: not {len(out)} tiles"
    assert x.is_contiguous(), "x is not contiguous"
    if not runs_on_triton(x):
        out.copy_(tile_sums_reference(x))
    elif len(out):
        tile_sums_kernel[(len(out),)](x, out, BLOCK=BLOCK, num_warps=8)
