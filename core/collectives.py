"""Collectives of one machine's ranks: gloo on CPUs, NCCL and symmetric memory on GPUs.

They find each other in an anonymous memory file that all inherit, so there is neither a port nor a
name that two jobs could share; what gloo and NCCL connect stays on the loopback interface.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import _abort_process_group

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.parallel import Collectives, TensorParallel
from nanovllm_cli.core.resolved_config import resolve

Way = Literal["one-shot", "two-shot", "nccl"]

# What sums fastest, by number of ranks: up to so many bytes, this way; above all of them, NCCL.
# Two H200, in a graph, us, NCCL / one-shot / two-shot: 2 KiB 16 / 6.0 / 5.9,
# 512 KiB 19 / 9.5 / 7.6;
# 2 MiB 37 / 19 / 13; 10 MiB 61 / 63 / 39; 80 MiB 321 / 462 / 262.
FASTEST_WAYS: dict[int, tuple[tuple[int, Way], ...]] = {2: ((1 << 30, "two-shot"),)}

_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # NVLink multicast needs a fabric manager that not every machine has set up.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
_TIMEOUT = timedelta(minutes=10)  # a rank's death is seen sooner, by its process

# Whether this process has not yet asked for symmetric memory. A second group in one process cannot
# have it: torch counts a process's meetings, and the new ranks, in new processes, begin at none.
_is_first_use = iter([True])

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def connect(
    rank: int,
    store_fd: int,
    config: EngineConfig,
    sizes: ModelConfig,
    *,
    meet: Callable[[], None],
) -> TensorParallel:
    """Meet the other ranks; on a GPU this rank's becomes the current one.

    meet: returns when all have come as far; raises where one has ended.
    """
    os.environ.update({**_ENVIRONMENT, **os.environ})
    resolved = resolve(config, sizes)
    size = resolved.tensor_parallel_size
    meet()
    store = FileStore(f"/proc/self/fd/{store_fd}", size)
    collectives: Collectives
    if resolved.device == "cpu":
        collectives = CpuCollectives(rank, size, store)
    else:
        rows = max(resolved.max_num_batched_tokens, resolved.max_num_seqs)
        collectives = GpuCollectives(
            rank,
            size,
            store,
            num_elements=rows * sizes.hidden_size,
            dtype=getattr(torch, resolved.dtype),
        )
    return TensorParallel(rank, size, collectives)


class CpuCollectives:
    """gloo. Sums are made in the order of ranks, in fp32: no row's bits depend on its batch."""

    def __init__(self, rank: int, size: int, store: FileStore) -> None:
        self.all_reduce = "gloo"
        self._size = size
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

    def sum(self, x: Tensor) -> Tensor:
        total, *others = self.gather(x.float()).unbind()
        for other in others:
            total += other
        return total.to(x.dtype)

    def buffer(self, num_rows: int, num_columns: int) -> None:
        return None

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self._size, *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous())
        return out

    def minimum(self, value: int) -> int:
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def close(self) -> None:
        dist.destroy_process_group()


class GpuCollectives:
    """NCCL, and for sums a buffer in symmetric memory where that is faster and the GPUs are peers.

    num_elements: of the largest sum; dtype: of all of them.
    """

    def __init__(
        self, rank: int, size: int, store: FileStore, *, num_elements: int, dtype: torch.dtype
    ) -> None:
        self._size = size
        self._device = torch.device("cuda", rank)
        torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=self._device,
        )
        group = dist.group.WORLD
        assert group is not None, "init_process_group has made it"
        self._group_name = group.group_name
        self._ways = FASTEST_WAYS.get(size, ())
        self._symmetric = self._symmetric_buffer(num_elements, dtype) if self._ways else None
        if self._symmetric is None:
            self._ways = ()
        self.all_reduce = " / ".join([*(way for _, way in self._ways), "nccl"])

    def sum(self, x: Tensor) -> Tensor:
        way = self._way(x.nbytes)
        if way == "nccl" or self._symmetric is None or x.numel() > self._symmetric.numel():
            dist.all_reduce(x)
            return x
        if x.data_ptr() != self._symmetric.data_ptr():
            x = self._symmetric[: x.numel()].view(x.shape).copy_(x)
        if way == "one-shot":
            return torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self._group_name)
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._group_name)

    def buffer(self, num_rows: int, num_columns: int) -> Tensor | None:
        """A view of symmetric memory: each sum ends when every rank has read it."""
        num_elements = num_rows * num_columns
        symmetric = self._symmetric
        if symmetric is None or num_elements > symmetric.numel():
            return None
        if self._way(num_elements * symmetric.itemsize) == "nccl":
            return None
        return symmetric[:num_elements].view(num_rows, num_columns)

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self._size, *x.shape)
        _gather_into(out.view(-1, *x.shape[1:]), x.contiguous())
        return out

    def minimum(self, value: int) -> int:
        least = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def close(self) -> None:
        self._symmetric = None
        # To destroy the group would wait for the others to do the same, and they have ended.
        _abort_process_group()

    def _way(self, num_bytes: int) -> Way:
        return next((way for most, way in self._ways if num_bytes <= most), "nccl")

    def _symmetric_buffer(self, num_elements: int, dtype: torch.dtype) -> Tensor | None:
        """None on every rank where it cannot be had on one."""
        others = [i for i in range(self._size) if i != self._device.index]
        are_peers = all(torch.cuda.can_device_access_peer(self._device, i) for i in others)
        if not self.minimum(are_peers and next(_is_first_use, False)):
            return None
        buffer = None
        try:
            buffer = symmetric_memory.empty(num_elements, dtype=dtype, device=self._device)
            symmetric_memory.rendezvous(buffer, self._group_name)
        except RuntimeError:  # no way to share memory between these processes
            buffer = None
        return buffer if self.minimum(buffer is not None) else None
