"""A scored row -> the line that is written: its log-probability and its perplexity."""

import numpy as np

from nanovllm_cli.core.request import Logprobs

from .output_columns import OutputColumns
from .results import joined
from .rows import Row


def score_line(
    row: Row,
    token_ids: list[int],
    logprobs: Logprobs,
    columns: OutputColumns,
    *,
    has_token_logprobs: bool,
) -> bytes:
    """The output row as one line of JSON, without its newline; `logprobs` are of the last tokens.

    A perplexity beyond a float's range is null.
    """
    num_scored = len(logprobs.values)
    logprob = float(logprobs.values.sum(dtype=np.float64))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-logprob / num_scored))
    result = {
        "logprob": logprob,
        "num_scored_tokens": num_scored,
        "perplexity": perplexity,
        "is_greedy": logprobs.top_ids[:, 0].tolist() == token_ids[-num_scored:],
    }
    if has_token_logprobs:
        result["token_logprobs"] = logprobs.values.tolist()
    return joined(row, result, columns)
