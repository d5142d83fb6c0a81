"""How much of the GPU's memory an engine takes, and gives back."""

import gc
from typing import Any

import pytest
import torch

from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.errors import MemoryTooSmall

from .gpu_tests import answers, ask, tiny_engine

pytestmark = pytest.mark.gpu

# 32 KiB of KV a token: 1024 sequences of 8192 tokens could fill 256 GiB.
LARGE_KV = {
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}


def large_kv_engine(**config: Any) -> Engine:
    return tiny_engine(
        **{"sizes": LARGE_KV, "device": "cuda", "dtype": "bfloat16", "block_size": 64, **config}
    )


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("utilization", [0.3, 0.8])
def test_an_engine_fills_the_memory_it_may_and_no_more(utilization: float) -> None:
    clear()
    total = torch.cuda.get_device_properties(0).total_memory
    engine = large_kv_engine(gpu_memory_utilization=utilization)
    free, _ = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    share = f"{reserved / total:.4f} reserved, {1 - free / total:.4f} in use, of {utilization}"
    print(f"\n{share}")
    assert reserved <= utilization * total, share
    assert total - free <= utilization * total, share
    assert reserved >= 0.9 * utilization * total, share
    # The widest prefill and decode steps still fit in what was left for them.
    prompts = [[i % 160] * 64 for i in range(1024)]
    answers(engine, [ask(i, prompt, max_tokens=3) for i, prompt in enumerate(prompts)])
    free, _ = torch.cuda.mem_get_info()
    assert total - free <= utilization * total, f"{1 - free / total:.4f} after a run"


def test_too_small_a_share_is_refused_with_the_bytes_it_needs() -> None:
    clear()
    with pytest.raises(MemoryTooSmall, match=r"bytes are left.* need \d+") as caught:
        large_kv_engine(gpu_memory_utilization=0.001)
    assert caught.value.hint is not None
    assert "--gpu-memory-utilization" in caught.value.hint


def test_a_model_larger_than_the_gpu_is_refused() -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 64}
    with pytest.raises(MemoryTooSmall, match=r"weights need \d+ bytes; the GPU has \d+ of"):
        large_kv_engine(sizes=sizes)


def test_an_engine_gives_its_memory_back_to_the_next_one() -> None:
    clear()
    first = large_kv_engine(gpu_memory_utilization=0.6)
    expected = answers(first, [ask(0, [1, 2, 3], max_tokens=9, temperature=0.0)])
    num_blocks = first.num_blocks
    del first
    gc.collect()  # and torch keeps what is freed: the second has to count it as its own
    second = large_kv_engine(gpu_memory_utilization=0.6)
    actual = answers(second, [ask(0, [1, 2, 3], max_tokens=9, temperature=0.0)])
    assert actual[0].token_ids.tolist() == expected[0].token_ids.tolist()
    assert abs(second.num_blocks - num_blocks) <= num_blocks // 100
