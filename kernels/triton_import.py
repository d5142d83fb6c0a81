"""Triton, or stand-ins that let the kernel files be imported where there is none.

On a CPU the tool works without Triton, and importing it takes half a second: it is left out unless
this torch was built for CUDA, or TRITON_INTERPRET=1 asks for the kernels on a CPU.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = (torch.version.cuda is not None or _IS_INTERPRETED) and find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:

    class _Absent:
        """Stands for `triton` and `tl` while the kernels are defined; calling one fails."""

        constexpr = None

        def jit(self, kernel: Any = None, **options: Any) -> Any:
            return kernel if kernel is not None else self.jit

    triton = tl = _Absent()


def runs_on_triton(x: torch.Tensor) -> bool:
    """Whether `x` is where a kernel runs: on a GPU, or anywhere under the interpreter."""
    return x.is_cuda or _IS_INTERPRETED


__all__ = ["HAS_TRITON", "runs_on_triton", "tl", "triton"]
