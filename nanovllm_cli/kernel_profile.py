"""Where the time goes, kernel by kernel: torch's profiler over two short slices of a pass.

The first slice is the beginning of the prefill, the second the middle of the decode; a whole pass
would be gigabytes of trace. The profiler costs something itself: compare a slice's seconds a step
with those of the timed passes before believing its idle share.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from nanovllm_cli.core.engine import Engine

from .files import io_errors
from .kernel_trace import kernel_table, summarize
from .timed_pass import TimedPass

_PREFILL_LAUNCHES = 2
_DECODE_STEPS = {"cuda": 64, "cpu": 4}  # a step is some 300 events on a GPU, thousands on a CPU
_ALL_THREADS = _ExperimentalConfig(profile_all_threads=True)

Slice = Literal["prefill", "decode"]


class KernelProfile:
    """Profiles one pass into `directory`; `like` is an earlier pass of the same workload.

    `before_step` is to be called before each step of the engine, and `finish` after the last.
    """

    def __init__(
        self, engine: Engine, directory: Path, like: TimedPass, *, max_window_steps: int
    ) -> None:
        self._engine = engine
        self._is_gpu = engine.device == "cuda"
        self._directory = directory
        self._before = engine.stats.copy()
        # The launch that may reach the middle begins the slice: it may be the only one.
        self._middle = max(like.decode_steps // 2 - max_window_steps + 1, 0)
        self._num_launches = min(_PREFILL_LAUNCHES, like.prefill_launches)
        self._running: Slice | None = None
        self._profiler: profile | None = None
        self._begun = engine.stats.copy()
        self._slices: dict[str, dict[str, Any]] = {}
        self._tables: list[str] = []

    def before_step(self) -> None:
        """Begin and end the slices where it is time."""
        if self._running is not None and self._is_long_enough(self._running):
            self._end(self._running)
        if self._running is not None:
            return
        done = self._engine.stats.since(self._before).num_decode_steps
        is_decoding = done > 0 or self._engine.num_waiting == 0
        if "prefill" not in self._slices:
            self._begin("prefill")
        elif "decode" not in self._slices and is_decoding and done >= self._middle:
            self._begin("decode")

    def finish(self) -> dict[str, Any]:
        """End what still runs, and write kernels.txt; the slices by their names."""
        if self._running is not None:
            self._end(self._running)
        file = self._directory / "kernels.txt"
        with io_errors(file):
            file.write_text("\n".join(self._tables), encoding="utf-8")
        return self._slices

    def _is_long_enough(self, running: Slice) -> bool:
        done = self._engine.stats.since(self._begun)
        if running == "prefill":
            return done.num_prefill_launches >= self._num_launches
        return done.num_decode_steps >= _DECODE_STEPS[self._engine.device]

    def _begin(self, name: Slice) -> None:
        if self._is_gpu:
            torch.cuda.synchronize()
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it writes two lines to stderr
        self._profiler = profile(
            activities=[ProfilerActivity.CUDA if self._is_gpu else ProfilerActivity.CPU],
            experimental_config=None if self._is_gpu else _ALL_THREADS,
        )
        self._begun = self._engine.stats.copy()
        self._running = name
        self._profiler.start()

    def _end(self, name: Slice) -> None:
        if self._is_gpu:
            torch.cuda.synchronize()
        assert self._profiler is not None, "no slice runs"
        self._profiler.stop()
        self._running = None
        done = self._engine.stats.since(self._begun)
        file = self._directory / f"{name}-trace.json"
        with io_errors(file):
            self._profiler.export_chrome_trace(str(file))
            summary = summarize(json.loads(file.read_bytes())["traceEvents"])
        self._slices[name] = {
            "trace": file.name,
            "prefill_launches": done.num_prefill_launches,
            "decode_steps": done.num_decode_steps,
            **asdict(summary),
        }
        self._tables.append(
            f"{name}: {done.num_prefill_launches} prefill launches and {done.num_decode_steps} "
            f"decode steps in {summary.seconds * 1e3:.2f} ms\n{kernel_table(summary.kernels)}"
        )
