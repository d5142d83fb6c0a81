"""Progress and the closing table, on stderr: a bar on a terminal, else a line now and then."""

import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table

from .exit_code import CommandError, ExitCode
from .files import printable
from .log import Level, Log
from .metrics_file import MetricsFile
from .run_job import exit_code_of
from .totals import Totals

_LINE_SECONDS = 30.0
_METRICS_SECONDS = 10.0
_BAR_SECONDS = 0.1
_BAR_WIDTHS = (6, 40)  # characters: the least, and the most
_MIN_WIDTH, _USUAL_WIDTH = 20, 80  # columns
_JOIN_SECONDS = 1.0  # whoever reads stderr may not read on


class Stderr(Console):
    """A console on stderr, which may be full or closed: no job fails for what it does not show."""

    def __init__(self) -> None:
        super().__init__(file=sys.stderr)
        if self.width < _MIN_WIDTH:  # COLUMNS=0 is said where nobody knows
            self.width = _USUAL_WIDTH

    def on_broken_pipe(self) -> None:
        """Instead of rich's way: to close stdout, and to exit."""
        self.quiet = True


class Progress:
    """Shows `totals` while a job runs, and keeps the metrics file; with `quiet` nothing is shown.

    It works in a thread of its own, so that no part of a job, and no long launch, leaves whoever
    looks in the dark. `status_requests` are answered with a line, even where `quiet`.
    is_stdout: rows go to standard output, which may be the terminal that a bar would be drawn on.
    """

    def __init__(
        self,
        totals: Totals,
        log: Log,
        *,
        quiet: bool,
        is_stdout: bool = False,
        metrics: MetricsFile | None = None,
        status_requests: SimpleQueue[None] | None = None,
        line_seconds: float = _LINE_SECONDS,
        metrics_seconds: float = _METRICS_SECONDS,
    ) -> None:
        self._totals = totals
        self._log = log
        self._quiet = quiet
        self._metrics = metrics
        self._has_warned = False
        self._exit_code: ExitCode | None = None
        # An entry wakes the thread: for a line of status, or, when it is to end, to see that.
        self._status_requests = status_requests or SimpleQueue()
        self._is_over = False
        self._line_seconds = line_seconds
        self._metrics_seconds = metrics_seconds
        self._console = Stderr()
        has_rows = is_stdout and sys.stdout is not None and sys.stdout.isatty()
        is_terminal = self._console.is_terminal and not has_rows
        self._is_bar = is_terminal and not quiet and not log.is_json
        self._bar_column = BarColumn(bar_width=_BAR_WIDTHS[0])
        whole = Column(no_wrap=True)
        self._bar = RichProgress(
            TextColumn("{task.description}", table_column=whole),
            self._bar_column,
            TextColumn("{task.fields[counts]}", table_column=whole),
            console=self._console,
            disable=not self._is_bar,
            transient=True,
        )
        self._task = self._bar.add_task("rows", total=None, counts="")
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        """Raises CommandError where the metrics file cannot be written."""
        if self._metrics is not None:
            self._metrics.write(self._totals, None)
        if self._is_bar:
            self._show_bar()
        with suppress(OSError):
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._status_requests.put(None)
        self._thread.join(_JOIN_SECONDS)
        with suppress(OSError):  # of a terminal that is gone
            self._bar.stop()
        self._write_metrics(self._exit_code if error is None else exit_code_of(error))

    def say(self, event: str, message: str, level: Level = "info") -> None:
        """One line, with the counts in JSON."""
        if not self._quiet:
            self._tell(event, message, level)

    def begin(self, message: str) -> None:
        """One line before the model loads, where no bar shows the same."""
        if not self._is_bar:
            self.say("start", message)

    def end(
        self,
        exit_code: ExitCode,
        message: str | None = None,
        *,
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """The job has ended so: the closing table, or a line in its place.

        files: what was written, by what it is: "output", "errors", "stats". With `quiet`, a line
        tells only of failed rows that are in an errors file: else they are on stderr already.
        """
        self._exit_code = exit_code
        if not self._quiet:
            if message is not None:
                self.say("end", message)
            else:
                self._show_totals(files)
        elif exit_code is ExitCode.SOME_ROWS_FAILED and "errors" in files:
            self._tell("end", message or self._failed(files["errors"]), "warning")

    def _failed(self, errors_file: str) -> str:
        totals = self._totals
        return (
            f"{totals.num_failed_rows} of {totals.num_rows} rows failed ({totals.reasons()}); see "
            f"{errors_file}"
        )

    def _show_totals(self, files: Mapping[str, str]) -> None:
        stats = self._totals.as_dict()
        rows, tokens, rates = stats["rows"], stats["tokens"], stats["throughput"]
        earlier = f" ({rows['resumed']} by an earlier run)" if rows["resumed"] else ""
        done = f"{rows['completed']} completed{earlier}, {rows['failed']} failed"
        if self._log.is_json:
            self._tell("end", done, files=dict(files))
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row("rows", done)
        table.add_row("prompt tokens", f"{tokens['prompt']}, {tokens['cached']} from the cache")
        table.add_row("completion tokens", f"{tokens['completion']}")
        table.add_row(
            "per second",
            f"{rates['rows_per_second']} rows, {rates['prompt_tokens_per_second']} prompt tokens, "
            f"{rates['completion_tokens_per_second']} completion tokens",
        )
        seconds = ", ".join(f"{k} {v:.1f}" for k, v in stats["phases_seconds"].items())
        table.add_row("seconds", f"{stats['elapsed_seconds']:.1f} in all: {seconds}")
        if rows["failed"]:
            where = f"{files['errors']}: " if "errors" in files else ""
            table.add_row("errors", printable(where + self._totals.reasons()))
        for what in ("output", "stats"):
            if what in files:
                table.add_row(what, printable(files[what]))
        with suppress(OSError):
            self._console.print(table, highlight=False)

    def _run(self) -> None:
        next_line = next_metrics = time.monotonic()
        next_line += self._line_seconds
        next_metrics += self._metrics_seconds
        while True:
            wake = min(next_line, next_metrics)
            if self._is_bar:
                wake = min(wake, time.monotonic() + _BAR_SECONDS)
            try:
                self._status_requests.get(timeout=max(wake - time.monotonic(), 0.0))
                if self._is_over:
                    return
                self._tell("status", self._status())
            except Empty:
                pass
            now = time.monotonic()
            if self._is_bar:
                self._show_bar()
            if now >= next_line:
                next_line = now + self._line_seconds
                if not self._is_bar:
                    self.say("progress", self._status())
            if now >= next_metrics:
                next_metrics = now + self._metrics_seconds
                self._write_metrics(None)

    def _show_bar(self) -> None:
        totals = self._totals
        phase = totals.current_phase
        of = f"/{totals.num_expected_rows}" if totals.num_expected_rows is not None else ""
        parts = [
            f"{totals.num_rows}{of} rows, {totals.num_failed_rows} failed",
            _clock(totals.elapsed_seconds),
        ]
        left = self._bar.tasks[0].time_remaining
        more = [f"{_clock(left)} left"] if left is not None and phase == "generate" else []
        # What does not fit is left out, from the last: the rates first.
        room = self._console.width - len(phase) - _BAR_WIDTHS[0] - 2
        for part in [*more, self._rates()]:
            if len(", ".join([*parts, part])) > room:
                break
            parts.append(part)
        counts = ", ".join(parts)
        self._bar_column.bar_width = min(
            max(room - len(counts) + _BAR_WIDTHS[0], _BAR_WIDTHS[0]), _BAR_WIDTHS[1]
        )
        with suppress(OSError):
            self._bar.update(
                self._task,
                description=phase,
                completed=totals.num_rows,
                total=totals.num_expected_rows,
                counts=counts,
            )

    def _write_metrics(self, exit_code: ExitCode | None) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(self._totals, exit_code)
        except CommandError as error:
            if not self._has_warned:  # the job is worth more than its metrics
                self._has_warned = True
                self._tell("metrics", error.message, "warning")

    def _tell(self, event: str, message: str, level: Level = "info", **facts: Any) -> None:
        if self._is_bar:
            prefix = "" if level == "info" else f"{level}: "
            text = printable(f"{prefix}{message}")
            with suppress(OSError):
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        self._log.say(event, message, level=level, **self._facts(), **facts)

    def _facts(self) -> dict[str, Any]:
        if not self._log.is_json:
            return {}
        totals = self._totals
        facts: dict[str, Any] = {
            "phase": totals.current_phase,
            "expected_rows": totals.num_expected_rows,
        }
        if self._exit_code is not None:
            facts["exit_code"] = self._exit_code
        return {**facts, **totals.as_dict()}

    def _status(self) -> str:
        totals = self._totals
        return (
            f"{totals.current_phase}, {totals.elapsed_seconds:.0f} s: {totals.counts()}, "
            f"{self._rates()}"
        )

    def _rates(self) -> str:
        stats = self._totals.as_dict()
        rates, tokens = stats["throughput"], stats["tokens"]
        return (
            f"{rates['prompt_tokens_per_second']:.0f} tok/s in, "
            f"{rates['completion_tokens_per_second']:.0f} tok/s out, "
            f"{tokens['prefix_hit_rate']:.0%} prefix hits"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
