"""Keys: integers in the order of a row's logits, so that a threshold is found by bisection.

A key is the bits of an fp32 number, turned so that they compare as integers; of a 16-bit logit
only the bits that it has. A logit is scaled when it is divided by the temperature.
"""

import torch

from nanovllm_cli.kernels.triton_import import tl, triton

# Zero bits at the end of a logit of this dtype as fp32: its order needs only those before them.
KEY_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def key_of(x, KEY_SHIFT: tl.constexpr):
    """int32 in the order of the fp32 values x, whose last KEY_SHIFT bits are zero."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> KEY_SHIFT


@triton.jit
def key_and_scaled(x, temperature, KEY_SHIFT: tl.constexpr):
    """Two fp32 logits may have one quotient, so there the quotient is the key."""
    scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
    if KEY_SHIFT == 0:
        return key_of(scaled, 0), scaled
    else:
        return key_of(x, KEY_SHIFT), scaled


@triton.jit
def mass_of(key, temperature, best, KEY_SHIFT: tl.constexpr):
    """exp(scaled - best) of a token with this key."""
    wide = key << KEY_SHIFT
    wide = tl.where(key < 0, wide | ((1 << KEY_SHIFT) - 1), wide)
    value = (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if KEY_SHIFT != 0:
        value = tl.div_rn(value, temperature)
    return tl.exp(value - best)


@triton.jit
def middle_of(low, high):
    """Without overflow."""
    return (low & high) + ((low ^ high) >> 1)
