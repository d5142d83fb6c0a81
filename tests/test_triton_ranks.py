"""The kernels of several ranks, one rank after the other on one device: each meets itself.

A rank's flag for another one is made to be the other's flag for it, so that nobody waits.
"""

import pytest
import torch
from torch import Tensor

from nanovllm_cli.kernels.join_columns import join_columns, join_columns_reference
from nanovllm_cli.kernels.sum_add_rms_norm import sum_add_rms_norm, sum_add_rms_norm_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU, assert_close, randn

SIGNAL_BYTES = 2048 if HAS_GPU else 64  # few blocks: each has several rows


def addresses(tensors: Tensor) -> Tensor:
    """Of each rank's part of [num_ranks, ...]."""
    return torch.tensor([part.data_ptr() for part in tensors], device=DEVICE)


def signals_to_oneself(num_ranks: int) -> tuple[Tensor, Tensor]:
    """The flags, and where each rank finds its own: one flag further than the rank before."""
    flags = torch.zeros(SIGNAL_BYTES // 4 + num_ranks, dtype=torch.int32, device=DEVICE)
    start = flags.data_ptr()
    return flags, torch.tensor([start + 4 * rank for rank in range(num_ranks)], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "size"),
    [(1, 8), (5, 123), (3, 1024), (21, 16)]
    + ([(131, 4096), (16384, 1024), (1000, 5120)] if HAS_GPU else []),
)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_sum_and_normalize_each_its_rows(
    num_ranks: int, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    terms = randn(num_ranks, num_rows, size, dtype=dtype)
    residual, weight = randn(num_rows, size, dtype=dtype, scale=3), randn(size, dtype=dtype)
    total = residual.clone()
    expected = sum_add_rms_norm_reference(terms, total, weight, 1e-6)
    out = torch.full_like(terms, torch.nan)
    flags, signals = signals_to_oneself(num_ranks)
    merged = torch.full_like(residual, torch.nan)
    for rank in range(num_ranks):
        own_residual = residual.clone()
        sum_add_rms_norm(
            addresses(terms),
            addresses(out),
            signals,
            own_residual,
            weight,
            1e-6,
            rank=rank,
            signal_bytes=SIGNAL_BYTES,
        )
        assert not flags.any()
        merged[rank::num_ranks] = own_residual[rank::num_ranks]
        own_residual[rank::num_ranks] = residual[rank::num_ranks]
        assert torch.equal(own_residual, residual), "another rank's row changed"
    assert_close(merged, total)
    assert_close(out[0], expected)
    assert torch.equal(out, out[:1].expand_as(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_ranks", "num_rows", "part", "num_columns"),
    [(2, 1, 4, 8), (2, 3, 81, 161), (2, 2, 9000, 17_999), (4, 9, 16, 61), (8, 2, 21, 162)]
    + ([(2, 257, 75_968, 151_936), (2, 5, 75_969, 151_937), (4, 65, 37_984, 151_936)] * HAS_GPU),
)
def test_ranks_see_all_columns(
    num_ranks: int, num_rows: int, part: int, num_columns: int, dtype: torch.dtype
) -> None:
    parts = randn(num_ranks, num_rows, part, dtype=dtype)
    flags, signals = signals_to_oneself(num_ranks)
    for rank in range(num_ranks):
        out = torch.full((num_rows, num_columns), torch.nan, dtype=dtype, device=DEVICE)
        join_columns(addresses(parts), signals, out, part, rank=rank, signal_bytes=SIGNAL_BYTES)
        assert torch.equal(out, join_columns_reference(parts, num_columns))
        assert not flags.any()
