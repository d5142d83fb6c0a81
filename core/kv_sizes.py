"""How large a KV cache is, and how many blocks some memory holds: numbers, and no tensor."""

import os
from dataclasses import replace

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.resolved_config import ResolvedConfig

_KV_TOKENS_PER_SEQ = 256  # a CPU's default cache holds so many of each running sequence
_KV_BYTES = 4 << 30  # and is no larger than this, nor than half the free memory


def blocks_per_sequence(config: ResolvedConfig) -> int:
    """Blocks of the longest sequence."""
    return -(-config.max_model_len // config.block_size)


def block_bytes(sizes: ModelConfig, config: ResolvedConfig) -> int:
    """Bytes of one block over all layers."""
    return sizes.kv_bytes_per_token(4 if config.dtype == "float32" else 2) * config.block_size


def num_kv_blocks(free_bytes: int, sizes: ModelConfig, config: ResolvedConfig) -> int:
    """Blocks that `free_bytes` hold, no more than the running sequences can fill.

    The scratch block is one of them. Raises MemoryTooSmall where there is no room for another.
    """
    most = config.max_num_seqs * blocks_per_sequence(config) + 1
    num_blocks = min(free_bytes // block_bytes(sizes, config), most)
    if num_blocks >= 2:
        return num_blocks
    if config.kv_cache_bytes is not None or config.device == "cpu":
        hint = "Raise --kv-cache-memory or lower --block-size."
    else:
        hint = (
            "Lower --max-num-batched-tokens or --max-num-seqs, or raise --gpu-memory-utilization."
        )
    raise MemoryTooSmall(
        f"{max(free_bytes, 0)} bytes are left for the KV cache; one block of {config.block_size} "
        f"tokens and the scratch block need {2 * block_bytes(sizes, config)}",
        hint,
    )


def cpu_kv_bytes(sizes: ModelConfig, config: ResolvedConfig) -> int:
    """Bytes that the KV cache of a CPU may take: the given number, or what is likely to be used."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    wanted = config.max_num_seqs * min(config.max_model_len, _KV_TOKENS_PER_SEQ)
    wanted_blocks = max(-(-wanted // config.block_size), blocks_per_sequence(config)) + 1
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted_blocks * block_bytes(sizes, config), _KV_BYTES, free // 2)


def longest_sequence(sizes: ModelConfig, config: ResolvedConfig) -> int:
    """Tokens of the longest sequence that an engine will run, as far as that is known before.

    On a GPU without --kv-cache-memory the cache gets what the loaded model leaves, so there only
    max_model_len is known. Raises MemoryTooSmall.
    """
    kv_bytes = config.kv_cache_bytes
    if config.device == "cpu":
        kv_bytes = cpu_kv_bytes(sizes, config)
    if kv_bytes is None:
        return config.max_model_len
    num_heads = max(1, sizes.num_key_value_heads // config.tensor_parallel_size)
    of_rank = replace(sizes, num_key_value_heads=num_heads)
    # One block is scratch.
    num_tokens = (num_kv_blocks(kv_bytes, of_rank, config) - 1) * config.block_size
    return min(config.max_model_len, num_tokens)
