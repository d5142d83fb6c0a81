"""`nanovllm bench`: a fixed workload through the engine, against this machine's own limit.

Without a checkpoint of the named model, weights are random and made on the device. Every sequence
runs to its given length (end-of-text ignored), so that the work is the same whatever the weights.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.loader import load_random_weights, load_weights
from nanovllm_cli.core.request import Completion, Request
from nanovllm_cli.core.sampling_params import SamplingParams

from .builtin_configs import builtin_config
from .exit_code import CommandError, ExitCode
from .models import resolve_model
from .workloads import WORKLOADS, Workload


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One benchmark; every default is here."""

    model: str = "Qwen3-0.6B"
    workload: str = "nano"
    repeats: int = 3
    temperature: float = 0.6
    limit: int | None = None  # of the workload's sequences
    engine: EngineConfig = EngineConfig()


def bench(options: BenchOptions) -> ExitCode:
    """A table on stderr, one JSON document on stdout."""
    if options.workload not in WORKLOADS:
        raise CommandError(
            f"no workload {options.workload!r}", f"There are {', '.join(WORKLOADS)}."
        )
    start = time.perf_counter()
    engine, weights = _engine(options)
    load_seconds = time.perf_counter() - start
    make = WORKLOADS[options.workload]
    _run(engine, [(prompt[:64], 8) for prompt, _ in make(options.repeats)[:64]], options)
    runs = [_run(engine, make(repeat)[: options.limit], options) for repeat in range(options.repeats)]
    document = _document(options, weights, load_seconds, runs)
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("elapsed_time", "output_tokens_per_second", "prompt_tokens_per_second"):
        table.add_row(name.replace("_", " "), f"{document[name]:,.2f}")
    Console(file=sys.stderr).print(table, highlight=False)
    return ExitCode.OK


def _engine(options: BenchOptions) -> tuple[Engine, str]:
    try:
        path = resolve_model(options.model, offline=True)
    except CommandError:
        model_config = builtin_config(options.model)
        if model_config is None:
            raise
        model = build_model(model_config, options.engine)
        load_random_weights(model)
        return Engine(model, options.engine), "random"
    model = build_model(ModelConfig.from_directory(path), options.engine)
    load_weights(model, path)
    return Engine(model, options.engine), "checkpoint"


def _run(engine: Engine, workload: Workload, options: BenchOptions) -> dict[str, Any]:
    before = engine.stats.copy()
    start = time.perf_counter()
    for index, (prompt, num_tokens) in enumerate(workload):
        failure = engine.add(
            Request(
                request_id=index,
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    temperature=options.temperature,
                    max_tokens=num_tokens,
                    ignore_eos=True,
                    seed=index,
                ),
            )
        )
        assert failure is None, failure
    num_output_tokens = 0
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, Completion), output
            num_output_tokens += len(output.token_ids)
    seconds = time.perf_counter() - start
    stats = engine.stats.since(before)
    num_prompt_tokens = sum(len(prompt) for prompt, _ in workload)
    assert num_output_tokens == sum(count for _, count in workload), "tokens were lost"
    return {
        "seconds": seconds,
        "num_requests": len(workload),
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "cached_tokens": stats.num_cached_tokens,
        "decode_steps": stats.num_decode_steps,
        "mean_batch": stats.num_decode_slots / max(stats.num_decode_steps, 1),
        "prefill_launches": stats.num_prefill_launches,
        "preemptions": stats.num_preemptions,
    }
