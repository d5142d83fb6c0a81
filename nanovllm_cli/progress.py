"""Progress and the closing table, on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .totals import Totals

_LINE_SECONDS = 30.0
_BAR_SECONDS = 0.1


class _Stderr(Console):
    """A console on stderr, which may be full or closed: no job fails for what it does not show."""

    def __init__(self) -> None:
        super().__init__(file=sys.stderr)

    def on_broken_pipe(self) -> None:
        """Instead of rich's way: to close stdout, and to exit."""
        self.quiet = True


class Progress:
    """Shows `totals` while a job runs; with `quiet` nothing at all."""

    def __init__(self, totals: Totals, *, quiet: bool) -> None:
        self._totals = totals
        self._quiet = quiet
        self._console = _Stderr()
        self._is_bar = self._console.is_terminal and not quiet
        self._next = time.monotonic() + (_BAR_SECONDS if self._is_bar else _LINE_SECONDS)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
            console=self._console,
            disable=not self._is_bar,
            transient=True,
        )
        self._task = self._bar.add_task("rows", total=None, rates="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show the totals as they are, when it is time."""
        if self._quiet or time.monotonic() < self._next:
            return
        if self._is_bar:
            self._next = time.monotonic() + _BAR_SECONDS
            self._bar.update(
                self._task,
                completed=self._totals.num_rows,
                total=self._totals.num_expected_rows,
                rates=self._rates(),
            )
        else:
            self._next = time.monotonic() + _LINE_SECONDS
            self.say(f"{self._counts()}, {self._rates()}")

    def say(self, line: str) -> None:
        """One line to stderr, markup and wrapping off."""
        if not self._quiet:
            with suppress(OSError):
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """The closing table."""
        if self._quiet:
            return
        stats = self._totals.as_dict()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        rows, tokens, rates = stats["rows"], stats["tokens"], stats["throughput"]
        earlier = f" ({rows['resumed']} by an earlier run)" if rows["resumed"] else ""
        done = f"{rows['completed']} completed{earlier}, {rows['failed']} failed"
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
        with suppress(OSError):
            self._console.print(table, highlight=False)

    def _counts(self) -> str:
        expected = self._totals.num_expected_rows
        of = f" of {expected}" if expected is not None else ""
        return f"{self._totals.num_rows}{of} rows, {self._totals.num_failed_rows} failed"

    def _rates(self) -> str:
        stats = self._totals.as_dict()
        rates, tokens = stats["throughput"], stats["tokens"]
        return (
            f"{rates['prompt_tokens_per_second']:.0f} tok/s in, "
            f"{rates['completion_tokens_per_second']:.0f} tok/s out, "
            f"{tokens['prefix_hit_rate']:.0%} prefix hits"
        )
