"""HalfSteps: the decode steps of guided sequences, which are two launches each.

The first gives the logits, and is planned before the tokens of the step before are read. The second
draws under masks that depend on these tokens, and so is planned after that: the host works the
masks out while the device computes the logits. For a sequence whose next tokens its grammar forces
nothing is drawn: the next step takes all of them at once.
"""

from collections.abc import Sequence as Seq

import numpy as np

from nanovllm_cli.core.batch import DRAWN_LAST, ForcedTokens, ForwardBatch, SampleBatch
from nanovllm_cli.core.guided import RowMasks, append_some, find_forced
from nanovllm_cli.core.running_set import RunningSet, slots_of
from nanovllm_cli.core.sequence import Sequence, SequenceStatus
from nanovllm_cli.core.stats import EngineStats
from nanovllm_cli.core.unread_launches import UnreadLaunches


class HalfSteps:
    """At most one step whose second half is to come."""

    def __init__(
        self,
        running: RunningSet,
        unread: UnreadLaunches,
        stats: EngineStats,
        *,
        max_num_batched_tokens: int,
    ) -> None:
        self._running = running
        self._unread = unread
        self._stats = stats
        self._max_num_batched_tokens = max_num_batched_tokens
        self._forwarded: list[Sequence] = []
        self._forwarded_slots = slots_of([])

    @property
    def waits_for_tokens(self) -> bool:
        """Whether masks depend on tokens that are still to be read."""
        live = (s for s in self._forwarded if s.status is SequenceStatus.RUNNING)
        return any(s.num_in_flight_tokens for s in live)

    def plan_forward(self, sequences: list[Sequence]) -> ForwardBatch:
        """The first half of a step, for which they hold the blocks already."""
        self._forwarded, self._forwarded_slots = sequences, slots_of(sequences)
        return ForwardBatch(
            block_table_update=self._running.take_block_table_update(),
            slots=self._forwarded_slots,
            forced=_take_forced(sequences),
        )

    def plan_sample(self) -> SampleBatch | None:
        """The second half of a step, for those that still want its token; None: nobody does."""
        forwarded, self._forwarded = self._forwarded, []
        rows = [s if s.status is SequenceStatus.RUNNING else None for s in forwarded]
        masks = self._running.start_masks(len(rows))
        self._force(rows, masks)
        needs = self._running.needs(rows, masks)
        if needs is None or needs.masks is None:
            return None
        self._unread.add(rows, [0 if s is None else 1 for s in rows])
        return SampleBatch(slots=self._forwarded_slots, needs=needs)

    def _force(self, rows: list[Sequence | None], masks: RowMasks) -> None:
        """Let rows go on with tokens known without a draw, and take them out; masks of the rest."""
        budget = self._max_num_batched_tokens - len(rows)
        for row, token_ids in find_forced(rows, masks).items():
            sequence = rows[row]
            assert sequence is not None, "only what is guided is forced"
            assert sequence.guide is not None, "only what is guided is forced"
            num_stored = sequence.num_tokens
            num_forced = append_some(sequence, token_ids[: max(budget, 0)], self._stats)
            if num_forced:
                sequence.set_stored(num_stored)
                budget -= num_forced
                rows[row] = None
            else:
                masks.add(row, sequence.guide)


def _take_forced(sequences: Seq[Sequence]) -> ForcedTokens | None:
    """The tokens of a step; None where each sequence has the one that it draws last."""
    if all(s.num_computed_tokens == s.num_prefilled_tokens for s in sequences):
        return None
    drawn_last = np.array([DRAWN_LAST], dtype=np.int32)
    token_ids, starts = [], []
    for s in sequences:
        is_forced = s.num_computed_tokens < s.num_prefilled_tokens
        starts.append(s.num_computed_tokens if is_forced else s.planned_length - 1)
        token_ids.append(s.token_ids[s.num_computed_tokens :] if is_forced else drawn_last)
        s.num_computed_tokens = s.num_prefilled_tokens
    return ForcedTokens(
        token_ids=np.concatenate(token_ids),
        start_positions=np.array(starts, dtype=np.int32),
        query_lens=np.array([len(ids) for ids in token_ids], dtype=np.int32),
    )
