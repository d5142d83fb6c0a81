"""What crosses the engine's border: a Request goes in, a Completion or a Failure comes out."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nanovllm_cli.core.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]
FailureCode = Literal[
    "prompt_too_long", "bad_token_ids", "bad_parameters", "nan_logits", "engine_died",
    "bad_grammar", "grammar_dead_end",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete once.

    `reports_tokens` asks for a NewTokens at every update, for callers that look for stop strings.
    """

    request_id: int
    prompt_token_ids: Seq[int] | TokenIds
    sampling: SamplingParams
    reports_tokens: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprobs:
    """Log-probabilities of consecutive tokens, and of the likeliest ones at their positions.

    Natural logarithms of the softmax, in fp32, of the model's own logits.
    """

    values: Float32  # [num_tokens], of the tokens themselves
    top_ids: TokenIds  # [num_tokens, k], the likeliest first, ties by the lower id
    top_values: Float32  # [num_tokens, k]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished request. `token_ids` ends with the stop token where `finish_reason` is "stop".

    `prompt_logprobs` are of the prompt's tokens from `prompt_logprobs_start` on.
    """

    request_id: int
    token_ids: TokenIds
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """Tokens just generated for an unfinished request with `reports_tokens`.

    With `starts_anew` those reported before are void: the engine was restarted. The prompt's
    log-probabilities come with the first ones.
    """

    request_id: int
    token_ids: TokenIds
    starts_anew: bool = False
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A request that cannot be completed, with the reason; the others are not touched."""

    request_id: int
    code: FailureCode
    message: str


Output = Completion | NewTokens | Failure
