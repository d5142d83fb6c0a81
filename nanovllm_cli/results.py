"""A row and its samples -> the line that is written: our own shape, or OpenAI's batch output.

Ids come from the row's content and no line holds a time, so that two runs can be byte-identical.
For the same reason the cached tokens are in the statistics and not in the rows: what was in the
cache depends on what ran before.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import xxhash

from nanovllm_cli.core.request import FinishReason

from .files import as_text
from .output_columns import OutputColumns
from .prompts import Prompt
from .rows import BadRow, Row

Shape = Literal["columns", "openai"]
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]')  # of JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion of a row, as text."""

    text: str
    reasoning: str | None
    finish_reason: FinishReason
    num_tokens: int


def result_line(
    prompt: Prompt,
    samples: list[Sample],
    num_prompt_tokens: int,
    *,
    shape: Shape,
    model: str,
    columns: OutputColumns = OutputColumns(),
) -> bytes:
    """The output row as one line of JSON, without its newline."""
    num_completion_tokens = sum(sample.num_tokens for sample in samples)
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens}
    if shape == "openai":
        usage["total_tokens"] = num_prompt_tokens + num_completion_tokens
        return orjson.dumps(_openai_result(prompt, samples, usage, model))
    shown = [
        {"completion": s.text, "reasoning": s.reasoning, "finish_reason": s.finish_reason}
        for s in samples
    ]
    result = {**(shown[0] if len(shown) == 1 else {"completions": shown}), "usage": usage}
    return joined(prompt.row, result, columns)


def error_line(row: BadRow) -> bytes:
    """A failed row as one line of JSON for the errors file."""
    name = {} if row.id is None else {"id": row.id}
    error = {"code": row.code, "message": row.message}
    return orjson.dumps({**name, "source": as_text(row.source), "line": row.line, "error": error})


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


def _openai_result(
    prompt: Prompt, samples: list[Sample], usage: dict[str, int], model: str
) -> dict[str, Any]:
    content = prompt.row.raw if prompt.row.raw is not None else repr(prompt.row.columns).encode()
    key = xxhash.xxh3_128_hexdigest(content)
    is_chat = prompt.endpoint != "completions"
    choices: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        if is_chat:
            message = {"role": "assistant", "content": sample.text, "refusal": None}
            if sample.reasoning is not None:
                message["reasoning_content"] = sample.reasoning
            choice["message"] = message
        else:
            choice["text"] = sample.text
        choices.append({**choice, "logprobs": None})
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": prompt.model or model,
        "choices": choices,
        "usage": usage,
    }
    return {
        "id": f"batch_req_{key}",
        "custom_id": prompt.id if prompt.id is not None else str(prompt.index),
        "response": {"status_code": 200, "request_id": f"req_{key}", "body": body},
        "error": None,
    }
