"""Causal attention of new tokens over K and V in pages: prefill, chunks, cached prefixes, decode.

The reference goes through a sequence's KV block by block with an online softmax (Milakov &
Gimelshein 2018, arXiv:1805.02867). Blocks lie at absolute positions and every product has the same
shape, so a token's result has the same bits whether it is computed in a prefill, in a chunk of one
or in a decode step, and whatever else is in the batch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TILES_AT_ONCE = 32  # the copies of their blocks, K and V, stay in a core's cache


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryTiles:
    """Up to `tile_size` neighbouring tokens of one sequence, attended to together.

    A prefill gathers a block of K and V once for a tile. `tile_size` depends on the model alone.
    Tiles begin at its multiples and so lie in one block each: a token that is not finite can reach
    no block before its own, and only a tile's last block needs a mask.
    The longest come first, so that the tiles with a block number n are the first ones, and those
    that end with it the last of these.
    """

    token_indices: Tensor  # int64 [num_tiles, tile_size]: rows of q, 0 in a tile's padding
    places: Tensor  # int64 [num_tokens]: where each token is in the flattened token_indices
    masks: Tensor  # fp32 [num_tiles, 1, tile_size * group_size, block_size]: of the last block
    sequence_indices: Tensor  # int64 [num_tiles]: rows of the block tables
    num_blocks: npt.NDArray[np.int64]  # [num_tiles]: blocks up to a tile's last position

    @classmethod
    def of(
        cls,
        query_lens: npt.NDArray[np.int32],
        start_positions: npt.NDArray[np.int32],
        *,
        group_size: int,
        block_size: int,
    ) -> "QueryTiles":
        """Tiles of packed sequences: query_lens, start_positions int32 [num_sequences]."""
        tile_size = max(1, 8 // group_size)
        first_tiles = start_positions // tile_size
        num_tiles = (start_positions + query_lens - 1) // tile_size - first_tiles + 1
        sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
        tiles_before = (np.cumsum(num_tiles) - num_tiles - first_tiles)[sequences]
        positions = (np.arange(len(sequences)) - tiles_before)[:, None] * tile_size
        num_blocks = positions[:, 0] // block_size + 1
        positions = positions + np.arange(tile_size)
        places = positions - start_positions[sequences, None]
        is_token = (places >= 0) & (places < query_lens[sequences, None])
        places += (np.cumsum(query_lens) - query_lens)[sequences, None]
        order = np.argsort(-num_blocks, kind="stable")
        is_token = is_token[order]
        token_indices = np.where(is_token, places[order], 0)
        places = np.empty(int(query_lens.sum()), dtype=np.int64)
        places[token_indices[is_token]] = np.flatnonzero(is_token)
        offsets = np.where(is_token, positions[order] % block_size, 0)
        is_future = np.arange(block_size) > offsets.repeat(group_size, axis=1)[..., None]
        masks = np.where(is_future, np.float32(-np.inf), np.float32(0))
        return cls(
            token_indices=torch.from_numpy(token_indices),
            places=torch.from_numpy(places),
            masks=torch.from_numpy(masks).unsqueeze(1),
            sequence_indices=torch.from_numpy(sequences[order]),
            num_blocks=num_blocks[order],
        )


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    tiles: QueryTiles,
    *,
    is_finite: bool = False,
) -> Tensor:
    """softmax(q K^T / sqrt(head_dim)) V over each token's own past, itself included, in fp32.

    q: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, num_kv_heads, block_size,
    head_dim]; block_tables: int64 [num_sequences, max_blocks] -> [num_tokens, num_heads, head_dim].
    What an earlier holder left in a block may be anything, NaN included, unless the caller knows
    that it `is_finite`: that is quicker, and gives the same bits.
    """
    num_tiles, tile_size = tiles.token_indices.shape
    _, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group_size = num_heads // num_kv_heads
    # [num_tiles, num_kv_heads, tile_size * group_size, head_dim]: the rows that share K and V.
    q = q.index_select(0, tiles.token_indices.flatten()).float() * head_dim**-0.5
    q = q.view(num_tiles, tile_size, num_kv_heads, group_size, head_dim).transpose(1, 2)
    q = q.reshape(num_tiles, num_kv_heads, tile_size * group_size, head_dim)
    out = torch.empty_like(q)
    for start in range(0, num_tiles, _TILES_AT_ONCE):
        part = slice(start, start + _TILES_AT_ONCE)
        out[part] = _attend(
            q[part],
            k_cache,
            v_cache,
            block_tables.index_select(0, tiles.sequence_indices[part]),
            tiles.masks[part],
            tiles.num_blocks[part],
            is_finite,
        )
    out = out.view(num_tiles, num_kv_heads, tile_size, group_size, head_dim).transpose(1, 2)
    out = out.reshape(-1, num_heads, head_dim).index_select(0, tiles.places)
    return out.to(k_cache.dtype)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    masks: Tensor,
    num_blocks: npt.NDArray[np.int64],
    is_finite: bool,
) -> Tensor:
    """q: fp32 [num_tiles, num_kv_heads, rows, head_dim] -> the same.

    masks: fp32 [num_tiles, 1, rows, block_size], added to the scores of each tile's last block.
    """
    best = total = out = torch.empty(0)
    n = len(q)
    for block in range(int(num_blocks[0])):
        m = int(np.count_nonzero(num_blocks > block + 1))  # tiles m .. n - 1 end with this block
        block_ids = block_tables[:n, block]
        k = k_cache.index_select(0, block_ids).float().flatten(0, 1)
        v = v_cache.index_select(0, block_ids).float().flatten(0, 1)
        scores = torch.bmm(q[:n].flatten(0, 1), k.transpose(1, 2)).view(n, *q.shape[1:3], -1)
        if is_finite:
            scores[m:] += masks[m:n]
        else:
            is_future = masks[m:n] < 0
            scores[m:].masked_fill_(is_future, -torch.inf)
            is_unseen = is_future.all(dim=2).unsqueeze(3)  # [n - m, 1, block_size, 1]
            v.view(n, -1, *v.shape[1:])[m:].masked_fill_(is_unseen, 0.0)
        largest = scores.amax(dim=-1, keepdim=True)
        if block == 0:
            best = largest
            scores.sub_(best).exp_()
            total = scores.sum(dim=-1, keepdim=True)
            out = torch.bmm(scores.flatten(0, 1), v).view_as(q)
        else:
            largest = torch.maximum(best[:n], largest)
            decay = torch.exp(best[:n] - largest)
            best[:n] = largest
            scores.sub_(largest).exp_()
            total[:n].mul_(decay).add_(scores.sum(dim=-1, keepdim=True))
            out[:n].mul_(decay).add_(torch.bmm(scores.flatten(0, 1), v).view_as(out[:n]))
        n = m
    return out / total
