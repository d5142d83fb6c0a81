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

_TILES_AT_ONCE = 256  # bounds the copies of K and V that the reference makes


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryTiles:
    """Up to `tile_size` neighbouring tokens of one sequence, attended to together.

    A prefill gathers a block of K and V once for a tile. `tile_size` depends on the model alone.
    Tiles begin at its multiples and so lie in one block each: a token that is not finite can reach
    no block before its own.
    The longest come first, so that the tiles with a block number n are the first ones.
    """

    token_indices: Tensor  # int64 [num_tiles, tile_size]: rows of q, 0 in a tile's padding
    positions: Tensor  # int64 [num_tiles, tile_size]: absolute, -1 in a tile's padding
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
        positions = positions + np.arange(tile_size)
        offsets = positions - start_positions[sequences, None]
        is_token = (offsets >= 0) & (offsets < query_lens[sequences, None])
        first_tokens = (np.cumsum(query_lens) - query_lens)[sequences, None]
        positions = np.where(is_token, positions, -1)
        num_blocks = positions.max(axis=1) // block_size + 1
        order = np.argsort(-num_blocks, kind="stable")
        return cls(
            token_indices=torch.from_numpy(np.where(is_token, first_tokens + offsets, 0)[order]),
            positions=torch.from_numpy(positions[order]),
            sequence_indices=torch.from_numpy(sequences[order]),
            num_blocks=num_blocks[order],
        )


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, tiles: QueryTiles
) -> Tensor:
    """softmax(q K^T / sqrt(head_dim)) V over each token's own past, itself included, in fp32.

    q: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, num_kv_heads, block_size,
    head_dim]; block_tables: int64 [num_sequences, max_blocks] -> [num_tokens, num_heads, head_dim].
    """
    out = torch.empty_like(q)
    for start in range(0, len(tiles.num_blocks), _TILES_AT_ONCE):
        part = slice(start, start + _TILES_AT_ONCE)
        indices, positions = tiles.token_indices[part], tiles.positions[part]
        attended = _attend(
            q[indices],
            k_cache,
            v_cache,
            block_tables[tiles.sequence_indices[part]],
            positions,
            tiles.num_blocks[part],
        )
        is_token = positions >= 0
        out[indices[is_token]] = attended[is_token].to(q.dtype)
    return out


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    num_blocks: npt.NDArray[np.int64],
) -> Tensor:
    """q: [num_tiles, tile_size, num_heads, head_dim] -> the same shape, fp32."""
    num_tiles, tile_size, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    rows = tile_size * group_size
    q = q.float().view(num_tiles, tile_size, num_kv_heads, group_size, head_dim).transpose(1, 2)
    q = q.reshape(num_tiles, num_kv_heads, rows, head_dim) * head_dim**-0.5
    row_positions = positions.repeat_interleave(group_size, dim=1)[:, None, :, None]
    last_positions = positions.amax(dim=1)

    best = torch.full((num_tiles, num_kv_heads, rows, 1), -1e30)
    total = torch.zeros_like(best)
    out = torch.zeros_like(q)
    for block in range(int(num_blocks[0])):
        n = int(np.count_nonzero(num_blocks > block))  # the first n tiles have such a block
        block_ids = block_tables[:n, block]
        offsets = torch.arange(block * block_size, (block + 1) * block_size)
        k = k_cache[block_ids].float().flatten(0, 1)
        v = v_cache[block_ids].float()
        # What an earlier holder left behind the last position may be anything, NaN included.
        v.masked_fill_((offsets > last_positions[:n, None])[:, None, :, None], 0.0)
        scores = torch.bmm(q[:n].flatten(0, 1), k.transpose(1, 2))
        scores = scores.view(n, num_kv_heads, rows, block_size)
        scores.masked_fill_(offsets > row_positions[:n], -torch.inf)
        new_best = torch.maximum(best[:n], scores.amax(dim=-1, keepdim=True))
        scores.sub_(new_best).exp_()
        decay = torch.exp(best[:n] - new_best)
        best[:n] = new_best
        total[:n].mul_(decay).add_(scores.sum(dim=-1, keepdim=True))
        product = torch.bmm(scores.flatten(0, 1), v.flatten(0, 1))
        out[:n].mul_(decay).add_(product.view(n, num_kv_heads, rows, head_dim))
    out = (out / total).view(num_tiles, num_kv_heads, tile_size, group_size, head_dim)
    return out.transpose(1, 2).reshape(num_tiles, tile_size, num_heads, head_dim)
