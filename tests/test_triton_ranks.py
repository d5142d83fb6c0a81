"""The kernels of several ranks, one rank after the other on one device: each meets itself.

A rank's flag for the other one is made to be the other's flag for it, so that nobody waits.
"""

import pytest
import torch
from torch import Tensor

from nanovllm_cli.kernels.join_columns import join_columns, join_columns_reference
from nanovllm_cli.kernels.sum_add_rms_norm import sum_add_rms_norm, sum_add_rms_norm_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU, assert_close, randn

SIGNAL_BYTES = 2048


def addresses(tensors: Tensor) -> Tensor:
    """Of each rank's part of [num_ranks, ...]."""
    return torch.tensor([part.data_ptr() for part in tensors], device=DEVICE)


def signals_to_oneself() -> tuple[Tensor, Tensor]:
    """The flags, and where two ranks find theirs: rank 1's of rank 0 is rank 0's of rank 1."""
    flags = torch.zeros(SIGNAL_BYTES // 4 + 1, dtype=torch.int32, device=DEVICE)
    start = flags.data_ptr()
    return flags, torch.tensor([start, start + 4], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "size"),
    [(1, 8), (5, 123), (4, 1024), (300, 16)]
    + ([(131, 4096), (16384, 1024), (1000, 5120)] if HAS_GPU else []),
)
def test_two_ranks_sum_and_normalize_each_its_rows(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    terms = randn(2, num_rows, size, dtype=dtype)
    residual, weight = randn(num_rows, size, dtype=dtype, scale=3), randn(size, dtype=dtype)
    total = residual.clone()
    expected = sum_add_rms_norm_reference(terms, total, weight, 1e-6)
    out = torch.full_like(terms, torch.nan)
    flags, signals = signals_to_oneself()
    residuals = residual.clone(), residual.clone()
    merged = torch.full_like(residual, torch.nan)
    for rank, own_residual in enumerate(residuals):
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
        others = slice(1 - rank, None, 2)
        assert torch.equal(own_residual[others], residual[others]), "another rank's row changed"
        merged[rank::2] = own_residual[rank::2]
    assert_close(merged, total)
    assert_close(out[0], expected)
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "part", "num_columns"),
    [(1, 4, 8), (3, 81, 161), (2, 9000, 17_999), (9, 16, 32)]
    + ([(1, 75_968, 151_936), (257, 75_968, 151_936), (5, 75_969, 151_937)] if HAS_GPU else []),
)
def test_two_ranks_see_all_columns(
    num_rows: int, part: int, num_columns: int, dtype: torch.dtype
) -> None:
    parts = randn(2, num_rows, part, dtype=dtype)
    flags, signals = signals_to_oneself()
    for rank in range(2):
        out = torch.full((num_rows, num_columns), torch.nan, dtype=dtype, device=DEVICE)
        join_columns(addresses(parts), signals, out, part, rank=rank, signal_bytes=SIGNAL_BYTES)
        assert torch.equal(out, join_columns_reference(parts, num_columns))
        assert not flags.any()
