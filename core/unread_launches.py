"""UnreadLaunches: launches that are planned and not yet read; their tokens are counted on."""

from collections import deque
from collections.abc import Sequence as Seq
from typing import NamedTuple

from nanovllm_cli.core.running_set import RunningSet
from nanovllm_cli.core.sequence import Sequence


class UnreadLaunch(NamedTuple):
    """Its rows."""

    sequences: list[Sequence | None]  # None: what it gives is not wanted any more
    num_planned: list[int]  # tokens of each
    target_counts: Seq[int]  # prompt tokens of each that it gives log-probabilities of, if any


class UnreadLaunches:
    """In the order they were planned, which is that in which they are read."""

    def __init__(self, running: RunningSet) -> None:
        self._running = running
        self._launches: deque[UnreadLaunch] = deque()

    def __len__(self) -> int:
        return len(self._launches)

    @property
    def newest(self) -> UnreadLaunch:
        return self._launches[-1]

    def add(
        self, rows: Seq[Sequence | None], num_planned: list[int], target_counts: Seq[int] = ()
    ) -> None:
        """Count on a launch's tokens, and let those go whose last ones they are.

        What comes into their slots and blocks is launched later, and so runs later: the device
        need not wait for the host to see that they have finished.
        """
        self._launches.append(UnreadLaunch([*rows], num_planned, target_counts))
        for sequence, num_tokens in zip(rows, num_planned, strict=True):
            if sequence is not None:
                sequence.num_in_flight_tokens += num_tokens
                if sequence.planned_length == sequence.max_length:
                    self._running.leave(sequence)

    def take_oldest(self) -> UnreadLaunch:
        return self._launches.popleft()

    def drop(self, sequence: Sequence) -> None:
        """What these launches draw for a sequence is of no use."""
        for launch in self._launches:
            for row, other in enumerate(launch.sequences):
                if other is sequence:
                    launch.sequences[row] = None
        sequence.num_in_flight_tokens = 0
