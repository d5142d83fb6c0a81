"""The second pass of the sampler: merges a row's groups, or draws from what its filters keep.

Nearly always a short list of tokens is enough to ask. Blocks of 64 tokens are known by their
largest logit. The k blocks with the largest ones hold k tokens, at least, that are not below the
k-th of these maxima; so all tokens that are not below it hold the top_k. For top_p the blocks are
more until the tokens are probable enough. A list that would be too long is not made: every
question then reads the row.
"""

from nanovllm_cli.kernels.filtered_draw import amount_above, draw
from nanovllm_cli.kernels.logit_keys import key_and_scaled, key_of, mass_of, middle_of
from nanovllm_cli.kernels.triton_import import tl, triton

BLOCK_TOKENS = 64
LIST_TOKENS = 4096
ROW_WARPS = 8
ROW_REGISTERS = 128  # a thread: two programs share a multiprocessor


@triton.jit
def has_filter(temperature, top_k, top_p, min_p, vocab_size, MIN_TEMPERATURE: tl.constexpr):
    filtered = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
    return filtered & (temperature >= MIN_TEMPERATURE)


@triton.jit
def block_bound(
    lowest, highest, block_keys, wanted, min_p, by_min_p, scale, KEY_SHIFT: tl.constexpr
):
    """Just below the wanted-th of the blocks' keys; or of the least key with min_p's mass."""
    temperature, best = scale
    low = lowest
    high = highest
    while low + 1 < high:
        middle = middle_of(low, high)
        if by_min_p:
            is_high = mass_of(middle, temperature, best, KEY_SHIFT) >= min_p
        else:
            is_high = tl.sum((block_keys > middle).to(tl.int32), axis=0) < wanted
        high = tl.where(is_high, middle, high)
        low = tl.where(is_high, low, middle)
    return low


