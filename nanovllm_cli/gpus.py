"""The GPUs that this process sees, and what connects them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from nanovllm_cli.core import cuda_driver
from nanovllm_cli.core.cuda_driver import Gpu

from .nvml import Nvml


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLink:
    """What connects two GPUs, by their numbers."""

    pair: tuple[int, int]
    path: str  # in words
    are_peers: bool  # whether each reads the other's memory


def find_gpus() -> list[Gpu]:
    """Return the GPUs in torch's order, which CUDA_VISIBLE_DEVICES may have changed."""
    return list(cuda_driver.visible_gpus())


def find_links(num_gpus: int) -> list[GpuLink]:
    """Return the link between each pair of the first `num_gpus` GPUs."""
    nvml = Nvml(*(gpu.uuid for gpu in find_gpus()[:num_gpus]))
    return [
        GpuLink(
            pair=(a, b),
            path=nvml.path(a, b) or "a path that NVML does not tell",
            are_peers=cuda_driver.are_peers(a, b),
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
