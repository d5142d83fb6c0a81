"""HalfSteps: the decode steps of guided sequences, which are two launches each.

The first gives the logits, and is planned before the tokens of the step before are read. The second
draws under masks that depend on these tokens, and so is planned after that: the host works the
masks out while the device computes the logits.
"""

from nanovllm_cli.core.batch import ForwardBatch, SampleBatch, TokenMasks
from nanovllm_cli.core.guided import worth_forcing
from nanovllm_cli.core.prefill_queue import PrefillQueue
from nanovllm_cli.core.running_set import RunningSet, slots_of
from nanovllm_cli.core.sequence import Sequence, SequenceStatus
from nanovllm_cli.core.unread_launches import UnreadLaunches


class HalfSteps:
    """At most one step whose second half is to come."""

    def __init__(self, running: RunningSet, unread: UnreadLaunches, prefills: PrefillQueue) -> None:
        self._running = running
        self._unread = unread
        self._prefills = prefills
        self._forwarded: list[Sequence] = []
        self._forwarded_slots = slots_of([])
        self._masked: tuple[list[Sequence | None], TokenMasks] | None = None  # of the last step

    @property
    def waits_for_tokens(self) -> bool:
        """Whether masks depend on tokens that are still to be read."""
        live = (s for s in self._forwarded if s.status is SequenceStatus.RUNNING)
        return any(s.num_in_flight_tokens for s in live)

    def plan_forward(self, sequences: list[Sequence]) -> ForwardBatch:
        """The first half of a step, for which they hold the blocks already."""
        self._forwarded, self._forwarded_slots = sequences, slots_of(sequences)
        return ForwardBatch(
            admissions=(),
            block_table_update=self._running.take_block_table_update(),
            slots=self._forwarded_slots,
        )

    def plan_sample(self) -> SampleBatch | None:
        """The second half of a step, for those that still want its token."""
        forwarded, self._forwarded = self._forwarded, []
        rows = [s if s.status is SequenceStatus.RUNNING else None for s in forwarded]
        needs = self._running.needs(rows)
        if needs is None or needs.masks is None:
            return None
        self._unread.add(rows, [0 if s is None else 1 for s in rows])
        self._masked = rows, needs.masks
        return SampleBatch(slots=self._forwarded_slots, needs=needs)

    def fast_forward(self) -> None:
        """Put sequences into the next prefill that go on with tokens known without a step.

        While the device draws the last ones: what it draws for these is of no use.
        """
        if self._masked is None:
            return
        (rows, masks), self._masked = self._masked, None
        running = [s if s is not None and s.slot is not None else None for s in rows]
        for sequence in worth_forcing(running, masks):
            self._prefills.resume(sequence, sequence.planned_length - 1)
