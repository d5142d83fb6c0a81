"""The kernels of several ranks, one rank after the other on one device: each meets itself.

A rank's counter for another one is made to be the other's for it, so that nobody waits.
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


def signals_to_oneself(num_ranks: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """The counters, and where each rank finds its own: one further than the rank before."""
    size = SIGNAL_BYTES // 4 + num_ranks
    counters = torch.full((size,), first, dtype=torch.int32, device=DEVICE)
    start = counters.data_ptr()
    return counters, torch.tensor([start + 4 * rank for rank in range(num_ranks)], device=DEVICE)


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
    merged = torch.full_like(residual, torch.nan)
    for rank in range(num_ranks):
        own_residual = residual.clone()
        counters, signals = signals_to_oneself(num_ranks)
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
        assert set(counters.tolist()) in ({2}, {0, 2})
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
    for rank in range(num_ranks):
        counters, signals = signals_to_oneself(num_ranks)
        out = torch.full((num_rows, num_columns), torch.nan, dtype=dtype, device=DEVICE)
        join_columns(addresses(parts), signals, out, part, rank=rank, signal_bytes=SIGNAL_BYTES)
        assert torch.equal(out, join_columns_reference(parts, num_columns))
        assert set(counters.tolist()) in ({2}, {0, 2})


@pytest.mark.parametrize("first", [0, 7, 2**31 - 4, 2**31 - 3, -5])
def test_ranks_go_on_meeting_launch_after_launch_and_beyond_the_largest_count(first: int) -> None:
    parts, columns = randn(2, 3, 20), torch.zeros(3, 40, device=DEVICE)
    terms, weight = randn(2, 5, 16), randn(16)
    counters, signals = signals_to_oneself(2, first)
    for launches in range(1, 4):
        residual = torch.zeros(5, 16, device=DEVICE)
        out = torch.full_like(terms, torch.nan)
        join_columns(addresses(parts), signals, columns, 20, rank=1, signal_bytes=8)
        sum_add_rms_norm(
            addresses(terms), addresses(out), signals, residual, weight, 1e-6, rank=1,
            signal_bytes=8,
        )  # fmt: skip
        assert torch.equal(columns, join_columns_reference(parts, 40))
        assert not out[:, 1::2].isnan().any()
        expected = (first + 4 * launches + 2**31) % 2**32 - 2**31
        assert counters[1:3].tolist() == [expected, expected]
