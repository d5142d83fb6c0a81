"""CudaGraphs: decode steps as they were captured for some sizes, and their replay."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def graph_batch_sizes(max_num_seqs: int) -> list[int]:
    """The captured batch sizes: 1, 2, 4, then steps of 8, 16 from 32 on, a quarter from 256 on.

    They end at the maximum. Products of a large model take longer with every 16 rows; with sizes 8
    rows apart nano with the 8B gains 0.2 % (H100), and its start takes a second longer.
    """
    sizes = [size for size in (1, 2, 4) if size < max_num_seqs]
    size = 8
    while size < max_num_seqs:
        sizes.append(size)
        size += 8 if size < 32 else 16 if size < 256 else (1 << size.bit_length()) // 8
    return [*sizes, max_num_seqs]


class CudaGraphs:
    """Whole steps, captured at once, and parts of others, each when it is first needed.

    What is captured is an argument and not kept: nothing here leads back to the runner, so that the
    graphs are gone as soon as it is.
    """

    def __init__(self, sizes: list[int], step: Callable[[int], None], device: torch.device) -> None:
        """Capture `step` of every batch size, the largest first: the others fit its memory.

        "relaxed", since cuBLAS loads some sizes' kernels in their capture.
        """
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        # And what each writes.
        self._others: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        step(sizes[-1])
        torch.cuda.synchronize(device)
        pool = None
        for size in reversed(sizes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                step(size)
            pool = graph.pool()
            self._steps[size] = graph

    def replay(self, size: int) -> None:
        """A whole step of that size."""
        self._steps[size].replay()

    def output_of(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives: by a graph, which is captured when its key first comes."""
        if key not in self._others:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._steps.values())).pool()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                output = make()
            self._others[key] = graph, output
        graph, output = self._others[key]
        graph.replay()
        return output
