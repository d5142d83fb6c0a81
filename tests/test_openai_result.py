"""openai_result.py: OpenAI's shapes, as the official package reads them."""

from typing import Any

import numpy as np
import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from nanovllm_cli.core.request import Logprobs
from nanovllm_cli.prompts import Prompt
from nanovllm_cli.results import error_line, result_line
from nanovllm_cli.rows import BadRow
from nanovllm_cli.samples import FinishReason, Sample
from nanovllm_cli.scored_tokens import ScoredTokens, as_columns, scored, scored_prompt
from nanovllm_cli.tokenizer import PromptTokenizer
from nanovllm_cli.tool_calls import ToolCall

from .cli import MODEL
from .parsing import TOOL, bad, chat_line, good, parse, text_line

GRIN = "\U0001f600"  # several tokens, none of them a whole character


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(MODEL)


def sample(text: str = "done", finish_reason: FinishReason = "stop", **more: Any) -> Sample:
    return Sample(text=text, reasoning=None, finish_reason=finish_reason, num_tokens=2, **more)


def body_of(prompt: Prompt, *samples: Sample, **more: Any) -> Any:
    """The response's body, which the official package takes as it is."""
    line = orjson.loads(result_line(prompt, [*samples], 5, shape="openai", model="m", **more))
    assert (line["custom_id"], line["error"]) == ("c", None)
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    kind = ChatCompletion if prompt.endpoint == "chat" else Completion
    kind.model_validate(body, strict=True)
    return body


def scored_text(tokenizer: PromptTokenizer, text: str, k: int) -> ScoredTokens:
    """`text`, whose n-th token has the log-probability -n, with the lowest k ids beside it."""
    (token_ids,) = tokenizer.encode([good({"prompt": text})])
    assert isinstance(token_ids, list)
    return scored(token_ids, logprobs_of(len(token_ids), k), tokenizer.token_texts)


def logprobs_of(count: int, k: int) -> Logprobs:
    values = -np.arange(1, count + 1, dtype=np.float32)
    ids = np.arange(ord("a") - ord("!"), ord("a") - ord("!") + k, dtype=np.int32)
    tops = values[:, None] - np.arange(1, k + 1, dtype=np.float32) / 4
    return Logprobs(values=values, top_ids=np.tile(ids, (count, 1)), top_values=tops)


