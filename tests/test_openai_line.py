"""openai_line.py: what an OpenAI batch line asks for."""

from typing import Any

import pytest

from .parsing import TOOL, USER, bad, batch_line, chat_line, good, text_line


def test_a_chat_line() -> None:
    ignored = {"stream": False, "user": "u", "metadata": {"a": "b"}, "store": True, "top_k": None}
    prompt = good(chat_line(temperature=0.5, n=2, stop="\n", min_p=0.1, seed=1, **ignored))
    assert prompt.messages == [USER]
    assert (prompt.id, prompt.endpoint, prompt.model) == ("c", "chat", "m")
    assert prompt.sampling == {"temperature": 0.5, "min_p": 0.1, "seed": 1}
    assert (prompt.n, prompt.stop) == (2, ("\n",))


@pytest.mark.parametrize(
    "other",
    [
        {"url": "/v1/chat/completions/"},
        {"url": "/chat/completions"},
        {"url": "/chat/completions/", "method": "post"},
        {"method": "Post"},
        {"method": None},
        {"method": None, "url": None},
    ],
)
def test_a_chat_line_as_other_services_write_it(other: dict[str, Any]) -> None:
    body = {"messages": [USER], "max_tokens": 3}
    line = {name: value for name, value in batch_line(body, **other).items() if value is not None}
    prompt = good(line)
    assert (prompt.messages, prompt.endpoint, prompt.id) == ([USER], "chat", "c")
    assert prompt.sampling == {"max_tokens": 3}


def test_a_body_with_a_prompt_needs_no_url() -> None:
    assert good({"custom_id": "c", "body": {"prompt": "x"}}).endpoint == "completions"
    assert good(batch_line({"prompt": "x"}, url="/completions")).endpoint == "completions"


def test_a_completions_line_stands_as_it_is() -> None:
    options: dict[str, Any] = {"chat": True, "system": "x", "template": "{y}"}
    assert good(text_line(prompt="Hello"), **options).text == "Hello"
    prompt = good(text_line(prompt=[1, 2]), **options)
    assert (prompt.token_ids, prompt.endpoint) == ([1, 2], "completions")


def test_max_completion_tokens_are_max_tokens() -> None:
    assert good(chat_line(max_completion_tokens=5)).sampling == {"max_tokens": 5}
    assert good(chat_line(max_completion_tokens=5, max_tokens=5)).sampling == {"max_tokens": 5}
    bad("bad_parameters", chat_line(max_completion_tokens=5, max_tokens=6), "differ")


def test_a_chat_asks_for_log_probabilities_with_two_fields() -> None:
    asked = good(chat_line(logprobs=True, top_logprobs=3, prompt_logprobs=1)).sampling
    assert asked == {"logprobs": 3, "prompt_logprobs": 1}
    assert good(chat_line(logprobs=True)).sampling == {"logprobs": 0}
    for nothing in ({"logprobs": False}, {"logprobs": False, "top_logprobs": 0}):
        assert good(chat_line(**nothing)).sampling == {}
    assert good(text_line(prompt="x", logprobs=5)).sampling == {"logprobs": 5}


def test_a_reasoning_effort_says_whether_to_think() -> None:
    efforts = {"none": False, "minimal": False, "low": True, "medium": True, "high": True}
    for effort, thinks in {**efforts, "xhigh": True, "max": True}.items():
        prompt = good(chat_line(reasoning_effort=effort), enable_thinking=not thinks)
        assert prompt.enable_thinking is thinks
    other = {"chat_template_kwargs": {"enable_thinking": True}}
    bad("bad_parameters", chat_line(reasoning_effort="none", **other), "differ")


def test_what_has_no_effect_on_the_text_is_taken() -> None:
    ignored = {
        **{"service_tier": "flex", "safety_identifier": "x", "prompt_cache_key": "x"},
        **{
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"ttl": "30m"},
            "prediction": {"type": "content", "content": "x"},
        },
        **{"modalities": ["text"], "metadata": {"a": "b"}, "store": False, "user": "x"},
    }
    assert good(chat_line(**ignored)).settings == good(chat_line()).settings


def test_a_seed_may_be_below_zero() -> None:
    seeds = [good(chat_line(seed=seed)).sampling["seed"] for seed in (-(2**63), -1, 0, 2**63 - 1)]
    assert len({*seeds}) == 4
    bad("bad_parameters", chat_line(seed=-(2**63) - 1), "body.seed is -")


def test_a_completion_may_echo_its_prompt() -> None:
    assert good(text_line(prompt="x", echo=True)).settings.echo
    assert not good(text_line(prompt="x", echo=False)).settings.echo


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    assert good(text_line(prompt=["Hello"])).text == "Hello"
    assert good(text_line(prompt=[[1, 2]])).token_ids == [1, 2]
    assert good(text_line(prompt=["Hello"])).others == ()


