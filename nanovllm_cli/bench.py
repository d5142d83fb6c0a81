"""`nanovllm bench`: a fixed workload through the engine, timed.

Without a checkpoint of the named model, weights are random and made on the device. Every sequence
runs to its given length (end-of-text ignored), so that the work is the same whatever the weights.
"""

import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.table import Table

from nanovllm_cli import __version__
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.loader import load_random_weights, load_weights
from nanovllm_cli.core.request import Completion, Request
from nanovllm_cli.core.sampling_params import SamplingParams

from .builtin_configs import builtin_config
from .exit_code import CommandError, ExitCode
from .models import resolve_model
from .options import DEFAULT_MODEL
from .workloads import WORKLOADS, Workload

_WARM_UP = 64  # sequences of 64 tokens in and 8 out


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One benchmark; every default is here."""

    model: str = DEFAULT_MODEL
    workload: str = "nano"
    repeats: int = 3
    temperature: float = 0.6
    limit: int | None = None  # of the workload's sequences
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise UserError(f"no workload {self.workload!r}", f"There are {', '.join(WORKLOADS)}.")
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}; it must be at least 1")


def bench(options: BenchOptions) -> ExitCode:
    """A table on stderr, one JSON document on stdout."""
    start = time.perf_counter()
    engine, weights = _engine(options)
    load_seconds = time.perf_counter() - start
    make = WORKLOADS[options.workload]
    _run(engine, [(p[:64], 8) for p, _ in make(options.repeats)[:_WARM_UP]], options.temperature)
    runs = [
        _run(engine, make(repeat)[: options.limit], options.temperature)
        for repeat in range(options.repeats)
    ]
    document = _document(options, engine, weights, load_seconds, runs)
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "min", "median", "max"):
        table.add_column(title, justify="left" if not title else "right")
    for name, values in document["over_repeats"].items():
        table.add_row(name.replace("_", " "), *(f"{value:,.2f}" for value in values.values()))
    console = Console(file=sys.stderr)
    console.print(
        f"{options.model} ({weights} weights), {options.workload}, {document['device']}, "
        f"{options.repeats} repeats, engine ready in {load_seconds:.1f} s",
        highlight=False,
    )
    console.print(table, highlight=False)
    return ExitCode.OK


def _engine(options: BenchOptions) -> tuple[Engine, str]:
    """A ready engine, and whether its weights are a checkpoint's or random."""
    model_config = builtin_config(options.model)
    try:
        path = resolve_model(options.model, offline=True)
    except CommandError:
        if model_config is None:
            raise
        model = build_model(model_config, options.engine)
        load_random_weights(model)
        return Engine(model, options.engine), "random"
    model = build_model(ModelConfig.from_directory(path), options.engine)
    load_weights(model, path)
    return Engine(model, options.engine), "the checkpoint's"


def _run(engine: Engine, workload: Workload, temperature: float) -> dict[str, Any]:
    """One pass over the workload; nothing is left running."""
    before = engine.stats.copy()
    start = time.perf_counter()
    for index, (prompt, num_tokens) in enumerate(workload):
        sampling = SamplingParams(
            temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=index
        )
        request = Request(request_id=index, prompt_token_ids=prompt, sampling=sampling)
        failure = engine.add(request)
        if failure is not None:
            raise UserError(f"the workload does not fit: {failure.message}")
    num_output_tokens = 0
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, Completion), output
            num_output_tokens += len(output.token_ids)
    seconds = time.perf_counter() - start
    expected = sum(num_tokens for _, num_tokens in workload)
    assert num_output_tokens == expected, f"{num_output_tokens} tokens, not {expected}"
    stats = engine.stats.since(before)
    return {
        "elapsed_time": seconds,
        "num_requests": len(workload),
        "prompt_tokens": sum(len(prompt) for prompt, _ in workload),
        "output_tokens": num_output_tokens,
        "cached_tokens": stats.num_cached_tokens,
        "prefill_launches": stats.num_prefill_launches,
        "decode_steps": stats.num_decode_steps,
        "mean_batch": stats.num_decode_slots / max(stats.num_decode_steps, 1),
        "preemptions": stats.num_preemptions,
    }


def _document(
    options: BenchOptions,
    engine: Engine,
    weights: str,
    load_seconds: float,
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    """The record: what ran where, each repeat, and vLLM's five keys for the median one."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"min": min(values), "median": statistics.median(values), "max": max(values)}

    median = sorted(runs, key=lambda run: run["elapsed_time"])[(len(runs) - 1) // 2]
    seconds = median["elapsed_time"]
    total = median["prompt_tokens"] + median["output_tokens"]
    is_gpu = torch.cuda.is_available() and engine.device == "cuda"
    return {
        "elapsed_time": seconds,
        "num_requests": median["num_requests"],
        "total_num_tokens": total,
        "requests_per_second": median["num_requests"] / seconds,
        "tokens_per_second": total / seconds,
        "over_repeats": {
            "seconds": spread([run["elapsed_time"] for run in runs]),
            "output_tokens_per_second": spread(
                [run["output_tokens"] / run["elapsed_time"] for run in runs]
            ),
            "prompt_tokens_per_second": spread(
                [run["prompt_tokens"] / run["elapsed_time"] for run in runs]
            ),
        },
        "model": options.model,
        "weights": weights,
        "workload": options.workload,
        "temperature": options.temperature,
        "device": torch.cuda.get_device_name() if is_gpu else platform.processor() or "cpu",
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "load_seconds": load_seconds,
        "nanovllm_version": __version__,
        "torch_version": torch.__version__,
        "runs": runs,
    }
