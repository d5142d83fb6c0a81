"""One pass of the engine over a workload, timed: its queue kept full, every token counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.request import Completion, Request, TokenIds
from nanovllm_cli.core.sampling_params import SamplingParams

from .nvml import Nvml
from .workloads import Workload

_QUEUED = 256  # sequences that wait in the engine, as in a job whose rows are read ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPass:
    """What a pass did, and how long it took.

    The phases share out all of `elapsed_time`, but for what the host does when all is computed:
    each launch has the time from the end of the one before it to its own end.
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
    engine: Engine,
    workload: Workload,
    temperature: float,
    *,
    counters: Nvml | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> TimedPass:
    """Run every sequence to its last token; end-of-text tokens do not count. Nothing is left over.

    Raises UserError for a sequence that can never run.
    """
    before = engine.stats.copy()
    joules = counters.joules() if counters is not None else None
    start = time.perf_counter()
    clock = _PhaseClock(engine)
    waiting = enumerate(workload)
    num_output_tokens = 0
    while True:
        while engine.num_waiting < _QUEUED and (next_one := next(waiting, None)) is not None:
            _add(engine, *next_one, temperature)
        if not engine.has_work:
            break
        before_step()
        for output in engine.step():
            assert isinstance(output, Completion), output
            num_output_tokens += len(output.token_ids)
        clock.mark()
    seconds = time.perf_counter() - start
    expected = sum(num_tokens for _, num_tokens in workload)
    assert num_output_tokens == expected, f"{num_output_tokens} tokens, not {expected}"
    if joules is not None and counters is not None:
        joules = (counters.joules() or joules) - joules
    stats = engine.stats.since(before)
    phases = clock.seconds()
    return TimedPass(
        elapsed_time=seconds,
        prefill_seconds=phases["prefill"],
        decode_seconds=phases["decode"],
        num_requests=len(workload),
        prompt_tokens=sum(len(prompt) for prompt, _ in workload),
        output_tokens=num_output_tokens,
        cached_tokens=stats.num_cached_tokens,
        prefill_launches=stats.num_prefill_launches,
        decode_steps=stats.num_decode_steps,
        mean_batch=stats.num_decode_slots / max(stats.num_decode_steps, 1),
        preemptions=stats.num_preemptions,
        joules=joules,
    )


def _add(engine: Engine, index: int, sequence: tuple[TokenIds, int], temperature: float) -> None:
    prompt, num_tokens = sequence
    sampling = SamplingParams(
        temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=index
    )
    failure = engine.add(Request(request_id=index, prompt_token_ids=prompt, sampling=sampling))
    if failure is not None:
        raise UserError(f"sequence {index} of the workload cannot run: {failure.message}")


class _PhaseClock:
    """Shares out a pass's time by what each step of the engine has launched.

    On a GPU the host is ahead, so a mark is an event behind the launch: the device's own time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_gpu = engine.device == "cuda"
        self._num_decode_steps = engine.stats.num_decode_steps
        self._num_prefill_launches = engine.stats.num_prefill_launches
        self._phase: Literal["prefill", "decode"] = "prefill"
        self._marks: list[Any] = [self._now()]
        self._phases: list[Literal["prefill", "decode"]] = []

    def mark(self) -> None:
        """A step has ended; one that launched nothing belongs to the launch before."""
        stats = self._engine.stats
        if stats.num_decode_steps > self._num_decode_steps:
            self._phase = "decode"
        elif stats.num_prefill_launches > self._num_prefill_launches:
            self._phase = "prefill"
        self._num_decode_steps = stats.num_decode_steps
        self._num_prefill_launches = stats.num_prefill_launches
        self._marks.append(self._now())
        self._phases.append(self._phase)

    def seconds(self) -> dict[str, float]:
        """Of each phase."""
        seconds = {"prefill": 0.0, "decode": 0.0}
        if self._is_gpu:
            torch.cuda.synchronize()
        for phase, (start, end) in zip(self._phases, pairwise(self._marks), strict=True):
            seconds[phase] += start.elapsed_time(end) / 1000 if self._is_gpu else end - start
        return seconds

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
