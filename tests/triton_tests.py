"""What the tests of the Triton kernels share: where they run, random tensors, tolerances.

They run on a GPU where there is one, and else in Triton's interpreter: conftest.py collects them
only where Triton is on, and test_kernels_interpreted.py runs them with TRITON_INTERPRET=1.
"""

import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2 if HAS_GPU else 3.2e-2,  # the interpreter cuts bits off
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the dtype's tolerance, relative to the largest value; NaN never passes."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    limit = TOLERANCE[actual.dtype] * max(expected.double().abs().max().item(), 1.0)
    assert error <= limit, f"{error} > {limit}"
