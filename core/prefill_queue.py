"""PrefillQueue: the sequences that go on by a prefill, and the next prefill's plan.

First comes a prompt of which the last prefill took a part, then running sequences whose grammar
begins, then those that wait to run, in order of arrival; who was preempted waits in front. What
fits is packed into one launch, up to `max_num_batched_tokens`. Who has the very prompt of a
sequence in the launch is its twin, and computes nothing.

Admission leaves a free block for each running sequence, so that a window always runs between a
preemption and the next admission, and the engine always advances.
"""

from collections import deque

import numpy as np

from nanovllm_cli.core.batch import PrefillBatch, Twins
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.guided import append_forced
from nanovllm_cli.core.row_needs import take_prompt_targets
from nanovllm_cli.core.running_set import RunningSet, slots_of
from nanovllm_cli.core.sequence import Sequence, SequenceStatus
from nanovllm_cli.core.stats import EngineStats
from nanovllm_cli.core.unread_launches import UnreadLaunches


class PrefillQueue:
    """Who comes next, and how much of it."""

    def __init__(
        self,
        block_manager: BlockManager,
        running: RunningSet,
        unread: UnreadLaunches,
        stats: EngineStats,
        *,
        max_num_batched_tokens: int,
    ) -> None:
        self._block_manager = block_manager
        self._running = running
        self._unread = unread
        self._stats = stats
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._chunked: Sequence | None = None  # the running one whose prompt is not done
        self._resumed: deque[Sequence] = deque()  # running ones that go on by a prefill

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Behind all that wait."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Whether it is here or not, and whether it waits or runs."""
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        if self._chunked is sequence:
            self._chunked = None
        if sequence in self._resumed:
            self._resumed.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and blocks: it will be prefilled again."""
        assert sequence.num_in_flight_tokens == 0, "tokens in flight would be lost"
        assert len(self._running) > 1, "a lone sequence always fits: max_model_len sees to it"
        self._stats.num_preemptions += 1
        self.remove(sequence)
        self._running.leave(sequence)
        self._wait_first(sequence)

    def resume(self, sequence: Sequence, num_stored_tokens: int) -> None:
        """Let a sequence go on by a prefill, with what its grammar leaves no choice of.

        `num_stored_tokens` of its tokens have their KV. What launches not yet read draw for it is
        of no use.
        """
        self._unread.drop(sequence)
        append_forced(sequence, self._stats)
        if sequence.slot is None:  # its last step was launched, and it has left
            self._wait_first(sequence)
        else:
            sequence.set_stored(num_stored_tokens)
            self._resumed.append(sequence)

    def plan(self) -> PrefillBatch | None:
        """The next prefill, or None where nobody goes on by one or none fits."""
        running, budget = self._running, self._max_num_batched_tokens
        sequences: list[Sequence] = []
        query_lens: list[int] = []
        is_last_chunk: list[bool] = []
        twins: list[tuple[Sequence, int]] = []  # and the index of its leader
        while budget > 0 and (sequence := self._chunked or self._next_resumed() or self._admit()):
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            sequences.append(sequence)
            query_lens.append(num_tokens)
            budget -= num_tokens
            sequence.num_computed_tokens += num_tokens
            is_last = sequence.num_computed_tokens == sequence.num_tokens
            is_last_chunk.append(is_last)
            self._chunked = None if is_last else sequence
            # Before it is computed: launches run in order, and store before they read.
            running.publish(sequence)
            while is_last and (twin := self._admit_twin_of(sequence)):
                twins.append((twin, len(sequences) - 1))
        if not sequences:
            return None
        self._stats.num_prefill_launches += 1
        ends = np.array([s.num_computed_tokens for s in sequences], dtype=np.int32)
        starts = ends - np.array(query_lens, dtype=np.int32)
        targets, target_counts = take_prompt_targets(sequences, starts, ends)
        rows = [*sequences, *(twin for twin, _ in twins)]
        num_planned = [*map(int, is_last_chunk), *([1] * len(twins))]
        needs = running.needs([s if n else None for s, n in zip(rows, num_planned, strict=True)])
        slots = slots_of(sequences)
        planned_twins = self._plan_twins(sequences, twins) if twins else None
        self._unread.add(rows, num_planned, [*target_counts, *([0] * len(twins))])
        return PrefillBatch(
            admissions=running.take_admissions(),
            block_table_update=running.take_block_table_update(),
            slots=slots,
            token_ids=np.concatenate(
                [s.token_ids[a:b] for s, a, b in zip(sequences, starts, ends, strict=True)]
            ),
            start_positions=starts,
            query_lens=ends - starts,
            is_last_chunk=np.array(is_last_chunk, dtype=np.bool_),
            twins=planned_twins,
            needs=needs,
            prompt_targets=targets,
        )

    def _wait_first(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)

    def _next_resumed(self) -> Sequence | None:
        """The next running sequence that goes on by a prefill of what it has got."""
        while self._resumed:
            sequence = self._resumed.popleft()
            num_needed = self._block_manager.num_blocks_for(sequence.num_tokens)
            num_new = num_needed - len(sequence.block_table)
            if num_new > self._block_manager.num_free_blocks:
                self.preempt(sequence)
                continue
            self._running.grow(sequence, sequence.num_tokens)
            self._running.announce(sequence)
            return sequence
        return None

    def _admit(self) -> Sequence | None:
        """Give the first waiting sequence a slot and blocks, where both are to be had."""
        if not self._waiting or not self._running.has_free_slot:
            return None
        sequence, blocks = self._waiting[0], self._block_manager
        append_forced(sequence, self._stats)
        blocks.hash_blocks(sequence.token_ids, sequence.block_hashes)
        findable = sequence.block_hashes
        if sequence.next_prompt_target is not None:  # the token before it must be computed
            findable = findable[: (sequence.next_prompt_target - 1) // blocks.block_size]
        cached = blocks.find_prefix(sequence.token_ids, findable)
        num_new = blocks.num_blocks_for(sequence.num_tokens) - len(cached)
        needed = num_new + blocks.num_free_among(cached)
        if self._running:
            needed += len(self._running) + 1  # a block for each to grow into
        if needed > blocks.num_free_blocks:
            return None
        self._enter(cached, num_new)
        return sequence

    def _admit_twin_of(self, leader: Sequence) -> Sequence | None:
        """Give the first waiting sequence a slot and blocks, where its prompt is the leader's.

        It computes nothing. Its KV is the leader's: full blocks are shared, the last is copied.
        """
        blocks = self._block_manager
        if not self._waiting or not self._running.has_free_slot or not blocks.enable_prefix_caching:
            return None
        twin = self._waiting[0]
        is_twin = (
            twin.num_tokens == twin.num_prompt_tokens == leader.num_tokens
            and twin.next_prompt_target is None
            and twin.request.sampling.grammar is None
            and np.array_equal(twin.token_ids, leader.token_ids)
        )
        num_shared, num_over = divmod(leader.num_tokens, blocks.block_size)
        num_new = int(num_over > 0)
        if not is_twin or num_new + len(self._running) + 1 > blocks.num_free_blocks:
            return None
        self._enter(leader.block_table[:num_shared], num_new)
        twin.num_computed_tokens = twin.num_tokens
        return twin

    def _enter(self, cached: list[int], num_new: int) -> None:
        """Let the first waiting sequence run, with blocks that hold its beginning and new ones."""
        sequence, block_size = self._waiting.popleft(), self._block_manager.block_size
        self._running.enter(sequence, cached, num_new)
        if sequence.num_cached_tokens is None:
            # Forced tokens may be in the cache as well; and a twin counts what it would have found,
            # whatever else is in its launch.
            findable = (sequence.num_tokens - 1) // block_size * block_size
            num_cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens, findable)
            sequence.num_cached_tokens = num_cached
            self._stats.num_prompt_tokens += sequence.num_prompt_tokens
            self._stats.num_cached_tokens += num_cached

    def _plan_twins(self, leaders: list[Sequence], twins: list[tuple[Sequence, int]]) -> Twins:
        copies = []
        for twin, i in twins:
            index, num_over = divmod(twin.num_tokens, self._block_manager.block_size)
            if num_over:
                copies.append((leaders[i].block_table[index], twin.block_table[index]))
        columns = np.array(copies, dtype=np.int32).reshape(-1, 2)
        return Twins(
            slots=slots_of([twin for twin, _ in twins]),
            leaders=np.array([i for _, i in twins], dtype=np.int32),
            sources=columns[:, 0].copy(),
            targets=columns[:, 1].copy(),
        )
