"""Rotary position embedding, the two halves of a head as the two parts of the complex plane.

Su et al. 2021, https://arxiv.org/abs/2104.09864; the half-split layout is GPT-NeoX's.
"""

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head by its token's position.

    x: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, head_dim / 2], fp32.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