@triton.jit
def list_tokens(
    bound,
    block_keys,
    blocks,
    num_blocks,
    vocab_size,
    listed_blocks_ptr,
    tokens,
    scale,
    BLOCK_TOKENS: tl.constexpr,
    LIST_TOKENS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the tokens above the bound, ids ascending, as far as there is room; their number."""
    _, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr = tokens
    temperature, _best = scale
    is_listed = ((block_keys > bound) & (blocks < num_blocks)).to(tl.int32)
    block_place = tl.cumsum(is_listed, axis=0) - 1
    tl.store(listed_blocks_ptr + block_place, blocks, mask=is_listed != 0)
    num_elements = tl.sum(is_listed, axis=0) * BLOCK_TOKENS
    tl.debug_barrier()  # the blocks that one thread stored another one reads
    num_listed = 0
    for start in range(0, num_elements, CHUNK):
        elements = start + tl.arange(0, CHUNK)
        is_element = elements < num_elements
        block = tl.load(listed_blocks_ptr + elements // BLOCK_TOKENS, mask=is_element, other=0)
        ids = block * BLOCK_TOKENS + elements % BLOCK_TOKENS
        is_element &= ids < vocab_size
        x = tl.load(row_ptr + ids, mask=is_element, other=float("-inf")).to(tl.float32)
        keys, scaled = key_and_scaled(x, temperature, KEY_SHIFT)
        is_above = (is_element & (keys > bound)).to(tl.int32)
        place = num_listed + tl.cumsum(is_above, axis=0) - 1
        mask = (is_above != 0) & (place < LIST_TOKENS)
        tl.store(list_keys_ptr + place, keys, mask=mask)
        tl.store(list_scaled_ptr + place, scaled, mask=mask)
        tl.store(list_ids_ptr + place, ids, mask=mask)
        num_listed += tl.sum(is_above, axis=0)
    tl.debug_barrier()  # likewise the tokens
    return num_listed


@triton.jit(do_not_specialize=["num_groups"])
def sample_rows_kernel(
    logits_ptr,  # [batch_size, vocab_size], rows logits_stride apart
    slots_ptr,  # int32 [batch_size]
    length_ptr,  # int32, by slot, as all columns
    seed_ptr,  # int64
    temperature_ptr,  # fp32
    top_k_ptr,  # int32
    top_p_ptr,  # fp32
    min_p_ptr,  # fp32
    values_ptr,  # fp32 [batch_size, num_groups], from sample_groups_kernel
    tokens_ptr,  # int32 [batch_size, num_groups], likewise
    masses_ptr,  # fp32 [batch_size, num_groups], likewise
    block_maxima_ptr,  # fp32 [batch_size, num_blocks], likewise
    listed_blocks_ptr,  # int32 [batch_size, num_blocks], scratch
    list_keys_ptr,  # int32 [batch_size, LIST_TOKENS], scratch
    list_scaled_ptr,  # fp32 [batch_size, LIST_TOKENS], scratch
    list_ids_ptr,  # int32 [batch_size, LIST_TOKENS], scratch
    out_ptr,  # int32 [batch_size]
    is_nan_ptr,  # int8 [batch_size]
    logits_stride,
    vocab_size,
    num_groups,
    LANE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LIST_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program: one row. The best of its groups; or, with filters, the best of what is kept.

    Sums and noise are fp32, all in an order that depends on the row alone.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUPS)
    is_group = groups < num_groups
    values = tl.load(values_ptr + row * num_groups + groups, mask=is_group, other=float("-inf"))
    group_ids = tl.load(tokens_ptr + row * num_groups + groups, mask=is_group, other=0x7FFFFFFF)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    filtered = has_filter(temperature, top_k, top_p, min_p, vocab_size, MIN_TEMPERATURE)
    largest = tl.max(values, axis=0)
    token = tl.min(tl.where(values == largest, group_ids, 0x7FFFFFFF), axis=0)
    is_nan = tl.abs(largest) == float("inf")
    tl.store(is_nan_ptr + row, is_nan.to(tl.int8))
    if is_nan | (filtered == 0):
        tl.store(out_ptr + row, tl.where(is_nan, 0, token))
        return

    GROUP_BLOCKS: tl.constexpr = 4 * LANE_TOKENS // BLOCK_TOKENS
    num_blocks = num_groups * GROUP_BLOCKS
    row_ptr = logits_ptr + row * logits_stride
    listed_blocks_ptr += row * num_blocks
    list_keys_ptr += row * LIST_TOKENS
    list_scaled_ptr += row * LIST_TOKENS
    list_ids_ptr += row * LIST_TOKENS
    whole_row = (vocab_size, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr)
    filters = (top_k, top_p, min_p)
    seed = tl.load(seed_ptr + slot)
    position = tl.load(length_ptr + slot)
    highest, best = key_and_scaled(largest, temperature, KEY_SHIFT)
    scale = (temperature, best)
    lowest = key_of(best * 0.0 - float("inf"), KEY_SHIFT) - 1
    masses = tl.load(masses_ptr + row * num_groups + groups, mask=is_group, other=0.0)
    total_mass = tl.sum(masses * tl.exp((values - largest) * (1.0 / temperature)), axis=0)
    blocks = tl.arange(0, BLOCK_GROUPS * GROUP_BLOCKS)
    maxima = tl.load(
        block_maxima_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=float("-inf")
    )
    block_keys, _block_scaled = key_and_scaled(maxima, temperature, KEY_SHIFT)

    by_mass = (top_k >= vocab_size) & (top_p < 1.0)
    by_min_p = (top_k >= vocab_size) & (top_p >= 1.0)
    wanted = tl.where(top_k < vocab_size, top_k, 128)  # blocks
    is_enough = wanted < 0
    bound = lowest
    num_listed = 0
    while (is_enough == 0) & (wanted <= 1024):
        bound = block_bound(lowest, highest, block_keys, wanted, min_p, by_min_p, scale, KEY_SHIFT)
        num_listed = list_tokens(
            bound,
            block_keys,
            blocks,
            num_blocks,
            vocab_size,
            listed_blocks_ptr,
            whole_row,
            scale,
            BLOCK_TOKENS,
            LIST_TOKENS,
            KEY_SHIFT,
            CHUNK,
        )
        is_enough = num_listed <= LIST_TOKENS
        wanted = tl.where(is_enough, wanted * 8, 1 << 20)
        if by_mass & is_enough:
            listed = (num_listed, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr)
            mass = amount_above(bound, listed, scale, True, KEY_SHIFT, True, CHUNK)
            is_enough = mass >= top_p * total_mass

    if is_enough:
        token = draw(
            bound,
            highest,
            total_mass,
            filters,
            seed,
            position,
            vocab_size,
            (num_listed, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr),
            scale,
            LANE_TOKENS,
            KEY_SHIFT,
            FAST,
            True,
            CHUNK // 2,
        )
    else:
        token = draw(
            lowest,
            highest,
            total_mass,
            filters,
            seed,
            position,
            vocab_size,
            whole_row,
            scale,
            LANE_TOKENS,
            KEY_SHIFT,
            FAST,
            False,
            CHUNK * 2,
        )
    tl.store(out_ptr + row, token)
