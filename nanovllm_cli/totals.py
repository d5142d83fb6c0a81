"""Totals: what a job has counted so far, for whoever shows or keeps it, from any thread."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from nanovllm_cli.core.stats import EngineStats

from .finished import JobRecord
from .journal import Journal, Kind

_EARLIER = "in_an_earlier_run"  # in place of a code that is not known
_NUM_REASONS = 3  # of failed rows, as many as are named


@dataclass(slots=True)
class Totals:
    """Rows and seconds of the job; the tokens are the engine's to count."""

    is_score: bool = False  # the token that each row generates is dropped, and not counted
    num_expected_rows: int | None = None  # None: the input cannot be counted ahead
    num_completed_rows: int = 0
    num_resumed_rows: int = 0  # of the completed ones those that an earlier run completed
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by code
    finish_reasons: Counter[str] = field(default_factory=Counter)  # of this run's rows
    engine: EngineStats = field(default_factory=EngineStats)
    attention_backend: str | None = None
    num_restarts: int = 0  # of the engine
    phases: dict[str, float] = field(default_factory=dict)  # seconds
    # By time.perf_counter; of the command, the start of its process.
    started: float = field(default_factory=time.perf_counter)
    _open_phases: dict[str, float] = field(default_factory=dict)  # when each began

    def resume(self, journal: Journal) -> None:
        """Count what an earlier run has done."""
        self.num_completed_rows = self.num_resumed_rows = journal.num_completed
        for _, line in journal.lines(Kind.FAILED):
            self.errors[orjson.loads(line)["error"]["code"]] += 1

    def take_finished(self, record: JobRecord) -> None:
        """Count a job that an earlier run has finished."""
        self.num_expected_rows = record.num_completed + len(record.failed_rows)
        self.num_completed_rows = self.num_resumed_rows = record.num_completed
        self.errors[_EARLIER] = len(record.failed_rows)

    @property
    def num_failed_rows(self) -> int:
        return self.errors.total()

    @property
    def num_rows(self) -> int:
        """Rows that are done, well or not."""
        return self.num_completed_rows + self.num_failed_rows

    def counts(self) -> str:
        """How many rows are done, in words."""
        of = f" of {self.num_expected_rows}" if self.num_expected_rows is not None else ""
        return f"{self.num_rows}{of} rows done, {self.num_failed_rows} failed"

    def reasons(self) -> str:
        """Return the commonest reasons of failed rows, in words."""
        named = [(code, count) for code, count in self.errors.most_common() if code != _EARLIER]
        told = [f"{count} {code}" for code, count in named[:_NUM_REASONS]]
        num_others = sum(count for _, count in named[_NUM_REASONS:])
        return ", ".join([*told, f"{num_others} others"] if num_others else told)

    @property
    def elapsed_seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def current_phase(self) -> str:
        """The part of the job that runs; behind one, until the next begins, that one."""
        latest = next(reversed(list(self.phases)), "start")
        return next(reversed(list(self._open_phases)), latest)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the job; what comes before the first one is "start"."""
        if not self.phases and not self._open_phases:
            self.phases["start"] = time.perf_counter() - self.started
        self._open_phases[name] = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = time.perf_counter() - self._open_phases.pop(name)

    def as_dict(self) -> dict[str, Any]:
        """For the stats file and for `--json`."""
        engine = self.engine
        num_completion_tokens = 0 if self.is_score else engine.num_completion_tokens
        now = time.perf_counter()
        seconds = self.phases.get("generate", now - self._open_phases.get("generate", now))

        def rate(count: int) -> float:
            return round(count / seconds, 1) if seconds else 0.0

        def share(part: int, whole: int) -> float:
            return round(part / whole, 4) if whole else 0.0

        open_phases = {name: now - start for name, start in dict(self._open_phases).items()}
        phases = self.phases | open_phases
        return {
            "rows": {
                "done": self.num_rows,
                "resumed": self.num_resumed_rows,
                "completed": self.num_completed_rows,
                "failed": self.num_failed_rows,
                "failed_by_code": dict(self.errors),
                "finish_reasons": dict(self.finish_reasons),
            },
            "tokens": {
                "prompt": engine.num_prompt_tokens,
                "cached": engine.num_cached_tokens,
                "completion": num_completion_tokens,
                "prefix_hit_rate": share(engine.num_cached_tokens, engine.num_prompt_tokens),
            },
            "throughput": {
                "rows_per_second": rate(self.num_completed_rows - self.num_resumed_rows),
                "prompt_tokens_per_second": rate(engine.num_prompt_tokens),
                "completion_tokens_per_second": rate(num_completion_tokens),
            },
            "engine": {
                "prefill_launches": engine.num_prefill_launches,
                "decode_steps": engine.num_decode_steps,
                "mean_batch": round(engine.num_decode_slots / max(engine.num_decode_steps, 1), 2),
                "preemptions": engine.num_preemptions,
                "forced_tokens": engine.num_forced_tokens,
                "attention_backend": self.attention_backend,
                "restarts": self.num_restarts,
                "prefill_seconds": round(engine.prefill_seconds, 3),
                "decode_seconds": round(engine.decode_seconds, 3),
            },
            "phases_seconds": {name: round(value, 3) for name, value in phases.items()},
            "elapsed_seconds": round(self.elapsed_seconds, 3),
        }
