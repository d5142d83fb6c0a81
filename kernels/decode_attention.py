"""Decode attention: one new token of each sequence attends to its keys and values in the pages.

    out[i, h] = softmax(head_dim ** -0.5 * q[i, h] . k[:n, h // group]) . v[:n, h // group]

where n = context_lens[slots[i]], and k and v are read through block_tables[slots[i]]. The bound is
the memory that holds K and V, so everything here serves one end: every multiprocessor streams K
and V all the time, whatever the lengths.

A step makes one plan, and then calls `decode_attention` once a layer. The plan turns the lengths,
which only the device knows, into work items: (sequence, range of positions), the longest first.
Grids and host arguments depend on the size of the batch alone, so that a CUDA graph holds both
while the lengths change. A long sequence in a small batch has several items, its splits; the
program that ends last merges them in their order, so results do not depend on timing.

Sources: split-KV and its merge by log-sum-exp are Flash-Decoding's (Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), the online softmax FlashAttention-2's
(arXiv 2307.08691), the plan FlashInfer's (arXiv 2501.01005), the last arriver's merge Stream-K's
(arXiv 2301.03598).
"""

from dataclasses import dataclass

import torch

from nanovllm_cli.kernels.triton_import import tl, triton

# On one H200, bf16, head_dim 128: 64 positions a tile, 4 warps and 3 stages take 70 KB of shared
# memory and 112 registers a thread, so that three programs share a multiprocessor. One alone has
# enough loads in flight for full bandwidth; the others hide its start and its end.
BLOCK_N = 64
NUM_WARPS = 4
NUM_STAGES = 3
# Integers of a work item: row of the batch, slot, first position, end position, first item of the
# sequence, number of splits, id of the first block. Padded to one memory sector, 32 bytes.
ITEM_INTS = 8


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The meaning of `decode_attention`, one sequence after the other, in float32."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.zeros_like(q)
    for row, slot in enumerate(slots.tolist()):
        context_len = int(context_lens[slot])
        if context_len == 0:
            continue
        blocks = block_tables[slot, : triton.cdiv(context_len, block_size)].long()
        # [num_kv_heads, context_len, head_dim]
        k = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context_len].float()
        v = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context_len].float()
        grouped = q[row].float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = (grouped @ k.transpose(1, 2)) * head_dim**-0.5
        out[row] = (scores.softmax(-1) @ v).view(num_heads, head_dim).to(q.dtype)
    return out


@triton.jit
def cut_into_splits(context_lens, split_tiles, BLOCK_N: tl.constexpr):
    """(splits, tiles a split): of about equal length, none over split_tiles; at least one."""
    tiles = tl.cdiv(context_lens, BLOCK_N)
    splits = tl.maximum(tl.cdiv(tiles, split_tiles), 1)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, splits), 1)
    return tl.maximum(tl.cdiv(tiles, tiles_per_split), 1), tiles_per_split


