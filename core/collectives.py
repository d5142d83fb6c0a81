"""Collectives of one machine's ranks: gloo on CPUs, NCCL and symmetric memory on GPUs.

They find each other in an anonymous memory file that all inherit, so there is neither a port nor a
name that two jobs could share; what gloo and NCCL connect stays on the loopback interface.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import _abort_process_group

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.parallel import Collectives, TensorParallel
from nanovllm_cli.core.resolved_config import ResolvedConfig, resolve
from nanovllm_cli.kernels.join_columns import join_columns, join_columns_reference
from nanovllm_cli.kernels.rms_norm import add_rms_norm
from nanovllm_cli.kernels.sum_add_rms_norm import sum_add_rms_norm

# Numbers of ranks whose sums go through symmetric memory; others take NCCL's until they have been
# measured. Two H200, in a graph, us, NCCL / PyTorch's two-shot: 2 KiB 16 / 5.9; 512 KiB 19 / 7.6;
# 2 MiB 37 / 13; 10 MiB 61 / 39; 80 MiB 321 / 262.
FUSED_SIZES = (2,)
NCCL, FUSED = "nccl", "fused with residual and norm"  # how sums are made

_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # NVLink multicast needs a fabric manager that not every machine has set up.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
_ALIGNMENT = 64  # elements; 16 bytes are what a thread moves at once
_TIMEOUT = timedelta(minutes=10)  # a rank's death is seen sooner, by its process

# Whether this process has not yet asked for symmetric memory. A second group in one process cannot
# have it: torch counts a process's meetings, and the new ranks, in new processes, begin at none.
_is_first_use = iter([True])

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def check_collectives(config: ResolvedConfig) -> None:
    """Raise UserError if this torch has nothing to connect the ranks with."""
    is_gpu = config.device == "cuda"
    is_there = dist.is_available() and (
        dist.is_nccl_available() if is_gpu else dist.is_gloo_available()
    )
    if not is_there:
        raise UserError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, and this torch has no "
            f"{'NCCL' if is_gpu else 'gloo'} to connect ranks with",
            "Install a torch that has it, or leave out --tensor-parallel-size.",
        )


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
        collectives = GpuCollectives(
            rank,
            size,
            store,
            getattr(torch, resolved.dtype),
            sum_shape=(
                max(resolved.max_num_batched_tokens, resolved.max_num_seqs),
                sizes.hidden_size,
            ),
            column_shape=(
                resolved.max_num_seqs,
                TensorParallel(rank, size).shard(sizes.vocab_size).length,
            ),
        )
    return TensorParallel(rank, size, collectives)


class CpuCollectives:
    """gloo. Sums are made in the order of ranks, in fp32: no row's bits depend on its batch."""

    def __init__(self, rank: int, size: int, store: FileStore) -> None:
        self.all_reduce = "gloo"
        self._size = size
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

    def sum_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        total, *others = self._gather(x.float()).unbind()
        for other in others:
            total += other
        return add_rms_norm(total.to(x.dtype), residual, weight, eps)

    def term_buffer(self, num_rows: int) -> None:
        return None

    def join_columns(self, x: Tensor, num_columns: int) -> Tensor:
        return join_columns_reference(self._gather(x), num_columns)

    def column_buffer(self, num_rows: int) -> None:
        return None

    def minimum(self, value: int) -> int:
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def take_first(self, x: Tensor) -> None:
        dist.broadcast(x, src=0)

    def close(self) -> None:
        dist.destroy_process_group()

    def _gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self._size, *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous())
        return out


@dataclass(frozen=True, slots=True)
class _Shared:
    """A tensor of this rank's in memory that all reach, and where each rank's lies."""

    own: Tensor
    addresses: Tensor  # int64 [num_ranks]


