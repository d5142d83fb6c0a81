"""SwiGLU: silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * size], the gates first -> [num_tokens, size].

    Written with exp, which gives an element the same bits wherever it lies; torch's silu takes
    another path for the last elements of a thread's share.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up
