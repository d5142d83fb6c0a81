"""What the engine says of a sequence: its end, its new tokens, or why it has failed."""

from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.core.guided import is_dead_end
from nanovllm_cli.core.request import Completion, Failure, FailureCode, FinishReason, NewTokens
from nanovllm_cli.core.row_needs import joined
from nanovllm_cli.core.sequence import Sequence


def completion_of(sequence: Sequence, finish_reason: FinishReason) -> Completion:
    return Completion(
        request_id=sequence.request.request_id,
        token_ids=sequence.completion_token_ids,
        finish_reason=finish_reason,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        logprobs=joined(sequence.logprobs, sequence.num_logprobs),
        prompt_logprobs=joined(sequence.prompt_logprobs, sequence.num_prompt_logprobs),
    )


def take_new_tokens(sequence: Sequence) -> NewTokens:
    """The tokens not yet reported, which from now on are."""
    first = sequence.num_reported_tokens
    sequence.num_reported_tokens = len(sequence.completion_token_ids)
    return NewTokens(
        request_id=sequence.request.request_id,
        token_ids=sequence.completion_token_ids[first:],
        logprobs=sequence.logprobs[-1] if sequence.num_logprobs is not None else None,
        prompt_logprobs=joined(
            sequence.prompt_logprobs, None if first else sequence.num_prompt_logprobs
        ),
    )


def failure_of(sequence: Sequence, num_drawn: int, grammars: Grammars) -> Failure:
    """Of a sequence whose logits were not finite; num_drawn: good tokens of that launch."""
    code: FailureCode = "nan_logits"
    message = f"the logits after {sequence.num_tokens + num_drawn} tokens are not finite"
    if is_dead_end(sequence, grammars):
        num_tokens = sequence.num_tokens - sequence.num_prompt_tokens
        code = "grammar_dead_end"
        message = f"the grammar allows no token after the completion's first {num_tokens}"
        if sequence.guide is not None and sequence.guide.error:
            message += f" ({sequence.guide.error})"
    return Failure(request_id=sequence.request.request_id, code=code, message=message)
