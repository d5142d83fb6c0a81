"""Between the QKV product and attention: RMSNorm and rotation of q and k, K and V to their pages.

    q = rotate(rms_norm(q) * q_weight), k = rotate(rms_norm(k) * k_weight), for every head;
    k_cache[block, :, offset] = k, v_cache[block, :, offset] = v

RMSNorm is Zhang & Sennrich's (https://arxiv.org/abs/1910.07467), the rotation Su et al.'s
(https://arxiv.org/abs/2104.09864), a head's two halves as the parts of the complex plane.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.kv_store import kv_store_reference
from nanovllm_cli.kernels.rms_norm import rms_norm_reference
from nanovllm_cli.kernels.rotary import rotary_reference
from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

LARGE_BATCH = 512  # tokens from which on larger programs are quicker


def qk_norm_rope_store_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """The meaning of `qk_norm_rope_store`: one operation after the other."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(len(qkv), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos[positions.long()], sin[positions.long()]
    k = rotary_reference(rms_norm_reference(k, k_weight, eps), cos, sin)
    kv_store_reference(k, v, k_cache, v_cache, slot_mapping)
    return rotary_reference(rms_norm_reference(q, q_weight, eps), cos, sin)


@triton.jit
def norm_and_rotate(first, second, weight_ptr, cos, sin, eps, HALF: tl.constexpr):
    """The two halves [heads, HALF] of some heads; every product is rounded, as torch rounds."""
    dtype = first.dtype
    columns = tl.arange(0, HALF)
    weight_first = tl.load(weight_ptr + columns)[None, :].to(tl.float32)
    weight_second = tl.load(weight_ptr + HALF + columns)[None, :].to(tl.float32)
    first, second = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first = ((first * scale).to(dtype).to(tl.float32) * weight_first).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * weight_second).to(dtype).to(tl.float32)
    cos, sin = cos[None, :].to(dtype).to(tl.float32), sin[None, :].to(dtype).to(tl.float32)
    real = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    imaginary = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return real.to(dtype), imaginary.to(dtype)


@triton.jit
def qk_norm_rope_store_kernel(
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]
    q_weight_ptr,  # [2 * HALF]
    k_weight_ptr,  # [2 * HALF]
    cos_ptr,  # fp32 [max_positions, HALF]
    sin_ptr,  # fp32 [max_positions, HALF]
    positions_ptr,  # int32 [num_tokens]
    slot_mapping_ptr,  # int64 [num_tokens]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HALF]
    v_cache_ptr,  # like k_cache
    q_ptr,  # [num_tokens, NUM_HEADS, 2 * HALF]
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One program: BLOCK_HEADS heads of one token, either of q or of k and v. Sums in fp32."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, HALF)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + columns)
    sin = tl.load(sin_ptr + position * HALF + columns)
    row_ptr = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    if part < Q_PROGRAMS:
        heads = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < NUM_HEADS)[:, None]
        offsets = heads[:, None] * HEAD_DIM + columns[None, :]
        first = tl.load(row_ptr + offsets, mask=mask, other=0.0)
        second = tl.load(row_ptr + offsets + HALF, mask=mask, other=0.0)
        first, second = norm_and_rotate(first, second, q_weight_ptr, cos, sin, eps, HALF)
        out_ptr = q_ptr + token * (NUM_HEADS * HEAD_DIM) + offsets
        tl.store(out_ptr, first, mask=mask)
        tl.store(out_ptr + HALF, second, mask=mask)
    else:
        heads = (part - Q_PROGRAMS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None]
        k_offsets = (NUM_HEADS + heads)[:, None] * HEAD_DIM + columns[None, :]
        v_offsets = k_offsets + NUM_KV_HEADS * HEAD_DIM
        first = tl.load(row_ptr + k_offsets, mask=mask, other=0.0)
        second = tl.load(row_ptr + k_offsets + HALF, mask=mask, other=0.0)
        v_first = tl.load(row_ptr + v_offsets, mask=mask, other=0.0)
        v_second = tl.load(row_ptr + v_offsets + HALF, mask=mask, other=0.0)
        slot = tl.load(slot_mapping_ptr + token)
        page_rows = (slot // BLOCK_SIZE * NUM_KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        page_offsets = page_rows[:, None] * HEAD_DIM + columns[None, :]
        first, second = norm_and_rotate(first, second, k_weight_ptr, cos, sin, eps, HALF)
        tl.store(k_cache_ptr + page_offsets, first, mask=mask)
        tl.store(k_cache_ptr + page_offsets + HALF, second, mask=mask)
        tl.store(v_cache_ptr + page_offsets, v_first, mask=mask)
        tl.store(v_cache_ptr + page_offsets + HALF, v_second, mask=mask)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """The rotated queries [num_tokens, num_heads, head_dim]; k and v go to their pages, in place.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; q_weight, k_weight: [head_dim];
    cos, sin: fp32 [max_positions, head_dim / 2], rounded to qkv's dtype before use; positions:
    int32 [num_tokens]; slot_mapping: int64 [num_tokens], block id * block_size + offset; k_cache,
    v_cache: [num_blocks, num_kv_heads, block_size, head_dim]. Several padding rows may name the
    same position of the scratch block.
    """
    if not runs_on_triton(qkv):
        return qk_norm_rope_store_reference(
            qkv, q_weight, k_weight, eps, cos, sin, positions, slot_mapping, k_cache, v_cache
        )
    num_tokens = len(qkv)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    assert head_dim in (64, 128), f"head_dim {head_dim}: not 64 or 128"
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim, f"qkv is {qkv.shape}"
    assert q_weight.shape == k_weight.shape == (head_dim,), "the weights are not of one head"
    assert cos.shape[1:] == sin.shape[1:] == (head_dim // 2,), f"cos is {cos.shape}"
    assert positions.shape == slot_mapping.shape == (num_tokens,), f"{positions.shape} positions"
    assert cos.dtype == sin.dtype == torch.float32, "cos and sin are not fp32"
    assert positions.dtype == torch.int32, f"positions are {positions.dtype}"
    assert slot_mapping.dtype == torch.int64, f"slot_mapping is {slot_mapping.dtype}"
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape} != {v_cache.shape}"
    tensors: tuple[Tensor, ...] = (qkv, q_weight, k_weight, k_cache, v_cache)
    assert all(t.dtype == qkv.dtype for t in tensors), "the tensors differ in dtype"
    tensors += (cos, sin, positions, slot_mapping)
    assert all(t.is_contiguous() for t in tensors), "a tensor is not contiguous"
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        block_heads, num_warps = _heads_and_warps(num_tokens)
        parts = triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads)
        qk_norm_rope_store_kernel[(num_tokens, parts)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            positions,
            slot_mapping,
            k_cache,
            v_cache,
            q,
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            BLOCK_SIZE=block_size,
            BLOCK_HEADS=block_heads,
            num_warps=num_warps,
        )
    return q


def _heads_and_warps(num_tokens: int) -> tuple[int, int]:
    """(heads a program, warps): small programs fill the device when tokens are few."""
    return (4, 1) if num_tokens < LARGE_BATCH else (8, 2)
