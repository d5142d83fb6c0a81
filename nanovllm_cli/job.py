"""The loop of a job: keeps the engine's queue full, and turns what comes out of it into rows."""

import time
from typing import Any

from nanovllm_cli.core.engine_client import EngineClient
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.engine_replicas import EngineReplicas
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output

from .feeder import Feeder, TokenizedPrompt, bad_row
from .options import GenerateOptions
from .output import JobOutput
from .progress import Progress
from .refusal import Refused
from .row_plan import RowPlanner, row_and_sample
from .rows import BadRow
from .running_row import RunningRow
from .score import score_line
from .signals import DRAIN_SECONDS, Signals, Stopped
from .tokenizer import PromptTokenizer
from .totals import Totals

_ROWS_BEFORE_A_RATE = 100  # of errors is one


class Job:
    """Runs rows from the feeder to the output; `sampling` is what a row does not say itself."""

    def __init__(
        self,
        options: GenerateOptions,
        *,
        sampling: dict[str, Any],
        engine: EngineClient,
        tokenizer: PromptTokenizer,
        feeder: Feeder,
        output: JobOutput,
        totals: Totals,
        signals: Signals,
    ) -> None:
        self._options = options
        self._columns = options.columns
        self._planner = RowPlanner(options, sampling, tokenizer)
        self._engine = engine
        self._tokenizer = tokenizer
        self._feeder = feeder
        self._output = output
        self._totals = totals
        self._signals = signals
        self._running: dict[int, RunningRow] = {}  # by row index
        self._num_bytes_running = 0  # of their rows
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
        options = self._options
        while (
            self._give_up is None
            and len(self._running) + self._output.num_held < options.rows_in_flight
            and (self._num_bytes_running < options.bytes_in_flight or not self._running)
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
        prompt = fed.prompt
        try:
            plans = self._planner.plans(fed)
        except Refused as refused:
            self._fail(bad_row(prompt, refused.code, refused.message))
            return
        row = self._running[prompt.index] = RunningRow(plans, self._tokenizer)
        self._num_bytes_running += prompt.row.num_bytes
        for request in row.requests:
            failure = self._engine.add(request)
            if failure is not None:
                self._take(failure)
                return

    def _take(self, output: Output) -> None:
        index, sample = row_and_sample(output.request_id)
        row = self._running.get(index)
        if row is None or row.has(sample):
            return  # another sample has failed the row, or a stop string has ended this one
        if isinstance(output, Failure):
            self._fail(bad_row(row.prompt, output.code, output.message))
            return
        if row.prompt.is_scored:
            assert isinstance(output, Completion), "a score has no stop strings"
            has_tokens = self._options.token_logprobs
            line = score_line(row.plans[0], output, self._columns, has_token_logprobs=has_tokens)
            self._write(index, line)
            return
        finished = row.take(sample, output)
        if finished is None:
            return
        if isinstance(output, NewTokens):  # and a stop string in them
            self._engine.abort(output.request_id)
        self._totals.finish_reasons[finished.finish_reason] += 1
        if row.is_done:
            options, columns = self._options, self._columns
            line = row.line(format=options.format, model=options.shown_model, columns=columns)
            self._write(index, line)

    def _write(self, index: int, line: bytes) -> None:
        self._num_bytes_running -= self._running.pop(index).prompt.row.num_bytes
        self._totals.num_completed_rows += 1
        self._output.write(index, line)

    def _fail(self, row: BadRow) -> None:
        running = self._running.pop(row.index, None)
        if running is not None:
            self._num_bytes_running -= running.prompt.row.num_bytes
        for request in running.requests if running is not None else ():
            self._engine.abort(request.request_id)
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
