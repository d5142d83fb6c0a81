"""Causal attention of packed new tokens over K and V in pages, their cached prefixes included.

    out[i, h] = softmax(head_dim ** -0.5 * q[i, h] . k[:p + 1, h // group]) . v[:p + 1, h // group]

where p is token i's position in its sequence, and k and v are read through the block table of its
slot. The new tokens' own K and V are in the pages already.

The query heads that share a KV head are the rows of one tile, so that a tile of K and V serves
them all. Tiles of keys lie at absolute positions: a token's result does not depend on how the
sequence was cut into chunks, nor on the batch.

Source: the online softmax is FlashAttention-2's (Dao 2023, https://arxiv.org/abs/2307.08691).
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm_cli.kernels.triton_import import tl, triton

_LOG2_E = 1.4426950408889634
_SHORT = 32  # new tokens of a sequence


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
        blocks = block_tables[slot, : -(-kv_len // block_size)].long()
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
def attend_tiles(
    q,
    acc,
    row_max,
    row_sum,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    head,
    begin,
    end,
    row_positions,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_DIAGONAL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys begin .. end - 1, `begin` a multiple of BLOCK_N.

    Unless IS_DIAGONAL, all rows see all of them and `end` is such a multiple too: no mask.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    # Block ids are read one tile ahead: carried in a register, they take no pipeline stage.
    # Where one block holds the whole tile its id is a scalar.
    pos = begin if BLOCK_SIZE >= BLOCK_N else begin + offs_n
    block = tl.load(table_ptr + pos // BLOCK_SIZE, mask=pos < end, other=0)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        next_pos = pos + BLOCK_N
        next_block = tl.load(table_ptr + next_pos // BLOCK_SIZE, mask=next_pos < end, other=0)
        tile_row = (block.to(tl.int64) * NUM_KV_HEADS + head) * BLOCK_SIZE + pos % BLOCK_SIZE
        if BLOCK_SIZE >= BLOCK_N:
            offs = tile_row * HEAD_DIM + (offs_n[:, None] * HEAD_DIM + offs_d[None, :])
        else:
            offs = tile_row[:, None] * HEAD_DIM + offs_d[None, :]
        if IS_DIAGONAL:  # behind the last token lies anything, NaN too: it is not read
            mask = (start + offs_n < end)[:, None]
            k = tl.load(k_cache_ptr + offs, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + offs, mask=mask, other=0.0)
        else:
            k = tl.load(k_cache_ptr + offs)
            v = tl.load(v_cache_ptr + offs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_DIAGONAL:
            is_past = (start + offs_n)[None, :] <= row_positions[:, None]
            scores = tl.where(is_past, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        rescale = tl.exp2(row_max - new_max)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
        block = next_block
        pos = next_pos
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["max_tiles", "table_stride"])
def prefill_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM], rows q_stride apart
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,  # like k_cache
    block_tables_ptr,  # int32 [num_slots, table_stride]
    slots_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1]
    start_positions_ptr,  # int32 [num_seqs]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    q_stride,
    table_stride,
    max_tiles,
    scale_log2,  # head_dim ** -0.5 * log2(e): the softmax is in base 2
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M // GROUP neighbouring tokens of a sequence, one KV head and its group.

    Row r is query head r % GROUP of token r // GROUP. Scores, softmax and output are fp32;
    probabilities take V's dtype for the second product.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % NUM_KV_HEADS
    rest = tl.program_id(0) // NUM_KV_HEADS
    seq = rest // max_tiles
    tile = max_tiles - 1 - rest % max_tiles  # the longest first; neighbours share K and V in L2
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - first_token
    first = tile * TOKENS
    if first >= query_len:
        return
    start_position = tl.load(start_positions_ptr + seq)
    slot = tl.load(slots_ptr + seq)
    table_ptr = block_tables_ptr + slot.to(tl.int64) * table_stride

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    tokens = first + offs_m // GROUP
    is_row = (offs_m < TOKENS * GROUP) & (tokens < query_len)
    rows = (first_token + tokens).to(tl.int64)
    columns = ((head * GROUP + offs_m % GROUP) * HEAD_DIM)[:, None] + offs_d[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_stride + columns, mask=is_row[:, None], other=0.0)

    # Finite, so that rows of padding give no NaN.
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    first_position = start_position + first
    end = start_position + tl.minimum(first + TOKENS, query_len)
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = attend_tiles(
        q,
        acc,
        row_max,
        row_sum,
        k_cache_ptr,
        v_cache_ptr,
        table_ptr,
        head,
        0,
        diagonal,
        start_position + tokens,
        scale_log2,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
        False,
        NUM_STAGES,
        PRECISION,
    )
    acc, row_max, row_sum = attend_tiles(
        q,
        acc,
        row_max,
        row_sum,
        k_cache_ptr,
        v_cache_ptr,
        table_ptr,
        head,
        diagonal,
        end,
        start_position + tokens,
        scale_log2,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
        True,
        NUM_STAGES,
        PRECISION,
    )
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = out_ptr + rows[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    tl.store(out_rows + columns, out, mask=is_row[:, None])


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
    token): int32 [num_seqs]; cu_seqlens_q: int32 [num_seqs + 1]. q's rows may be strided; no
    sequence has more than max_query_len new tokens.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    (num_seqs,) = slots.shape
    int32s = (block_tables, slots, cu_seqlens_q, start_positions)
    assert num_heads == group * num_kv_heads, f"{num_heads} heads over {num_kv_heads} KV heads"
    assert group <= 64, f"{group} query heads share a KV head"
    assert head_dim in (64, 128), f"head_dim {head_dim}: not 64 or 128"
    assert block_size in (16, 32, 64, 128, 256), f"block_size {block_size}: not 16 to 256"
    assert q.stride()[1:] == (head_dim, 1), f"q has strides {q.stride()}"
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape} != {v_cache.shape}"
    assert k_cache.is_contiguous(), "k_cache is not contiguous"
    assert v_cache.is_contiguous(), "v_cache is not contiguous"
    assert q.dtype == k_cache.dtype == v_cache.dtype, "q, k and v differ in dtype"
    assert all(t.dtype == torch.int32 for t in int32s), "an index is not int32"
    assert start_positions.shape == (num_seqs,), f"{start_positions.shape} start positions"
    assert cu_seqlens_q.shape == (num_seqs + 1,), f"cu_seqlens_q is {cu_seqlens_q.shape}"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not len(q):
        return out
    tiling = _tiling(q.dtype, max_query_len)
    max_tiles = triton.cdiv(max_query_len, tiling["BLOCK_M"] // group)
    prefill_attention_kernel[(max_tiles * num_kv_heads * num_seqs,)](
        q,
        k_cache,
        v_cache,
        block_tables,
        slots,
        cu_seqlens_q,
        start_positions,
        out,
        q.stride(0),
        block_tables.stride(0),
        max_tiles,
        head_dim**-0.5 * _LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        PRECISION="tf32x3",  # of fp32 only: as good as fp32, by tensor cores
        **tiling,
    )
    return out


def _tiling(dtype: torch.dtype, max_query_len: int) -> dict[str, Any]:
    """Tile sizes, pipeline stages, warps and registers a thread.

    Few new tokens after many cached ones are bound by the reading of these, which smaller programs
    do better: 115 us instead of 154 for a token after each of 256 x 300 (one H100).

    128 registers and 96 KB let two programs share a multiprocessor: one's softmax runs beside the
    other's products. On one H200 at 8 x 2048 tokens that is 434 TFLOP/s; with the 183 registers
    that the compiler would take it is 336, and with three stages 401.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "NUM_STAGES": 2, "num_warps": 4}
    if max_query_len <= _SHORT:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "NUM_STAGES": 3, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "NUM_STAGES": 2, "num_warps": 8, "maxnreg": 128}