@triton.jit(do_not_specialize=["num_seqs", "split_budget", "table_stride"])
def decode_plan_kernel(
    context_lens_ptr,  # int32 [max_num_seqs], by slot
    slots_ptr,  # int32 [num_seqs]
    block_tables_ptr,  # int32 [max_num_seqs, table_stride], by slot
    items_ptr,  # int32 [max_items, ITEM_INTS]
    num_items_ptr,  # int32 [1]
    num_seqs,
    split_budget,
    table_stride,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEM_INTS: tl.constexpr,
):
    """One program writes the work items of BLOCK_ROWS sequences. All integers.

    With T tiles of BLOCK_N positions in the batch, no split is longer than ceil(T / split_budget)
    tiles, so there are at most num_seqs + split_budget items. They are sorted by length, longest
    first, so that short ones fill the gaps at the end; the splits of a sequence stay together.
    """
    seqs = tl.arange(0, BLOCK_SEQS)
    slots = tl.load(slots_ptr + seqs, mask=seqs < num_seqs, other=0)
    lens = tl.load(context_lens_ptr + slots, mask=seqs < num_seqs, other=0)
    split_tiles = tl.maximum(tl.cdiv(tl.sum(tl.cdiv(lens, BLOCK_N), 0), split_budget), 1)
    splits, size = cut_into_splits(lens, split_tiles, BLOCK_N)
    splits = tl.where(seqs < num_seqs, splits, 0)

    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_seqs
    row_slots = tl.load(slots_ptr + rows, mask=is_row, other=0)
    row_lens = tl.load(context_lens_ptr + row_slots, mask=is_row, other=0)
    row_splits, row_size = cut_into_splits(row_lens, split_tiles, BLOCK_N)
    row_splits = tl.where(is_row, row_splits, 0)

    is_longer = size[None, :] > row_size[:, None]
    is_earlier = (size[None, :] == row_size[:, None]) & (seqs[None, :] < rows[:, None])
    first_item = tl.sum(tl.where(is_longer | is_earlier, splits[None, :], 0), 1)

    table_ptr = block_tables_ptr + row_slots.to(tl.int64) * table_stride
    for start in tl.range(0, tl.max(row_splits, 0), BLOCK_SPLITS):
        split = (start + tl.arange(0, BLOCK_SPLITS))[None, :]
        mask = split < row_splits[:, None]
        begin = split * row_size[:, None] * BLOCK_N
        end = tl.minimum(begin + row_size[:, None] * BLOCK_N, row_lens[:, None])
        first_block = tl.load(
            table_ptr[:, None] + begin // BLOCK_SIZE, mask=mask & (begin < end), other=0
        )
        item_ptr = items_ptr + (first_item[:, None] + split) * ITEM_INTS
        tl.store(item_ptr, rows[:, None], mask=mask)
        tl.store(item_ptr + 1, row_slots[:, None], mask=mask)
        tl.store(item_ptr + 2, begin, mask=mask)
        tl.store(item_ptr + 3, end, mask=mask)
        tl.store(item_ptr + 4, first_item[:, None], mask=mask)
        tl.store(item_ptr + 5, row_splits[:, None], mask=mask)
        tl.store(item_ptr + 6, first_block, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(num_items_ptr, tl.sum(splits, 0))


@triton.jit
def merge_splits(
    partial_out_ptr,
    partial_stats_ptr,
    out_ptr,  # [GROUP, HEAD_DIM], where the result goes
    first_item,
    num_splits,
    head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Merges the splits of one sequence and KV head in their order, BLOCK_SPLITS at a time.

    sum_s 2^(max_s - max) out_s / sum_s 2^(max_s - max) sum_s, in float32. Loads are .cg, from L2,
    where the other programs' stores are; L1 may hold what was there before.
    """
    offs_g = tl.arange(0, BLOCK_GROUP)
    offs_s = tl.arange(0, BLOCK_SPLITS)
    offs_d = tl.arange(0, HEAD_DIM)
    running_max = tl.full([BLOCK_GROUP], -1.0e30, tl.float32)
    running_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, HEAD_DIM], tl.float32)
    for start in tl.range(0, num_splits, BLOCK_SPLITS, num_stages=1):
        partials = (first_item + start + offs_s).to(tl.int64) * NUM_KV_HEADS + head
        mask = (start + offs_s < num_splits)[:, None] & (offs_g < GROUP)[None, :]
        stats_ptr = partial_stats_ptr + partials[:, None] * (2 * BLOCK_GROUP) + offs_g[None, :]
        split_rows = partials[:, None] * BLOCK_GROUP + offs_g[None, :]
        split_out_ptr = partial_out_ptr + split_rows[:, :, None] * HEAD_DIM + offs_d[None, None, :]
        split_max = tl.load(stats_ptr, mask=mask, other=-1.0e30, cache_modifier=".cg")
        split_sum = tl.load(stats_ptr + BLOCK_GROUP, mask=mask, other=0.0, cache_modifier=".cg")
        split_out = tl.load(split_out_ptr, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(running_max, tl.max(split_max, 0))
        rescale = tl.exp2(running_max - new_max)
        weight = tl.exp2(split_max - new_max[None, :])
        running_sum = running_sum * rescale + tl.sum(split_sum * weight, 0)
        acc = acc * rescale[:, None] + tl.sum(split_out * weight[:, :, None], 0)
        running_max = new_max
    running_sum = tl.where(offs_g < GROUP, running_sum, 1.0)  # padding has none
    out = (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_offs = offs_g[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr + out_offs, out, mask=offs_g[:, None] < GROUP)


@triton.jit(do_not_specialize=["table_stride"])
def decode_attention_kernel(
    q_ptr,  # [num_seqs, num_heads, HEAD_DIM], rows q_stride apart
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,  # like k_cache
    block_tables_ptr,  # int32 [max_num_seqs, table_stride], by slot
    items_ptr,  # int32 [max_items, ITEM_INTS], from decode_plan_kernel
    num_items_ptr,  # int32 [1], likewise
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    partial_out_ptr,  # float32 [max_items, NUM_KV_HEADS, BLOCK_GROUP, HEAD_DIM]
    partial_stats_ptr,  # float32 [max_items, NUM_KV_HEADS, 2, BLOCK_GROUP]: maximum, sum
    arrivals_ptr,  # int32 [max_num_seqs, NUM_KV_HEADS], zeros before and after
    q_stride,
    table_stride,
    scale_log2,  # head_dim ** -0.5 * log2(e): the softmax is in base 2
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one work item of one KV head, for the GROUP query heads that share it.

    The group's queries are the rows of one tensor core tile, 16 rows with their padding. Tiles of
    K and V, [BLOCK_N, HEAD_DIM], pass through shared memory, NUM_STAGES - 1 tiles ahead. Scores,
    softmax and output are float32; probabilities take V's dtype for the second product.
    """
    BLOCK_M: tl.constexpr = 16
    item = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS  # fastest: neighbours read neighbouring memory
    item_ptr = items_ptr + item * ITEM_INTS
    row = tl.load(item_ptr)
    slot = tl.load(item_ptr + 1)
    begin = tl.load(item_ptr + 2)
    end = tl.load(item_ptr + 3)
    first_item = tl.load(item_ptr + 4)
    num_splits = tl.load(item_ptr + 5)
    if item >= tl.load(num_items_ptr):
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    group_offs = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    out_row_ptr = out_ptr + (row.to(tl.int64) * NUM_KV_HEADS + head) * (GROUP * HEAD_DIM)
    if begin == end:  # no context
        zeros = tl.zeros([BLOCK_M, HEAD_DIM], out_ptr.dtype.element_ty)
        tl.store(out_row_ptr + group_offs, zeros, mask=offs_m[:, None] < GROUP)
        return

    table_ptr = block_tables_ptr + slot.to(tl.int64) * table_stride
    if BLOCK_SIZE >= BLOCK_N:  # one block holds the whole tile: its id is a scalar
        pos = begin
        block = tl.load(item_ptr + 6)
        tile_offs = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    else:
        pos = begin + offs_n
        block = tl.load(table_ptr + pos // BLOCK_SIZE, mask=pos < end, other=0)
        tile_offs = offs_d[None, :]

    q_row_ptr = q_ptr + row.to(tl.int64) * q_stride + head * (GROUP * HEAD_DIM)
    q = tl.load(q_row_ptr + group_offs, mask=offs_m[:, None] < GROUP, other=0.0)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # of each column: summed at the end
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        # Block ids are read one tile ahead: carried in a register, they take no pipeline stage.
        next_pos = pos + BLOCK_N
        next_block = tl.load(table_ptr + next_pos // BLOCK_SIZE, mask=next_pos < end, other=0)
        tile_row = (block.to(tl.int64) * NUM_KV_HEADS + head) * BLOCK_SIZE + pos % BLOCK_SIZE
        if BLOCK_SIZE >= BLOCK_N:
            offs = tile_row * HEAD_DIM + tile_offs
        else:
            offs = tile_row[:, None] * HEAD_DIM + tile_offs
        # Behind the context lies anything, NaN too: neither K nor V is read there.
        is_live = offs_n < end - start
        k = tl.load(k_cache_ptr + offs, mask=is_live[:, None], other=0.0)
        v = tl.load(v_cache_ptr + offs, mask=is_live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(is_live[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        rescale = tl.exp2(running_max - new_max)
        probs = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * rescale[:, None] + probs
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        running_max = new_max
        block = next_block
        pos = next_pos
    item_sum = tl.sum(running_sum, 1)

    if GROUP <= 8:  # rows 8 to 15 are padding, in registers of their own: drop them
        acc, _ = tl.split(tl.permute(tl.reshape(acc, (2, 8, HEAD_DIM)), (1, 2, 0)))
        item_sum, _ = tl.split(tl.permute(tl.reshape(item_sum, (2, 8)), (1, 0)))
        item_max, _ = tl.split(tl.permute(tl.reshape(running_max, (2, 8)), (1, 0)))
        offs_r = tl.arange(0, 8)
    else:
        item_max = running_max
        offs_r = tl.arange(0, 16)
    is_query = offs_r < GROUP
    row_offs = offs_r[:, None] * HEAD_DIM + offs_d[None, :]
    if num_splits == 1:
        out = acc / item_sum[:, None]
        tl.store(out_row_ptr + row_offs, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None])
    else:
        partial = (item.to(tl.int64) * NUM_KV_HEADS + head) * BLOCK_GROUP
        stats_ptr = partial_stats_ptr + partial * 2 + offs_r
        tl.store(partial_out_ptr + partial * HEAD_DIM + row_offs, acc, mask=is_query[:, None])
        tl.store(stats_ptr, item_max, mask=is_query)
        tl.store(stats_ptr + BLOCK_GROUP, item_sum, mask=is_query)
        tl.debug_barrier()  # every thread's stores come before the release of one
        arrival_ptr = arrivals_ptr + row * NUM_KV_HEADS + head
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
            tl.store(arrival_ptr, 0)  # as the next launch wants it
            merge_splits(
                partial_out_ptr,
                partial_stats_ptr,
                out_row_ptr,
                first_item,
                num_splits,
                head,
                NUM_KV_HEADS,
                GROUP,
                BLOCK_GROUP,
                HEAD_DIM,
                BLOCK_SPLITS,
            )


def split_budget(num_seqs: int, num_kv_heads: int, num_sms: int) -> int:
    """How many splits a batch may have beyond one a sequence.

    A split costs 3 us for its merge, and one program a multiprocessor reaches full bandwidth: a
    small batch gets as many splits as that takes, a middling one splits what is longer than the
    mean, and a large one only what is longer than twice the mean, so that no outlier runs on alone.
    """
    per_head = num_sms // num_kv_heads
    return max(per_head, min(num_seqs, 2 * per_head), num_seqs // 2, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """A step's work items, and scratch memory for its layers: device tensors, none of them resized.

    One plan serves every layer and every batch of at most max_num_seqs, one launch at a time.
    """

    items: torch.Tensor  # int32 [max_items, ITEM_INTS]
    num_items: torch.Tensor  # int32 [1]
    partial_out: torch.Tensor  # float32 [max_items, num_kv_heads, BLOCK_GROUP, head_dim]
    partial_stats: torch.Tensor  # float32 [max_items, num_kv_heads, 2, BLOCK_GROUP]
    arrivals: torch.Tensor  # int32 [max_num_seqs, num_kv_heads]
    block_size: int
    num_sms: int

    @classmethod
    def allocate(
        cls,
        *,
        max_num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device,
        num_sms: int | None = None,
    ) -> "DecodePlan":
        """num_sms: multiprocessors to spread small batches over; None asks the device."""
        if num_sms is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        block_group = triton.next_power_of_2(num_heads // num_kv_heads)
        max_items = max_num_seqs + split_budget(max_num_seqs, num_kv_heads, num_sms)
        with device:
            return cls(
                items=torch.zeros(max_items, ITEM_INTS, dtype=torch.int32),
                num_items=torch.zeros(1, dtype=torch.int32),
                partial_out=torch.empty(
                    max_items, num_kv_heads, block_group, head_dim, dtype=torch.float32
                ),
                partial_stats=torch.empty(
                    max_items, num_kv_heads, 2, block_group, dtype=torch.float32
                ),
                arrivals=torch.zeros(max_num_seqs, num_kv_heads, dtype=torch.int32),
                block_size=block_size,
                num_sms=num_sms,
            )


def plan_decode_attention(
    plan: DecodePlan,
    context_lens: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Fills the plan for the batch `slots`: once a step, when context_lens and tables are set.

    context_lens: int32 [max_num_seqs], positions to attend to, the new token's included; 0 for a
    padded row, whose output is zeros. slots: int32 [num_seqs], row of the batch -> row of
    context_lens and block_tables; several rows may share a slot.
    """
    (num_seqs,) = slots.shape
    num_kv_heads = plan.arrivals.shape[1]
    assert num_seqs <= plan.arrivals.shape[0], f"{num_seqs} sequences: more than the plan holds"
    assert context_lens.dtype == slots.dtype == block_tables.dtype == torch.int32
    block_rows = 8
    decode_plan_kernel[(triton.cdiv(num_seqs, block_rows),)](
        context_lens,
        slots,
        block_tables,
        plan.items,
        plan.num_items,
        num_seqs,
        split_budget(num_seqs, num_kv_heads, plan.num_sms),
        block_tables.stride(0),
        # Two sizes only: each is a kernel to compile.
        BLOCK_SEQS=256 if num_seqs <= 256 else triton.next_power_of_2(plan.arrivals.shape[0]),
        BLOCK_ROWS=block_rows,
        BLOCK_SPLITS=16,
        BLOCK_SIZE=plan.block_size,
        BLOCK_N=BLOCK_N,
        ITEM_INTS=ITEM_INTS,
        num_warps=4,
    )


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer's attention of the planned batch; returns out.

    q, out: [num_seqs, num_heads, head_dim]; q's rows may be strided, as in a fused qkv.
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], contiguous, one layer's.
    block_tables: int32 [max_num_seqs, max_blocks_per_seq]; entries behind the context are not read.
    """
    num_seqs, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group, rest = divmod(num_heads, num_kv_heads)
    block_group = triton.next_power_of_2(group)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    assert rest == 0, f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads"
    assert group <= 16, f"{group} query heads share a KV head: more than one tile's 16 rows"
    assert head_dim in (64, 128), f"head_dim {head_dim}: not 64 or 128"
    assert block_size in (16, 32, 64, 128, 256), f"block_size {block_size}: not 16 to 256"
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape} != {v_cache.shape}"
    assert k_cache.is_contiguous(), "k_cache is not contiguous"
    assert v_cache.is_contiguous(), "v_cache is not contiguous"
    assert q.dtype == k_cache.dtype == v_cache.dtype == out.dtype, "q, k, v, out differ in dtype"
    assert q.stride()[1:] == (head_dim, 1), f"strides of q: {q.stride()}"
    assert out.shape == q.shape, f"out is {out.shape}, q {q.shape}"
    assert out.is_contiguous(), "out is not contiguous"
    assert plan.partial_out.shape[1:] == (num_kv_heads, block_group, head_dim), "another plan"
    assert plan.block_size == block_size, f"block_size {block_size}, planned {plan.block_size}"
    assert num_seqs <= plan.arrivals.shape[0], f"{num_seqs} sequences: more than the plan holds"

    max_items = num_seqs + split_budget(num_seqs, num_kv_heads, plan.num_sms)
    decode_attention_kernel[(max_items * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        block_tables,
        plan.items,
        plan.num_items,
        out,
        plan.partial_out,
        plan.partial_stats,
        plan.arrivals,
        q.stride(0),
        block_tables.stride(0),
        head_dim**-0.5 * 1.4426950408889634,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_GROUP=block_group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=BLOCK_N,
        BLOCK_SPLITS=max(32 // block_group, 1),
        NUM_STAGES=2 if q.dtype == torch.float32 else NUM_STAGES,  # shared memory
        ITEM_INTS=ITEM_INTS,
        PRECISION="tf32x3",  # of float32 only: as good as float32, by tensor cores
        num_warps=NUM_WARPS,
    )
    return out
