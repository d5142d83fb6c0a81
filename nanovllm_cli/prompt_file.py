"""A file of prompts -> a workload of `nanovllm bench`.

Its own prompts come first. A later pass has the same prompts with every token id replaced by
another, one for one: equal beginnings stay equal, and nothing is in the prefix cache.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .exit_code import CommandError, ExitCode
from .inputs import find_inputs
from .prompt_options import PromptOptions
from .prompts import Prompt, to_prompt
from .rows import BadRow, Row, check_inputs, read_rows
from .tokenizer import PromptTokenizer, TemplateError
from .workloads import Workload

_MAX_TOKENS = 128


def prompt_file(
    name: str, model_path: Path, vocab_size: int, *, max_tokens: int | None, limit: int | None
) -> Callable[[int], Workload]:
    """The workload of each pass; a row's own max_tokens and n come before the flags.

    Raises CommandError for a file that is not there, and for the first row that is not good.
    """
    sources = find_inputs([name])
    check_inputs(sources, limit=limit)
    prompts = [_good_prompt(row) for row in read_rows(sources, limit=limit)]
    if not prompts:
        raise CommandError(f"{name} has no rows", exit_code=ExitCode.INPUT_UNUSABLE)
    sequences: Workload = []
    for prompt, ids in zip(prompts, PromptTokenizer(model_path).encode(prompts), strict=True):
        place = f"{prompt.source}:{prompt.line}"
        if isinstance(ids, TemplateError):
            raise CommandError(f"{place}: {ids}", exit_code=ExitCode.INPUT_UNUSABLE)
        token_ids = np.array(ids, dtype=np.int32)
        if token_ids.max(initial=0) >= vocab_size:
            raise CommandError(
                f"{place}: token id {token_ids.max()} is outside the vocabulary of {vocab_size}",
                exit_code=ExitCode.INPUT_UNUSABLE,
            )
        num_tokens = prompt.sampling.get("max_tokens", max_tokens or _MAX_TOKENS)
        sequences += [(token_ids, num_tokens)] * (prompt.n or 1)
    sequences = sequences[:limit]

    def workload(repeat: int) -> Workload:
        if repeat == 0:
            return sequences
        other_ids = np.random.default_rng(repeat).permutation(vocab_size).astype(np.int32)
        return [(other_ids[token_ids], num_tokens) for token_ids, num_tokens in sequences]

    return workload


def _good_prompt(row: Row | BadRow) -> Prompt:
    prompt = to_prompt(row, PromptOptions()) if isinstance(row, Row) else row
    if isinstance(prompt, BadRow):
        raise CommandError(
            f"{prompt.source}:{prompt.line}: {prompt.message}",
            "A measurement leaves no row out: mend it, or stop before it with --limit.",
            exit_code=ExitCode.INPUT_UNUSABLE,
        )
    return prompt
