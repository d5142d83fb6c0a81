"""ScoredTokens: tokens with their log-probabilities and the likeliest ones beside them, as text.

Numbers are fp32: as floats they are the shortest decimals that mean the same, so that lines are
small and two runs write the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from nanovllm_cli.core.request import Float32, Logprobs

from .token_texts import TokenText, TokenTexts


class ScoredToken(NamedTuple):
    """A token; the first of a prompt has no log-probability."""

    token: TokenText
    logprob: float | None
    top: list[tuple[TokenText, float]]  # the likeliest first


ScoredTokens = list[ScoredToken]


def scored(token_ids: Sequence[int], logprobs: Logprobs, texts: TokenTexts) -> ScoredTokens:
    """`token_ids` with `logprobs`, which may go on beyond them."""
    count = len(token_ids)
    values = shortest(logprobs.values[:count])
    all_top_ids = logprobs.top_ids[:count].tolist()
    all_top_values = shortest(logprobs.top_values[:count])
    return [
        ScoredToken(
            texts[token_id],
            value,
            [(texts[top_id], top) for top_id, top in zip(top_ids, top_values, strict=True)],
        )
        for token_id, value, top_ids, top_values in zip(
            token_ids, values, all_top_ids, all_top_values, strict=True
        )
    ]


def scored_prompt(token_ids: Sequence[int], logprobs: Logprobs, texts: TokenTexts) -> ScoredTokens:
    """A whole prompt: `logprobs` are of its tokens from the second on."""
    return [ScoredToken(texts[token_ids[0]], None, []), *scored(token_ids[1:], logprobs, texts)]


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """Those of one token sequence that came in pieces."""
    return Logprobs(
        values=np.concatenate([part.values for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_values=np.concatenate([part.top_values for part in parts]),
    )


def as_columns(tokens: ScoredTokens) -> list[dict[str, Any]]:
    """Our own shape: `top` where likeliest ones were asked for."""
    columns = []
    for token, logprob, top in tokens:
        column = _column(token, logprob)
        if top:
            column["top"] = [_column(*likely) for likely in top]
        columns.append(column)
    return columns


def _column(token: TokenText, logprob: float | None) -> dict[str, Any]:
    column = {"token": token.text, "token_id": token.token_id, "logprob": logprob}
    if not token.is_whole:
        column["bytes"] = [*token.raw]
    return column


def shortest(values: Float32) -> Any:
    """The same as Python's floats, whose 17 digits would be mostly noise."""
    return orjson.loads(
        orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    )
