"""One pass of the engine over a workload, timed: its queue kept full, every token counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_replicas import EngineReplicas
from nanovllm_cli.core.errors import EngineDied, UserError
from nanovllm_cli.core.request import Completion, Failure, Output, Request, TokenIds
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.stats import EngineStats

from .nvml import Nvml
from .workloads import Workload

_QUEUED = 256  # sequences that wait in the engine, as in a job whose rows are read ahead

AnyEngine = Engine | EngineReplicas


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPass:
    """What a pass did, and how long it took.

    The phases share out all of `elapsed_time`, but for what the host does when all is computed:
    each launch has the time from the end of the one before it to its own end. Replicas work side
    by side: their phases' seconds are the mean of them, launches and steps are those of all.
    """

    elapsed_time: float
    prefill_seconds: float
    decode_seconds: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    prefill_launches: int
    decode_steps: int
    mean_batch: float  # sequences in a decode step
    preemptions: int
    joules: float | None
    replica_output_tokens: list[int]  # of each engine; what a second one ran as well counts twice
    replica_seconds: list[float]  # in which each had something to compute


def check_fits(workload: Workload, max_model_len: int) -> None:
    """Raise UserError for a sequence that would be cut short."""
    for index, (prompt, num_tokens) in enumerate(workload):
        if len(prompt) + num_tokens > max_model_len:
            raise UserError(
                f"sequence {index} of the workload asks for {num_tokens} tokens after "
                f"{len(prompt)}; at most {max_model_len} fit in all",
                "Raise --max-model-len, or make room for K and V.",
            )


def run_pass(
    engine: AnyEngine,
    workload: Workload,
    temperature: float,
    *,
    counters: Nvml | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> TimedPass:
    """Run every sequence to its last token; end-of-text tokens do not count. Nothing is left over.

    Raises UserError for a sequence that can never run, and EngineDied where an engine's process
    has died: what is run again is no measurement.
    """
    before, each_before = engine.stats.copy(), [s.copy() for s in _stats_of_each(engine)]
    joules = counters.joules() if counters is not None else None
    start = time.perf_counter()
    waiting = enumerate(workload)
    num_output_tokens = 0
    while True:
        while engine.num_waiting < _QUEUED and (next_one := next(waiting, None)) is not None:
            _add(engine, *next_one, temperature)
        if not engine.has_work:
            break
        before_step()
        for output in engine.step():
            _check_ran(output)
            assert isinstance(output, Completion), "nothing asks for tokens as they come"
            num_output_tokens += len(output.token_ids)
        if isinstance(engine, EngineReplicas) and engine.num_restarts:
            raise EngineDied(f"{engine.last_death}, in the middle of a measurement")
    seconds = time.perf_counter() - start
    expected = sum(num_tokens for _, num_tokens in workload)
    assert num_output_tokens == expected, f"{num_output_tokens} tokens, not {expected}"
    if joules is not None and counters is not None:
        joules = (counters.joules() or joules) - joules
    stats = engine.stats.since(before)
    each = [
        stats.since(earlier)
        for stats, earlier in zip(_stats_of_each(engine), each_before, strict=True)
    ]
    return TimedPass(
        elapsed_time=seconds,
        prefill_seconds=stats.prefill_seconds / len(each),
        decode_seconds=stats.decode_seconds / len(each),
        num_requests=len(workload),
        prompt_tokens=sum(len(prompt) for prompt, _ in workload),
        output_tokens=num_output_tokens,
        cached_tokens=stats.num_cached_tokens,
        prefill_launches=stats.num_prefill_launches,
        decode_steps=stats.num_decode_steps,
        mean_batch=stats.num_decode_slots / max(stats.num_decode_steps, 1),
        preemptions=stats.num_preemptions,
        joules=joules,
        replica_output_tokens=[stats.num_completion_tokens for stats in each],
        replica_seconds=[stats.prefill_seconds + stats.decode_seconds for stats in each],
    )


def _stats_of_each(engine: AnyEngine) -> list[EngineStats]:
    return engine.stats_by_replica if isinstance(engine, EngineReplicas) else [engine.stats]


def _add(engine: AnyEngine, index: int, sequence: tuple[TokenIds, int], temperature: float) -> None:
    prompt, num_tokens = sequence
    sampling = SamplingParams(
        temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=index
    )
    _check_ran(engine.add(Request(request_id=index, prompt_token_ids=prompt, sampling=sampling)))


def _check_ran(output: Output | None) -> None:
    if isinstance(output, Failure):
        raise UserError(
            f"sequence {output.request_id} of the workload cannot run: {output.message}"
        )
