"""The record of a measurement: the JSON document that `nanovllm bench` writes to stdout.

Its first five keys are those of vLLM's benchmark, for the pass with the median time.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from nanovllm_cli.core.machine_rates import MachineRates
from nanovllm_cli.core.resolved_config import ResolvedConfig

from .bench_options import BenchOptions
from .measurement import Measurement
from .roofline import Bound
from .timed_pass import TimedPass
from .workloads import Workload

Record = dict[str, Any]


def identity(
    options: BenchOptions, workload: Workload, settings: ResolvedConfig, device: str
) -> Record:
    """What is measured, as far as it is known before it is run."""
    return {
        "model": options.model,
        "workload": options.workload,
        "num_requests": len(workload),
        "total_num_tokens": sum(len(prompt) + num_tokens for prompt, num_tokens in workload),
        "device": device,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "weak_scaling": options.weak_scaling,
    }


def speed_record(measurement: Measurement) -> Record:
    """How fast it was."""
    timed, passes = measurement.median_pass, measurement.passes
    seconds = timed.elapsed_time
    total = timed.prompt_tokens + timed.output_tokens
    joules = [p.joules / p.output_tokens for p in passes if p.joules is not None]
    return {
        "elapsed_time": seconds,
        "num_requests": timed.num_requests,
        "total_num_tokens": total,
        "requests_per_second": timed.num_requests / seconds,
        "tokens_per_second": total / seconds,
        "over_repeats": {
            "seconds": _spread(passes, lambda p: p.elapsed_time),
            "output_tokens_per_second": _spread(passes, lambda p: p.output_tokens / p.elapsed_time),
            "prompt_tokens_per_second": _spread(passes, lambda p: p.prompt_tokens / p.elapsed_time),
            "total_tokens_per_second": _spread(
                passes, lambda p: (p.prompt_tokens + p.output_tokens) / p.elapsed_time
            ),
        },
        "prefill_launches": timed.prefill_launches,
        "decode_steps": timed.decode_steps,
        "mean_batch": timed.mean_batch,
        "preemptions": timed.preemptions,
        "replica_output_tokens": timed.replica_output_tokens,
        "replica_busy_share": [busy / seconds for busy in timed.replica_seconds],
        "prefix_hit_rate": timed.cached_tokens / timed.prompt_tokens,
        "joules_per_output_token": statistics.median(joules) if joules else None,
        "peak_gpu_bytes": measurement.peak_gpu_bytes,
        "peak_host_bytes": measurement.peak_host_bytes,
        "gpu_idle_share": _idle_share(measurement.profile),
    }


def single_record(measurement: Measurement, options: BenchOptions) -> Record:
    """What several GPUs gain over one of them; None where nothing was measured of one."""
    single = measurement.single
    if single is None:
        return {"single": None, "speedup": None, "efficiency": None}
    timed, alone = measurement.median_pass, single.output_tokens / single.elapsed_time
    speedup = timed.output_tokens / timed.elapsed_time / alone
    return {
        "single": {
            "elapsed_time": single.elapsed_time,
            "output_tokens_per_second": alone,
            "run": asdict(single),
        },
        "speedup": speedup,
        "efficiency": speedup / options.num_gpus,
    }


def bound_record(least: Bound, rates: MachineRates, timed: TimedPass) -> Record:
    """How fast it could have been."""
    return {
        "bound": {
            "seconds": least.seconds,
            "prefill_seconds": least.prefill_seconds,
            "decode_seconds": least.decode_seconds,
            "output_tokens_per_second": timed.output_tokens / least.seconds,
            "share_reached": least.seconds / timed.elapsed_time,
        },
        "machine": asdict(rates),
    }


def phases_record(
    measurement: Measurement, import_seconds: float | None, check_seconds: float
) -> Record:
    """Where the time went, from the start of the process."""
    timed = measurement.median_pass
    before = (check_seconds, measurement.load_seconds, measurement.capture_seconds or 0.0)
    return {
        "engine_ready_seconds": None if import_seconds is None else import_seconds + sum(before),
        "phases_seconds": {
            "import": import_seconds,
            "check": check_seconds,
            "load": measurement.load_seconds,
            "capture": measurement.capture_seconds,
            "warm_up": measurement.warm_up_seconds,
            "prefill": timed.prefill_seconds,
            "decode": timed.decode_seconds,
        },
    }


def settings_record(settings: ResolvedConfig, measurement: Measurement) -> Record:
    """How the engine ran: every choice made."""
    return {
        **{field.name: getattr(settings, field.name) for field in fields(settings)},
        "attention_backend": measurement.attention_backend,
        "num_kv_blocks": measurement.num_kv_blocks,
    }


def _spread(passes: list[TimedPass], value_of: Callable[[TimedPass], float]) -> dict[str, float]:
    values = [value_of(timed) for timed in passes]
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _idle_share(profile: dict[str, Any] | None) -> float | None:
    """Of the decode slice."""
    share: float | None = (profile or {}).get("decode", {}).get("gpu_idle_share")
    return share
