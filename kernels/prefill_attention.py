"""Prefill attention: packed new tokens attend to their own past in the pages, cached prefixes too.

    out[t, h] = softmax(head_dim ** -0.5 * q[t, h] . k[:n, h // group]) . v[:n, h // group]

for the token t at position n - 1 of its sequence. The loop is FlashAttention-2's (arXiv
2307.08691): tiles of queries stay, tiles of keys and values pass, with an online softmax in fp32.
The heads of a group share their K and V, so a tile holds them all: a row is a (token, head).
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import tl, triton

BLOCK_M = 128  # rows of a tile: tokens times heads of a group
NUM_WARPS = 8
NUM_STAGES = 2
_LOG2_E = 1.4426950408889634


def prefill_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    start_positions: Tensor,
) -> Tensor:
    """The meaning of `prefill_attention`, one sequence after the other, in fp32."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.zeros_like(q)
    ends = cu_seqlens_q.tolist()
    for row, slot in enumerate(slots.tolist()):
        begin, end, start = ends[row], ends[row + 1], int(start_positions[row])
        kv_len = start + end - begin
        blocks = block_tables[slot, : triton.cdiv(kv_len, block_size)].long()
        k = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :kv_len].float()
        v = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :kv_len].float()
        k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=0) for x in (k, v))
        scores = q[begin:end].float().transpose(0, 1) @ k.transpose(1, 2) * head_dim**-0.5
        positions = torch.arange(start, kv_len, device=q.device)
        is_future = torch.arange(kv_len, device=q.device) > positions[:, None]
        probabilities = scores.masked_fill(is_future, -torch.inf).softmax(dim=-1)
        out[begin:end] = (probabilities @ v).transpose(0, 1).to(q.dtype)
    return out


@triton.jit
def prefill_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,  # like k_cache
    block_tables_ptr,  # int32 [num_slots, max_blocks]
    slots_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1]
    start_positions_ptr,  # int32 [num_seqs]
    out_ptr,  # like q
    block_table_stride,
    scale,  # of the exponent of two
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M rows of one sequence and one KV head; the last, longest tiles first."""
    TOKENS: tl.constexpr = BLOCK_M // BLOCK_GROUP
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - first_token
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * TOKENS >= query_len:
        return
    start = tl.load(start_positions_ptr + seq)
    slot = tl.load(slots_ptr + seq).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    tokens = tile * TOKENS + rows // BLOCK_GROUP
    heads = rows % BLOCK_GROUP
    is_row = (tokens < query_len) & (heads < GROUP)
    columns = tl.arange(0, HEAD_DIM)
    q_rows = (first_token + tokens).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + heads
    q_offsets = q_rows[:, None] * HEAD_DIM + columns[None, :]
    q = tl.load(q_ptr + q_offsets, mask=is_row[:, None], other=0.0)
    positions = start + tokens

    best = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    table_ptr = block_tables_ptr + slot * block_table_stride
    last = start + tl.minimum(query_len, (tile + 1) * TOKENS) - 1
    # No mask is needed where every key lies before every query of the tile.
    num_open = (start + tile * TOKENS + 1) // BLOCK_N * BLOCK_N
    for n in tl.range(0, num_open, BLOCK_N):
        block_id = tl.load(table_ptr + n // BLOCK_SIZE).to(tl.int64)
        row = (block_id * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
        offsets = (row + tl.arange(0, BLOCK_N))[:, None] * HEAD_DIM + columns[None, :]
        k = tl.load(k_cache_ptr + offsets)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_best[:, None])
        decay = tl.exp2(best - new_best)
        total = total * decay + tl.sum(p, axis=1)
        v = tl.load(v_cache_ptr + offsets)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        best = new_best
    for n in tl.range(num_open, last + 1, BLOCK_N):
        block_id = tl.load(table_ptr + n // BLOCK_SIZE).to(tl.int64)
        row = (block_id * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
        offsets = (row + tl.arange(0, BLOCK_N))[:, None] * HEAD_DIM + columns[None, :]
        keys = n + tl.arange(0, BLOCK_N)
        is_key = (keys <= last)[:, None]
        k = tl.load(k_cache_ptr + offsets, mask=is_key, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_best[:, None])
        decay = tl.exp2(best - new_best)
        total = total * decay + tl.sum(p, axis=1)
        v = tl.load(v_cache_ptr + offsets, mask=is_key, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        best = new_best
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_offsets, out, mask=is_row[:, None])


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    start_positions: Tensor,
    max_query_len: int,
) -> Tensor:
    """q: [num_tokens, num_heads, head_dim], sequence after sequence -> the same shape.

    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], the new tokens stored;
    block_tables: int32 [num_slots, max_blocks]; slots, start_positions (of a sequence's first new
    token): int32 [num_seqs]; cu_seqlens_q: int32 [num_seqs + 1].
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads, f"{num_heads} heads over {num_kv_heads} KV heads"
    assert head_dim in (64, 128), f"head_dim {head_dim}: not 64 or 128"
    assert q.is_contiguous(), "q is not contiguous"
    assert q.dtype == k_cache.dtype == v_cache.dtype, "q, k and v differ in dtype"
    block_group = triton.next_power_of_2(group)
    is_wide = q.dtype == torch.float32
    block_m = BLOCK_M // 2 if is_wide else BLOCK_M
    out = torch.empty_like(q)
    grid = (triton.cdiv(max_query_len, block_m // block_group), num_kv_heads, len(slots))
    prefill_attention_kernel[grid](
        q,
        k_cache,
        v_cache,
        block_tables,
        slots,
        cu_seqlens_q,
        start_positions,
        out,
        block_tables.stride(0),
        head_dim**-0.5 * _LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_GROUP=block_group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=min(block_size, 32 if is_wide else 64),
        PRECISION="ieee" if is_wide else "tf32",
        num_warps=4 if is_wide else NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
