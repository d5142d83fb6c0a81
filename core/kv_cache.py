"""The KV cache: a layer's pages, and their allocation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.kv_sizes import block_bytes
from nanovllm_cli.core.resolved_config import ResolvedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """One layer's pages: k, v [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: Tensor
    v: Tensor


def copy_blocks(caches: list[KVCache], sources: Tensor, targets: Tensor) -> None:
    """Block `sources[i]` to `targets[i]` in every layer; int [num_copies]."""
    for cache in caches:
        for pages in (cache.k, cache.v):
            pages[targets] = pages[sources]


def allocate_kv_caches(
    num_blocks: int, sizes: ModelConfig, config: ResolvedConfig
) -> list[KVCache]:
    """Every layer's pages, of zeros; raises MemoryTooSmall."""
    shape = (num_blocks, sizes.num_key_value_heads, config.block_size, sizes.head_dim)
    dtype = getattr(torch, config.dtype)

    def pages() -> Tensor:
        # Filled and so really there: memory that is short fails now, not in the night.
        return torch.empty(shape, dtype=dtype, device=config.device).fill_(0)

    try:
        return [KVCache(k=pages(), v=pages()) for _ in range(sizes.num_hidden_layers)]
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no class
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise MemoryTooSmall(
            f"a KV cache of {num_blocks * block_bytes(sizes, config)} bytes does not fit",
            "Lower --kv-cache-memory, --max-num-seqs or --max-model-len.",
        ) from error
