"""Guided rows: sequences whose next token a grammar narrows; what the scheduler asks of it.

A step of theirs comes in two halves, so that the host works out the masks while the device computes
the logits. Where the grammar leaves one way to go on, the host goes it: such tokens are computed by
a prefill and not one by one. A sequence that thinks first is a free one until its thought ends.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import takewhile

import numpy as np

from nanovllm_cli.core.batch import RowNeeds, TokenMasks
from nanovllm_cli.core.grammar import Grammars, Matcher
from nanovllm_cli.core.sequence import Sequence

LEAST_FORCED = 4  # tokens for which a running sequence is taken out of its steps


def with_masks(
    needs: RowNeeds | None, sequences: Seq[Sequence | None], grammars: Grammars
) -> RowNeeds | None:
    """What a launch's rows ask, and masks for those that are guided; None: a row without a draw."""
    matchers = _matchers_of(sequences)
    if not matchers:
        return needs
    rows = np.array(list(matchers), dtype=np.int32)
    masks = TokenMasks(rows=rows, words=grammars.masks(list(matchers.values())))
    return replace(needs or RowNeeds(), masks=masks)


def forced_token_ids(sequence: Sequence) -> list[int]:
    """The tokens that a guided sequence must go on with, but for the last.

    That one is drawn, under a mask that leaves no other: what ends a sequence is always a token
    that was drawn.
    """
    sampling = sequence.request.sampling
    if sequence.matcher is None or sampling.logprobs is not None or sampling.bad_words:
        return []  # it must take every step
    forced = sequence.matcher.forced_token_ids()[:-1]
    room = max(sequence.max_length - sequence.num_tokens - 1, 0)
    return list(takewhile(lambda i: i not in sequence.stop_token_ids, forced[:room]))


def worth_forcing(sequences: Seq[Sequence]) -> list[Sequence]:
    """Those that go on with enough forced tokens, where a prefill of them is worth its time.

    It takes about as long as a step, which gives a token for every row.
    """
    counts = [len(forced_token_ids(sequence)) for sequence in sequences]
    worth = [s for s, count in zip(sequences, counts, strict=True) if count >= LEAST_FORCED]
    if sum(count for count in counts if count >= LEAST_FORCED) < len(sequences):
        return []
    return worth


def ends_thought(sequence: Sequence, token_id: int) -> bool:
    """Whether a token at which the device has stopped is where the sequence's grammar begins.

    The end of the text is the end of its thought, too: there is no other way to the answer.
    """
    is_own_stop = token_id in sequence.request.sampling.stop_token_ids
    return sequence.grammar_after is not None and not is_own_stop


def is_whole(sequence: Sequence) -> bool:
    """Whether a guided sequence has all that it may have but for eos."""
    return (
        sequence.is_guided
        and sequence.matcher is not None
        and sequence.num_logprobs is None  # which eos has as well
        and sequence.matcher.is_finished
    )


def is_dead_end(sequence: Sequence, grammars: Grammars) -> bool:
    """Whether nothing but a stop token may come, and that one not before min_length, or nothing."""
    matchers = _matchers_of([sequence])
    if not matchers:
        return False
    bits = np.unpackbits(grammars.masks(list(matchers.values())).view(np.uint8), bitorder="little")
    if sequence.num_tokens < sequence.min_length:
        bits[list(sequence.stop_token_ids)] = 0
    return not bits.any()


def _matchers_of(sequences: Seq[Sequence | None]) -> dict[int, Matcher]:
    """By row."""
    return {
        row: sequence.matcher
        for row, sequence in enumerate(sequences)
        if sequence is not None and sequence.is_guided and sequence.matcher is not None
    }
