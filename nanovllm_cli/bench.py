"""`nanovllm bench`: a workload through the engine, timed, beside the bound of this machine.

Without a checkpoint of the named model, weights are random and made on the device. Every sequence
runs to its given length (end-of-text ignored), so that the work is the same whatever the weights.
"""

import gc
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson
import torch

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.engine_replicas import share_machine
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.machine_rates import MachineRates, cpu_rates, gpu_rates
from nanovllm_cli.core.resolved_config import ResolvedConfig, resolve

from .bench_compare import OldRecord
from .bench_options import BenchOptions
from .bench_record import (
    bound_record,
    identity,
    phases_record,
    settings_record,
    single_record,
    speed_record,
)
from .bench_table import say, say_record
from .builtin_configs import builtin_config
from .exit_code import CommandError, ExitCode
from .files import io_errors
from .machine import device_name, gpu_counters, software
from .measurement import Draw, measure
from .models import resolve_model
from .placement import parallel_notes
from .process_clock import seconds_since_process_start
from .roofline import bound, loads
from .timed_pass import check_fits
from .workloads import WORKLOADS, Workload


def bench(options: BenchOptions) -> ExitCode:
    """A table on stderr, one JSON document on stdout; TOO_SLOW where --fail-if-slower says so."""
    import_seconds = seconds_since_process_start()
    start = time.perf_counter()
    if sys.stdout is None:
        raise CommandError("standard output is closed", exit_code=ExitCode.PIPE_CLOSED)
    old = OldRecord.read(options.compare) if options.compare is not None else None
    if options.profile is not None:
        with io_errors(options.profile):
            options.profile.mkdir(parents=True, exist_ok=True)
    model, checkpoint = _find_model(options)
    settings = resolve(share_machine(options.engine, options.data_parallel_size), model)
    check_seconds = time.perf_counter() - start

    draw = _workload(options, model, checkpoint)
    workload = draw(0)
    if options.limit is not None and options.limit * options.num_copies > len(workload):
        raise UserError(
            f"--limit is {options.limit}; {options.workload} has "
            f"{len(workload) // options.num_copies} sequences"
        )
    check_fits(workload, settings.max_model_len)
    record = identity(options, workload, settings, device_name(settings.device))
    if old is not None:
        old.check(record)

    for note in parallel_notes(options.engine, options.data_parallel_size, checkpoint or model):
        say(note)
    num_threads = torch.get_num_threads()
    counters = gpu_counters(settings.device, options.num_gpus)
    measurement = measure(options, settings, checkpoint or model, draw, counters)
    timed = measurement.median_pass
    say("measuring the memory bandwidth and the matrix products of this machine")
    rates = _machine_rates(settings, options.num_gpus, num_threads)
    least = bound(
        model,
        getattr(torch, settings.dtype).itemsize,
        loads(workload, is_shared=settings.enable_prefix_caching),
        rates,
        max_num_seqs=settings.max_num_seqs * options.data_parallel_size,
        max_num_batched_tokens=settings.max_num_batched_tokens * options.data_parallel_size,
    )
    record = {
        **speed_record(measurement),
        **record,
        "weights": "random" if checkpoint is None else "the checkpoint's",
        "temperature": options.temperature,
        **single_record(measurement, options),
        **bound_record(least, rates, timed),
        **phases_record(measurement, import_seconds, check_seconds),
        "settings": settings_record(settings, measurement),
        "software": software(counters),
        "command": ["nanovllm", *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "comparison": None,
        "profile": measurement.profile,
        "not_measured": measurement.not_measured,
        "runs": [asdict(timed) for timed in measurement.passes],
    }
    is_too_slow = False
    if old is not None:
        record["comparison"] = old.compare(record, options.fail_if_slower)
        is_too_slow = record["comparison"]["is_too_slow"]
    with io_errors("standard output"):
        sys.stdout.buffer.write(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.flush()
    say_record(record)
    return ExitCode.TOO_SLOW if is_too_slow else ExitCode.OK


def _find_model(options: BenchOptions) -> tuple[ModelConfig, Path | None]:
    """What the model is, and its checkpoint; None where random weights do."""
    model = builtin_config(options.model)
    try:
        path = resolve_model(options.model, offline=True)
    except CommandError as error:
        if model is None:
            raise
        if not options.is_fixed:
            raise CommandError(
                error.message,
                f"The prompts of {options.workload} need the model's tokenizer: "
                "give a directory with --model.",
                exit_code=error.exit_code,
            ) from None
        return model, None
    return ModelConfig.from_directory(path), path


def _workload(options: BenchOptions, model: ModelConfig, checkpoint: Path | None) -> Draw:
    """The sequences of each pass, the first `--limit` of them, once for each engine or for all."""
    if options.is_fixed:
        make = WORKLOADS[options.workload]
    else:
        # Late: transformers, for the tokenizer, takes seconds to import.
        from .prompt_file import prompt_file

        assert checkpoint is not None, "a file of prompts comes with a checkpoint"
        make = prompt_file(
            options.workload,
            checkpoint,
            model.vocab_size,
            max_tokens=options.max_tokens,
            limit=options.limit,
        )

    def draw(repeat: int, copies: int = options.num_copies) -> Workload:
        sequences = [
            sequence
            for copy in range(copies)
            for sequence in make(repeat * copies + copy)[: options.limit]
        ]
        # A small model has fewer tokens than are drawn.
        return [(prompt % model.vocab_size, num_tokens) for prompt, num_tokens in sequences]

    return draw


def _machine_rates(settings: ResolvedConfig, num_gpus: int, num_threads: int) -> MachineRates:
    """Of all that was used, measured when the engine is gone, on a machine that is warm."""
    gc.collect()
    if settings.device == "cpu":
        return cpu_rates((settings.num_threads or 0) * num_gpus or num_threads)
    torch.cuda.empty_cache()
    return gpu_rates(getattr(torch, settings.dtype)).of_several(num_gpus)
