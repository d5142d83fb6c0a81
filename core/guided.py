"""Guided sequences: those whose next token a grammar narrows; what the scheduler asks of it.

A step of theirs comes in two halves (half_steps.py). Where the grammar leaves one way to go on, the
host goes it: such tokens are computed together and not one by one. A sequence that thinks first is
a free one until its thought ends.
"""

from collections.abc import Sequence as Seq
from itertools import takewhile

import numpy as np

from nanovllm_cli.core.batch import MAX_FORCED_TOKENS, TokenMasks
from nanovllm_cli.core.grammar import Grammars, Matcher
from nanovllm_cli.core.grammar_masks import Masks
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.stats import EngineStats

# Tokens a row, below which a step of several tokens a row hardly saves what it takes: 1.2 times
# the time of a step of one, and 50 us of the host for each such row (256 rows, 0.6B, H100).
LEAST_FORCED_PER_ROW = 0.5
_LEAST_BYTES = 5  # a shorter text is hardly ever a forced token: 10 of 1343 were, in JSON


class RowMasks:
    """The masks of a launch's guided rows, worked out while more rows are named."""

    def __init__(self, grammars: Grammars, num_rows: int) -> None:
        self._grammars = grammars
        self._num_rows = num_rows
        self._rows: list[int] = []
        self._masks: Masks | None = None

    def add(self, row: int, guide: Matcher) -> None:
        """One whose next token is drawn."""
        if self._masks is None:
            self._masks = self._grammars.start_masks(self._num_rows)
        self._masks.add(guide)
        self._rows.append(row)

    def add_all(self, sequences: Seq[Sequence | None]) -> None:
        """Those of a launch that are guided; None: a row without a draw."""
        for row, sequence in enumerate(sequences):
            if sequence is not None and sequence.guide is not None:
                self.add(row, sequence.guide)

    def start(self) -> None:
        """Begin with the rows named so far."""
        if self._masks is not None:
            self._masks.start()

    def result(self) -> TokenMasks | None:
        """None where no row is guided."""
        if self._masks is None:
            return None
        return TokenMasks(rows=np.array(self._rows, dtype=np.int32), words=self._masks.result())


def forced_token_ids(sequence: Sequence) -> list[int]:
    """The tokens that a guided sequence must go on with, and that do not end it for sure."""
    guide, sampling = sequence.guide, sequence.request.sampling
    if guide is None or sampling.logprobs is not None or sampling.bad_words:
        return []  # it must take every step
    room = sequence.max_length - sequence.num_tokens - 1
    forced = guide.forced_token_ids()[: max(min(room, MAX_FORCED_TOKENS), 0)]
    return list(takewhile(lambda i: i not in sequence.stop_token_ids, forced))


def append_forced(sequence: Sequence, stats: EngineStats) -> None:
    """Add the tokens that a sequence must go on with, if any; their KV is still to be computed."""
    append_some(sequence, forced_token_ids(sequence), stats)


def append_some(sequence: Sequence, token_ids: list[int], stats: EngineStats) -> int:
    """Add the first of `forced_token_ids`; how many, since what ends a text must be drawn."""
    guide = sequence.guide
    if not token_ids or guide is None:
        return 0
    guide.accept(token_ids)
    if guide.is_finished:
        guide.take_back(1)
        token_ids = token_ids[:-1]
    sequence.append(np.asarray(token_ids, dtype=np.int32))
    stats.num_completion_tokens += len(token_ids)
    stats.num_forced_tokens += len(token_ids)
    return len(token_ids)


def find_forced(sequences: Seq[Sequence | None], masks: RowMasks) -> dict[int, list[int]]:
    """Of a step's rows, the tokens that some must go on with; none where they are too few.

    The others' masks are named, and mostly done by the time that the last row has been asked.
    """
    guided = [
        (row, sequence, sequence.guide)
        for row, sequence in enumerate(sequences)
        if sequence is not None and sequence.guide is not None
    ]
    asked = []
    for row, sequence, guide in guided:
        # Where the device adjusts logits it counts what it draws.
        counts = sequence.request.sampling.adjusts_logits
        if not counts and guide.num_forced_bytes >= _LEAST_BYTES:
            asked.append((row, sequence, guide))
        else:
            masks.add(row, guide)
    masks.start()
    forced = {row: forced_token_ids(sequence) for row, sequence, _ in asked}
    if sum(map(len, forced.values())) >= LEAST_FORCED_PER_ROW * len(guided):
        return forced
    for row, _, guide in asked:
        masks.add(row, guide)
    return {}


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
