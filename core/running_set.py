"""RunningSet: the sequences that run, with the slots and blocks they hold.

It keeps what the device has still to be told of them, for the next launch: who has entered which
slot, and which blocks were added to which block table.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from nanovllm_cli.core.batch import Admission, BlockTableUpdate, Int32, RowNeeds
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.core.guided import RowMasks
from nanovllm_cli.core.row_needs import adjustment_of, needs_of
from nanovllm_cli.core.sequence import Sequence, SequenceStatus


class RunningSet:
    """At most `max_num_seqs` sequences, in order of admission."""

    def __init__(
        self,
        block_manager: BlockManager,
        grammars: Grammars,
        *,
        vocab_size: int,
        max_num_seqs: int,
    ) -> None:
        self._block_manager = block_manager
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_asking = 0  # ask more than tokens
        self.num_with_grammar = 0
        self._new_admissions: list[Admission] = []
        self._new_blocks: list[tuple[int, int, int]] = []  # (slot, index, block id)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def sequences(self) -> list[Sequence]:
        return list(self._by_id.values())

    @property
    def newest(self) -> Sequence:
        """The one admitted last."""
        return next(reversed(self._by_id.values()))

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def enter(self, sequence: Sequence, cached: list[int], num_new: int) -> None:
        """Let a sequence run, with blocks that hold its beginning and new ones."""
        blocks = self._block_manager
        self._num_asking += sequence.asks
        self.num_with_grammar += sequence.matcher is not None
        self._by_id[sequence.request.request_id] = sequence
        blocks.take(cached)
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.block_table = cached + blocks.allocate(num_new)
        sequence.num_published_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * blocks.block_size
        sequence.num_prefilled_tokens = sequence.num_tokens
        self._new_blocks += [(sequence.slot, i, b) for i, b in enumerate(sequence.block_table)]
        self.announce(sequence)

    def announce(self, sequence: Sequence) -> None:
        """Tell the device what holds of the sequence in a slot from the next launch on."""
        assert sequence.slot is not None, "a running sequence has a slot"
        sampling = sequence.request.sampling
        admission = Admission(
            slot=sequence.slot,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k or self._vocab_size, self._vocab_size),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            min_length=sequence.min_length,
            max_length=sequence.max_length,
            stop_token_ids=sequence.stop_token_ids,
            adjustment=adjustment_of(sequence),
        )
        self._new_admissions.append(admission)

    def grow(self, sequence: Sequence, num_positions: int) -> None:
        """Extend a block table to hold `num_positions` tokens' KV."""
        num_held = len(sequence.block_table)
        num_new = self._block_manager.num_blocks_for(num_positions) - num_held
        if num_new > 0:
            assert sequence.slot is not None, "a running sequence has a slot"
            new = self._block_manager.allocate(num_new)
            self._new_blocks += [(sequence.slot, num_held + i, b) for i, b in enumerate(new)]
            sequence.block_table += new

    def publish(self, sequence: Sequence) -> None:
        """Make the full blocks visible whose tokens are known and whose KV is written.

        The last generated token's KV does not count: a launch in flight writes it, or skips it
        where the sequence has stopped.
        """
        num_written = sequence.num_computed_tokens
        if sequence.num_tokens > sequence.num_prefilled_tokens:
            num_written = sequence.num_tokens - 1
        end = num_written // self._block_manager.block_size
        if end > sequence.num_published_blocks:
            self._block_manager.hash_blocks(sequence.token_ids, sequence.block_hashes)
            self._block_manager.publish(
                sequence.block_table,
                sequence.token_ids,
                sequence.block_hashes,
                sequence.num_published_blocks,
                end,
            )
            sequence.num_published_blocks = end

    def leave(self, sequence: Sequence) -> None:
        """Give back a running sequence's slot and blocks."""
        assert sequence.slot is not None, "a running sequence has a slot"
        del self._by_id[sequence.request.request_id]
        self._num_asking -= sequence.asks
        self.num_with_grammar -= sequence.matcher is not None
        self._free_slots.append(sequence.slot)
        self._block_manager.release(sequence.block_table)
        sequence.slot = None
        sequence.block_table = []

    def needs(self, rows: Seq[Sequence | None], masks: RowMasks | None = None) -> RowNeeds | None:
        """What rows ask of a launch that draws their next token; None: a row without a draw.

        masks: of all that are guided, where they have been begun.
        """
        needs = needs_of(rows) if self._num_asking else None
        if self.num_with_grammar:
            if masks is None:
                masks = self.start_masks(len(rows))
                masks.add_all(rows)
            token_masks = masks.result()
            if token_masks is not None:
                needs = replace(needs or RowNeeds(), masks=token_masks)
        return needs

    def start_masks(self, num_rows: int) -> RowMasks:
        """For the rows of a launch, which are still to be named."""
        return RowMasks(self._grammars, num_rows)

    def take_admissions(self) -> tuple[Admission, ...]:
        taken, self._new_admissions = tuple(self._new_admissions), []
        return taken

    def take_block_table_update(self) -> BlockTableUpdate:
        columns = np.array(self._new_blocks, dtype=np.int32).reshape(-1, 3)
        self._new_blocks = []
        return BlockTableUpdate(
            slots=columns[:, 0].copy(), indices=columns[:, 1].copy(), block_ids=columns[:, 2].copy()
        )


def slots_of(sequences: Seq[Sequence]) -> Int32:
    return np.array([s.slot for s in sequences], dtype=np.int32)
