"""The draw from what top_k, then top_p over what is left, then min_p keep; no sorting.

Sorted by logit, ties by token id, what top_k and top_p keep is a prefix: everything above one
logit and, of the tokens tied with it, the first few. That logit is found by bisection over the
logits' keys: how many tokens, how much probability lies above a key?

`tokens` are those to ask: (how many, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr), of
the list where IN_LIST, else all of the row. `scale` is (temperature, best): a token's mass is
exp(scaled - best).
"""

from nanovllm_cli.kernels.gumbel_noise import noise_of_tokens
from nanovllm_cli.kernels.logit_keys import key_and_scaled, mass_of, middle_of
from nanovllm_cli.kernels.triton_import import tl, triton


@triton.jit
def load_chunk(
    start, tokens, scale, KEY_SHIFT: tl.constexpr, IN_LIST: tl.constexpr, CHUNK: tl.constexpr
):
    """(keys, scaled, ids) of the next CHUNK tokens, ids ascending; and the mask."""
    num_tokens, row_ptr, list_keys_ptr, list_scaled_ptr, list_ids_ptr = tokens
    temperature, _best = scale
    offsets = start + tl.arange(0, CHUNK)
    mask = offsets < num_tokens
    if IN_LIST:
        keys = tl.load(list_keys_ptr + offsets, mask=mask, other=0)
        scaled = tl.load(list_scaled_ptr + offsets, mask=mask, other=float("-inf"))
        ids = tl.load(list_ids_ptr + offsets, mask=mask, other=0)
    else:
        ids = offsets
        x = tl.load(row_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32)
        keys, scaled = key_and_scaled(x, temperature, KEY_SHIFT)
    return keys, scaled, ids, mask


@triton.jit
def amount_above(
    pivot,
    tokens,
    scale,
    BY_MASS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    IN_LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many keys lie above the pivot; or, BY_MASS, the sum of their masses."""
    _temperature, best = scale
    amounts = tl.zeros([CHUNK], tl.float32 if BY_MASS else tl.int32)
    for start in range(0, tokens[0], CHUNK):
        keys, scaled, _ids, mask = load_chunk(start, tokens, scale, KEY_SHIFT, IN_LIST, CHUNK)
        is_above = mask & (keys > pivot)
        if BY_MASS:
            amounts += tl.where(is_above, tl.exp(scaled - best), 0.0)
        else:
            amounts += is_above.to(tl.int32)
    return tl.sum(amounts, axis=0)


@triton.jit
def least_key(
    low,
    high,
    limit,
    tokens,
    scale,
    BY_MASS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    IN_LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The least key above which less than `limit` lies: it is so of high, and not of low.

    And what lies above it.
    """
    while low + 1 < high:
        middle = middle_of(low, high)
        amount = amount_above(middle, tokens, scale, BY_MASS, KEY_SHIFT, IN_LIST, CHUNK)
        high = tl.where(amount < limit, middle, high)
        low = tl.where(amount < limit, low, middle)
    return high, amount_above(high, tokens, scale, BY_MASS, KEY_SHIFT, IN_LIST, CHUNK)


@triton.jit
def draw(
    low,
    highest,
    total_mass,
    filters,
    seed,
    position,
    vocab_size,
    tokens,
    scale,
    LANE_TOKENS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    FAST: tl.constexpr,
    IN_LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The token drawn from what the filters, (top_k, top_p, min_p), keep: all is above `low`."""
    top_k, top_p, min_p = filters
    temperature, best = scale
    least = low
    mass_above = 0.0
    num_kept = vocab_size  # of the tokens whose key is `least`
    if top_k < vocab_size:
        least, count = least_key(
            low, highest, top_k, tokens, scale, False, KEY_SHIFT, IN_LIST, CHUNK
        )
        num_kept = top_k - count
    if top_p < 1.0:
        if top_k < vocab_size:
            mass_above = amount_above(least, tokens, scale, True, KEY_SHIFT, IN_LIST, CHUNK)
            total_mass = mass_above + num_kept * mass_of(least, temperature, best, KEY_SHIFT)
        limit = top_p * total_mass
        if (top_k >= vocab_size) | (mass_above >= limit):
            num_kept = vocab_size
            least, mass_above = least_key(
                least, highest, limit, tokens, scale, True, KEY_SHIFT, IN_LIST, CHUNK
            )
        ties = (limit - mass_above) / mass_of(least, temperature, best, KEY_SHIFT)
        ties = tl.ceil(tl.minimum(ties, 1e9)).to(tl.int32)
        num_kept = tl.minimum(num_kept, tl.maximum(ties, 1))  # the first token of all is kept

    num_ties = 0
    values = tl.full([CHUNK], float("-inf"), tl.float32)
    best_ids = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
    for start in range(0, tokens[0], CHUNK):
        keys, scaled, ids, mask = load_chunk(start, tokens, scale, KEY_SHIFT, IN_LIST, CHUNK)
        is_tie = (mask & (keys == least)).to(tl.int32)
        rank = num_ties + tl.cumsum(is_tie, axis=0)
        num_ties += tl.sum(is_tie, axis=0)
        is_kept = mask & ((keys > least) | ((is_tie != 0) & (rank <= num_kept)))
        is_kept &= tl.exp(scaled - best) >= min_p
        if tl.sum(is_kept.to(tl.int32), axis=0) > 0:
            noise = noise_of_tokens(seed, position, ids, LANE_TOKENS, FAST)
            noisy = tl.where(is_kept, scaled + noise, float("-inf"))
            best_ids = tl.where(noisy > values, ids, best_ids)
            values = tl.maximum(noisy, values)
    largest = tl.max(values, axis=0)
    return tl.min(tl.where(values == largest, best_ids, 0x7FFFFFFF), axis=0)