def test_several_prompts_are_each_as_it_is_alone() -> None:
    first = good(text_line(prompt=["Hello", "you"], n=2), prefix="Oh ")
    (other,) = first.others
    assert (first.text, other.text) == ("Oh Hello", "Oh you")
    assert (first.position, other.position, other.others) == (0, 1, ())
    assert (other.settings, other.row, other.id) == (first.settings, first.row, first.id)
    ids = good(text_line(prompt=[[1, 2], [3], [4]]))
    assert [prompt.token_ids for prompt in (ids, *ids.others)] == [[1, 2], [3], [4]]


def test_a_bad_line_is_known_for_one() -> None:
    assert bad("bad_parameters", chat_line(n=0)).is_openai_line
    assert bad("bad_openai_line", batch_line(None)).is_openai_line
    assert not bad("bad_parameters", {"prompt": "x", "n": 0}).is_openai_line


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (batch_line({}, custom_id=1), "custom_id is 1"),
        (batch_line({}, method="GET"), "method is 'GET'"),
        (batch_line({}, method=["POST"]), "method is ['POST']"),
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
        ("bad_prompt", text_line(prompt=["a", 1]), "body.prompt[1] is 1; it must be a string"),
        ("bad_prompt", text_line(prompt=[[1], [-2]]), "body.prompt[1] is [-2]; it must be a list"),
        ("empty_prompt", text_line(prompt=["a", "b", ""]), "body.prompt[2] is empty"),
        ("empty_prompt", text_line(prompt=[[]]), "body.prompt[0] is empty"),
        ("empty_prompt", text_line(prompt=""), "body.prompt is empty"),
        ("empty_prompt", text_line(prompt=[]), "body.prompt is empty"),
        ("bad_parameters", chat_line(stream=True), "body.stream is True"),
        ("bad_parameters", chat_line(temperature=-1), "body.temperature is -1"),
        ("bad_parameters", chat_line(n=0), "body.n is 0"),
        ("bad_parameters", chat_line(logprobs=1), "body.logprobs is 1; it must be true or false"),
        ("bad_parameters", chat_line(logprobs=True, top_logprobs=21), "body.top_logprobs is 21"),
        ("bad_parameters", chat_line(logprobs=True, top_logprobs="2"), "body.top_logprobs is '2'"),
        ("bad_parameters", chat_line(logprobs=True, top_logprobs=True), "body.top_logprobs is Tr"),
        ("bad_parameters", chat_line(top_logprobs=2), "top_logprobs is 2, without body.logprobs"),
        ("bad_parameters", chat_line(prompt_logprobs=21), "body.prompt_logprobs is 21"),
        ("bad_parameters", chat_line(reasoning_effort="huge"), "body.reasoning_effort is 'huge'"),
        ("bad_parameters", chat_line(reasoning_effort=["low"]), "body.reasoning_effort is"),
        ("bad_parameters", chat_line(modalities=["audio"]), "body.modalities is ['audio']"),
        ("bad_parameters", chat_line(tools={}), "body.tools is {}; it must be a list"),
        ("bad_parameters", chat_line(tool_choice="any"), "body.tool_choice is 'any'; it must be"),
        ("bad_parameters", text_line(prompt="x", logprobs=True), "body.logprobs is True"),
        ("bad_parameters", text_line(prompt="x", echo="yes"), "body.echo is 'yes'"),
        ("bad_parameters", text_line(prompt="x", tools=[TOOL]), "tools needs messages"),
        ("bad_tools", chat_line(tools=[{"type": "custom"}]), "body.tools[0].type is 'custom'"),
        ("unknown_setting", text_line(prompt="x", top_logprobs=1), "use 'logprobs'"),
        ("unknown_setting", text_line(prompt="x", reasoning_effort="none"), "'reasoning_effort'"),
        ("unknown_setting", text_line(prompt="x", suffix="y"), "'suffix'"),
        ("unknown_setting", chat_line(echo=True), "'echo'"),
        ("unknown_setting", chat_line(functions=[]), "use 'tools'"),
        ("unknown_setting", chat_line(stream_options={}), "'stream_options'"),
        ("unknown_setting", chat_line(web_search_options={}), "'web_search_options'"),
        ("unknown_setting", chat_line(audio={}), "'audio'"),
        ("unknown_setting", chat_line(verbosity="low"), "'verbosity'"),
        ("unknown_setting", chat_line(temprature=1), "did you mean 'temperature'"),
        ("unknown_setting", chat_line(anything=1), "'anything' is not supported"),
    ],
)
def test_a_bad_body_is_named(code: str, columns: dict[str, Any], words: str) -> None:
    bad(code, columns, words)
