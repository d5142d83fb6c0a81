"""OpenAI's shapes of a line of a batch's output, and of its errors.

https://platform.openai.com/docs/api-reference/batch/request-output, and of the bodies
https://platform.openai.com/docs/api-reference/chat/object and
https://platform.openai.com/docs/api-reference/completions/object.
"""

import codecs
from collections.abc import Iterable
from typing import Any

import orjson

from .files import as_text
from .prompts import Prompt
from .row_key import content_id
from .rows import BadRow
from .samples import Sample
from .scored_tokens import ScoredTokens, as_columns
from .token_texts import TokenText
from .tool_calls import shaped_calls

_ENGINES_ERRORS = ("nan_logits", "engine_died")  # others are the request's


def openai_result(
    prompt: Prompt,
    samples: list[Sample],
    usage: dict[str, int],
    model: str,
    prompt_logprobs: ScoredTokens | None,
) -> dict[str, Any]:
    """A completed row; every id comes from its content."""
    key = content_id(prompt.row)
    is_chat = prompt.endpoint != "completions"
    choices: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        if is_chat:
            choice["message"] = _message(sample, key, index)
            choice["logprobs"] = _chat_logprobs(sample.logprobs)
        else:
            echoed = prompt_logprobs if prompt.settings.echo else None
            choice["text"] = sample.text
            choice["logprobs"] = _text_logprobs(sample.logprobs, echoed)
        choices.append(choice)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": prompt.model or model,
        "choices": choices,
        "usage": usage,
    }
    if prompt_logprobs is not None and not prompt.settings.echo:
        body["prompt_logprobs"] = as_columns(prompt_logprobs)
    return {
        "id": f"batch_req_{key}",
        "custom_id": prompt.id if prompt.id is not None else str(prompt.index),
        "response": {"status_code": 200, "request_id": f"req_{key}", "body": body},
        "error": None,
    }


def joined_lines(lines: Iterable[bytes]) -> bytes:
    """The completed rows of a row's prompts as one: all their choices, and their usage together."""
    results = [orjson.loads(line) for line in lines]
    first, *others = (result["response"]["body"] for result in results)
    for body in others:
        first["choices"] += body["choices"]
        for name, count in body["usage"].items():
            first["usage"][name] += count
    for index, choice in enumerate(first["choices"]):
        choice["index"] = index
    if "prompt_logprobs" in first:
        first["prompt_logprobs"] = [
            first["prompt_logprobs"],
            *(b["prompt_logprobs"] for b in others),
        ]
    return orjson.dumps(results[0])


def openai_error(row: BadRow) -> dict[str, Any]:
    """A failed row: the response that a server would have given, and the error beside it.

    `source` and `line` say where it is, for whoever mends it; a row without an id has them alone.
    """
    error = {"code": row.code, "message": row.message}
    place = {"source": as_text(row.source), "line": row.line}
    key = content_id(row)
    is_engines = row.code in _ENGINES_ERRORS
    kind = "server_error" if is_engines else "invalid_request_error"
    body = {"error": {**error, "type": kind, "param": None}}
    response = {
        "status_code": 500 if is_engines else 400,
        "request_id": f"req_{key}",
        "body": body,
    }
    # Null where the row has no good one: anything else could be another row's.
    named = {"id": f"batch_req_{key}", "custom_id": row.id}
    return {**named, "response": response, "error": error, **place}


def _message(sample: Sample, key: str, index: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
    if sample.tool_calls:
        message["content"] = sample.text or None
        message["tool_calls"] = shaped_calls(sample.tool_calls, f"{key} {index}")
    if sample.reasoning is not None:
        message["reasoning_content"] = sample.reasoning
    return message


def _chat_logprobs(tokens: ScoredTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = []
    for token, logprob, top in tokens:
        likely = [_chat_token(*item) for item in top]
        content.append({**_chat_token(token, logprob), "top_logprobs": likely})
    return {"content": content, "refusal": None}


def _chat_token(token: TokenText, logprob: float | None) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": [*token.raw]}


def _text_logprobs(
    tokens: ScoredTokens | None, echoed: ScoredTokens | None
) -> dict[str, list[Any]] | None:
    """In columns. `text_offset` counts the characters before a token in the choice's text."""
    if tokens is None:
        return None
    tokens = [*(echoed or ()), *tokens]
    offsets, num_chars = [], 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        offsets.append(num_chars)
        num_chars += len(decoder.decode(token.token.raw))
    return {
        "tokens": [_name(token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_of(*token) for token in tokens],
        "text_offset": offsets,
    }


def _top_of(
    token: TokenText, logprob: float | None, top: list[tuple[TokenText, float]]
) -> dict[str, float] | None:
    """The likeliest tokens and the token itself, as OpenAI has it; the first one has neither."""
    if logprob is None:
        return None
    return {_name(token): logprob, **{_name(likely): value for likely, value in top}}


def _name(token: TokenText) -> str:
    """The token's text; of a part of a character its bytes, as OpenAI writes them."""
    if token.is_whole:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
