"""A workload through an engine: load, warm up, the timed passes, the profiled one.

One engine lies in this process, several (--dp) in processes of their own. What several GPUs did is
then measured against one: an engine alone runs the same workload when the others are gone.
"""

import gc
import os
import resource
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine, load_model
from nanovllm_cli.core.engine_replicas import EngineReplicas
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.parallel import ALONE
from nanovllm_cli.core.rank_group import start_ranks
from nanovllm_cli.core.resolved_config import ResolvedConfig

from .bench_options import BenchOptions
from .bench_table import say
from .kernel_profile import KernelProfile
from .nvml import Nvml
from .timed_pass import AnyEngine, TimedPass, check_fits, run_pass
from .workloads import Workload

_WARM_UP_SEQUENCES = 64  # for each engine
_WARM_UP_TOKENS = 40  # a decode window and some
_IN_PROCESSES = "each engine is in a process of its own"
_NOT_MEASURED_OF_REPLICAS = {
    "peak_gpu_bytes": _IN_PROCESSES,
    "gpu_idle_share": f"{_IN_PROCESSES}, and --profile is for one in this process",
    "capture": f"{_IN_PROCESSES}; it is in the seconds of the load",
}


class Draw(Protocol):
    def __call__(self, repeat: int, copies: int = ...) -> Workload:
        """The workload of a pass, so many times with other tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured; the engines are gone."""

    passes: list[TimedPass]
    load_seconds: float
    capture_seconds: float | None  # KV cache, kernels, CUDA graphs
    warm_up_seconds: float
    attention_backend: str
    num_kv_blocks: int
    peak_gpu_bytes: int | None  # of torch's allocator: weights, KV cache and all
    peak_host_bytes: int
    profile: dict[str, Any] | None
    single: TimedPass | None = None  # of one engine on one GPU
    not_measured: dict[str, str] = field(default_factory=dict)  # what is None -> why

    @property
    def median_pass(self) -> TimedPass:
        """Of an even number the faster one in the middle."""
        ordered = sorted(self.passes, key=lambda timed: timed.elapsed_time)
        return ordered[(len(ordered) - 1) // 2]


def measure(
    options: BenchOptions,
    settings: ResolvedConfig,
    source: Path | ModelConfig,
    draw: Draw,
    counters: Nvml | None,
) -> Measurement:
    """Run it all; `draw` gives the workload of each pass, no prompt of which was there before.

    source: a checkpoint, or sizes for random weights.
    """
    if options.data_parallel_size > 1:
        measurement = _measure_replicas(options, source, draw, counters)
    else:
        measurement = _measure_here(options, settings, source, draw, counters)
    if options.num_gpus == 1:
        return measurement
    single, why_not = None, "left out with --no-single"
    if options.single:
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        # Of a CPU's threads it has as many as one of several had.
        alone = replace(options.engine, tensor_parallel_size=1, num_threads=settings.num_threads)
        try:
            single = _measure_single(options, alone, source, draw)
        except MemoryTooSmall as error:
            why_not = f"on one GPU {error.message}"
            say(f"nothing to compare with: {why_not}")
    if single is None:
        not_measured = {**measurement.not_measured, "single": why_not}
        return replace(measurement, not_measured=not_measured)
    return replace(measurement, single=single)


def _measure_here(
    options: BenchOptions,
    settings: ResolvedConfig,
    source: Path | ModelConfig,
    draw: Draw,
    counters: Nvml | None,
) -> Measurement:
    """An engine in this process; of several ranks it is the first."""
    start = time.perf_counter()
    say(f"loading {options.model}")
    ranks = start_ranks(source, ModelConfig.of(source), options.engine)
    model = load_model(source, options.engine, ALONE if ranks is None else ranks.parallel)
    if model.embed_tokens.weight.is_cuda:
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    engine = Engine(model, options.engine, ranks)
    ready = time.perf_counter()
    _warm_up(engine, options, draw)
    warm = time.perf_counter()
    passes = _timed_passes(engine, options, draw, counters)
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


def _measure_replicas(
    options: BenchOptions, source: Path | ModelConfig, draw: Draw, counters: Nvml | None
) -> Measurement:
    """Several engines, which load side by side."""
    start = time.perf_counter()
    say(f"loading {options.model} in {options.data_parallel_size} engines")
    engine = EngineReplicas(source, options.engine, num_replicas=options.data_parallel_size)
    try:
        engine.wait_until_ready()
        ready = time.perf_counter()
        _warm_up(engine, options, draw)
        warm = time.perf_counter()
        passes = _timed_passes(engine, options, draw, counters)
        return Measurement(
            passes=passes,
            load_seconds=ready - start,
            capture_seconds=None,
            warm_up_seconds=warm - ready,
            attention_backend=engine.attention_backend,
            num_kv_blocks=engine.num_blocks,
            peak_gpu_bytes=None,
            peak_host_bytes=sum(map(_peak_host_bytes, [os.getpid(), *engine.pids])),
            profile=None,
            not_measured=_NOT_MEASURED_OF_REPLICAS,
        )
    finally:
        engine.close()


def _measure_single(
    options: BenchOptions, config: EngineConfig, source: Path | ModelConfig, draw: Draw
) -> TimedPass:
    """In a process, which finds the GPU empty whatever this one has left of its own."""
    say("one engine alone, to compare with")
    engine = EngineReplicas(source, config, num_replicas=1)
    try:
        engine.wait_until_ready()
        _warm_up(engine, options, draw)
        timed = run_pass(engine, draw(0, 1), options.temperature)
        _say_pass("alone", timed)
        return timed
    finally:
        engine.close()


def _warm_up(engine: AnyEngine, options: BenchOptions, draw: Draw) -> None:
    check_fits(draw(0), engine.max_model_len)
    num_engines = engine.num_replicas if isinstance(engine, EngineReplicas) else 1
    sequences = draw(options.repeats)[: _WARM_UP_SEQUENCES * num_engines]
    shortened = [(prompt, min(num_tokens, _WARM_UP_TOKENS)) for prompt, num_tokens in sequences]
    say(f"warming up with {len(shortened)} sequences")
    run_pass(engine, shortened, options.temperature)


def _timed_passes(
    engine: AnyEngine, options: BenchOptions, draw: Draw, counters: Nvml | None
) -> list[TimedPass]:
    passes = []
    is_slow = options.engine.device == "cpu" or not torch.cuda.is_available()
    for repeat in range(options.repeats):
        workload, name = draw(repeat), f"pass {repeat + 1} of {options.repeats}"
        if is_slow:  # on a CPU, minutes: a GPU has done it before the line is read
            num_tokens = sum(num_tokens for _, num_tokens in workload)
            say(f"{name} begins: {len(workload)} sequences, {num_tokens:,} tokens to generate")
        timed = run_pass(engine, workload, options.temperature, counters=counters)
        passes.append(timed)
        _say_pass(name, timed)
    return passes


def _say_pass(name: str, timed: TimedPass) -> None:
    rate = f"{timed.output_tokens / timed.elapsed_time:,.0f} output tok/s"
    each = " + ".join(f"{num_tokens:,}" for num_tokens in timed.replica_output_tokens)
    by_replica = f" ({each} tokens)" if len(timed.replica_output_tokens) > 1 else ""
    say(f"{name}: {timed.elapsed_time:.2f} s, {rate}{by_replica}")


def _peak_host_bytes(pid: int) -> int:
    """Of a process that runs: as Linux has it, the most that was ever resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("a process that runs has a peak")
