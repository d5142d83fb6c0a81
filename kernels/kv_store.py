"""Store the K and V of new tokens in their pages."""

from torch import Tensor


def kv_store_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write row i of k and v to position `slot_mapping[i]` of the caches, in place.

    k, v: [num_tokens, num_kv_heads, head_dim]; slot_mapping: int64 [num_tokens], block id *
    block_size + offset; k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim].
    Several padding rows may name the same position of the scratch block.
    """
    block_size = k_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v
