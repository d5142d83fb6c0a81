"""Signals: what may end a command before it is done, and the end by the signal itself.

A job that runs rows has a moment to finish those that it has begun; everything else is left as it
is, at once, since the same command line goes on from any moment. The end of --timeout is a signal
too: an alarm.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any

DRAIN_SECONDS = 8.0  # `docker stop` and others wait 10 s before they kill
_LAST_SECONDS = 9.0  # for a job that does not come to look: whoever reads its stdout may be slow
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal ends the command; no Exception, so that nothing takes it for a failure."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        is_alarm = number == signal.SIGALRM
        self.message = "the time of --timeout is over" if is_alarm else f"ended by {number.name}"
        super().__init__(self.message)


class Signals:
    """Between enter and exit, a signal that asks for the end raises Stopped in the main thread.

    A signal that was ignored at the start (nohup, a shell's &) stays ignored. Use it as a context
    manager, in the main thread; without that, no signal comes here.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first that asks for the end
        self.status_requests: SimpleQueue[None] = SimpleQueue()  # one entry for each SIGUSR1
        self._is_held = False
        self.has_raised = False  # Stopped; from then on signals change nothing
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (*_ENDING, signal.SIGUSR1, signal.SIGALRM):
            if number == signal.SIGALRM or signal.getsignal(number) != signal.SIG_IGN:
                self._replaced[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def end_after(self, seconds: float) -> None:
        """Ask for the end when so many seconds are over."""
        signal.setitimer(signal.ITIMER_REAL, seconds)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block look at `received` itself, and finish.

        Stopped comes all the same at a second SIGINT, and where the block takes too long.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def raise_received(self) -> None:
        """Raise Stopped where a signal was held back."""
        if self.received is not None:
            self.has_raised = True
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.status_requests.put(None)
            return
        if self.has_raised:
            return  # what it has left behind is being tidied up
        is_first = self.received is None
        if is_first:
            self.received = signal.Signals(number)
            signal.setitimer(signal.ITIMER_REAL, _LAST_SECONDS)
        is_urgent = not is_first and number in (signal.SIGINT, signal.SIGALRM)
        if is_urgent or not self._is_held:
            self.raise_received()


def end_by(number: signal.Signals) -> None:
    """End this process by a signal; a shell's loop, too, ends for a command that ends so."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
