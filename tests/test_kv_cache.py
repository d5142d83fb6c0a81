"""How many blocks some memory holds, and their allocation."""

from dataclasses import replace

import pytest
import torch

from nanovllm_cli.core.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.kv_cache import allocate_kv_caches
from nanovllm_cli.core.kv_sizes import block_bytes, blocks_per_sequence, num_kv_blocks
from nanovllm_cli.core.resolved_config import ResolvedConfig, resolve

SIZES = ModelConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=96,
    vocab_size=100,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    rope=RopeConfig(rope_type="default", theta=10000.0),
    dtype="bfloat16",
)
BLOCK_BYTES = 2 * 3 * 2 * 64 * 4 * 16  # K and V, layers, heads, head_dim, fp32, tokens


def settings(**config: int) -> ResolvedConfig:
    return resolve(EngineConfig(device="cpu", block_size=16, max_num_seqs=4, **config), SIZES)


def test_a_block_holds_k_and_v_of_its_tokens_in_every_layer() -> None:
    assert block_bytes(SIZES, settings()) == BLOCK_BYTES
    assert block_bytes(SIZES, replace(settings(), dtype="bfloat16")) == BLOCK_BYTES // 2


def test_memory_is_cut_into_whole_blocks() -> None:
    for free, blocks in ((2, 2), (2.9, 2), (3, 3), (20.5, 20)):
        assert num_kv_blocks(int(free * BLOCK_BYTES), SIZES, settings()) == blocks


def test_no_more_blocks_are_taken_than_the_running_sequences_can_fill() -> None:
    assert blocks_per_sequence(settings(max_model_len=33)) == 3
    assert num_kv_blocks(1 << 40, SIZES, settings(max_model_len=33)) == 4 * 3 + 1


@pytest.mark.parametrize("free", [2 * BLOCK_BYTES - 1, 0, -5_000_000])
def test_room_for_less_than_a_block_and_the_scratch_block_is_refused(free: int) -> None:
    with pytest.raises(MemoryTooSmall) as caught:
        num_kv_blocks(free, SIZES, settings())
    assert caught.value.message.startswith(f"{max(free, 0)} bytes are left")
    assert f"need {2 * BLOCK_BYTES}" in caught.value.message


def test_the_hint_names_the_flag_that_decided() -> None:
    on_gpu = replace(settings(), device="cuda")
    for config, flag in (
        (settings(), "--kv-cache-memory"),
        (settings(kv_cache_bytes=9), "--kv-cache-memory"),
        (replace(on_gpu, kv_cache_bytes=9), "--kv-cache-memory"),
        (on_gpu, "--gpu-memory-utilization"),
    ):
        with pytest.raises(MemoryTooSmall) as caught:
            num_kv_blocks(9, SIZES, config)
        assert caught.value.hint is not None
        assert flag in caught.value.hint


def test_every_layer_has_its_own_zeroed_pages() -> None:
    caches = allocate_kv_caches(5, SIZES, settings())
    assert len(caches) == 3
    for cache in caches:
        for pages in (cache.k, cache.v):
            assert pages.shape == (5, 2, 16, 64)
            assert pages.dtype == torch.float32
            assert pages.is_contiguous()
            assert not pages.any()
    assert len({pages.data_ptr() for cache in caches for pages in (cache.k, cache.v)}) == 6


def test_a_cache_that_the_machine_has_no_memory_for_is_refused() -> None:
    # More than any address space holds: the allocator itself refuses it.
    with pytest.raises(MemoryTooSmall, match="does not fit") as caught:
        allocate_kv_caches(1 << 42, SIZES, settings())
    assert str(BLOCK_BYTES << 42) in caught.value.message


def test_an_allocation_that_fails_on_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("torch.empty", no_memory)
    with pytest.raises(MemoryTooSmall, match="does not fit"):
        allocate_kv_caches(2, SIZES, settings())
