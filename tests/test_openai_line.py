"""openai_line.py: what an OpenAI batch line asks for."""

from typing import Any

import pytest

from .parsing import USER, bad, batch_line, chat_line, good, text_line


def test_a_chat_line() -> None:
    ignored = {"stream": False, "user": "u", "metadata": {"a": "b"}, "store": True, "top_k": None}
    prompt = good(chat_line(temperature=0.5, n=2, stop="\n", min_p=0.1, seed=1, **ignored))
    assert prompt.messages == [USER]
    assert (prompt.id, prompt.endpoint, prompt.model) == ("c", "chat", "m")
    assert prompt.sampling == {"temperature": 0.5, "min_p": 0.1, "seed": 1}
    assert (prompt.n, prompt.stop) == (2, ("\n",))


def test_a_completions_line_stands_as_it_is() -> None:
    options: dict[str, Any] = {"chat": True, "system": "x", "template": "{y}"}
    assert good(text_line(prompt="Hello"), **options).text == "Hello"
    prompt = good(text_line(prompt=[1, 2]), **options)
    assert (prompt.token_ids, prompt.endpoint) == ([1, 2], "completions")


def test_max_completion_tokens_are_max_tokens() -> None:
    assert good(chat_line(max_completion_tokens=5)).sampling == {"max_tokens": 5}
    assert good(chat_line(max_completion_tokens=5, max_tokens=5)).sampling == {"max_tokens": 5}
    bad("bad_parameters", chat_line(max_completion_tokens=5, max_tokens=6), "differ")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (batch_line({}, custom_id=1), "custom_id is 1"),
        (batch_line({}, method="GET"), "method is 'GET'"),
        (batch_line({}, method=None), "method is null"),
        (batch_line({}, url="/v1/embeddings"), "url is '/v1/embeddings'"),
        (batch_line({}, url=["x"]), "url is ['x']"),
        (batch_line([]), "body is []"),
        (batch_line(None), "body is null"),
        (chat_line(model=1), "body.model is 1"),
        (chat_line(prompt="x"), "messages and no prompt"),
        (text_line(prompt="x", messages=[USER]), "a prompt and no messages"),
        ({**chat_line(), "temperature": 1}, "'temperature' must stand in the body"),
        ({**chat_line(), "max_token": 1}, "'max_token' must stand in the body"),
    ],
)
def test_a_bad_openai_line_is_named(columns: dict[str, Any], words: str) -> None:
    bad("bad_openai_line", columns, words)


@pytest.mark.parametrize(
    ("code", "columns", "words"),
    [
        ("bad_messages", batch_line({"model": "m"}), "body.messages is null"),
        ("bad_prompt", text_line(), "body.prompt is null"),
        ("bad_prompt", text_line(prompt=["a", "b"]), "body.prompt is ['a', 'b']"),
        ("empty_prompt", text_line(prompt=""), "body.prompt is empty"),
        ("empty_prompt", text_line(prompt=[]), "body.prompt is empty"),
        ("bad_parameters", chat_line(stream=True), "body.stream is True"),
        ("bad_parameters", chat_line(temperature=-1), "body.temperature is -1"),
        ("bad_parameters", chat_line(n=0), "body.n is 0"),
        ("unknown_setting", chat_line(logprobs=True), "'logprobs'"),
        ("unknown_setting", chat_line(temprature=1), "did you mean 'temperature'"),
        ("unknown_setting", chat_line(anything=1), "'anything' is not supported"),
    ],
)
def test_a_bad_body_is_named(code: str, columns: dict[str, Any], words: str) -> None:
    bad(code, columns, words)
