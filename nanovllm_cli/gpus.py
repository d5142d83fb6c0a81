"""The GPUs that this process sees, and what connects them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from .nvml import Nvml


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # sm_90 is (9, 0)

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory_bytes / 2**30:.0f} GiB, sm_{major}{minor}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLink:
    """What connects two GPUs, by their numbers."""

    pair: tuple[int, int]
    path: str  # in words
    are_peers: bool  # whether each reads the other's memory


def find_gpus() -> list[Gpu]:
    """In torch's order, which CUDA_VISIBLE_DEVICES may have changed."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        Gpu(name=gpu.name, memory_bytes=gpu.total_memory, capability=(gpu.major, gpu.minor))
        for gpu in found
    ]


def find_links(num_gpus: int) -> list[GpuLink]:
    """Of every two of the first so many GPUs."""
    nvml = Nvml(*(str(torch.cuda.get_device_properties(i).uuid) for i in range(num_gpus)))
    return [
        GpuLink(
            pair=(a, b),
            path=nvml.path(a, b) or "a path that NVML does not tell",
            are_peers=torch.cuda.can_device_access_peer(a, b),
        )
        for a, b in combinations(range(num_gpus), 2)
    ]


def describe_links(links: Sequence[GpuLink]) -> list[str]:
    """A line for each kind of link, with the pairs that have it."""
    pairs = defaultdict(list)
    for link in links:
        access = "peer access" if link.are_peers else "no peer access"
        pairs[f"{link.path}, {access}"].append(f"{link.pair[0]}-{link.pair[1]}")
    if len(pairs) == 1 and len(links) > 1:
        return [f"every pair: {kind}" for kind in pairs]
    return [f"{', '.join(names)}: {kind}" for kind, names in pairs.items()]
