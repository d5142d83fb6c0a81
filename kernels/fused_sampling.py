"""Choose the next token: greedy, or a draw by the Gumbel-max trick with counter-based noise.

    argmax over the kept tokens of logit / temperature + noise(seed, position, token id)

Its meaning is sampling.py's sample_reference; ties go to the lowest token id. Every row takes its
path on the device, so that one graph serves all parameters. A row without filters, greedy ones
too, is read once, by a program for each group of 4096 tokens; a second kernel, of
sampling_filters.py, merges the groups, and draws for the rows with filters.
"""

from functools import partial

import torch
from torch import Tensor

from nanovllm_cli.kernels.gumbel_noise import negative_noise, words_of_counters
from nanovllm_cli.kernels.logit_keys import KEY_SHIFTS
from nanovllm_cli.kernels.sampling import LANE_TOKENS, MIN_TEMPERATURE
from nanovllm_cli.kernels.sampling_filters import (
    BLOCK_TOKENS,
    LIST_TOKENS,
    ROW_REGISTERS,
    ROW_WARPS,
    has_filter,
    sample_rows_kernel,
)
from nanovllm_cli.kernels.triton_import import tl, triton

GROUP_TOKENS = 4 * LANE_TOKENS
GROUP_WARPS = 4
# Registers a thread, so that six programs share a multiprocessor: their loads hide each other.
GROUP_REGISTERS = 80


@triton.jit
def without_nan(x):
    """fp32, infinite where x is NaN."""
    x = x.to(tl.float32)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def best_of(value, token, other_value, other_token):
    """Elementwise; the other one has the higher id, and loses a tie."""
    is_better = other_value > value
    return tl.where(is_better, other_value, value), tl.where(is_better, other_token, token)


