"""A row and its samples -> the line that is written: in our own shape, or as openai_result.py says.

Ids come from the row's content and no line holds a time, so that two runs can be byte-identical.
For the same reason the cached tokens are in the statistics and not in the rows: what was in the
cache depends on what ran before.
"""

import base64
import re
from collections.abc import Iterator
from typing import Any, Literal

import orjson

from .files import as_text
from .openai_result import openai_error, openai_result
from .prompts import Prompt
from .row_key import content_id
from .rows import BadRow
from .samples import Sample
from .scored_tokens import ScoredTokens, as_columns
from .tool_calls import shaped_calls

Shape = Literal["columns", "openai"]
RESULT_COLUMNS = (
    *("completion", "completions", "reasoning", "tool_calls", "finish_reason", "logprobs"),
    *("prompt_logprobs", "usage"),
)
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]')  # of JSON


def result_line(
    prompt: Prompt,
    samples: list[Sample],
    num_prompt_tokens: int,
    *,
    shape: Shape,
    model: str,
    num_completion_tokens: int | None = None,
    prompt_logprobs: ScoredTokens | None = None,
) -> bytes:
    """The output row as one line of JSON, without its newline.

    `num_completion_tokens` counts samples that are not shown, too; None: those of `samples`.
    """
    if num_completion_tokens is None:
        num_completion_tokens = sum(sample.num_tokens for sample in samples)
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens}
    if shape == "openai":
        usage["total_tokens"] = num_prompt_tokens + num_completion_tokens
        return orjson.dumps(openai_result(prompt, samples, usage, model, prompt_logprobs))
    result: dict[str, Any]
    if len(samples) == 1:
        result = _columns(prompt, samples[0], 0)
    else:
        shown = [_columns(prompt, sample, at) for at, sample in enumerate(samples)]
        result = {"completions": shown}
    if prompt_logprobs is not None:
        result["prompt_logprobs"] = as_columns(prompt_logprobs)
    result["usage"] = usage
    return _join(prompt, result)


def error_line(row: BadRow, *, format: str = "auto") -> bytes:
    """A failed row as one line of JSON for the errors file."""
    if row.is_openai_line or format == "openai":
        return orjson.dumps(openai_error(row))
    name = {} if row.id is None else {"id": row.id}
    error = {"code": row.code, "message": row.message}
    return orjson.dumps({**name, "source": as_text(row.source), "line": row.line, "error": error})


def _columns(prompt: Prompt, sample: Sample, at: int) -> dict[str, Any]:
    columns: dict[str, Any] = {"completion": sample.text, "reasoning": sample.reasoning}
    if sample.tool_calls is not None:
        key = f"{content_id(prompt.row)} {at}"
        columns["tool_calls"] = shaped_calls(sample.tool_calls, key) or None
    columns["finish_reason"] = sample.finish_reason
    if sample.logprobs is not None:
        columns["logprobs"] = as_columns(sample.logprobs)
    return columns


def _join(prompt: Prompt, result: dict[str, Any]) -> bytes:
    """The row's columns as they stand, then the result's; a column of a result's name gives way."""
    row = prompt.row
    if row.raw is None:
        columns = {k: v for k, v in row.columns.items() if k not in RESULT_COLUMNS}
        return orjson.dumps({**columns, **result}, default=_to_json)
    # Not parsed and written again: numbers and escapes stay as they were given.
    members = row.raw.strip()[1:-1].rstrip()
    if any(name in row.columns for name in RESULT_COLUMNS):
        members = b",".join(_members(members, without=RESULT_COLUMNS))
    fields = orjson.dumps(result)
    return b"{" + members + b"," + fields[1:] if members else fields


def _members(content: bytes, *, without: tuple[str, ...]) -> Iterator[bytes]:
    """The members of a JSON object that is known to be valid, as they are written."""
    depth = start = 0
    for match in _STRUCTURE.finditer(content + b","):
        if match[0] in b"[{":
            depth += 1
        elif match[0] in b"]}":
            depth -= 1
        elif match[0] == b"," and depth == 0:
            member = content[start : match.start()]
            key = _STRUCTURE.search(member)
            assert key is not None, "a member begins with its name"
            if orjson.loads(key[0]) not in without:
                yield member
            start = match.end()


def _to_json(value: object) -> str:
    """What Parquet has and JSON has not; parquet_values.py has taken care of the rest."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
