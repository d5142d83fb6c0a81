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
from .output_columns import OutputColumns
from .prompts import Prompt
from .row_key import content_id
from .rows import BadRow, Row
from .samples import Sample
from .scored_tokens import ScoredTokens, as_columns
from .tool_calls import shaped_calls

Shape = Literal["columns", "openai"]
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
    columns: OutputColumns = OutputColumns(),
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
    return joined(prompt.row, result, columns)


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


def joined(row: Row, result: dict[str, Any], columns: OutputColumns) -> bytes:
    """The row's columns as they stand, then the result's; or those of them that are chosen."""
    if row.raw is None:
        given = {name: v for name, v in row.columns.items() if name not in columns.results}
        whole = {**given, **result}
        chosen = [name for name in columns.chosen or whole if name in whole]
        return orjson.dumps({name: whole[name] for name in chosen}, default=_to_json)
    # Not parsed and written again: numbers and escapes stay as they were given.
    content = row.raw.strip()[1:-1].rstrip()
    if columns.chosen:
        members = {n: m.strip() for n, m in _members(content) if n not in columns.results}
        members |= {n: orjson.dumps({n: value})[1:-1] for n, value in result.items()}
        return b"{" + b",".join(members[n] for n in columns.chosen if n in members) + b"}"
    if any(name in row.columns for name in columns.results):
        kept = (member for name, member in _members(content) if name not in columns.results)
        content = b",".join(kept)
    fields = orjson.dumps(result)
    return b"{" + content + b"," + fields[1:] if content else fields


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of a JSON object that is known to be valid: (name, as it is written)."""
    depth = start = 0
    for match in _STRUCTURE.finditer(content + b"," if content else b""):
        if match[0] in b"[{":
            depth += 1
        elif match[0] in b"]}":
            depth -= 1
        elif match[0] == b"," and depth == 0:
            member = content[start : match.start()]
            key = _STRUCTURE.search(member)
            assert key is not None, "a member begins with its name"
            yield orjson.loads(key[0]), member
            start = match.end()


def _to_json(value: object) -> str:
    """What Parquet has and JSON has not; parquet_values.py has taken care of the rest."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
