"""Log-probabilities: logit - log(sum(exp(logits))) in fp32, over the whole vocabulary.

Of the likeliest tokens, ties by the lower id. On a GPU nothing is sorted: a program for each row
and tile of tokens finds the tile's k largest logits, its maximum and its sum of exponentials; a
second kernel merges a row's tiles.
"""

import torch
from torch import Tensor

from nanovllm_cli.kernels.logit_keys import key_of
from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

MAX_LIKELIEST = 32
_TILE_TOKENS = 4096


def likeliest_reference(logits: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: log(sum(exp)), the ids of the k likeliest tokens, their log-probabilities.

    logits: [num_rows, vocab_size]; rows: int [num_asked] -> fp32 [num_asked], int32 and fp32
    [num_asked, k].
    """
    x = logits[rows].float()
    largest = x.amax(dim=-1, keepdim=True)
    # exp and cumsum give a row the same bits in every batch.
    normalizer = largest + (x - largest).exp().cumsum(dim=-1)[:, -1:].log()
    num_candidates = k
    if k and len(x):
        # Whoever ties with the last of them is a candidate; then the order of ids decides.
        least = x.topk(k, dim=-1).values[:, -1:]
        num_candidates = max(int((x >= least).sum(dim=-1).max()), k)
    ids = x.topk(num_candidates, dim=-1).indices.sort(dim=-1).values
    values, order = x.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)[:, :k].int()
    return normalizer.squeeze(1), ids, values[:, :k] - normalizer


@triton.jit(do_not_specialize=["num_tiles", "k"])
def likeliest_of_tiles_kernel(
    logits_ptr,  # [num_rows, vocab_size], rows logits_stride apart
    rows_ptr,  # int32 [num_asked]
    maxima_ptr,  # fp32 [num_asked, num_tiles]
    sums_ptr,  # fp32 [num_asked, num_tiles], of exp(logit - maximum)
    keys_ptr,  # int64 [num_asked, num_tiles, k]
    logits_stride,
    vocab_size,
    num_tiles,
    k,
    TILE: tl.constexpr,
):
    """One program: TILE tokens of one row. A key has the order of the logits, then of lower ids."""
    tile = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    largest = tl.max(x, axis=0)
    part = index * num_tiles + tile
    tl.store(maxima_ptr + part, largest)
    tl.store(sums_ptr + part, tl.sum(tl.where(x > float("-inf"), tl.exp(x - largest), 0.0), axis=0))
    keys = (key_of(x, 0).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    taken = tl.full([TILE], -(2**63), tl.int64)
    for i in range(k):
        best = tl.max(keys, axis=0)
        tl.store(keys_ptr + part * k + i, best)
        keys = tl.where(keys == best, taken, keys)


@triton.jit(do_not_specialize=["num_tiles", "k"])
def merge_tiles_kernel(
    logits_ptr,
    rows_ptr,
    maxima_ptr,
    sums_ptr,
    keys_ptr,
    normalizers_ptr,  # fp32 [num_asked]
    ids_ptr,  # int32 [num_asked, k]
    values_ptr,  # fp32 [num_asked, k]
    logits_stride,
    num_tiles,
    k,
    BLOCK_TILES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One program: one row."""
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.load(rows_ptr + index).to(tl.int64) * logits_stride
    tiles = tl.arange(0, BLOCK_TILES)
    is_tile = tiles < num_tiles
    maxima = tl.load(maxima_ptr + index * num_tiles + tiles, mask=is_tile, other=float("-inf"))
    sums = tl.load(sums_ptr + index * num_tiles + tiles, mask=is_tile, other=0.0)
    largest = tl.max(maxima, axis=0)
    normalizer = largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), axis=0))
    tl.store(normalizers_ptr + index, normalizer)
    num_keys = num_tiles * k
    offsets = tl.arange(0, BLOCK_KEYS)
    taken = tl.full([BLOCK_KEYS], -(2**63), tl.int64)
    keys = tl.load(keys_ptr + index * num_keys + offsets, mask=offsets < num_keys, other=0)
    keys = tl.where(offsets < num_keys, keys, taken)
    for i in range(k):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, taken, keys)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        tl.store(ids_ptr + index * k + i, token)
        tl.store(values_ptr + index * k + i, tl.load(row_ptr + token).to(tl.float32) - normalizer)


def likeliest(logits: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`likeliest_reference`, on a GPU by two kernels. k: at most MAX_LIKELIEST and vocab_size."""
    vocab_size, num_asked = logits.shape[1], len(rows)
    assert k <= min(MAX_LIKELIEST, vocab_size), f"{k} of {vocab_size} tokens"
    if not runs_on_triton(logits):
        return likeliest_reference(logits, rows, k)
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    num_tiles = triton.cdiv(vocab_size, _TILE_TOKENS)
    maxima = logits.new_empty(num_asked, num_tiles, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    keys = logits.new_empty(num_asked, num_tiles, k, dtype=torch.int64)
    normalizers = logits.new_empty(num_asked, dtype=torch.float32)
    ids = logits.new_empty(num_asked, k, dtype=torch.int32)
    values = logits.new_empty(num_asked, k, dtype=torch.float32)
    if not num_asked:
        return normalizers, ids, values
    likeliest_of_tiles_kernel[(num_tiles, num_asked)](
        logits,
        rows,
        maxima,
        sums,
        keys,
        logits.stride(0),
        vocab_size,
        num_tiles,
        k,
        TILE=_TILE_TOKENS,
        num_warps=8,
    )
    merge_tiles_kernel[(num_asked,)](
        logits,
        rows,
        maxima,
        sums,
        keys,
        normalizers,
        ids,
        values,
        logits.stride(0),
        num_tiles,
        k,
        BLOCK_TILES=triton.next_power_of_2(num_tiles),
        BLOCK_KEYS=triton.next_power_of_2(num_tiles * MAX_LIKELIEST),
    )
    return normalizers, ids, values
