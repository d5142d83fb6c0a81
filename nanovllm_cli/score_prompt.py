"""What `nanovllm score` scores: all of a text but its first token, or a pair's continuation.

Pairs are put together and taken apart as lm-evaluation-harness does it (`_encode_pair` and
`loglikelihood` of https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/api/model.py):
white space at the end of a context counts as the continuation's, both are tokenized as one text,
and the continuation has what comes after as many tokens as the context alone has.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .prompt_options import PromptOptions
from .refusal import Refused, checked_text


class Pair(NamedTuple):
    """A context, which ends in no white space, and the text that it begins."""

    context: str
    text: str


def pair_of(columns: Mapping[str, Any], options: PromptOptions) -> Pair | None:
    """The pair of a row, None where it has no continuation; raises Refused."""
    assert options.pair_columns is not None, "rows are scored"
    context_column, continuation_column = options.pair_columns
    continuation = columns.get(continuation_column)
    if continuation is None:
        return None
    others = (options.prompt_column, options.messages_column, "prompt_token_ids")
    for name in others:
        if name != context_column and columns.get(name) is not None:
            raise Refused("bad_prompt", f"the row has {name} and {continuation_column}")
    context = checked_text(context_column, columns.get(context_column), "bad_prompt")
    if not checked_text(continuation_column, continuation, "bad_prompt"):
        raise Refused("empty_prompt", f"{continuation_column} is empty")
    return Pair(context.rstrip(), context + continuation)


def tokens_to_score(
    token_ids: list[int], num_context_tokens: int | None, first_token_id: int | None
) -> tuple[list[int], int]:
    """The tokens to compute, and the position of the first to score; raises Refused.

    num_context_tokens: None for what is no pair. An empty context is `first_token_id`, of the
    token that begins a text.
    """
    first_scored = 1 if num_context_tokens is None else num_context_tokens
    if first_scored == 0:
        if first_token_id is None:
            raise Refused("bad_prompt", "the context is empty, and no token begins a text")
        if token_ids[:1] != [first_token_id]:  # as --parse-special may have it
            token_ids = [first_token_id, *token_ids]
        first_scored = 1
    if len(token_ids) <= first_scored:
        what = "the prompt" if num_context_tokens is None else "the context with its continuation"
        reason = f"{what} has {len(token_ids)} tokens, and the first {first_scored} are not scored"
        raise Refused("nothing_to_score", reason)
    return token_ids, first_scored
