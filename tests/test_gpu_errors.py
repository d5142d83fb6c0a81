"""What a GPU's failures become. The exceptions are torch's and Triton's own, raised where they are.

No GPU is needed: what would fail there is replaced by what raises the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nanovllm_cli.core.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.engine import build_model
from nanovllm_cli.core.errors import GpuFailed, MemoryTooSmall, UserError
from nanovllm_cli.core.gpu_errors import gpu_errors
from nanovllm_cli.core.gpu_launch import GpuLaunch
from nanovllm_cli.core.gpu_runner import GpuRunner

from .stand_in_gpus import stand_in_gpus

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 12.50 GiB is free. Including non-PyTorch memory, this process has 127.30 GiB memory in "
    "use. Of the allocated memory 126.00 GiB is allocated by PyTorch."
)
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be "
    "asynchronously reported at some other API call"
)
FAILURES = [
    torch.AcceleratorError(ILLEGAL),
    RuntimeError(ILLEGAL),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
]
SIZES = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=96,
    vocab_size=100,
    rms_norm_eps=1e-6,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    rope=RopeConfig(rope_type="default", theta=10000.0),
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Raises:
    """Whatever is asked of it fails with `error`."""

    error: Exception

    def __getattr__(self, name: str) -> Any:
        raise self.error


@contextmanager
def a_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int = 0) -> Iterator[None]:
    """As if there were a GPU with so many bytes free, and so many that torch holds unused."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    stand_in_gpus(monkeypatch, "NVIDIA Stand-in")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 24 << 30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: reserved)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 0)
    yield


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: str(error)[:40])
def test_a_failure_of_the_gpu_in_a_launch_is_named(error: Exception) -> None:
    runner = object.__new__(GpuRunner)
    runner._staging = Raises(error)  # type: ignore[assignment]
    with pytest.raises(GpuFailed, match=r"^the GPU failed: ") as caught:
        runner.launch(None)  # type: ignore[arg-type]
    assert caught.value.message == f"the GPU failed: {str(error).splitlines()[0]}"
    assert caught.value.hint is not None
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: str(error)[:40])
def test_a_failure_that_shows_only_when_the_tokens_are_read_is_named(error: Exception) -> None:
    launch = GpuLaunch(done=Raises(error), out=torch.zeros(4, 1))  # type: ignore[arg-type]
    with pytest.raises(GpuFailed, match=r"^the GPU failed: "):
        launch.result()


def test_memory_that_runs_out_in_a_launch_is_a_failure_of_the_gpu() -> None:
    runner = object.__new__(GpuRunner)
    runner._staging = Raises(torch.OutOfMemoryError(OUT_OF_MEMORY))  # type: ignore[assignment]
    with pytest.raises(GpuFailed, match="ran out of memory") as caught:
        runner.launch(None)  # type: ignore[arg-type]
    assert "Tried to allocate 20.00 GiB" in caught.value.message
    assert caught.value.message.endswith("12.50 GiB is free.")
    assert caught.value.hint is not None
    assert "--max-num-batched-tokens" in caught.value.hint


def test_memory_that_is_short_at_start_is_too_small() -> None:
    with pytest.raises(MemoryTooSmall, match=r"20.00 GiB.*12.50 GiB is free"), gpu_errors(
        is_start=True
    ):  # fmt: skip
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), UserError("a hint"), KeyError(3)]
)
def test_an_error_that_is_not_of_the_gpu_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, gpu_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("dtype", "dtype_bytes", "hint"),
    [("bfloat16", 2, "--model"), ("float32", 4, "--dtype bfloat16")],
)
def test_a_model_larger_than_the_gpu_is_refused_before_anything_is_allocated(
    dtype: Any, dtype_bytes: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = SIZES.num_parameters * dtype_bytes
    monkeypatch.setattr("nanovllm_cli.core.engine.Qwen3", None)  # what would allocate
    with a_gpu(monkeypatch, free=needed - 1), pytest.raises(MemoryTooSmall) as caught:
        build_model(SIZES, EngineConfig(dtype=dtype))
    for number in (needed, needed - 1):
        assert str(number) in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_weights_that_do_not_fit_after_all_are_refused_as_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr("nanovllm_cli.core.engine.Qwen3", no_memory)
    with a_gpu(monkeypatch, free=1 << 30), pytest.raises(MemoryTooSmall, match=r"20\.00 GiB"):
        build_model(SIZES, EngineConfig())


def test_memory_that_torch_holds_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_cli.core.engine.Qwen3", lambda *args: "built")
    with a_gpu(monkeypatch, free=1, reserved=1 << 30):
        assert build_model(SIZES, EngineConfig()) == "built"  # type: ignore[comparison-overlap]
