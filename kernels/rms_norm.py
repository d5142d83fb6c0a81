"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in fp32; also of a residual stream's new sum.

Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place; returns the norm of the sum. x, residual: [num_rows, size]."""
    residual += x
    return rms_norm_reference(residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize over the last dimension. x: [..., size], weight: [size] -> [..., size], x's dtype.

    Rounds to x's dtype before the weight is applied, as the model was trained.
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


@triton.jit
def normalized(x, weight, eps, size):
    """A row, x fp32, times its weight; rounded to the weight's dtype before and after."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    rounded = (x * scale).to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [num_rows, size]
    residual_ptr,  # [num_rows, size], changed in place
    weight_ptr,  # [size]
    out_ptr,  # [num_rows, size]
    eps,
    size,
    BLOCK: tl.constexpr,
):
    """One program: one row. The sum is rounded to the residual's dtype, then normalized in fp32."""
    row = tl.program_id(0).to(tl.int64) * size
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + offsets, mask=mask, other=0.0)
    total = (residual.to(tl.float32) + x).to(residual.dtype)
    tl.store(residual_ptr + row + offsets, total, mask=mask)
    out = normalized(total.to(tl.float32), weight, eps, size)
    tl.store(out_ptr + row + offsets, out, mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to residual, in place, and return the norm of the sum; all [num_rows, size]."""
    if not runs_on_triton(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    num_rows, size = x.shape
    assert residual.shape == x.shape, f"residual is {residual.shape}, x {x.shape}"
    assert weight.shape == (size,), f"weight {tuple(weight.shape)} for rows of {size}"
    assert x.dtype == residual.dtype == weight.dtype, "x, residual and weight differ in dtype"
    assert x.is_contiguous(), "x is not contiguous"
    assert residual.is_contiguous(), "residual is not contiguous"
    assert weight.is_contiguous(), "weight is not contiguous"
    out = torch.empty_like(x)
    if num_rows:
        block = triton.next_power_of_2(size)
        add_rms_norm_kernel[(num_rows,)](
            x, residual, weight, out, eps, size, BLOCK=block, num_warps=warps_of_row(block)
        )
    return out


def warps_of_row(block: int) -> int:
    """Eight elements a thread, 16 bytes of bf16, where the row is long enough for a warp."""
    return min(max(block // 256, 1), 16)
