"""Guided sequences: those whose next token a grammar narrows; what the scheduler asks of it.

A step of theirs comes in two halves (half_steps.py). Where the grammar leaves one way to go on, the
host goes it: such tokens are computed by a prefill and not one by one. A sequence that thinks first
is a free one until its thought ends.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import takewhile

import numpy as np

from nanovllm_cli.core.batch import RowNeeds, TokenMasks
from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.stats import EngineStats

LEAST_FORCED = 4  # tokens for which a running sequence is taken out of its steps


def with_masks(
    needs: RowNeeds | None, sequences: Seq[Sequence | None], grammars: Grammars
) -> RowNeeds | None:
    """What a launch's rows ask, and masks for those that are guided; None: a row without a draw."""
    guides = {
        row: sequence.guide
        for row, sequence in enumerate(sequences)
        if sequence is not None and sequence.guide is not None
    }
    if not guides:
        return needs
    rows = np.array(list(guides), dtype=np.int32)
    masks = TokenMasks(rows=rows, words=grammars.masks(list(guides.values())))
    return replace(needs or RowNeeds(), masks=masks)


def forced_token_ids(sequence: Sequence) -> list[int]:
    """The tokens that a guided sequence must go on with, but for the last.

    That one is drawn, under a mask that leaves no other: what ends a sequence is always a token
    that was drawn.
    """
    guide, sampling = sequence.guide, sequence.request.sampling
    if guide is None or sampling.logprobs is not None or sampling.bad_words:
        return []  # it must take every step
    forced = guide.forced_token_ids()[:-1]
    room = max(sequence.max_length - sequence.num_tokens - 1, 0)
    return list(takewhile(lambda i: i not in sequence.stop_token_ids, forced[:room]))


def append_forced(sequence: Sequence, stats: EngineStats) -> None:
    """Add the tokens that a guided sequence must go on with; a prefill has to follow."""
    token_ids = forced_token_ids(sequence)
    if token_ids and (guide := sequence.guide) is not None:
        guide.accept(token_ids)
        sequence.append(np.asarray(token_ids, dtype=np.int32))
        stats.num_completion_tokens += len(token_ids)
        stats.num_forced_tokens += len(token_ids)


def worth_forcing(sequences: Seq[Sequence | None], masks: TokenMasks) -> list[Sequence]:
    """Those of a step's rows that go on with forced tokens, where a prefill is worth its time.

    It takes about as long as a step, which gives a token for every row. A mask with one word is
    where to look: to ask llguidance takes longer than the mask did.
    """
    worth, num_forced = [], 0
    for row, words in zip(masks.rows.tolist(), masks.words, strict=True):
        sequence = sequences[row]
        if sequence is not None and np.count_nonzero(words) == 1:
            count = len(forced_token_ids(sequence))
            if count >= LEAST_FORCED:
                worth.append(sequence)
                num_forced += count
    return worth if num_forced >= len(masks.rows) else []


def ends_thought(sequence: Sequence, token_id: int) -> bool:
    """Whether a token at which the device has stopped is where the sequence's grammar begins.

    The end of the text is the end of its thought, too: there is no other way to the answer.
    """
    is_own_stop = token_id in sequence.request.sampling.stop_token_ids
    return sequence.grammar_after is not None and not is_own_stop


def is_whole(sequence: Sequence) -> bool:
    """Whether a guided sequence has all that it may have but for eos."""
    guide = sequence.guide
    if guide is None or sequence.num_logprobs is not None:  # eos has some, too
        return False
    return guide.is_finished


def is_dead_end(sequence: Sequence, grammars: Grammars) -> bool:
    """Whether nothing but a stop token may come, and that one not before min_length, or nothing."""
    guide = sequence.guide
    if guide is None:
        return False
    bits = np.unpackbits(grammars.masks([guide]).view(np.uint8), bitorder="little")
    if sequence.num_tokens < sequence.min_length:
        bits[list(sequence.stop_token_ids)] = 0
    return not bits.any()
