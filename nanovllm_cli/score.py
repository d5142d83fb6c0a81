"""A scored row -> the line that is written: its log-probability and its perplexity."""

from typing import Any

import numpy as np

from nanovllm_cli.core.request import Completion

from .output_columns import OutputColumns
from .results import joined
from .row_plan import RowPlan
from .scored_tokens import shortest


def score_line(
    plan: RowPlan, completion: Completion, columns: OutputColumns, *, has_token_logprobs: bool
) -> bytes:
    """The output row as one line of JSON, without its newline.

    A perplexity beyond a float's range is null.
    """
    logprobs = completion.prompt_logprobs
    assert logprobs is not None, "a score asks for them"
    num_scored = len(logprobs.values)
    logprob = float(logprobs.values.sum(dtype=np.float64))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-logprob / num_scored))
    result: dict[str, Any] = {
        "logprob": logprob,
        "num_scored_tokens": num_scored,
        "perplexity": perplexity,
        "is_greedy": logprobs.top_ids[:, 0].tolist() == plan.token_ids[-num_scored:],
    }
    if has_token_logprobs:
        result["token_logprobs"] = shortest(logprobs.values)
    return joined(plan.prompt.row, result, columns)
