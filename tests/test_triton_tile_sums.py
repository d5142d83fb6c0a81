"""The kernel that read bandwidth is measured with, against its reference."""

import pytest
import torch

from nanovllm_cli.kernels.tile_sums import BLOCK, tile_sums, tile_sums_reference

from .triton_tests import DEVICE, HAS_GPU, assert_close, randn


@pytest.mark.parametrize("num_tiles", [0, 1, 3, *([70_000] if HAS_GPU else [])])
def test_every_tile_is_read_to_its_end(num_tiles: int) -> None:
    x = randn(num_tiles * BLOCK)
    out = torch.full((num_tiles,), float("nan"), device=DEVICE)
    tile_sums(x, out)
    if num_tiles:
        assert_close(out / BLOCK, tile_sums_reference(x) / BLOCK)
