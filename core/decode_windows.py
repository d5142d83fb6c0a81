"""DecodeWindows: whose turn it is to decode, for how many steps, and who is preempted for it.

A window runs every prefilled sequence for K steps, K bounded by the next certain finish, the free
blocks and `max_window_steps`. When not even one step's blocks are free, the sequence admitted last
is preempted. Guided sequences (half_steps.py) take turns with the windows of the free ones.
"""

from nanovllm_cli.core.batch import DecodeBatch, ForwardBatch
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.half_steps import HalfSteps
from nanovllm_cli.core.prefill_queue import PrefillQueue
from nanovllm_cli.core.running_set import RunningSet, slots_of
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.stats import EngineStats
from nanovllm_cli.core.unread_launches import UnreadLaunches

# Of free rows, between the steps of guided ones: one of these takes as long as a window's, and both
# should get on.
MAX_STEPS_BESIDE_GUIDED = 4


class DecodeWindows:
    """Plans the next one, where no prefill is to be made: then whoever runs is prefilled."""

    def __init__(
        self,
        block_manager: BlockManager,
        running: RunningSet,
        unread: UnreadLaunches,
        prefills: PrefillQueue,
        half_steps: HalfSteps,
        stats: EngineStats,
        *,
        max_window_steps: int,
    ) -> None:
        self._block_manager = block_manager
        self._running = running
        self._unread = unread
        self._prefills = prefills
        self._half_steps = half_steps
        self._stats = stats
        self._max_window_steps = max_window_steps
        self._free_went_last = False  # of free and guided rows, who take turns

    def plan(self) -> DecodeBatch | ForwardBatch | None:
        """The next window, or None where nobody runs or tokens must be read first."""
        while True:
            sequences, is_guided = self._whose_turn()
            if not sequences:
                return None
            most = self._max_window_steps
            if self._running.num_with_grammar:
                most = 1 if is_guided else min(most, MAX_STEPS_BESIDE_GUIDED)
            num_steps = self._window_steps(sequences, most)
            if num_steps > 0:
                break
            if self._unread:
                return None  # a preempted sequence's tokens must be known: read them first
            self._prefills.preempt(self._running.newest)
        for sequence in sequences:
            self._running.grow(sequence, sequence.planned_length - 1 + num_steps)
        self._stats.num_decode_steps += num_steps
        self._stats.num_decode_slots += num_steps * len(sequences)
        self._free_went_last = not is_guided
        if is_guided:
            return self._half_steps.plan_forward(sequences)
        batch = DecodeBatch(
            block_table_update=self._running.take_block_table_update(),
            slots=slots_of(sequences),
            num_steps=num_steps,
            needs=self._running.needs(sequences),
        )
        self._unread.add(sequences, [num_steps] * len(sequences))
        return batch

    def _whose_turn(self) -> tuple[list[Sequence], bool]:
        """The sequences of the next decode launch, and whether it is the guided ones' step."""
        running = self._running.sequences
        if not self._running.num_with_grammar:
            return running, False
        guided = [s for s in running if s.guide is not None]
        if len(guided) == len(running) or (guided and self._free_went_last):
            return guided, True
        return [s for s in running if s.guide is None], False

    def _window_steps(self, sequences: list[Sequence], most: int) -> int:
        """Steps to the next certain finish, or as many as the free blocks allow: 0 if not one."""
        num_steps = min(s.max_length - s.planned_length for s in sequences)
        num_steps = min(num_steps, most)
        while num_steps > 0:
            # The window's last token is sampled but not stored, hence planned_length - 1. Who has
            # stopped thinking may hold more.
            needed = sum(
                max(
                    self._block_manager.num_blocks_for(s.planned_length - 1 + num_steps)
                    - len(s.block_table),
                    0,
                )
                for s in sequences
            )
            if needed <= self._block_manager.num_free_blocks:
                break
            num_steps //= 2
        return num_steps
