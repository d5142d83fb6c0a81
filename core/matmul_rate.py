"""How fast this machine multiplies: for estimates."""

import time

import torch

from nanovllm_cli.kernels.linear import ROWS_PER_TILE, linear_reference


def cpu_matmul_rate() -> float:
    """FLOP/s of the CPU path's products, measured in some milliseconds."""
    x, weight = torch.rand(ROWS_PER_TILE, 1024), torch.rand(4096, 1024)
    linear_reference(x, weight)
    start = time.perf_counter()
    for _ in range(10):
        linear_reference(x, weight)
    return 10 * 2 * x.numel() * len(weight) / (time.perf_counter() - start)