@triton.jit
def mass_and_maxima(
    x,
    ids,
    largest,
    inverse_temperature,
    block_maxima_ptr,
    LANE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Store the largest logit of each block of tokens; return exp((x - largest) / temperature)."""
    NUM_BLOCKS: tl.constexpr = LANE_TOKENS // BLOCK_TOKENS
    maxima = tl.max(tl.reshape(x, [NUM_BLOCKS, BLOCK_TOKENS]), axis=1)
    first_block = tl.min(ids, axis=0) // BLOCK_TOKENS
    tl.store(block_maxima_ptr + first_block + tl.arange(0, NUM_BLOCKS), maxima)
    mass = tl.exp((x - largest) * inverse_temperature)
    return tl.where(x > float("-inf"), mass, 0.0)


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
    masses_ptr,  # fp32 [batch_size, num_groups], of rows with filters
    block_maxima_ptr,  # fp32 [batch_size, num_groups * 4 * LANE_TOKENS // BLOCK_TOKENS], likewise
    logits_stride,
    vocab_size,
    num_groups,
    LANE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program: one row's group of 4 * LANE_TOKENS tokens; its best token, in fp32.

    Of a row with filters there is no noise: the group's largest logit, the sum of
    exp((logit - largest) / temperature), and the largest logit of each block of tokens. Stop
    tokens that are banned become minus infinity in memory, so that the next kernel need not know.
    """
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    partial = row * num_groups + group
    lanes = tl.arange(0, LANE_TOKENS)
    ids0 = group * (4 * LANE_TOKENS) + lanes
    ids1 = ids0 + LANE_TOKENS
    ids2 = ids1 + LANE_TOKENS
    ids3 = ids2 + LANE_TOKENS
    # Loads stay in this order: the logits are under way while the parameters are fetched.
    slot = tl.load(slots_ptr + row).to(tl.int64)
    x0 = tl.load(row_ptr + ids0, mask=ids0 < vocab_size, other=float("-inf"))
    x1 = tl.load(row_ptr + ids1, mask=ids1 < vocab_size, other=float("-inf"))
    x2 = tl.load(row_ptr + ids2, mask=ids2 < vocab_size, other=float("-inf"))
    x3 = tl.load(row_ptr + ids3, mask=ids3 < vocab_size, other=float("-inf"))
    temperature = tl.load(temperature_ptr + slot)
    length = tl.load(length_ptr + slot)
    min_length = tl.load(min_length_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    filtered = has_filter(temperature, top_k, top_p, min_p, vocab_size, MIN_TEMPERATURE)
    x0, x1, x2, x3 = without_nan(x0), without_nan(x1), without_nan(x2), without_nan(x3)
    if length < min_length:
        stops_ptr = stop_token_ids_ptr + slot * NUM_STOPS
        for i in range(NUM_STOPS):
            stop = tl.load(stops_ptr + i)
            x0 = tl.where(ids0 == stop, float("-inf"), x0)
            x1 = tl.where(ids1 == stop, float("-inf"), x1)
            x2 = tl.where(ids2 == stop, float("-inf"), x2)
            x3 = tl.where(ids3 == stop, float("-inf"), x3)
            if filtered & (stop >= 0) & (stop // (4 * LANE_TOKENS) == group):
                banned = tl.full([], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + stop, banned, mask=stop < vocab_size)
    if (filtered == 0) & (temperature >= MIN_TEMPERATURE):
        seed = tl.load(seed_ptr + slot)
        # Nothing is above infinity; but so the counters lie in registers as the logits do, and
        # the noise need not pass through shared memory to meet them.
        counter = group * LANE_TOKENS + tl.where(x0 > float("inf"), 0, lanes)
        w0, w1, w2, w3 = words_of_counters(seed, length, counter)
        factor = 1.4426950408889634 / temperature  # logits and noise both over ln(2)
        x0 = x0 * factor - negative_noise(w0, FAST)
        x1 = x1 * factor - negative_noise(w1, FAST)
        x2 = x2 * factor - negative_noise(w2, FAST)
        x3 = x3 * factor - negative_noise(w3, FAST)
    value, token = best_of(x0, ids0, x1, ids1)
    value, token = best_of(value, token, x2, ids2)
    value, token = best_of(value, token, x3, ids3)
    best = tl.max(value, axis=0)
    first = tl.min(tl.where(value == best, token, 0x7FFFFFFF), axis=0)
    tl.store(values_ptr + partial, best)
    tl.store(tokens_ptr + partial, first)
    if filtered:
        GROUP_BLOCKS: tl.constexpr = 4 * LANE_TOKENS // BLOCK_TOKENS
        inverse = 1.0 / temperature
        block_maxima_ptr += row * num_groups * GROUP_BLOCKS
        mass = mass_and_maxima(x0, ids0, best, inverse, block_maxima_ptr, LANE_TOKENS, BLOCK_TOKENS)
        mass += mass_and_maxima(
            x1, ids1, best, inverse, block_maxima_ptr, LANE_TOKENS, BLOCK_TOKENS
        )
        mass += mass_and_maxima(
            x2, ids2, best, inverse, block_maxima_ptr, LANE_TOKENS, BLOCK_TOKENS
        )
        mass += mass_and_maxima(
            x3, ids3, best, inverse, block_maxima_ptr, LANE_TOKENS, BLOCK_TOKENS
        )
        tl.store(masses_ptr + partial, tl.sum(mass, axis=0))


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
    assert logits.dtype in KEY_SHIFTS, f"logits are {logits.dtype}"
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    assert stop_token_ids.is_contiguous(), "stop_token_ids is not contiguous"
    num_groups = triton.cdiv(vocab_size, GROUP_TOKENS)
    num_blocks = num_groups * (GROUP_TOKENS // BLOCK_TOKENS)
    new_floats = partial(logits.new_empty, dtype=torch.float32)
    new_ints = partial(logits.new_empty, dtype=torch.int32)
    values = new_floats(batch_size, num_groups)
    tokens = new_ints(batch_size, num_groups)
    masses = new_floats(batch_size, num_groups)
    block_maxima = new_floats(batch_size, num_blocks)
    listed_blocks = new_ints(batch_size, num_blocks)
    list_scaled = new_floats(batch_size, LIST_TOKENS)
    list_keys = new_ints(batch_size, LIST_TOKENS)
    list_ids = new_ints(batch_size, LIST_TOKENS)
    out = new_ints(batch_size)
    is_nan = logits.new_empty(batch_size, dtype=torch.bool)
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
        masses,
        block_maxima,
        logits.stride(0),
        vocab_size,
        num_groups,
        LANE_TOKENS=LANE_TOKENS,
        BLOCK_TOKENS=BLOCK_TOKENS,
        NUM_STOPS=stop_token_ids.shape[1],
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        FAST=logits.is_cuda,
        num_warps=GROUP_WARPS,
        maxnreg=GROUP_REGISTERS,
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
        masses,
        block_maxima,
        listed_blocks,
        list_keys,
        list_scaled,
        list_ids,
        out,
        is_nan.view(torch.int8),
        logits.stride(0),
        vocab_size,
        num_groups,
        LANE_TOKENS=LANE_TOKENS,
        BLOCK_TOKENS=BLOCK_TOKENS,
        LIST_TOKENS=LIST_TOKENS,
        CHUNK=256 * ROW_WARPS,
        BLOCK_GROUPS=triton.next_power_of_2(num_groups),
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        KEY_SHIFT=KEY_SHIFTS[logits.dtype],
        FAST=logits.is_cuda,
        num_warps=ROW_WARPS,
        maxnreg=ROW_REGISTERS,
    )
    return out, is_nan
