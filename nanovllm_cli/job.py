"""The loop of a job: keeps the engine's queue full, and turns what comes out of it into rows."""

import struct
import time
from dataclasses import dataclass
from typing import Any

import xxhash

from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.engine_replicas import EngineReplicas
from nanovllm_cli.core.request import (
    Completion,
    Failure,
    FinishReason,
    NewTokens,
    Output,
    Request,
)
from nanovllm_cli.core.sampling_params import SamplingParams

from .feeder import Feeder, TokenizedPrompt, bad_row
from .options import GenerateOptions
from .output import JobOutput
from .progress import Progress
from .prompts import Prompt
from .results import Sample, result_line
from .rows import BadRow
from .signals import DRAIN_SECONDS, Signals, Stopped
from .stop_strings import StopStrings
from .tokenizer import PromptTokenizer
from .totals import Totals

_SAMPLES_PER_ROW = 1 << 10  # a request's id is row index * this + sample
_ROWS_BEFORE_A_RATE = 100  # of errors is one


@dataclass(slots=True)
class _RunningRow:
    """A row in the engine: its samples, None where still missing, and who watches for stops."""

    prompt: Prompt
    token_ids: list[int]
    samples: list[Sample | None]
    watchers: list[StopStrings | None]


class Job:
    """Runs rows from the feeder to the output; `sampling` is what a row does not say itself."""

    def __init__(
        self,
        options: GenerateOptions,
        *,
        sampling: dict[str, Any],
        engine: Engine | EngineProcess | EngineReplicas,
        tokenizer: PromptTokenizer,
        feeder: Feeder,
        output: JobOutput,
        totals: Totals,
        signals: Signals,
    ) -> None:
        self._options = options
        self._sampling = sampling
        self._engine = engine
        self._tokenizer = tokenizer
        self._feeder = feeder
        self._output = output
        self._totals = totals
        self._signals = signals
        self._running: dict[int, _RunningRow] = {}  # by row index
        self._num_replicas = options.data_parallel_size  # that have not been left out
        self._give_up: float | None = None  # when to end, after a stop

    def run(self, progress: Progress) -> bool:
        """Until every row is done, or until it is stopped; returns whether every row is done.

        A signal stops it, with a moment for the rows that run.
        """
        while True:
            if self._signals.received is not None and self._give_up is None:
                self.stop(DRAIN_SECONDS)
                progress.say(
                    "drain",
                    f"{Stopped(self._signals.received).message}: the rows that run have "
                    f"{DRAIN_SECONDS:g} s to finish",
                )
            self._feed()
            is_done = self._feeder.is_done and not self._engine.has_work
            if is_done or self._is_over:
                break
            if self._engine.has_work:
                for output in self._engine.step():
                    self._take(output)
            self._say_restarts(progress)
            self._output.flush()
        self._output.flush()
        return is_done

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no further row; `run` ends when those that run are done, or after so long.

        What is done by then is in the output's journal.
        """
        self._give_up = time.monotonic() + drain_seconds

    def _say_restarts(self, progress: Progress) -> None:
        engine = self._engine
        if not isinstance(engine, EngineProcess | EngineReplicas):
            return
        if isinstance(engine, EngineReplicas) and engine.num_replicas < self._num_replicas:
            self._num_replicas = engine.num_replicas
            progress.say("replica_lost", str(engine.last_death))
        elif engine.num_restarts > self._totals.num_restarts:
            progress.say(
                "restart", f"{engine.last_death}; it is started again, and its rows with it"
            )
        self._totals.num_restarts = engine.num_restarts

    def _feed(self) -> None:
        """Queue rows in the engine up to the limit; wait for one only where there is no other."""
        while (
            self._give_up is None
            and len(self._running) + self._output.num_held < self._options.rows_in_flight
        ):
            fed = self._feeder.get(wait=not self._engine.has_work)
            if fed is None:
                return
            if isinstance(fed, BadRow):
                self._fail(fed)
            else:
                self._start(fed)

    @property
    def _is_over(self) -> bool:
        return self._give_up is not None and (
            not self._engine.has_work or time.monotonic() >= self._give_up
        )

    def _start(self, fed: TokenizedPrompt) -> None:
        prompt, options = fed.prompt, self._options
        num_samples = prompt.n or options.n
        fields = {**self._sampling, **prompt.sampling}
        if fields.get("grammar") is not None and prompt.messages is not None:
            fields["grammar_after_token_id"] = self._tokenizer.end_think_of(fed.token_ids)
        row_seed = fields.pop("seed", None)
        self._running[prompt.index] = _RunningRow(
            prompt,
            fed.token_ids,
            [None] * num_samples,
            [self._watcher(prompt) for _ in range(num_samples)],
        )
        for sample in range(num_samples):
            try:
                seed = sample_seed(options.seed, prompt.index, row_seed, sample)
                sampling = SamplingParams(**fields, seed=seed)
            except ValueError as error:  # the row and the flags are good alone, but not together
                self._fail(bad_row(prompt, "bad_parameters", str(error)))
                return
            failure = self._engine.add(
                Request(
                    request_id=prompt.index * _SAMPLES_PER_ROW + sample,
                    prompt_token_ids=fed.token_ids,
                    sampling=sampling,
                    reports_tokens=bool(prompt.stop or options.stop),
                )
            )
            if failure is not None:
                self._take(failure)
                return

    def _watcher(self, prompt: Prompt) -> StopStrings | None:
        stop = prompt.stop or self._options.stop
        return StopStrings(stop, self._tokenizer.decode) if stop else None

    def _take(self, output: Output) -> None:
        index, sample = divmod(output.request_id, _SAMPLES_PER_ROW)
        row = self._running.get(index)
        if row is None or row.samples[sample] is not None:
            return  # another sample has failed the row, or a stop string has ended this one
        if isinstance(output, Failure):
            self._fail(bad_row(row.prompt, output.code, output.message))
        elif isinstance(output, NewTokens):
            if output.starts_anew:
                row.watchers[sample] = self._watcher(row.prompt)
            watcher = row.watchers[sample]
            assert watcher is not None, "only a watched request reports its tokens"
            if watcher.add(output.token_ids.tolist()):
                self._engine.abort(output.request_id)
                self._finish(row, sample, watcher.matched_token_ids, "stop", watcher)
        else:
            self._complete(row, sample, output)

    def _complete(self, row: _RunningRow, sample: int, completion: Completion) -> None:
        token_ids = completion.token_ids.tolist()
        num_stop_tokens = 1 if completion.finish_reason == "stop" else 0
        text_ids = token_ids[: len(token_ids) - num_stop_tokens]
        watcher = row.watchers[sample]
        if watcher is not None and watcher.add(text_ids[len(watcher.token_ids) :]):
            self._finish(row, sample, watcher.matched_token_ids, "stop", watcher)
        else:
            self._finish(row, sample, text_ids, completion.finish_reason, None, num_stop_tokens)

    def _finish(
        self,
        row: _RunningRow,
        sample: int,
        token_ids: list[int],
        finish_reason: FinishReason,
        watcher: StopStrings | None,
        num_stop_tokens: int = 0,
    ) -> None:
        cut = watcher.cut if watcher is not None else None
        text, reasoning = self._tokenizer.decode_completion(row.token_ids, token_ids, cut)
        row.samples[sample] = Sample(
            text=text,
            reasoning=reasoning,
            finish_reason=finish_reason,
            num_tokens=len(token_ids) + num_stop_tokens,
        )
        self._totals.finish_reasons[finish_reason] += 1
        samples = [sample for sample in row.samples if sample is not None]
        if len(samples) < len(row.samples):
            return
        del self._running[row.prompt.index]
        is_openai = row.prompt.endpoint is not None or self._options.format == "openai"
        line = result_line(
            row.prompt,
            samples,
            len(row.token_ids),
            shape="openai" if is_openai else "columns",
            model=self._options.model,
        )
        self._totals.num_completed_rows += 1
        self._output.write(row.prompt.index, line)

    def _fail(self, row: BadRow) -> None:
        running = self._running.pop(row.index, None)
        for sample in range(len(running.samples) if running is not None else 0):
            self._engine.abort(row.index * _SAMPLES_PER_ROW + sample)
        self._totals.errors[row.code] += 1
        self._output.write_error(row)
        if self._has_too_many_errors:
            self.stop()

    @property
    def _has_too_many_errors(self) -> bool:
        # Bad rows fail at once, good ones take their time: those that run count as good.
        most, num_rows = self._options.max_error_rate, self._totals.num_rows + len(self._running)
        if most is None or num_rows < _ROWS_BEFORE_A_RATE:
            return False
        return self._totals.num_failed_rows > most * num_rows


def sample_seed(job_seed: int, row_index: int, row_seed: int | None, sample: int) -> int:
    """The seed of one sample: of the row's own seed where it has one, else of its number."""
    if row_seed is not None:
        key = struct.pack("<QQ", row_seed, sample)
    else:
        key = struct.pack("<QQQ", job_seed, row_index, sample)
    return xxhash.xxh3_64_intdigest(key)
