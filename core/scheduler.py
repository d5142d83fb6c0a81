"""Scheduler: which sequences run, and whether the next launch is a prefill or a decode window.

The order of a launch's life is `schedule` (plan it), then later `update` (read its tokens). Several
launches may be planned before the first is read, so a plan never depends on a token not yet read:
lengths are known without looking, and only a stop token needs a look. A sequence that turns out to
have stopped in window w is dropped when w is read; what window w + 1 made of it is ignored.

Prefill goes first: whatever fits is admitted, in order of arrival (prefill_queue.py). Then every
prefilled sequence is decoded for some steps (decode_windows.py). Who runs holds a slot and blocks
(running_set.py); who is preempted loses them and is prefilled again, with the tokens it has. The
exception are guided sequences: a step of theirs is two launches, the second of which is planned
when the tokens before it are read (half_steps.py).
"""

import numpy as np

from nanovllm_cli.core.batch import Batch, BatchResult
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.decode_windows import DecodeWindows
from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.core.guided import ends_thought, is_whole
from nanovllm_cli.core.half_steps import HalfSteps
from nanovllm_cli.core.outputs import completion_of, failure_of, take_new_tokens
from nanovllm_cli.core.prefill_queue import PrefillQueue
from nanovllm_cli.core.request import Completion, Failure, FinishReason, Output, Request, TokenIds
from nanovllm_cli.core.request_checks import RequestChecks
from nanovllm_cli.core.row_needs import ResultLogprobs
from nanovllm_cli.core.running_set import RunningSet
from nanovllm_cli.core.sequence import Sequence, SequenceStatus
from nanovllm_cli.core.stats import EngineStats
from nanovllm_cli.core.unread_launches import UnreadLaunches


class Scheduler:
    """Requests in, plans of launches out, their tokens in, outputs out; no tensors."""

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
        # One outside the vocabulary is never drawn, and indexes no logit.
        eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        if grammars is None:
            grammars = Grammars(None, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self.stats = EngineStats()
        self._grammars = grammars
        self._by_id: dict[int, Sequence] = {}
        self._checks = RequestChecks(
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            grammars=grammars,
        )
        self._running = RunningSet(
            block_manager, grammars, vocab_size=vocab_size, max_num_seqs=max_num_seqs
        )
        self._unread = UnreadLaunches(self._running)
        self._prefills = PrefillQueue(
            block_manager,
            self._running,
            self._unread,
            self.stats,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._half_steps = HalfSteps(
            self._running,
            self._unread,
            self.stats,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._windows = DecodeWindows(
            block_manager,
            self._running,
            self._unread,
            self._prefills,
            self._half_steps,
            self.stats,
            max_window_steps=max_window_steps,
        )

    @property
    def num_waiting(self) -> int:
        return self._prefills.num_waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether some sequence is not finished."""
        return bool(self._by_id)

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure at once."""
        sequence = self._checks.sequence_of(request)
        if isinstance(sequence, Failure):
            return sequence
        assert request.request_id not in self._by_id, f"request {request.request_id} runs already"
        self._by_id[request.request_id] = sequence
        self._prefills.add(sequence)
        return None

    def abort(self, request_id: int) -> None:
        """Drop a request without a Completion; unknown and finished ones are no error."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    def schedule(self) -> Batch | None:
        """The next launch, or None where there is nothing to do before tokens are read."""
        if self._half_steps.waits_for_tokens:
            return None
        return self._half_steps.plan_sample() or self._prefills.plan() or self._windows.plan()

    def update(self, result: BatchResult) -> list[Output]:
        """Take in the oldest launch's tokens; returns what has finished, failed or moved on."""
        sequences, num_planned, target_counts = self._unread.take_oldest()
        logprobs = None
        if result.logprobs is not None or result.prompt_logprobs is not None:
            logprobs = ResultLogprobs(result, target_counts)
        outputs: list[Output] = []
        for i, sequence in enumerate(sequences):
            if sequence is None or sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_in_flight_tokens -= num_planned[i]
            if result.is_nan[i]:
                self._finish(sequence)
                outputs.append(failure_of(sequence, int(result.num_tokens[i]) - 1, self._grammars))
                continue
            token_ids = result.token_ids[i, : result.num_tokens[i]]
            if logprobs is not None:
                logprobs.give_to(sequence, i, len(token_ids))
            if not len(token_ids):
                continue
            output = self._take_tokens(sequence, token_ids, is_stopped=bool(result.is_stopped[i]))
            if output is not None:
                outputs.append(output)
        return outputs

    def _take_tokens(
        self, sequence: Sequence, token_ids: TokenIds, *, is_stopped: bool
    ) -> Output | None:
        """What becomes of a sequence with tokens that were drawn for it."""
        begins_grammar = is_stopped and ends_thought(sequence, int(token_ids[-1]))
        if (guide := sequence.guide) is not None:
            guide.accept(token_ids.tolist())
        self._append(sequence, token_ids)
        if begins_grammar:
            sequence.end_thought()
        if is_stopped and not begins_grammar:
            return self._complete(sequence, "stop")
        if sequence.num_tokens >= sequence.max_length:
            return self._complete(sequence, "length")
        if begins_grammar:
            # What follows is guided, from the next token on. Windows that are launched already do
            # nothing for a sequence that has stopped.
            self._prefills.resume(sequence, sequence.num_tokens - 1)
        elif is_whole(sequence):
            # Nothing but eos may follow: no step is needed for it.
            self._append(sequence, np.array(self._grammars.eos_token_ids[:1], dtype=np.int32))
            sequence.set_stored(sequence.num_tokens - 2)
            return self._complete(sequence, "stop")
        if sequence.slot is not None:
            self._running.publish(sequence)
        return take_new_tokens(sequence) if sequence.request.reports_tokens else None

    def _append(self, sequence: Sequence, token_ids: TokenIds) -> None:
        sequence.append(token_ids)
        self.stats.num_completion_tokens += len(token_ids)

    def _complete(self, sequence: Sequence, finish_reason: FinishReason) -> Completion:
        self._finish(sequence)
        return completion_of(sequence, finish_reason)

    def _finish(self, sequence: Sequence) -> None:
        self._prefills.remove(sequence)
        if sequence.slot is not None:
            self._running.publish(sequence)
            self._running.leave(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request.request_id]
