"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in fp32.

Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize over the last dimension. x: [..., size], weight: [size] -> [..., size], x's dtype.

    Rounds to x's dtype before the weight is applied, as the model was trained.
    """
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)
