"""Choose the next token: greedy, or a draw by the Gumbel-max trick with counter-based noise.

    argmax over the kept tokens of logit / temperature - log(-log1p(-u))

The uniform u of a token depends on the sequence's seed, the position and the token id alone
(Philox 4x32-10, Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405). Ties go to the
lowest token id. The filters are top_k, then top_p over what is left, then min_p.

Every row takes its path on the device, so that one graph serves all parameters. A row without
filters, greedy ones too, is read once, in groups of 4096 tokens. A row with filters is never
sorted: what top_k and top_p keep is everything above one logit and, of the tokens tied with it,
the first few; that logit is found by bisection over the logits' bit patterns.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.sampling import LANE_TOKENS, MIN_TEMPERATURE
from nanovllm_cli.kernels.triton_import import tl, triton

ROW_WARPS = 16
# Zero bits at the end of a logit of this dtype as fp32: its order needs only those before them.
_KEY_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Base 2; FAST is the GPU's own instruction, good to 2^-22 where the result is small."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def gumbel_noise(word, FAST: tl.constexpr):
    """-log(-log1p(-u)), u = (word + 0.5) / 2^32, to about 1e-5; word: uint32.

    A small u makes a large noise, which is the one that wins: there log1p is its series.
    """
    uniform = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.99999994)
    series = 0.2 * uniform + 0.25
    series = series * uniform + 0.3333333333333333
    series = series * uniform + 0.5
    series = series * uniform * uniform + uniform
    waiting = tl.where(uniform < 0.03125, series, log2(1.0 - uniform, FAST) * -0.6931471805599453)
    return log2(waiting, FAST) * -0.6931471805599453


@triton.jit
def group_words(seed, position, group, LANE_TOKENS: tl.constexpr):
    """The random words of the group's 4 * LANE_TOKENS tokens: four tensors, ids in their order."""
    counter = group * LANE_TOKENS + tl.arange(0, LANE_TOKENS)
    zero = counter * 0
    return tl.philox(seed, counter, zero + position, zero, zero)


@triton.jit
def has_filter(temperature, top_k, top_p, min_p, vocab_size, MIN_TEMPERATURE: tl.constexpr):
    filtered = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
    return filtered & (temperature >= MIN_TEMPERATURE)


@triton.jit
def load_lane(
    row_ptr,
    ids,
    vocab_size,
    too_early,
    stops_ptr,
    NUM_STOPS: tl.constexpr,
):
    """Logits as fp32; infinite where they are NaN, and minus infinity for stops that are banned."""
    x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    if too_early:
        for i in range(NUM_STOPS):
            x = tl.where(ids == tl.load(stops_ptr + i), float("-inf"), x)
    return x


@triton.jit
def best_of(value, token, other_value, other_token):
    """Elementwise; the other one has the higher id, and loses a tie."""
    is_better = other_value > value
    return tl.where(is_better, other_value, value), tl.where(is_better, other_token, token)


