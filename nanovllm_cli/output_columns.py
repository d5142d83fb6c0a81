"""OutputColumns: which columns an output has, and which of them a job makes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .exit_code import CommandError
from .refusal import shown

RESULT_COLUMNS = (
    *("completion", "completions", "reasoning", "tool_calls", "finish_reason", "logprobs"),
    *("prompt_logprobs", "usage"),
)
Lines = Callable[[], Iterator[tuple[int, bytes]]]  # (row number, line), the same each time
SCORE_COLUMNS = ("logprob", "num_scored_tokens", "perplexity", "is_greedy", "token_logprobs")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputColumns:
    """What a row of the output holds; a column of the input that has a result's name gives way."""

    results: tuple[str, ...] = RESULT_COLUMNS
    chosen: tuple[str, ...] = ()  # these, in this order; (): the input's, then the results


def parse_output_columns(text: str | None) -> tuple[str, ...]:
    """The names in the value of --output-columns; raises CommandError."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    hint = "Give names of columns with commas between, like id,prompt,completion."
    if not all(names):
        raise CommandError(f"--output-columns is {shown(text)}, which has an empty name", hint)
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"--output-columns has {shown(name)} twice", hint)
    return names
