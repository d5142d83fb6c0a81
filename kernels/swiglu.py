"""SwiGLU: silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

BLOCK = 1024


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * size], the gates first -> [num_tokens, size].

    Written with exp, which gives an element the same bits wherever it lies; torch's silu takes
    another path for the last elements of a thread's share.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return wide.neg().exp_().add_(1).reciprocal_().mul_(wide).to(gate.dtype).mul_(up)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [num_tokens, 2 * size]: gates, then ups
    out_ptr,  # [num_tokens, size]
    size,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one token, in fp32; silu(gate) is rounded to the dtype."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate_ptr = gate_up_ptr + row * (2 * size) + columns
    gate = tl.load(gate_ptr, mask=mask, other=0.0)
    up = tl.load(gate_ptr + size, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    out = (silu * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * size + columns, out, mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * size], the gates first -> [num_tokens, size]."""
    if not runs_on_triton(gate_up):
        return swiglu_reference(gate_up)
    num_tokens, columns = gate_up.shape
    size = columns // 2
    assert columns == 2 * size, f"{columns} columns: not gates and as many ups"
    assert gate_up.is_contiguous(), "gate_up is not contiguous"
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, BLOCK))
        swiglu_kernel[grid](gate_up, out, size, BLOCK=BLOCK, num_warps=4)
    return out
