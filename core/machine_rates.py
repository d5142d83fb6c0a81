"""How fast this machine reads memory and multiplies: measured, not looked up.

On a GPU a kernel of ours reads a buffer many times the cache, and cuBLAS multiplies matrices large
enough to be at its best. On a CPU torch copies a buffer, which counts both ways, and the CPU path's
own product is timed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanovllm_cli.kernels.linear import ROWS_PER_TILE, linear_reference
from nanovllm_cli.kernels.tile_sums import BLOCK, tile_sums

_GPU_BUFFER_BYTES = 16 << 30  # a launch costs some 60 us besides its bytes
_CPU_BUFFER_BYTES = 128 << 20
_MATRIX_SIZE = 8192
_TIMES = 9
_WARM_UP_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineRates:
    """What the machine does at best, and how that was measured."""

    bytes_per_second: float
    flops_per_second: float
    bytes_measured_by: str
    flops_measured_by: str

    def of_several(self, num_gpus: int) -> "MachineRates":
        """Those of so many equal GPUs, one of which was measured."""
        return replace(
            self,
            bytes_per_second=self.bytes_per_second * num_gpus,
            flops_per_second=self.flops_per_second * num_gpus,
        )


def gpu_rates(dtype: torch.dtype) -> MachineRates:
    """Of the current GPU, which has nothing else to do and some memory free."""
    free, _ = torch.cuda.mem_get_info()
    num_bytes = min(_GPU_BUFFER_BYTES, free // 2)
    return MachineRates(
        bytes_per_second=_gpu_read_rate(num_bytes // (4 * BLOCK)),
        flops_per_second=_gpu_matmul_rate(dtype),
        bytes_measured_by=f"a Triton kernel that reads {num_bytes / 2**20:.0f} MiB",
        flops_measured_by=f"cuBLAS {str(dtype).removeprefix('torch.')}, {_MATRIX_SIZE} cubed",
    )


def cpu_rates(num_threads: int) -> MachineRates:
    """Of the CPU, with torch's own threads; leaves torch at `num_threads`."""
    torch.set_num_threads(num_threads)
    buffer = torch.rand(_CPU_BUFFER_BYTES // 4)
    copy = torch.zeros_like(buffer)
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        copy.copy_(buffer)
        seconds.append(time.perf_counter() - start)
    return MachineRates(
        # The best: a CPU has other work too, which only takes away.
        bytes_per_second=2 * buffer.nbytes / min(seconds),
        flops_per_second=max(cpu_matmul_rate() for _ in range(_TIMES)),
        bytes_measured_by=f"torch copies {buffer.nbytes / 2**20:.0f} MiB: read and written",
        flops_measured_by="the CPU path's float32 product",
    )


def cpu_matmul_rate() -> float:
    """FLOP/s of the CPU path's products, measured in some milliseconds."""
    x, weight = torch.rand(ROWS_PER_TILE, 1024), torch.rand(4096, 1024)
    linear_reference(x, weight)
    start = time.perf_counter()
    for _ in range(10):
        linear_reference(x, weight)
    return 10 * 2 * x.numel() * len(weight) / (time.perf_counter() - start)


def _gpu_read_rate(num_tiles: int) -> float:
    buffer = torch.rand(num_tiles * BLOCK, device="cuda")
    sums = torch.empty(num_tiles, device="cuda")
    return buffer.nbytes / _median_gpu_seconds(lambda: tile_sums(buffer, sums))


def _gpu_matmul_rate(dtype: torch.dtype) -> float:
    # Not zeros: on those a GPU draws less power, and clocks higher.
    shape = (_MATRIX_SIZE, _MATRIX_SIZE)
    a, b = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _MATRIX_SIZE**3 / _median_gpu_seconds(lambda: torch.mm(a, b, out=out))


def _median_gpu_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_SECONDS:  # an idle GPU's clocks take their time
        work()
        torch.cuda.synchronize()
    events = []
    for _ in range(_TIMES + 1):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        events.append(event)
        work()
    torch.cuda.synchronize()
    return statistics.median(events[i].elapsed_time(events[i + 1]) / 1000 for i in range(_TIMES))
