"""Sample: one completion of a row, as text."""

from dataclasses import dataclass
from typing import Literal

from .scored_tokens import ScoredTokens
from .tool_calls import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(kw_only=True, slots=True)  # not frozen, which takes thrice the time, for every row
class Sample:
    """One completion of a row, as text."""

    text: str  # without its reasoning and its tool calls
    reasoning: str | None
    finish_reason: FinishReason
    num_tokens: int
    tool_calls: list[ToolCall] | None = None  # None where no tools were offered
    mean_logprob: float = 0.0  # only where samples are compared
    logprobs: ScoredTokens | None = None  # only where they are shown
