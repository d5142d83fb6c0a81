"""What the tests of prompts share: a row -> a Prompt or a BadRow, whichever it must be."""

from typing import Any

from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.rows import BadRow, Row

USER = {"role": "user", "content": "Hello"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def parse(columns: dict[str, Any], **options: Any) -> Prompt | BadRow:
    row = Row(index=4, source="in.jsonl", line=5, raw=None, columns=columns)
    return to_prompt(row, PromptOptions(**options))


def good(columns: dict[str, Any], **options: Any) -> Prompt:
    prompt = parse(columns, **options)
    assert isinstance(prompt, Prompt), prompt
    assert (prompt.index, prompt.source, prompt.line) == (4, "in.jsonl", 5)
    assert prompt.row.columns is columns
    contents = (prompt.text, prompt.messages, prompt.token_ids)
    assert sum(content is not None for content in contents) == 1
    return prompt


def bad(code: str, columns: dict[str, Any], *words: str, **options: Any) -> BadRow:
    row = parse(columns, **options)
    assert isinstance(row, BadRow), row
    assert (row.index, row.source, row.line) == (4, "in.jsonl", 5)
    assert row.code == code, row
    for word in words:
        assert word in row.message
    return row


def batch_line(body: Any, url: Any = "/v1/chat/completions", **columns: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body, **columns}


def chat_line(**body: Any) -> dict[str, Any]:
    return batch_line({"model": "m", "messages": [USER], **body})


def text_line(**body: Any) -> dict[str, Any]:
    return batch_line({"model": "m", **body}, "/v1/completions")
