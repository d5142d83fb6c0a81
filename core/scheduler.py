"""Scheduler: which sequences run, and whether the next launch is a prefill or a decode window.

The order of a launch's life is `schedule` (plan it), then later `update` (read its tokens). Several
launches may be planned before the first is read, so a plan never depends on a token not yet read:
lengths are known without looking, and only a stop token needs a look. A sequence that turns out to
have stopped in window w is dropped when w is read; what window w + 1 made of it is ignored.

Prefill goes first: whatever fits is admitted, in order of arrival. A decode window runs every
prefilled sequence for K steps, K bounded by the next certain finish, the free blocks and
`max_window_steps`. When not even one step's blocks are free, the sequence admitted last is
preempted: it loses its blocks, goes to the front of the queue and is prefilled again later, with
the tokens it has. Admission leaves a free block for each running sequence, so that a window
always runs between a preemption and the next admission, and the engine always advances.

Guided sequences (guided.py) take turns with the free ones' windows. Their step is two launches: the
first is planned before their last tokens are read, the second, with the masks, after that.
"""

from collections import deque
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from nanovllm_cli.core.batch import (
    Admission,
    Batch,
    BatchResult,
    BlockTableUpdate,
    DecodeBatch,
    ForwardBatch,
    PrefillBatch,
    RowNeeds,
    SampleBatch,
    TokenMasks,
    Twins,
)
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.grammar import GrammarError, Grammars
from nanovllm_cli.core.guided import (
    ends_thought,
    forced_token_ids,
    is_dead_end,
    is_whole,
    with_masks,
    worth_forcing,
)
from nanovllm_cli.core.request import (
    Completion,
    Failure,
    FailureCode,
    FinishReason,
    NewTokens,
    Output,
    Request,
    TokenIds,
)
from nanovllm_cli.core.row_needs import (
    ResultLogprobs,
    adjustment_of,
    joined,
    needs_of,
    take_prompt_targets,
    tokens_named_by,
)
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS
from nanovllm_cli.core.sequence import Sequence, SequenceStatus
from nanovllm_cli.core.stats import EngineStats

# Of free rows, between the steps of guided ones: one of these takes as long as a window's, and both
# should get on.
MAX_STEPS_BESIDE_GUIDED = 4


class _Launched(NamedTuple):
    """A launch that is not yet read: its rows."""

    sequences: list[Sequence | None]  # None: what it gives is not wanted any more
    num_planned: list[int]  # tokens of each
    target_counts: list[int]  # prompt tokens of each that it gives log-probabilities of, if any


