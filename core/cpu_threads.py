"""Threads for the CPU path: each runs the whole model over its share of a launch's tokens.

PyTorch's own threads meet at a barrier in every operation. On a machine that has other work that
costs more than it gains (measured with two busy neighbours on two cores: 2.9 rows/s against 37.5
with one thread), and the number of threads can change the last bits of a product. So operations run
on one thread, and the tokens are shared out: they only meet where one may read another's K and V.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class CpuThreads:
    """A fixed number of threads; takes PyTorch's own down to one."""

    def __init__(self, num_threads: int | None) -> None:
        self.num_threads = num_threads or torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="cpu")

    def map(
        self,
        function: Callable[[_Part], _Result],
        parts: Sequence[_Part],
        barrier: threading.Barrier | None = None,
    ) -> list[_Result]:
        """function(part) of every part, at most `num_threads` of them, side by side.

        The parts may wait for each other at `barrier`; one that raises breaks it, so none waits on.
        """
        if len(parts) == 1:
            return [function(parts[0])]

        def run(part: _Part) -> _Result:
            try:
                with torch.inference_mode():
                    return function(part)
            except BaseException:
                if barrier is not None:
                    barrier.abort()
                raise

        futures = [self._pool.submit(run, part) for part in parts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
