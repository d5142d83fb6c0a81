"""What goes wrong on a GPU, as errors of ours: too little memory at start, a failure later."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.errors import GpuFailed, MemoryTooSmall, UserError
from nanovllm_cli.core.resolved_config import ResolvedConfig

# How the messages begin or go on; only some of these errors have a class of their own.
_SIGNS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "cuBLAS", "CUBLAS_STATUS")


@contextmanager
def gpu_errors(*, is_start: bool = False) -> Iterator[None]:
    """What torch and Triton raise of a GPU becomes MemoryTooSmall (at start) or GpuFailed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # "Tried to allocate ... of which ... is free." and then the allocator's own affairs.
        what = str(error).splitlines()[0].partition(" Including ")[0]
        hint = "Lower --max-num-batched-tokens, --max-num-seqs or --gpu-memory-utilization."
        if is_start:
            raise MemoryTooSmall(f"the GPU's memory is too small: {what}", hint) from error
        raise GpuFailed(f"the GPU ran out of memory: {what}", hint) from error
    except RuntimeError as error:
        message = str(error)
        is_gpu = isinstance(error, torch.AcceleratorError)
        if not is_gpu and not any(sign in message for sign in _SIGNS):
            raise
        raise GpuFailed(
            f"the GPU failed: {message.splitlines()[0]}",
            "Run the same command again; if the GPU fails again, nvidia-smi may say why.",
        ) from error


def check_weights_fit(model: ModelConfig, config: ResolvedConfig) -> None:
    """Raise MemoryTooSmall if the GPU has no room for the weights, UserError if torch has none."""
    if config.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"the driver shows a GPU that torch {torch.__version__} cannot use",
            "Install a torch that was built for this driver, or run on the CPU with --device cpu.",
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    needed = model.num_parameters * dtype.itemsize
    free, total = torch.cuda.mem_get_info()
    # What earlier engines of this process gave back to torch is free as well.
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if needed > free:
        raise MemoryTooSmall(
            f"the model's weights need {needed} bytes; the GPU has {free} of {total} free",
            "Name a smaller model with --model."
            if dtype.itemsize == 2
            else "Halve them with --dtype bfloat16, or name a smaller model with --model.",
        )