def test_chats_and_completions_are_what_the_official_package_reads() -> None:
    chat = body_of(good(chat_line()), sample(), sample("cut", "length"))
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["done", "cut"]
    assert [choice["finish_reason"] for choice in chat["choices"]] == ["stop", "length"]
    assert chat["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    text = body_of(good(text_line(prompt="x")), sample())
    assert text["choices"][0] == {
        **{"index": 0, "finish_reason": "stop", "text": "done", "logprobs": None}
    }


def test_a_chats_log_probabilities(tokenizer: PromptTokenizer) -> None:
    tokens = scored_text(tokenizer, f"a{GRIN}", 2)
    choice = body_of(good(chat_line()), sample(logprobs=tokens))["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-n for n in range(1, len(tokens) + 1)]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == f"a{GRIN}".encode()
    assert [entry["token"] for entry in content[1:]] == ["\ufffd"] * (len(tokens) - 1)
    assert content[0]["top_logprobs"] == [
        {"token": "a", "logprob": -1.25, "bytes": [ord("a")]},
        {"token": "b", "logprob": -1.5, "bytes": [ord("b")]},
    ]


def test_a_completions_log_probabilities_are_in_columns(tokenizer: PromptTokenizer) -> None:
    tokens = scored_text(tokenizer, f"a{GRIN}b", 2)
    found = body_of(good(text_line(prompt="x")), sample(logprobs=tokens))["choices"][0]["logprobs"]
    names = found["tokens"]
    assert (names[0], names[-1]) == ("a", "b")
    parts = [name.removeprefix("bytes:") for name in names[1:-1]]
    assert "".join(parts) == "".join(f"\\x{byte:02x}" for byte in GRIN.encode())
    assert found["token_logprobs"] == [-n for n in range(1, len(tokens) + 1)]
    # The likeliest ones, and the token itself.
    assert found["top_logprobs"][0] == {"a": -1.25, "b": -1.5}
    assert found["top_logprobs"][1] == {names[1]: -2.0, "a": -2.25, "b": -2.5}
    # A character counts when it is whole.
    assert found["text_offset"] == [0] + [1] * (len(tokens) - 2) + [2]


def test_an_echoed_prompt_goes_before_the_text(tokenizer: PromptTokenizer) -> None:
    ids = [ord("a") - ord("!"), ord("b") - ord("!")]
    prompt = good(text_line(prompt=ids, echo=True))
    echoed = scored_prompt(ids, logprobs_of(1, 0), tokenizer.token_texts)
    line = result_line(
        prompt,
        [sample("abc", logprobs=scored_text(tokenizer, "c", 0))],
        len(ids),
        shape="openai",
        model="m",
        prompt_logprobs=echoed,
    )
    body = orjson.loads(line)["response"]["body"]
    found = body["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == body["choices"][0]["text"] == "abc"
    assert found["text_offset"] == [*range(3)]
    # As OpenAI has it, though its package's types know no null here.
    assert found["token_logprobs"] == [None, -1.0, -1.0]
    assert found["top_logprobs"] == [None, {"b": -1.0}, {"c": -1.0}]
    assert "prompt_logprobs" not in body


def test_a_prompts_log_probabilities_are_in_our_own_shape(tokenizer: PromptTokenizer) -> None:
    tokens = scored_text(tokenizer, "ab", 1)
    for prompt in (good(chat_line()), good(text_line(prompt="x"))):
        body = body_of(prompt, sample(), prompt_logprobs=tokens)
        assert body["prompt_logprobs"] == as_columns(tokens)


def test_a_part_of_a_character_has_its_bytes_in_our_own_shape(tokenizer: PromptTokenizer) -> None:
    first, *parts = as_columns(scored_text(tokenizer, f"a{GRIN}", 0))
    assert first == {"token": "a", "token_id": ord("a") - ord("!"), "logprob": -1.0}
    assert b"".join(bytes(part["bytes"]) for part in parts) == GRIN.encode()


def test_tool_calls_are_in_the_message() -> None:
    calls = [ToolCall("weather", '{"city": "Oslo"}'), ToolCall("weather", "{}")]
    prompt = good(chat_line(tools=[TOOL]))
    both, alone, none = (
        choice["message"]
        for choice in body_of(
            prompt,
            sample("I look.", "tool_calls", tool_calls=calls),
            sample("", "tool_calls", tool_calls=calls[:1]),
            sample("Hello", tool_calls=[]),
        )["choices"]
    )
    assert both["content"] == "I look."
    assert [call["function"]["name"] for call in both["tool_calls"]] == ["weather"] * 2
    assert alone["content"] is None
    assert "tool_calls" not in none
    ids = [call["id"] for message in (both, alone) for call in message["tool_calls"]]
    assert len({*ids}) == 3
    again = body_of(prompt, sample("", "tool_calls", tool_calls=calls))["choices"][0]["message"]
    assert [call["id"] for call in again["tool_calls"]] == ids[:2]


def test_a_thought_is_beside_the_content() -> None:
    thought = Sample(text="4", reasoning="2+2", finish_reason="stop", num_tokens=3)
    message = body_of(good(chat_line()), thought)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("4", "2+2")


def test_a_failed_line_is_as_openai_has_it() -> None:
    row = bad("bad_parameters", chat_line(n=0))
    error = orjson.loads(error_line(row))
    assert list(error) == ["id", "custom_id", "response", "error", "source", "line"]
    assert error["custom_id"] == "c"
    assert error["id"].startswith("batch_req_")
    assert error["response"]["status_code"] == 400
    assert error["error"] == {"code": "bad_parameters", "message": row.message}
    assert error["response"]["body"]["error"] == {
        **{"code": "bad_parameters", "message": row.message},
        **{"type": "invalid_request_error", "param": None},
    }
    assert error_line(row) == error_line(bad("bad_parameters", chat_line(n=0)))


def test_a_failed_line_without_a_good_id_has_none_that_could_be_another_rows() -> None:
    for columns in (chat_line(), {"prompt": ""}, {"id": [1], "prompt": "x"}):
        row = parse({**columns, "custom_id": 5} if "body" in columns else columns)
        assert isinstance(row, BadRow)
        error = orjson.loads(error_line(row, format="openai"))
        assert (error["custom_id"], error["line"]) == (None, 5)
    (row,) = [r for r in [parse({"custom_id": 5, "prompt": ""})] if isinstance(r, BadRow)]
    assert orjson.loads(error_line(row, format="openai"))["custom_id"] == 5


def test_a_failure_of_the_engine_is_no_fault_of_the_request() -> None:
    row = BadRow(index=3, source="s", line=4, id=None, code="nan_logits", message="no")
    assert "response" not in orjson.loads(error_line(row))
    error = orjson.loads(error_line(row, format="openai"))
    assert (error["custom_id"], error["response"]["status_code"]) == (None, 500)
    assert error["response"]["body"]["error"]["type"] == "server_error"