@triton.jit(do_not_specialize=["num_groups"])
def sample_groups_kernel(
    logits_ptr,  # [batch_size, vocab_size], rows logits_stride apart
    slots_ptr,  # int32 [batch_size]
    length_ptr,  # int32, by slot, as all columns
    min_length_ptr,  # int32
    stop_token_ids_ptr,  # int32 [.., NUM_STOPS]
    seed_ptr,  # int64
    temperature_ptr,  # fp32
    top_k_ptr,  # int32
    top_p_ptr,  # fp32
    min_p_ptr,  # fp32
    values_ptr,  # fp32 [batch_size, num_groups]
    tokens_ptr,  # int32 [batch_size, num_groups]
    logits_stride,
    vocab_size,
    num_groups,
    LANE_TOKENS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program: the best of one row's group of 4 * LANE_TOKENS tokens, in fp32.

    Of a row with filters it is the group's largest logit, without noise; the stop tokens that are
    banned become minus infinity in memory, so that the next kernel need not know of them.
    """
    group = tl.program_id(0)
    row = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    length = tl.load(length_ptr + slot)
    too_early = length < tl.load(min_length_ptr + slot)
    filtered = has_filter(
        temperature,
        tl.load(top_k_ptr + slot),
        tl.load(top_p_ptr + slot),
        tl.load(min_p_ptr + slot),
        vocab_size,
        MIN_TEMPERATURE,
    )
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    stops_ptr = stop_token_ids_ptr + slot * NUM_STOPS
    ids0 = group * (4 * LANE_TOKENS) + tl.arange(0, LANE_TOKENS)
    ids1 = ids0 + LANE_TOKENS
    ids2 = ids1 + LANE_TOKENS
    ids3 = ids2 + LANE_TOKENS
    x0 = load_lane(row_ptr, ids0, vocab_size, too_early, stops_ptr, NUM_STOPS)
    x1 = load_lane(row_ptr, ids1, vocab_size, too_early, stops_ptr, NUM_STOPS)
    x2 = load_lane(row_ptr, ids2, vocab_size, too_early, stops_ptr, NUM_STOPS)
    x3 = load_lane(row_ptr, ids3, vocab_size, too_early, stops_ptr, NUM_STOPS)
    if filtered:
        if too_early:
            stops = tl.load(stops_ptr + tl.arange(0, NUM_STOPS))
            in_group = (stops >= 0) & (stops // (4 * LANE_TOKENS) == group) & (stops < vocab_size)
            banned = tl.full([NUM_STOPS], float("-inf"), tl.float32)
            tl.store(row_ptr + stops, banned.to(logits_ptr.dtype.element_ty), mask=in_group)
    elif temperature >= MIN_TEMPERATURE:
        w0, w1, w2, w3 = group_words(tl.load(seed_ptr + slot), length, group, LANE_TOKENS)
        inverse = 1.0 / temperature
        x0 = x0 * inverse + gumbel_noise(w0, FAST)
        x1 = x1 * inverse + gumbel_noise(w1, FAST)
        x2 = x2 * inverse + gumbel_noise(w2, FAST)
        x3 = x3 * inverse + gumbel_noise(w3, FAST)
    value, token = best_of(x0, ids0, x1, ids1)
    value, token = best_of(value, token, x2, ids2)
    value, token = best_of(value, token, x3, ids3)
    best = tl.max(value, axis=0)
    first = tl.min(tl.where(value == best, token, 0x7FFFFFFF), axis=0)
    partial = row.to(tl.int64) * num_groups + group
    tl.store(values_ptr + partial, best)
    tl.store(tokens_ptr + partial, first)


@triton.jit
def key_of(x, KEY_SHIFT: tl.constexpr):
    """int32 in the order of the fp32 values x, whose last KEY_SHIFT bits are zero."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> KEY_SHIFT


@triton.jit
def value_of(key, KEY_SHIFT: tl.constexpr):
    """The inverse of key_of."""
    wide = key << KEY_SHIFT
    wide = tl.where(key < 0, wide | ((1 << KEY_SHIFT) - 1), wide)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_and_scaled(x, temperature, KEY_SHIFT: tl.constexpr):
    """fp32 logits: two may have one quotient, so the quotient is the key. Others keep apart."""
    scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
    if KEY_SHIFT == 0:
        return key_of(scaled, 0), scaled
    else:
        return key_of(x, KEY_SHIFT), scaled


@triton.jit
def count_and_mass_above(
    row_ptr,
    vocab_size,
    pivot,
    temperature,
    best,
    KEY_SHIFT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """How many keys lie above the pivot, and the sum of their exp(scaled - best)."""
    offsets = tl.arange(0, TILE_ROWS)[:, None] * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    count = tl.zeros([TILE_COLUMNS], tl.int32)
    mass = tl.zeros([TILE_COLUMNS], tl.float32)
    for start in range(0, vocab_size, TILE_ROWS * TILE_COLUMNS):
        ids = start + offsets
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        key, scaled = key_and_scaled(x, temperature, KEY_SHIFT)
        is_above = key > pivot
        count += tl.sum(is_above.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(is_above, tl.exp(scaled - best), 0.0), axis=0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def bisect(
    row_ptr,
    vocab_size,
    low,
    high,
    count_from,
    limit,
    temperature,
    best,
    BY_MASS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """The least key above which less than `limit` lies, tokens or mass, between low and high.

    It is true of high, the largest key there is, and not of low; `count_from` tokens are above
    low. Returns the key, how many tokens and how much mass are above it, and how many are not
    below it.
    """
    count_above = 0
    mass_above = 0.0
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        count, mass = count_and_mass_above(
            row_ptr, vocab_size, middle, temperature, best, KEY_SHIFT, TILE_ROWS, TILE_COLUMNS
        )
        if BY_MASS:  # noqa: SIM108 (a constexpr branch: only one of the two is compiled)
            is_less = mass < limit
        else:
            is_less = count < limit
        high = tl.where(is_less, middle, high)
        low = tl.where(is_less, low, middle)
        count_above = tl.where(is_less, count, count_above)
        mass_above = tl.where(is_less, mass, mass_above)
        count_from = tl.where(is_less, count_from, count)
    return high, count_above, mass_above, count_from


@triton.jit
def last_kept_tie(
    row_ptr,
    vocab_size,
    key,
    num_kept,
    temperature,
    KEY_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The id of the num_kept-th token whose key is `key`."""
    last = vocab_size
    seen = 0
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        keys, _ = key_and_scaled(x, temperature, KEY_SHIFT)
        is_tie = ((keys == key) & (ids < vocab_size)).to(tl.int32)
        num_ties = tl.sum(is_tie, axis=0)
        if (seen < num_kept) & (seen + num_ties >= num_kept):
            rank = seen + tl.cumsum(is_tie, axis=0)
            last = tl.max(tl.where((is_tie != 0) & (rank <= num_kept), ids, 0), axis=0)
        seen += num_ties
    return last


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
    out_ptr,  # int32 [batch_size]
    is_nan_ptr,  # int8 [batch_size]
    logits_stride,
    vocab_size,
    num_groups,
    LANE_TOKENS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program: the best of one row's groups; of a row with filters, all the rest. In fp32."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUPS)
    is_group = groups < num_groups
    values_ptr += row * num_groups
    values = tl.load(values_ptr + groups, mask=is_group, other=float("-inf"))
    tokens = tl.load(tokens_ptr + row * num_groups + groups, mask=is_group, other=0x7FFFFFFF)
    largest = tl.max(values, axis=0)
    token = tl.min(tl.where(values == largest, tokens, 0x7FFFFFFF), axis=0)
    is_nan = tl.abs(largest) == float("inf")

    slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    filtered = has_filter(temperature, top_k, top_p, min_p, vocab_size, MIN_TEMPERATURE)
    tl.store(is_nan_ptr + row, is_nan.to(tl.int8))
    if is_nan | (filtered == 0):
        tl.store(out_ptr + row, tl.where(is_nan, 0, token))
        return

    row_ptr = logits_ptr + row * logits_stride
    highest, best = key_and_scaled(largest, temperature, KEY_SHIFT)
    lowest = key_of(largest * 0.0 - float("inf"), KEY_SHIFT) - 1

    # What is kept: keys above `least`, and of those equal to it the first num_kept.
    least = lowest
    count_above = vocab_size
    count_from = vocab_size
    num_kept = 0
    mass_above = 0.0
    if top_k < vocab_size:
        least, count_above, mass_above, count_from = bisect(
            row_ptr,
            vocab_size,
            lowest,
            highest,
            vocab_size,
            top_k,
            temperature,
            best,
            False,
            KEY_SHIFT,
            TILE_ROWS,
            TILE_COLUMNS,
        )
        num_kept = top_k - count_above
    if top_p < 1.0:
        if top_k < vocab_size:
            mass = mass_above + num_kept * tie_mass(least, temperature, best, KEY_SHIFT)
        else:
            _, mass = count_and_mass_above(
                row_ptr, vocab_size, lowest, temperature, best, KEY_SHIFT, TILE_ROWS, TILE_COLUMNS
            )
        limit = top_p * mass
        if (top_k >= vocab_size) | (mass_above >= limit):
            num_kept = vocab_size
            least, count_above, mass_above, count_from = bisect(
                row_ptr,
                vocab_size,
                least,
                highest,
                count_above,
                limit,
                temperature,
                best,
                True,
                KEY_SHIFT,
                TILE_ROWS,
                TILE_COLUMNS,
            )
        ties = (limit - mass_above) / tie_mass(least, temperature, best, KEY_SHIFT)
        ties = tl.ceil(tl.minimum(ties, 1e9)).to(tl.int32)
        num_kept = tl.minimum(num_kept, tl.maximum(ties, 1))
    last_tie = vocab_size
    if num_kept < count_from - count_above:
        last_tie = last_kept_tie(
            row_ptr, vocab_size, least, num_kept, temperature, KEY_SHIFT, TILE_COLUMNS
        )

    lanes = tl.arange(0, LANE_TOKENS)
    seed = tl.load(seed_ptr + slot)
    position = tl.load(length_ptr + slot)
    value = tl.full([LANE_TOKENS], float("-inf"), tl.float32)
    token_of_lane = tl.full([LANE_TOKENS], 0x7FFFFFFF, tl.int32)
    for group in range(0, num_groups):
        group_key, _ = key_and_scaled(tl.load(values_ptr + group), temperature, KEY_SHIFT)
        if group_key >= least:
            w0, w1, w2, w3 = group_words(seed, position, group, LANE_TOKENS)
            for lane in tl.static_range(4):
                ids = group * (4 * LANE_TOKENS) + lane * LANE_TOKENS + lanes
                x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
                key, scaled = key_and_scaled(x.to(tl.float32), temperature, KEY_SHIFT)
                is_kept = (key > least) | ((key == least) & (ids <= last_tie))
                is_kept = is_kept & (tl.exp(scaled - best) >= min_p)
                if lane == 0:
                    noise = gumbel_noise(w0, FAST)
                elif lane == 1:
                    noise = gumbel_noise(w1, FAST)
                elif lane == 2:
                    noise = gumbel_noise(w2, FAST)
                else:
                    noise = gumbel_noise(w3, FAST)
                noisy = tl.where(is_kept, scaled + noise, float("-inf"))
                value, token_of_lane = best_of(value, token_of_lane, noisy, ids)
    largest = tl.max(value, axis=0)
    token = tl.min(tl.where(value == largest, token_of_lane, 0x7FFFFFFF), axis=0)
    tl.store(out_ptr + row, token)


@triton.jit
def tie_mass(key, temperature, best, KEY_SHIFT: tl.constexpr):
    """exp(scaled - best) of the tokens with this key."""
    value = value_of(key, KEY_SHIFT)
    if KEY_SHIFT != 0:
        value = tl.div_rn(value, temperature)
    return tl.exp(value - best)


def sample(
    logits: Tensor,
    slots: Tensor,
    *,
    length: Tensor,
    min_length: Tensor,
    stop_token_ids: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next token of each row: int32 [batch_size]; and whether its logits were not finite: bool.

    logits: [batch_size, vocab_size], its banned stop tokens overwritten in rows with filters;
    slots: int32 [batch_size]; the rest by slot: length (the position of the token to choose),
    min_length, top_k (vocab_size keeps all): int32; stop_token_ids: int32 [.., 16], negative where
    unused; seed: int64; temperature, top_p, min_p: fp32. A row that is not finite gets token 0.
    """
    batch_size, vocab_size = logits.shape
    int32s = (slots, length, min_length, stop_token_ids, top_k)
    assert slots.shape == (batch_size,), f"{tuple(slots.shape)} slots for {batch_size} rows"
    assert all(t.dtype == torch.int32 for t in int32s), "a column is not int32"
    assert seed.dtype == torch.int64, f"seed is {seed.dtype}"
    assert temperature.dtype == top_p.dtype == min_p.dtype == torch.float32, "a column is not fp32"
    assert logits.dtype in _KEY_SHIFTS, f"logits are {logits.dtype}"
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    assert stop_token_ids.is_contiguous(), "stop_token_ids is not contiguous"
    num_groups = triton.cdiv(vocab_size, 4 * LANE_TOKENS)
    device = logits.device
    values = torch.empty(batch_size, num_groups, dtype=torch.float32, device=device)
    tokens = torch.empty(batch_size, num_groups, dtype=torch.int32, device=device)
    out = torch.empty(batch_size, dtype=torch.int32, device=device)
    is_nan = torch.empty(batch_size, dtype=torch.bool, device=device)
    if not batch_size:
        return out, is_nan
    sample_groups_kernel[(num_groups, batch_size)](
        logits,
        slots,
        length,
        min_length,
        stop_token_ids,
        seed,
        temperature,
        top_k,
        top_p,
        min_p,
        values,
        tokens,
        logits.stride(0),
        vocab_size,
        num_groups,
        LANE_TOKENS=LANE_TOKENS,
        NUM_STOPS=stop_token_ids.shape[1],
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        FAST=logits.is_cuda,
        num_warps=4,
    )
    sample_rows_kernel[(batch_size,)](
        logits,
        slots,
        length,
        seed,
        temperature,
        top_k,
        top_p,
        min_p,
        values,
        tokens,
        out,
        is_nan.view(torch.int8),
        logits.stride(0),
        vocab_size,
        num_groups,
        LANE_TOKENS=LANE_TOKENS,
        BLOCK_GROUPS=triton.next_power_of_2(num_groups),
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        KEY_SHIFT=_KEY_SHIFTS[logits.dtype],
        TILE_ROWS=4,
        TILE_COLUMNS=256 * ROW_WARPS,
        FAST=logits.is_cuda,
        num_warps=ROW_WARPS,
    )
    return out, is_nan
