"""A workload through an engine: load, warm up, the timed passes, the profiled one."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.engine import Engine, load_model
from nanovllm_cli.core.parallel import ALONE
from nanovllm_cli.core.rank_group import start_ranks
from nanovllm_cli.core.resolved_config import ResolvedConfig

from .bench_options import BenchOptions
from .bench_table import say
from .kernel_profile import KernelProfile
from .nvml import Nvml
from .timed_pass import TimedPass, check_fits, run_pass
from .workloads import Workload

_WARM_UP_SEQUENCES = 64
_WARM_UP_TOKENS = 40  # a decode window and some


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured; the engine is gone."""

    passes: list[TimedPass]
    load_seconds: float
    capture_seconds: float  # KV cache, kernels, CUDA graphs
    warm_up_seconds: float
    attention_backend: str
    num_kv_blocks: int
    peak_gpu_bytes: int | None  # of torch's allocator: weights, KV cache and all
    peak_host_bytes: int
    profile: dict[str, Any] | None

    @property
    def median_pass(self) -> TimedPass:
        """Of an even number the faster one in the middle."""
        ordered = sorted(self.passes, key=lambda timed: timed.elapsed_time)
        return ordered[(len(ordered) - 1) // 2]


def measure(
    options: BenchOptions,
    settings: ResolvedConfig,
    model_config: ModelConfig,
    checkpoint: Path | None,
    draw: Callable[[int], Workload],
    counters: Nvml | None,
) -> Measurement:
    """Run it all; `draw` gives the workload of each pass, no prompt of which was there before."""
    start = time.perf_counter()
    source = checkpoint or model_config
    ranks = start_ranks(source, model_config, options.engine)
    model = load_model(source, options.engine, ALONE if ranks is None else ranks.parallel)
    if model.embed_tokens.weight.is_cuda:
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    engine = Engine(model, options.engine, ranks)
    ready = time.perf_counter()
    check_fits(draw(0), engine.max_model_len)
    warm_up = [
        (prompt, min(num_tokens, _WARM_UP_TOKENS))
        for prompt, num_tokens in draw(options.repeats)[:_WARM_UP_SEQUENCES]
    ]
    run_pass(engine, warm_up, options.temperature)
    warm = time.perf_counter()
    passes = []
    for repeat in range(options.repeats):
        timed = run_pass(engine, draw(repeat), options.temperature, counters=counters)
        passes.append(timed)
        say(
            f"pass {repeat + 1} of {options.repeats}: {timed.elapsed_time:.2f} s, "
            f"{timed.output_tokens / timed.elapsed_time:,.0f} output tok/s"
        )
    peak_gpu_bytes = torch.cuda.max_memory_allocated() if engine.device == "cuda" else None
    profile = None
    if options.profile is not None:
        kernel_profile = KernelProfile(
            engine, options.profile, passes[-1], max_window_steps=settings.max_window_steps
        )
        run_pass(
            engine,
            draw(options.repeats + 1),
            options.temperature,
            before_step=kernel_profile.before_step,
        )
        profile = kernel_profile.finish()
    engine.close()
    return Measurement(
        passes=passes,
        load_seconds=loaded - start,
        capture_seconds=ready - loaded,
        warm_up_seconds=warm - ready,
        attention_backend=engine.attention_backend,
        num_kv_blocks=engine.num_blocks,
        peak_gpu_bytes=peak_gpu_bytes,
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        profile=profile,
    )
