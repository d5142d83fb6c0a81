"""The log-probability kernels against their reference."""

import pytest
import torch

from nanovllm_cli.kernels.logprobs import likeliest, likeliest_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU

VOCAB_SIZES = [20, 123, 9000] + ([151936] if HAS_GPU else [])


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_they_are_the_references(vocab_size: int, dtype: torch.dtype, k: int) -> None:
    logits = (torch.randn(6, vocab_size + 5) * 4)[:, :vocab_size].to(dtype)
    rows = torch.tensor([5, 0, 2, 3], dtype=torch.int32)
    expected = likeliest_reference(logits, rows, k)
    actual = likeliest(logits.to(DEVICE), rows.to(DEVICE), k)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
    assert torch.equal(actual[1].cpu(), expected[1])
    assert torch.allclose(actual[0].cpu(), expected[0], atol=1e-5)
    assert torch.allclose(actual[2].cpu(), expected[2], atol=1e-5)
    assert torch.allclose(expected[0], logits[rows].float().logsumexp(dim=-1), atol=1e-4)


def test_ties_go_to_the_lower_id_over_tiles_as_well() -> None:
    logits = torch.full((2, 9000), -3.0)
    logits[0, [4095, 4096, 8999, 17]] = 2.0
    logits[1, 100:] = -torch.inf
    _, ids, _ = likeliest(logits.to(DEVICE), torch.tensor([0, 1], device=DEVICE).int(), 5)
    assert ids.tolist() == [[17, 4095, 4096, 8999, 0], [0, 1, 2, 3, 4]]


def test_no_rows_ask() -> None:
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    shapes = [x.shape for x in likeliest(torch.zeros(2, 50, device=DEVICE), none, 3)]
    assert shapes == [(0,), (0, 3), (0, 3)]