class _SharedMemory:
    """This rank's tensors that all ranks reach, in one piece of symmetric memory.

    Raises RuntimeError where these processes cannot share any.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        *,
        sum_shape: tuple[int, int],
        column_shape: tuple[int, int],
    ) -> None:
        sizes = [sum_shape[0] * sum_shape[1]] * 2 + [column_shape[0] * column_shape[1]]
        sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        memory = symmetric_memory.empty(sum(sizes), dtype=dtype, device=device)
        # Keeps the others' memory mapped.
        self._handle = handle = symmetric_memory.rendezvous(memory, group)
        starts = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        shared = []
        for part, shape in zip(
            torch.split(memory, sizes), (sum_shape, sum_shape, column_shape), strict=True
        ):
            offset = part.data_ptr() - memory.data_ptr()
            own = part[: shape[0] * shape[1]].view(shape)
            shared.append(_Shared(own, starts + offset))
        self.terms, self.norms, self.columns = shared
        self.signal_ptrs = torch.tensor(handle.signal_pad_ptrs, dtype=torch.int64, device=device)
        self.signal_bytes = handle.signal_pad_size


class GpuCollectives:
    """NCCL, and memory that all ranks reach where that is faster and the GPUs are peers.

    sum_shape: of the largest sum; column_shape: of the most columns to join; dtype: of both.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: FileStore,
        dtype: torch.dtype,
        *,
        sum_shape: tuple[int, int],
        column_shape: tuple[int, int],
    ) -> None:
        self._rank, self._size = rank, size
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
        self._shared = None
        if size in FUSED_SIZES and self._are_peers():
            self._shared = self._share(dtype, sum_shape, column_shape)
        self.all_reduce = NCCL if self._shared is None else FUSED

    def sum_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        terms, shared = self.term_buffer(len(x)), self._shared
        if terms is None or shared is None:
            dist.all_reduce(x)
            return add_rms_norm(x, residual, weight, eps)
        if x.data_ptr() != terms.data_ptr():
            terms.copy_(x)
        sum_add_rms_norm(
            shared.terms.addresses,
            shared.norms.addresses,
            shared.signal_ptrs,
            residual,
            weight,
            eps,
            rank=self._rank,
            signal_bytes=shared.signal_bytes,
        )
        return shared.norms.own[: len(x)]

    def term_buffer(self, num_rows: int) -> Tensor | None:
        """In the memory that all ranks reach: the sum ends when every rank has read it."""
        if self._shared is None or num_rows > len(self._shared.terms.own):
            return None
        return self._shared.terms.own[:num_rows]

    def join_columns(self, x: Tensor, num_columns: int) -> Tensor:
        columns, shared = self.column_buffer(len(x)), self._shared
        if columns is None or shared is None:
            parts = x.new_empty(self._size, *x.shape)
            _gather_into(parts.view(-1, *x.shape[1:]), x.contiguous())
            return join_columns_reference(parts, num_columns)
        assert x.data_ptr() == columns.data_ptr(), "the columns are elsewhere"
        out = x.new_empty(len(x), num_columns)
        join_columns(
            shared.columns.addresses,
            shared.signal_ptrs,
            out,
            x.shape[1],
            rank=self._rank,
            signal_bytes=shared.signal_bytes,
        )
        return out

    def column_buffer(self, num_rows: int) -> Tensor | None:
        if self._shared is None or num_rows > len(self._shared.columns.own):
            return None
        return self._shared.columns.own[:num_rows]

    def minimum(self, value: int) -> int:
        least = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def take_first(self, x: Tensor) -> None:
        dist.broadcast(x, src=0)

    def close(self) -> None:
        self._shared = None
        # To destroy the group would wait for the others to do the same, and they have ended.
        _abort_process_group()

    def _are_peers(self) -> bool:
        """Whether every rank's GPU reaches every other's memory, and this is their first group."""
        others = [i for i in range(self._size) if i != self._rank]
        are_peers = all(torch.cuda.can_device_access_peer(self._device, i) for i in others)
        return bool(self.minimum(are_peers and next(_is_first_use, False)))

    def _share(
        self, dtype: torch.dtype, sum_shape: tuple[int, int], column_shape: tuple[int, int]
    ) -> _SharedMemory | None:
        """None on every rank where it cannot be had on one."""
        group = dist.group.WORLD
        assert group is not None, "init_process_group has made it"
        shared = None
        with suppress(RuntimeError):  # no way to share memory between these processes
            shared = _SharedMemory(
                group,
                dtype,
                self._device,
                sum_shape=sum_shape,
                column_shape=column_shape,
            )
        return shared if self.minimum(shared is not None) else None
