"""What sequences ask beyond a token: told to their launches, and read from the results."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from nanovllm_cli.core.batch import Adjustment, BatchResult, Int32, PromptTargets, RowNeeds
from nanovllm_cli.core.request import Logprobs
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.sequence import Sequence

_NO_TOKEN_COMES_SO_LATE = 2**31 - 1


def adjustment_of(sequence: Sequence) -> Adjustment | None:
    """For its admission; of a preempted sequence, the tokens it has count."""
    sampling = sequence.request.sampling
    if not sampling.adjusts_logits:
        return None
    completion = sequence.completion_token_ids
    thinking_end = None
    if sampling.thinking_budget is not None and sampling.end_think_token_id not in completion:
        thinking_end = sequence.num_prompt_tokens + sampling.thinking_budget
        thinking_end = min(thinking_end, _NO_TOKEN_COMES_SO_LATE)
    return Adjustment(
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        bad_words=sampling.bad_words,
        thinking_end=thinking_end,
        end_think_token_id=sampling.end_think_token_id,
        prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
        completion_token_ids=completion,
    )


def tokens_named_by(sampling: SamplingParams) -> list[int]:
    """Token ids of settings that only few rows have; they must be in the vocabulary."""
    named = [token_id for token_id, _ in sampling.logit_bias]
    named += [token_id for word in sampling.bad_words for token_id in word]
    ends = (sampling.end_think_token_id, sampling.grammar_after_token_id)
    return named + [token_id for token_id in ends if token_id is not None]


def needs_of(sequences: Iterable[Sequence | None]) -> RowNeeds | None:
    """Of a launch's rows; None for one that draws no token."""
    adjusted, logprob_rows, num_logprobs = [], [], 0
    for row, sequence in enumerate(sequences):
        if sequence is None:
            continue
        if sequence.request.sampling.adjusts_logits:
            adjusted.append(row)
        if sequence.num_logprobs is not None:
            logprob_rows.append(row)
            num_logprobs = max(num_logprobs, sequence.num_logprobs)
    if not adjusted and not logprob_rows:
        return None
    return RowNeeds(
        adjusted_rows=np.array(adjusted, dtype=np.int32),
        logprob_rows=np.array(logprob_rows, dtype=np.int32),
        num_logprobs=num_logprobs,
    )


def take_prompt_targets(
    sequences: Seq[Sequence], starts: Int32, ends: Int32
) -> tuple[PromptTargets | None, list[int]]:
    """What a prefill of tokens `starts` .. `ends` - 1 of sequences gives, and how many of each.

    A token's log-probability is in the hidden state before it. Moves the sequences on.
    """
    rows, token_ids, counts, num_logprobs = [], [], [], 0
    first_rows = np.cumsum(ends - starts) - (ends - starts)
    for sequence, start, end, first_row in zip(sequences, starts, ends, first_rows, strict=True):
        target = sequence.next_prompt_target
        counts.append(0)
        if target is None:
            continue
        assert start < target, "the hidden state before the target is not computed"
        stop = min(int(end) + 1, sequence.num_prompt_tokens)
        if target < stop:
            rows.append(np.arange(target, stop) - 1 - start + first_row)
            token_ids.append(sequence.token_ids[target:stop])
            counts[-1] = stop - target
            num_logprobs = max(num_logprobs, sequence.num_prompt_logprobs or 0)
            sequence.next_prompt_target = stop if stop < sequence.num_prompt_tokens else None
    if not rows:
        return None, counts
    targets = PromptTargets(
        hidden_rows=np.concatenate(rows, dtype=np.int32),
        token_ids=np.concatenate(token_ids),
        num_logprobs=num_logprobs,
    )
    return targets, counts


class ResultLogprobs:
    """A launch's log-probabilities, by its rows."""

    def __init__(self, result: BatchResult, target_counts: Seq[int]) -> None:
        self._own, self._prompt = result.logprobs, result.prompt_logprobs
        rows = [] if self._own is None else self._own.rows.tolist()
        self._index_of_row = {row: index for index, row in enumerate(rows)}
        self._target_counts = target_counts
        self._target_ends = np.cumsum(target_counts)

    def of_tokens(self, row: int, num_tokens: int, k: int | None) -> Logprobs | None:
        """Of a row's first tokens; k: those it asked for."""
        index = self._index_of_row.get(row)
        if index is None or self._own is None:
            return None
        return Logprobs(
            values=self._own.values[index, :num_tokens].copy(),
            top_ids=self._own.top_ids[index, :num_tokens, :k].copy(),
            top_values=self._own.top_values[index, :num_tokens, :k].copy(),
        )

    def of_prompt(self, row: int, k: int | None) -> Logprobs | None:
        """Of a row's prompt tokens, where the launch computed some."""
        if self._prompt is None or not self._target_counts[row]:
            return None
        end = self._target_ends[row]
        targets = slice(end - self._target_counts[row], end)
        return Logprobs(
            values=self._prompt.values[targets].copy(),
            top_ids=self._prompt.top_ids[targets, :k].copy(),
            top_values=self._prompt.top_values[targets, :k].copy(),
        )


def joined(parts: list[Logprobs], k: int | None) -> Logprobs | None:
    """What came launch by launch, of consecutive tokens; None where k, what was asked for, is."""
    if k is None:
        return None
    if not parts:
        none = np.zeros((0, k), dtype=np.float32)
        return Logprobs(values=none.sum(axis=1), top_ids=none.astype(np.int32), top_values=none)
    return Logprobs(
        values=np.concatenate([part.values for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_values=np.concatenate([part.top_values for part in parts]),
    )