class Scheduler:
    """Waiting and running sequences, their slots and their blocks; no tensors."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_window_steps: int,
        grammars: Grammars | None = None,
    ) -> None:
        self._block_manager = block_manager
        self._vocab_size = vocab_size
        # One outside the vocabulary is never drawn, and indexes no logit.
        self._eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_window_steps = max_window_steps
        self._grammars = grammars or Grammars(
            None, vocab_size=vocab_size, eos_token_ids=self._eos_token_ids
        )
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by request id, in order of admission
        self._chunked: Sequence | None = None  # the running one whose prompt is not done
        self._resumed: deque[Sequence] = deque()  # running ones that go on by a prefill
        self._forwarded: list[Sequence] = []  # rows of a step whose other half is to come
        self._forwarded_slots = _slots_of([])
        self._masked: tuple[list[Sequence | None], TokenMasks] | None = None  # of the last step
        self._free_went_last = False  # of free and guided rows, who take turns
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_asking = 0  # running ones that ask more than tokens
        self._num_with_grammar = 0  # likewise
        self._launched: deque[_Launched] = deque()
        self._by_id: dict[int, Sequence] = {}
        self._new_admissions: list[Admission] = []
        self._new_blocks: list[tuple[int, int, int]] = []  # (slot, index, block id)
        self.stats = EngineStats()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether some sequence is not finished."""
        return bool(self._by_id)

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure at once."""
        sampling = request.sampling
        length = len(request.prompt_token_ids)
        eos = () if sampling.ignore_eos else self._eos_token_ids
        matcher = None
        if sampling.grammar is not None:
            try:
                matcher = self._grammars.matcher(sampling.grammar)
            except GrammarError as error:
                code: FailureCode = "bad_grammar"
                return Failure(request_id=request.request_id, code=code, message=str(error))
            eos = self._grammars.eos_token_ids  # they end it where it is whole, and only there
        stop_token_ids = tuple(dict.fromkeys((*eos, *sampling.stop_token_ids)))

        def failure(code: FailureCode, message: str) -> Failure:
            return Failure(request_id=request.request_id, code=code, message=message)

        if length == 0:
            return failure("bad_token_ids", "the prompt has no tokens")
        if length >= self._max_model_len:
            return failure(
                "prompt_too_long",
                f"the prompt has {length} tokens; at most {self._max_model_len - 1} leave room "
                "for one more",
            )
        limit = f"is outside the vocabulary of {self._vocab_size}"
        if (wrong := self._unknown_token(request.prompt_token_ids)) is not None:
            return failure("bad_token_ids", f"token id {wrong} {limit}")
        if (wrong := self._unknown_token(stop_token_ids)) is not None:
            return failure("bad_parameters", f"stop token id {wrong} {limit}")
        max_length = self._max_model_len
        if sampling.max_tokens is not None:
            max_length = min(max_length, length + sampling.max_tokens)
        sequence = Sequence(request, max_length, stop_token_ids, matcher)
        if (num_stops := len(sequence.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
            return failure(
                "bad_parameters",
                f"{num_stops} stop token ids, eos and the end of a thought included; at most "
                f"{MAX_STOP_TOKEN_IDS}",
            )
        if (wrong := self._unknown_token(tokens_named_by(sampling))) is not None:
            return failure("bad_parameters", f"token id {wrong} of a setting {limit}")
        most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        if most > self._vocab_size:
            return failure(
                "bad_parameters", f"{most} likeliest tokens of a vocabulary of {self._vocab_size}"
            )
        assert request.request_id not in self._by_id, f"request {request.request_id} runs already"
        self._by_id[request.request_id] = sequence
        self._waiting.append(sequence)
        return None

    def _unknown_token(self, token_ids: Seq[int] | TokenIds) -> int | None:
        if not len(token_ids):
            return None
        ids = np.asarray(token_ids)
        for extreme in (ids.min(), ids.max()):
            if not 0 <= extreme < self._vocab_size:
                return int(extreme)
        return None

    def abort(self, request_id: int) -> None:
        """Drop a request without a Completion; unknown and finished ones are no error."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        self._finish(sequence)

    def schedule(self) -> Batch | None:
        """The next launch, or None where there is nothing to do before tokens are read."""
        live = (s for s in self._forwarded if s.status is SequenceStatus.RUNNING)
        if any(s.num_in_flight_tokens for s in live):
            return None  # their masks depend on tokens that are still to be read
        sample = self._schedule_sample()
        if sample is not None:
            return sample
        self._fast_forward()
        return self._schedule_prefill() or self._schedule_decode()

    def update(self, result: BatchResult) -> list[Output]:
        """Take in the oldest launch's tokens; returns what has finished, failed or moved on."""
        sequences, num_planned, target_counts = self._launched.popleft()
        logprobs = None
        if result.logprobs is not None or result.prompt_logprobs is not None:
            logprobs = ResultLogprobs(result, target_counts)
        outputs: list[Output] = []
        for i, sequence in enumerate(sequences):
            if sequence is None or sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_in_flight_tokens -= num_planned[i]
            if result.is_nan[i]:
                outputs.append(self._fail(sequence, int(result.num_tokens[i]) - 1))
                continue
            token_ids = result.token_ids[i, : result.num_tokens[i]]
            if logprobs is not None:
                logprobs.give_to(sequence, i, len(token_ids))
            if not len(token_ids):
                continue
            sequence.append(token_ids)
            self.stats.num_completion_tokens += len(token_ids)
            output: Output | None
            if sequence.matcher is not None:
                output = self._follow_grammar(sequence, token_ids, bool(result.is_stopped[i]))
            elif result.is_stopped[i]:
                output = self._complete(sequence, "stop")
            elif sequence.num_tokens >= sequence.max_length:
                output = self._complete(sequence, "length")
            else:
                output = self._go_on(sequence)
            if output is not None:
                outputs.append(output)
        return outputs

    def _go_on(self, sequence: Sequence) -> NewTokens | None:
        if sequence.slot is not None:
            self._publish(sequence)
        return self._new_tokens(sequence) if sequence.request.reports_tokens else None

    def _follow_grammar(
        self, sequence: Sequence, token_ids: TokenIds, is_stopped: bool
    ) -> Output | None:
        """What becomes of a sequence with a grammar for which tokens were drawn."""
        if (guide := sequence.guide) is not None:
            guide.accept(token_ids.tolist())
        begins_grammar = is_stopped and ends_thought(sequence, int(token_ids[-1]))
        if begins_grammar:
            sequence.end_thought()
        elif is_stopped:
            return self._complete(sequence, "stop")
        if sequence.num_tokens >= sequence.max_length:
            return self._complete(sequence, "length")
        if begins_grammar:
            self._begin_grammar(sequence)
        elif is_whole(sequence):
            # Nothing but eos may follow: no step is needed for it.
            self._append(sequence, self._grammars.eos_token_ids[:1])
            sequence.set_stored(sequence.num_tokens - 2)
            return self._complete(sequence, "stop")
        return self._go_on(sequence)

    def _append(self, sequence: Sequence, token_ids: Seq[int]) -> None:
        """Add tokens that no launch has drawn."""
        sequence.append(np.asarray(token_ids, dtype=np.int32))
        self.stats.num_completion_tokens += len(token_ids)

    def _begin_grammar(self, sequence: Sequence) -> None:
        """A thought has ended: what follows is guided, from the token after it on.

        Windows that are launched already do nothing for a sequence that has stopped.
        """
        self._drop_in_flight(sequence)
        num_stored = sequence.num_tokens - 1
        self._force(sequence)
        if sequence.slot is None:  # its last step was launched, and it has left
            sequence.status = SequenceStatus.WAITING
            self._waiting.appendleft(sequence)
        else:
            sequence.set_stored(num_stored)
            self._resumed.append(sequence)

    def _force(self, sequence: Sequence) -> None:
        """Add the tokens that a guided sequence must go on with; a prefill has to follow."""
        token_ids = forced_token_ids(sequence)
        if token_ids and (guide := sequence.guide) is not None:
            guide.accept(token_ids)
            self._append(sequence, token_ids)
            self.stats.num_forced_tokens += len(token_ids)

    def _schedule_prefill(self) -> PrefillBatch | None:
        budget = self._max_num_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []
        twins: list[tuple[Sequence, int]] = []  # and the index of its leader
        while budget > 0 and (sequence := self._chunked or self._resume() or self._admit()):
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            scheduled.append((sequence, num_tokens))
            budget -= num_tokens
            sequence.num_computed_tokens += num_tokens
            is_last = sequence.num_computed_tokens == sequence.num_tokens
            sequence.num_in_flight_tokens += is_last
            self._chunked = None if is_last else sequence
            # Before it is computed: launches run in order, and store before they read.
            self._publish(sequence)
            while is_last and (twin := self._admit_twin_of(sequence)):
                twins.append((twin, len(scheduled) - 1))
        if not scheduled:
            return None
        self.stats.num_prefill_launches += 1
        sequences = [sequence for sequence, _ in scheduled]
        ends = np.array([s.num_computed_tokens for s in sequences], dtype=np.int32)
        query_lens = np.array([num_tokens for _, num_tokens in scheduled], dtype=np.int32)
        starts = ends - query_lens
        targets, target_counts = take_prompt_targets(sequences, starts, ends)
        rows = [*sequences, *(twin for twin, _ in twins)]
        in_flight = [s.num_in_flight_tokens for s in rows]
        target_counts = [*target_counts, *([0] * len(twins))]
        self._launched.append(_Launched([*rows], in_flight, target_counts))
        needs = self._needs([s if s.num_in_flight_tokens else None for s in rows])
        slots = _slots_of(sequences)
        planned_twins = self._plan_twins(sequences, twins) if twins else None
        self._leave_if_full(rows)
        return PrefillBatch(
            admissions=self._take_admissions(),
            block_table_update=self._take_block_table_update(),
            slots=slots,
            token_ids=np.concatenate(
                [s.token_ids[a:b] for s, a, b in zip(sequences, starts, ends, strict=True)]
            ),
            start_positions=starts,
            query_lens=query_lens,
            is_last_chunk=np.array(in_flight[: len(sequences)], dtype=np.bool_),
            twins=planned_twins,
            needs=needs,
            prompt_targets=targets,
        )

    def _needs(self, sequences: Seq[Sequence | None]) -> RowNeeds | None:
        """What rows ask of a launch that draws their next token."""
        needs = needs_of(sequences) if self._num_asking else None
        if self._num_with_grammar:
            needs = with_masks(needs, sequences, self._grammars)
        return needs

    def _resume(self) -> Sequence | None:
        """The next running sequence that goes on by a prefill of what it has got."""
        while self._resumed:
            sequence = self._resumed.popleft()
            num_needed = self._block_manager.num_blocks_for(sequence.num_tokens)
            num_new = num_needed - len(sequence.block_table)
            if num_new > self._block_manager.num_free_blocks:
                self._preempt(sequence)
                continue
            self._grow(sequence, sequence.num_tokens)
            self._new_admissions.append(self._admission(sequence))
            return sequence
        return None

    def _admit(self) -> Sequence | None:
        """Give the first waiting sequence a slot and blocks, where both are to be had."""
        if not self._waiting or not self._free_slots:
            return None
        sequence, blocks = self._waiting[0], self._block_manager
        self._force(sequence)
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
        if not self._waiting or not self._free_slots or not blocks.enable_prefix_caching:
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
        twin.num_in_flight_tokens += 1
        return twin

    def _plan_twins(self, leaders: list[Sequence], twins: list[tuple[Sequence, int]]) -> Twins:
        copies = []
        for twin, i in twins:
            index, num_over = divmod(twin.num_tokens, self._block_manager.block_size)
            if num_over:
                copies.append((leaders[i].block_table[index], twin.block_table[index]))
        columns = np.array(copies, dtype=np.int32).reshape(-1, 2)
        return Twins(
            slots=_slots_of([twin for twin, _ in twins]),
            leaders=np.array([i for _, i in twins], dtype=np.int32),
            sources=columns[:, 0].copy(),
            targets=columns[:, 1].copy(),
        )

    def _enter(self, cached: list[int], num_new: int) -> None:
        """Let the first waiting sequence run, with blocks that hold its beginning and new ones."""
        sequence, blocks = self._waiting.popleft(), self._block_manager
        self._num_asking += sequence.asks
        self._num_with_grammar += sequence.matcher is not None
        self._running[sequence.request.request_id] = sequence
        blocks.take(cached)
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.block_table = cached + blocks.allocate(num_new)
        sequence.num_published_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * blocks.block_size
        sequence.num_prefilled_tokens = sequence.num_tokens
        if sequence.num_cached_tokens is None:
            # Forced tokens may be in the cache as well; and a twin counts what it would have found,
            # whatever else is in its launch.
            findable = (sequence.num_tokens - 1) // blocks.block_size * blocks.block_size
            num_cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens, findable)
            sequence.num_cached_tokens = num_cached
            self.stats.num_prompt_tokens += sequence.num_prompt_tokens
            self.stats.num_cached_tokens += num_cached
        self._new_blocks += [(sequence.slot, i, b) for i, b in enumerate(sequence.block_table)]
        self._new_admissions.append(self._admission(sequence))

    def _admission(self, sequence: Sequence) -> Admission:
        assert sequence.slot is not None, "a running sequence has a slot"
        sampling = sequence.request.sampling
        return Admission(
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

    def _schedule_decode(self) -> DecodeBatch | ForwardBatch | None:
        while True:
            sequences, is_guided = self._whose_turn()
            if not sequences:
                return None
            most = self._max_window_steps
            if self._num_with_grammar:
                most = 1 if is_guided else min(most, MAX_STEPS_BESIDE_GUIDED)
            num_steps = self._window_steps(sequences, most)
            if num_steps > 0:
                break
            if self._launched:
                return None  # a preempted sequence's tokens must be known: read them first
            self._preempt(next(reversed(self._running.values())))
        for sequence in sequences:
            self._grow(sequence, sequence.planned_length - 1 + num_steps)
        self.stats.num_decode_steps += num_steps
        self.stats.num_decode_slots += num_steps * len(sequences)
        slots = _slots_of(sequences)
        update = self._take_block_table_update()
        self._free_went_last = not is_guided
        if is_guided:
            self._forwarded, self._forwarded_slots = sequences, slots
            return ForwardBatch(admissions=(), block_table_update=update, slots=slots)
        needs = self._needs(sequences)
        self._launch(sequences, num_steps)
        return DecodeBatch(block_table_update=update, slots=slots, num_steps=num_steps, needs=needs)

    def _whose_turn(self) -> tuple[list[Sequence], bool]:
        """The sequences of the next decode launch, and whether it is the guided ones' step."""
        running = list(self._running.values())
        if not self._num_with_grammar:
            return running, False
        guided = [s for s in running if s.guide is not None]
        if len(guided) == len(running) or (guided and self._free_went_last):
            return guided, True
        return [s for s in running if s.guide is None], False

    def _schedule_sample(self) -> SampleBatch | None:
        """The other half of the guided rows' step, for those that still want its token."""
        forwarded, self._forwarded = self._forwarded, []
        rows = [s if s.status is SequenceStatus.RUNNING else None for s in forwarded]
        needs = self._needs(rows)
        if needs is None or needs.masks is None:
            return None
        self._launch(rows, 1)
        self._masked = rows, needs.masks
        return SampleBatch(slots=self._forwarded_slots, needs=needs)

    def _fast_forward(self) -> None:
        """Put sequences into the next prefill that go on with tokens known without a step.

        While the device draws the last ones: what it draws for these is of no use.
        """
        if self._masked is None:
            return
        (rows, masks), self._masked = self._masked, None
        running = [s if s is not None and s.slot is not None else None for s in rows]
        for sequence in worth_forcing(running, masks):
            num_stored = sequence.planned_length - 1
            self._drop_in_flight(sequence)
            self._force(sequence)
            sequence.set_stored(num_stored)
            self._resumed.append(sequence)

    def _drop_in_flight(self, sequence: Sequence) -> None:
        """What launches not yet read draw for a sequence is of no use."""
        for launched in self._launched:
            for row, other in enumerate(launched.sequences):
                if other is sequence:
                    launched.sequences[row] = None
        sequence.num_in_flight_tokens = 0

    def _launch(self, sequences: Seq[Sequence | None], num_steps: int) -> None:
        """Count on tokens of a decode launch."""
        planned = [0 if sequence is None else num_steps for sequence in sequences]
        self._launched.append(_Launched([*sequences], planned, []))
        for sequence, num_planned in zip(sequences, planned, strict=True):
            if sequence is not None:
                sequence.num_in_flight_tokens += num_planned
        self._leave_if_full([s for s in sequences if s is not None])

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

    def _grow(self, sequence: Sequence, num_positions: int) -> None:
        """Extend a block table to hold `num_positions` tokens' KV."""
        num_held = len(sequence.block_table)
        num_new = self._block_manager.num_blocks_for(num_positions) - num_held
        if num_new > 0:
            assert sequence.slot is not None, "a running sequence has a slot"
            new = self._block_manager.allocate(num_new)
            self._new_blocks += [(sequence.slot, num_held + i, b) for i, b in enumerate(new)]
            sequence.block_table += new

    def _publish(self, sequence: Sequence) -> None:
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

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.num_in_flight_tokens == 0, "tokens in flight would be lost"
        assert len(self._running) > 1, "a lone sequence always fits: max_model_len sees to it"
        self.stats.num_preemptions += 1
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)

    def _complete(self, sequence: Sequence, finish_reason: FinishReason) -> Completion:
        self._finish(sequence)
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=sequence.completion_token_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            logprobs=joined(sequence.logprobs, sequence.num_logprobs),
            prompt_logprobs=joined(sequence.prompt_logprobs, sequence.num_prompt_logprobs),
        )

    def _new_tokens(self, sequence: Sequence) -> NewTokens:
        first = sequence.num_reported_tokens
        sequence.num_reported_tokens = len(sequence.completion_token_ids)
        return NewTokens(
            request_id=sequence.request.request_id,
            token_ids=sequence.completion_token_ids[first:],
            logprobs=sequence.logprobs[-1] if sequence.num_logprobs is not None else None,
            prompt_logprobs=joined(
                sequence.prompt_logprobs, None if first else sequence.num_prompt_logprobs
            ),
        )

    def _fail(self, sequence: Sequence, num_drawn: int) -> Failure:
        """num_drawn: good tokens of the launch that failed."""
        self._finish(sequence)
        code: FailureCode = "nan_logits"
        message = f"the logits after {sequence.num_tokens + num_drawn} tokens are not finite"
        if is_dead_end(sequence, self._grammars):
            num_tokens = sequence.num_tokens - sequence.num_prompt_tokens
            code = "grammar_dead_end"
            message = f"the grammar allows no token after the completion's first {num_tokens}"
        return Failure(request_id=sequence.request.request_id, code=code, message=message)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._publish(sequence)
            self._leave(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request.request_id]

    def _leave_if_full(self, sequences: list[Sequence]) -> None:
        """Let those go whose last tokens are launched, before these are read.

        What comes into their slots and blocks is launched later, and so runs later: the device
        need not wait for the host to see that they have finished.
        """
        for sequence in sequences:
            if sequence.planned_length == sequence.max_length:
                self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give back a running sequence's slot and blocks."""
        assert sequence.slot is not None, "a running sequence has a slot"
        del self._running[sequence.request.request_id]
        self._num_asking -= sequence.asks
        self._num_with_grammar -= sequence.matcher is not None
        if self._chunked is sequence:
            self._chunked = None
        if sequence in self._resumed:
            self._resumed.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._block_manager.release(sequence.block_table)
        sequence.slot = None
        sequence.block_table = []

    def _take_admissions(self) -> tuple[Admission, ...]:
        taken, self._new_admissions = tuple(self._new_admissions), []
        return taken

    def _take_block_table_update(self) -> BlockTableUpdate:
        columns = np.array(self._new_blocks, dtype=np.int32).reshape(-1, 3)
        self._new_blocks = []
        return BlockTableUpdate(
            slots=columns[:, 0].copy(), indices=columns[:, 1].copy(), block_ids=columns[:, 2].copy()
        )


def _slots_of(sequences: list[Sequence]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array([s.slot for s in sequences], dtype=np.int32)
