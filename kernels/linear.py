"""Matrix product with a weight, in tiles of a fixed number of rows.

A library's matrix product picks its kernel, and with it the order of its sums, by the number of
rows: a row alone and the same row in a batch differ in the last bits. Always multiplying exactly
ROWS_PER_TILE rows, the last tile filled with zeros, gives every row the same bits in any batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS_PER_TILE = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [num_rows, in_features] -> [num_rows, out_features]; on a GPU by cuBLAS."""
    return F.linear(x, weight) if x.is_cuda else linear_reference(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, accumulated in fp32.

    x: [num_rows, in_features], weight: [out_features, in_features] -> [num_rows, out_features].
    """
    num_rows = x.shape[0]
    if num_rows % ROWS_PER_TILE:
        x = F.pad(x, (0, 0, 0, -num_rows % ROWS_PER_TILE))
    wide, transposed = x.float(), weight.float().t()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, len(wide), ROWS_PER_TILE):
        torch.mm(
            wide.narrow(0, start, ROWS_PER_TILE),
            transposed,
            out=out.narrow(0, start, ROWS_PER_TILE),
        )
    return out[:num_rows].to(x.dtype)
