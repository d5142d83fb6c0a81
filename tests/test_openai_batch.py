"""A batch file that uses what OpenAI's bodies have, through the command: answers and errors."""

from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from .cli import Run, generate, read_rows, write_rows
from .parsing import TOOL
from .schemas import check_json

QUESTION = {"role": "user", "content": "Add 3 and 4."}
RAW = "Q: 46 to 52\nA:"  # the answer is the numbers between
SUM = "Q: 3+4=\nA:"
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}

TURN = {
    "type": "object",
    "properties": {
        "to": {"enum": ["left", "right"]},
        "degrees": {"type": "integer", "maximum": 90},
    },
    "required": ["to"],
    "additionalProperties": False,
}
TURN_TOOL = {"type": "function", "function": {"name": "turn", "parameters": TURN, "strict": True}}
TURN_CHOICE = {"type": "function", "function": {"name": "turn"}}


def chat(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "m", "messages": [QUESTION], "max_tokens": 9, **body}


def text(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "m", "prompt": RAW, "max_tokens": 9, **body}


GOOD = {
    "plain": chat(),
    "two": chat(n=2, temperature=1.5, seed=3, top_p=0.9),
    "fast": chat(reasoning_effort="none", max_tokens=None, max_completion_tokens=20),
    "budget": chat(thinking_budget=2),
    "logprobs": chat(logprobs=True, top_logprobs=2),
    "no logprobs": chat(logprobs=False, temperature=0, stream=False),
    "tools": chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=True),
    "forced": chat(
        **{"tools": [TURN_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        **{"reasoning_effort": "none", "max_tokens": 80, "n": 2, "temperature": 1},
    ),
    "named": chat(
        **{"tools": [TOOL, TURN_TOOL], "tool_choice": TURN_CHOICE, "parallel_tool_calls": False},
        **{"max_tokens": 80, "thinking_budget": 5},
    ),
    "called": chat(
        tools=[TOOL],
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Add 3 and 4.", "name": "Ann"},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
    ),
    "penalties": chat(presence_penalty=1, frequency_penalty=-1, logit_bias={"5": -100}),
    "ignored": chat(user="x", metadata={"a": "b"}, store=True, service_tier="auto"),
    "text": text(),
    "one of a list": text(prompt=[RAW]),
    "echo": text(echo=True),
    "echo logprobs": text(echo=True, logprobs=1),
    "text logprobs": text(logprobs=2, max_tokens=None),
    "stop": text(stop=[" 48", "zzz"], logprobs=0, max_tokens=40),
    "best": text(best_of=3, n=2, temperature=1.5, logprobs=1),
    "sum": text(prompt=SUM),
    "ids": text(prompt=[9, 8, 7]),
    "several": text(prompt=[RAW, SUM, RAW]),
    "several ids": text(prompt=[[9, 8, 7], [5]]),
    "several echoed": text(prompt=[RAW, SUM], echo=True, logprobs=1, stop=" 48"),
    "several scored": text(prompt=[RAW, SUM], prompt_logprobs=0),
    "several best": text(prompt=[RAW, RAW], best_of=3, n=2, temperature=4, seed=5, ignore_eos=True),
}
BAD = {
    "stream": (chat(stream=True), "bad_parameters"),
    "no tools": (chat(tool_choice="required"), "bad_parameters"),
    "unknown": (chat(web_search_options={}), "unknown_setting"),
    "suffix": (text(suffix="x"), "unknown_setting"),
    "empty": (text(prompt=["a", ""]), "empty_prompt"),
    "many": (text(prompt=["a"] * 9, n=128, temperature=1), "bad_parameters"),
    "one too long": (text(prompt=[[5], [5] * 5000, [5]]), "prompt_too_long"),
    "greedy": (text(best_of=3, temperature=0), "bad_parameters"),
    "long": (text(prompt=[5] * 5000), "prompt_too_long"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openai_batch")


@pytest.fixture(scope="module")
def ended(folder: Path) -> Run:
    asked = {**GOOD, **{name: request for name, (request, _) in BAD.items()}}
    rows = [
        {"custom_id": name, "method": "POST", "url": url, "body": body}
        for name, (url, body) in asked.items()
    ]
    return generate(write_rows(folder / "in.jsonl", rows), "-o", folder / "out.jsonl")


@pytest.fixture(scope="module")
def bodies(ended: Run, folder: Path) -> dict[str, Any]:
    assert ended.code == 3, ended
    rows = read_rows(folder / "out.jsonl")
    assert [row["custom_id"] for row in rows] == [*GOOD]
    return {row["custom_id"]: row["response"]["body"] for row in rows}


def test_the_official_package_reads_every_body(bodies: dict[str, Any]) -> None:
    for name, body in bodies.items():
        kind = ChatCompletion if body["object"] == "chat.completion" else Completion
        if (
            "echo" not in name or "logprobs" not in GOOD[name][1]
        ):  # the first is null, as OpenAI has it and its package has not
            kind.model_validate(body, strict=True)
        assert (body["object"] == "chat.completion") == (GOOD[name][0] == "/v1/chat/completions")


def test_several_choices_are_counted_together(bodies: dict[str, Any]) -> None:
    assert [choice["index"] for choice in bodies["two"]["choices"]] == [0, 1]
    assert bodies["two"]["usage"]["completion_tokens"] == 2 * 9
    assert len(bodies["best"]["choices"]) == 2
    assert bodies["best"]["usage"]["completion_tokens"] == 3 * 9
    means = [
        sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
        for choice in bodies["best"]["choices"]
    ]
    assert means == sorted(means, reverse=True)


def test_a_thought_is_left_out_or_cut_short(bodies: dict[str, Any]) -> None:
    (fast,) = bodies["fast"]["choices"]
    assert "reasoning_content" not in fast["message"]
    assert (fast["message"]["content"].strip(), fast["finish_reason"]) == ("7", "stop")
    (plain,) = bodies["plain"]["choices"]
    assert plain["finish_reason"] == "length"  # in the thought
    assert (plain["message"]["content"], len(plain["message"]["reasoning_content"]) > 3) == ("", 1)
    (budget,) = bodies["budget"]["choices"]
    assert plain["message"]["reasoning_content"].startswith(budget["message"]["reasoning_content"])
    assert budget["message"]["content"]


def test_a_forced_call_is_all_that_a_chat_says(bodies: dict[str, Any]) -> None:
    for choice in [*bodies["forced"]["choices"], *bodies["named"]["choices"]]:
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "turn"
        check_json(call["function"]["arguments"], TURN)
    assert bodies["named"]["choices"][0]["message"]["reasoning_content"]


def test_every_token_of_a_chat_has_its_log_probability(bodies: dict[str, Any]) -> None:
    content = bodies["logprobs"]["choices"][0]["logprobs"]["content"]
    assert len(content) == bodies["logprobs"]["usage"]["completion_tokens"] == 9
    for entry in content:
        likeliest, second = entry["top_logprobs"]
        assert (entry["token"], entry["logprob"]) == (likeliest["token"], likeliest["logprob"])
        assert 0 >= likeliest["logprob"] >= second["logprob"]
    assert content[0]["token"] == "<think>"
    assert bodies["no logprobs"]["choices"][0]["logprobs"] is None


def test_a_completions_columns_fit_its_text(bodies: dict[str, Any]) -> None:
    for name in ("text logprobs", "best"):
        for choice in bodies[name]["choices"]:
            found = choice["logprobs"]
            text = "".join(found["tokens"]).removesuffix("<|endoftext|>")
            assert text == choice["text"]
            starts = [sum(map(len, found["tokens"][:n])) for n in range(len(found["tokens"]))]
            assert found["text_offset"] == starts
    tokens = bodies["text logprobs"]["choices"][0]["logprobs"]
    assert tokens["tokens"][-1] == "<|endoftext|>"
    assert all(len(top) == 2 for top in tokens["top_logprobs"])  # the drawn one is among them


def test_a_stop_string_cuts_the_text_and_ends_the_columns(bodies: dict[str, Any]) -> None:
    (choice,) = bodies["stop"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" 46 47", "stop")
    assert "".join(choice["logprobs"]["tokens"]) == " 46 47 48"
    assert bodies["stop"]["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"])


def test_an_echo_and_a_list_of_one_change_nothing_else(bodies: dict[str, Any]) -> None:
    (plain,) = bodies["text"]["choices"]
    assert bodies["echo"]["choices"][0]["text"] == RAW + plain["text"]
    assert bodies["one of a list"]["choices"][0]["text"] == plain["text"]
    assert bodies["ignored"]["choices"] == bodies["plain"]["choices"]


def test_an_echoed_prompt_has_log_probabilities_too(bodies: dict[str, Any]) -> None:
    (choice,) = bodies["echo logprobs"]["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == bodies["echo"]["choices"][0]["text"]
    assert len(found["tokens"]) == bodies["echo logprobs"]["usage"]["total_tokens"]
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert all(value <= 0 for value in found["token_logprobs"][1:])


def test_several_prompts_are_answered_in_one_body_as_each_is_alone(
    bodies: dict[str, Any],
) -> None:
    def texts(name: str) -> list[str]:
        choices = bodies[name]["choices"]
        assert [choice["index"] for choice in choices] == [*range(len(choices))]
        return [choice["text"] for choice in choices]

    assert texts("several") == [*texts("text"), *texts("sum"), *texts("text")]
    assert texts("several ids")[0] == texts("ids")[0]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        once = bodies["text"]["usage"][count]
        assert bodies["several"]["usage"][count] == 2 * once + bodies["sum"]["usage"][count]


def test_choices_of_several_prompts_are_in_their_order(bodies: dict[str, Any]) -> None:
    for prompt, choice in zip((RAW, SUM), bodies["several echoed"]["choices"], strict=True):
        assert choice["text"].startswith(prompt)
        assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
    assert bodies["several echoed"]["choices"][0]["text"] == f"{RAW} 46 47"
    scored = bodies["several scored"]["prompt_logprobs"]
    for prompt, tokens in zip((RAW, SUM), scored, strict=True):
        assert "".join(token["token"] for token in tokens) == prompt
    best = bodies["several best"]
    assert len(best["choices"]) == 4
    assert len({choice["text"] for choice in best["choices"]}) == 4  # each with a seed of its own
    assert best["usage"]["completion_tokens"] == 6 * 9


def test_every_failed_line_is_in_the_errors_file(ended: Run, folder: Path) -> None:
    errors = read_rows(folder / "out.jsonl.errors.jsonl")
    assert [row["custom_id"] for row in errors] == [*BAD]
    for row in errors:
        _, code = BAD[row["custom_id"]]
        assert row["error"]["code"] == row["response"]["body"]["error"]["code"] == code
        assert row["response"]["status_code"] == 400
    assert len({row["id"] for row in errors}) == len(errors)


def test_a_dry_run_counts_every_prompt(bodies: dict[str, Any], folder: Path) -> None:
    ended = generate(folder / "in.jsonl", "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in ended.stderr.splitlines() if line.strip())
    assert lines["rows"].strip() == f"{len(GOOD)} good, {len(BAD)} bad"
    num_tokens = sum(body["usage"]["prompt_tokens"] for body in bodies.values())
    assert f"tokens {num_tokens}," in " ".join(ended.stderr.split())


def test_a_second_run_writes_the_same_bytes(ended: Run, folder: Path) -> None:
    again = generate(folder / "in.jsonl", "-o", folder / "again.jsonl", "--max-num-seqs", "3")
    assert again.code == 3
    for name in ("{}.jsonl", "{}.jsonl.errors.jsonl"):
        first, second = (folder / name.format(stem) for stem in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()
