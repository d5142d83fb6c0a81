"""Sequence: a request on its way through the engine. Only the scheduler's files change one."""

from enum import Enum, auto

import numpy as np

from nanovllm_cli.core.grammar import Matcher
from nanovllm_cli.core.request import Logprobs, Request, TokenIds


class SequenceStatus(Enum):
    WAITING = auto()  # holds no slot and no blocks
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request's tokens, and how far its KV has been planned.

    `num_tokens` counts the tokens the host knows, `num_in_flight_tokens` those that launches not
    yet read back will add. Of the `num_prefilled_tokens` known at its last admission, the launches
    made so far compute the first `num_computed_tokens`; every later token's KV is written by the
    decode step that it is the input of.
    """

    __slots__ = (
        "_own_stop_token_ids", "_tokens", "block_hashes", "block_table", "grammar_after",
        "logprobs", "matcher", "max_length", "min_length", "next_prompt_target",
        "num_cached_tokens", "num_computed_tokens", "num_in_flight_tokens", "num_logprobs",
        "num_prefilled_tokens", "num_prompt_logprobs", "num_prompt_tokens",
        "num_published_blocks", "num_reported_tokens", "num_tokens", "prompt_logprobs",
        "request", "slot", "status",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        max_length: int,
        stop_token_ids: tuple[int, ...],
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self._tokens: TokenIds = np.asarray(request.prompt_token_ids, dtype=np.int32)
        self.num_prompt_tokens = self.num_tokens = len(self._tokens)
        self.min_length = self.num_prompt_tokens + request.sampling.min_tokens
        self.max_length = max_length
        self._own_stop_token_ids = stop_token_ids
        self.matcher = matcher  # of its grammar, where it has one
        self.grammar_after = None if matcher is None else request.sampling.grammar_after_token_id
        self.num_reported_tokens = 0  # of the completion
        self.num_cached_tokens: int | None = None  # of the prompt, at its first admission
        self.num_computed_tokens = self.num_prefilled_tokens = 0
        self.num_in_flight_tokens = 0
        self.status = SequenceStatus.WAITING
        self.slot: int | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []  # of the full blocks hashed so far
        self.num_published_blocks = 0
        self.num_logprobs = request.sampling.logprobs
        self.num_prompt_logprobs = request.sampling.prompt_logprobs
        self.logprobs: list[Logprobs] = []  # launch by launch, as they were read
        self.prompt_logprobs: list[Logprobs] = []
        # The first prompt token that wants a log-probability which no launch so far gives.
        self.next_prompt_target: int | None = None
        start = request.sampling.prompt_logprobs_start
        if self.num_prompt_logprobs is not None and start < self.num_prompt_tokens:
            self.next_prompt_target = start

    @property
    def asks(self) -> bool:
        """Whether it asks more of a launch that draws its tokens than those."""
        return self.num_logprobs is not None or self.request.sampling.adjusts_logits

    @property
    def guide(self) -> Matcher | None:
        """What says which tokens may come next: its grammar, once that has begun."""
        return self.matcher if self.grammar_after is None else None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Where the device must stop: also where the grammar begins."""
        if self.grammar_after is None:
            return self._own_stop_token_ids
        return tuple(dict.fromkeys((*self._own_stop_token_ids, self.grammar_after)))

    @property
    def token_ids(self) -> TokenIds:
        """The known tokens, prompt first: int32 [num_tokens]."""
        return self._tokens[: self.num_tokens]

    @property
    def completion_token_ids(self) -> TokenIds:
        """The generated tokens: int32 [num_tokens - num_prompt_tokens]."""
        return self._tokens[self.num_prompt_tokens : self.num_tokens]

    @property
    def planned_length(self) -> int:
        """Tokens there will be when everything launched has been read."""
        return self.num_tokens + self.num_in_flight_tokens

    def end_thought(self) -> None:
        """The last token, whichever it was, becomes the one after which the grammar begins."""
        assert self.grammar_after is not None, "only what thinks has a thought to end"
        self._tokens[self.num_tokens - 1] = self.grammar_after
        self.grammar_after = None

    def set_stored(self, num_stored_tokens: int) -> None:
        """Tokens were added that no launch drew: of those there are, so many have their KV."""
        self.num_computed_tokens = num_stored_tokens
        self.num_prefilled_tokens = self.num_tokens

    def append(self, token_ids: TokenIds) -> None:
        """Add generated tokens, growing the buffer by doubling."""
        end = self.num_tokens + len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(min(max(2 * end, 64), self.max_length), dtype=np.int32)
            grown[: self.num_tokens] = self.token_ids
            self._tokens = grown
        self._tokens[self.num_tokens : end] = token_ids
        self.num_tokens = end
