"""RMSNorm, q/k norm + rotation + page store, and SwiGLU against their references."""

import pytest
import torch

from nanovllm_cli.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from nanovllm_cli.kernels.rms_norm import add_rms_norm, rms_norm_reference
from nanovllm_cli.kernels.swiglu import swiglu, swiglu_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU, assert_close, randn

SHAPES = [(1, 1), (5, 123), (3, 1024), (2, 5120)]
if HAS_GPU:
    SHAPES += [(33, 2560), (40000, 1024), (1000, 4096)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, scale=3)
    weight = randn(shape[1], dtype=dtype)
    total = residual + x
    out = add_rms_norm(x, residual, weight, 1e-6)
    if HAS_GPU or dtype != torch.bfloat16:  # the interpreter cuts bits off instead of rounding
        assert torch.equal(residual, total)
    assert_close(residual, total)
    assert_close(out, rms_norm_reference(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3072)], ids=str)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = randn(shape[0], 2 * shape[1], dtype=dtype, scale=4)
    gate_up[0, 0] = -300.0
    assert_close(swiglu(gate_up), swiglu_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(1, 16, 8, 128, 64), (5, 4, 2, 64, 16), (7, 3, 1, 128, 256), (6, 5, 5, 64, 16)]
    + ([(511, 32, 8, 128, 64), (512, 16, 8, 128, 64), (32768, 16, 8, 128, 64)] if HAS_GPU else []),
)
def test_qk_norm_rope_store(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    num_blocks, max_positions = num_tokens // block_size + 4, 4000
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, scale=2)
    weights = randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)
    angles = torch.randn(max_positions, head_dim // 2, device=DEVICE)
    positions = torch.randint(max_positions, (num_tokens,), device=DEVICE).int()
    slot_mapping = torch.randperm(num_blocks * block_size, device=DEVICE)[:num_tokens]
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = [torch.full(shape, 7.0, dtype=dtype, device=DEVICE) for _ in range(4)]
    args = (qkv, *weights, 1e-6, angles.cos(), angles.sin(), positions, slot_mapping)
    expected = qk_norm_rope_store_reference(*args, *caches[:2])
    actual = qk_norm_rope_store(*args, *caches[2:])
    assert_close(actual, expected)
    assert_close(caches[2], caches[0])
    assert torch.equal(caches[3], caches[1])


def test_padding_rows_may_share_a_position_of_the_scratch_block() -> None:
    qkv, weight = randn(9, 4 * 64), torch.ones(64, device=DEVICE)
    angles = torch.randn(20, 32, device=DEVICE)
    cache = torch.zeros(3, 1, 16, 64, device=DEVICE)
    positions = torch.arange(9, device=DEVICE).int()
    slot_mapping = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    caches = (cache, cache.clone())
    args = (weight, weight, 1e-6, angles.cos(), angles.sin(), positions, slot_mapping)
    qk_norm_rope_store(qkv, *args, *caches)
    assert not caches[1][1:].any()
    assert any(torch.equal(caches[1][0, 0, 0], row[192:]) for row in qkv)
