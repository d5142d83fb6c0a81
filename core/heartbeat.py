"""A heartbeat: a count in shared memory, by which one process sees that another one gets on.

A process that is stopped, or waits for ever, ends no connection and has no exit code; it is only
silent. The memory is an anonymous memfd, inherited: it has no name that two jobs could share.
"""

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

NUM_BYTES = 8  # one int64
_BEAT_SECONDS = 0.25
_LONGEST_LOOK_SECONDS = 1.0
_LEAST_SHARE_OF_A_PROCESSOR = 0.01


class Heartbeat:
    """The count's writer: a thread of its own, which adds 1 while the process gets on.

    It gets on when it counts a step, when it is excused (it loads, or has nothing to do), and,
    where `processor_time_counts`, when it uses the processor: one step of a big model on a CPU
    takes minutes.
    """

    def __init__(self, fd: int) -> None:
        self._cell = memoryview(mmap.mmap(fd, NUM_BYTES)).cast("q")
        self._num_steps = 0
        self._is_excused = False
        self.processor_time_counts = False
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def count_step(self) -> None:
        """Say that the work gets on."""
        self._num_steps += 1

    @contextmanager
    def excused(self) -> Iterator[None]:
        """While this lasts, to be alive is enough."""
        self._is_excused = True
        try:
            yield
        finally:
            self._is_excused = False

    def _run(self) -> None:
        num_steps, processor_seconds = -1, 0.0
        while True:
            used = time.process_time() - processor_seconds
            is_busy = used >= _LEAST_SHARE_OF_A_PROCESSOR * _BEAT_SECONDS
            if (
                self._num_steps != num_steps
                or self._is_excused
                or (self.processor_time_counts and is_busy)
            ):
                self._cell[0] += 1
            num_steps, processor_seconds = self._num_steps, time.process_time()
            time.sleep(_BEAT_SECONDS)


class HeartbeatMonitor:
    """The count's reader."""

    def __init__(self, fd: int) -> None:
        self._cell = memoryview(mmap.mmap(fd, NUM_BYTES)).cast("q")
        self._last_count = self._cell[0]
        self._last_look = time.monotonic()
        self._silent_seconds = 0.0

    def silent_seconds(self) -> float:
        """How long the count has stood still while it was looked at.

        Between two looks at most a second counts: after a pause of the whole machine, or of the
        reader alone, the writer must not seem dead.
        """
        now, count = time.monotonic(), self._cell[0]
        if count != self._last_count:
            self._silent_seconds = 0.0
        else:
            self._silent_seconds += min(now - self._last_look, _LONGEST_LOOK_SECONDS)
        self._last_count, self._last_look = count, now
        return self._silent_seconds
