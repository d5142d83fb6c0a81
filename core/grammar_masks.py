"""Masks: which tokens may come next in many grammars at once, on llguidance's threads."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nanovllm_cli.core.batch import Int32

if TYPE_CHECKING:
    import llguidance

    from nanovllm_cli.core.grammar import Matcher

BITS_PER_WORD = 32
_MOST_THREADS = 15  # as many as were measured; more take cores from other ranks and engines


class MaskThreads:
    """llguidance's threads, and one that waits for them while the caller goes on."""

    def __init__(self, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        import llguidance

        # Its own choice is 80 % of the cores; here one is kept for the thread that asks.
        num_threads = min(max(len(os.sched_getaffinity(0)) - 1, 1), _MOST_THREADS)
        self.executor = llguidance.LLExecutor(num_threads=num_threads)
        self.background = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self.eos_token_ids = eos_token_ids
        self.num_words = -(-vocab_size // BITS_PER_WORD)


class Masks:
    """The tokens that may come next in grammars, worked out while more of them are named.

    A matcher that was named must be left alone until `result`.
    """

    def __init__(self, threads: MaskThreads, most: int) -> None:
        """most: matchers that will be named."""
        self._threads = threads
        self._matchers: list[Matcher] = []
        self._words = np.empty((most, threads.num_words), dtype=np.int32)
        self._started: list[Future[None]] = []
        self._num_started = 0

    def add(self, matcher: "Matcher") -> None:
        """Name the next one."""
        self._matchers.append(matcher)

    def start(self) -> None:
        """Begin with those named so far, in the background."""
        if new := self._take_new():
            is_under_way = threading.Event()
            fill = partial(self._fill, new, is_under_way)
            self._started.append(self._threads.background.submit(fill))
            is_under_way.wait()  # or else it has Python's lock only when this thread is done

    def result(self) -> Int32:
        """Bits, the lowest first, [matchers, vocab_size / 32], in the order of their names.

        A token that ends the text is allowed where it is whole, and nothing at all where the
        grammar has a dead end. What is beyond the tokenizer's vocabulary is never allowed.
        """
        if new := self._take_new():
            self._fill(new)
        for started in self._started:
            started.result()
        masks = self._words[: len(self._matchers)]
        words = masks.view(np.uint32)
        for token_id in self._threads.eos_token_ids:
            column = words[:, token_id // BITS_PER_WORD]
            bit = np.uint32(1 << token_id % BITS_PER_WORD)
            ending: list[int] = np.flatnonzero(column & bit).tolist()
            for row in ending:  # llguidance ends a dead end with eos as well
                if not self._matchers[row].is_complete:
                    column[row] &= ~bit
        return masks

    def _take_new(self) -> list[tuple["llguidance.LLMatcher", int]]:
        """Those named since the last call and their rows, by lexer: a thread takes neighbours."""
        new = range(self._num_started, len(self._matchers))
        self._num_started = len(self._matchers)
        rows = sorted(new, key=lambda row: self._matchers[row].lexer_number)
        return [(self._matchers[row].inner, row) for row in rows]

    def _fill(
        self,
        new: list[tuple["llguidance.LLMatcher", int]],
        is_under_way: threading.Event | None = None,
    ) -> None:
        from llguidance.numpy import fill_next_token_bitmask_par

        if is_under_way is not None:
            is_under_way.set()
        fill_next_token_bitmask_par(self._threads.executor, new, self._words)
