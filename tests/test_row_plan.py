"""What rows and flags ask of the tokens, through the command: the same by either, and in effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from .cli import MODEL, Run, call, generate, read_rows, run, write_rows

RAW = "Q: 46 to 52\nA:"  # the answer is the numbers between
CHAT = [{"role": "user", "content": "Add 3 and 4."}]
SIX = 21  # the token of the digit

# A row's fields, and the flags that ask for the same of all rows.
ASKED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "repetition_penalty": ({"repetition_penalty": 1.9}, ("--repetition-penalty", "1.9")),
    "presence_penalty": ({"presence_penalty": 2}, ("--presence-penalty", "2")),
    "frequency_penalty": ({"frequency_penalty": 2}, ("--frequency-penalty", "2")),
    "logit_bias": ({"logit_bias": {f"{SIX}": -100}}, ("--logit-bias", f'{{"{SIX}": -100}}')),
    "bad_words": ({"bad_words": ["twice", "8"]}, ("--bad-word", "twice", "--bad-word", "8")),
    "truncate": ({"truncate_prompt_tokens": 9}, ("--truncate-prompt-tokens", "9")),
    "logprobs": ({"logprobs": 2}, ("--logprobs", "2")),
    "prompt_logprobs": ({"prompt_logprobs": 0}, ("--prompt-logprobs", "0")),
    "best_of": ({"best_of": 4}, ("--best-of", "4")),
}
# Greedy, the sample model is so sure that a penalty would change nothing.
HOT = ("--temperature", "3", "--ignore-eos")
GREEDY = ("--temperature", "0", "--max-tokens", "40")
RESULTS = ("completion", "reasoning", "finish_reason", "logprobs", "prompt_logprobs", "usage")


def rows_of(source: Path, *flags: str) -> list[dict[str, Any]]:
    """The results of the rows, without what the rows brought."""
    ended = generate(source, "-q", "--max-tokens", "40", *HOT, *flags)
    assert ended.code == 0, ended
    return [{name: row[name] for name in RESULTS if name in row} for row in ended.rows]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": RAW}, {"prompt": "Q: 3+4=\nA:"}]
    return write_rows(tmp_path_factory.mktemp("rows") / "in.jsonl", rows)


@pytest.fixture(scope="module")
def plain(source: Path) -> list[dict[str, Any]]:
    return rows_of(source)


@pytest.mark.parametrize("name", ASKED)
def test_a_flag_asks_of_all_rows_what_a_field_asks_of_one(
    name: str, source: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    fields, flags = ASKED[name]
    own = write_rows(tmp_path / "in.jsonl", [{**row, **fields} for row in read_rows(source)])
    by_flag = rows_of(source, *flags)
    assert by_flag == rows_of(own)
    assert by_flag[0] != plain[0]


def test_a_bias_and_a_bad_word_keep_tokens_away(source: Path) -> None:
    assert "6" not in rows_of(source, *ASKED["logit_bias"][1])[0]["completion"]
    banned = rows_of(source, *ASKED["bad_words"][1])[0]["completion"]
    assert "twice" not in banned
    assert "8" not in banned


def test_log_probabilities_leave_the_text_as_it_is(
    source: Path, plain: list[dict[str, Any]]
) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        for row, alone in zip(rows_of(source, *ASKED[name][1]), plain, strict=True):
            logprobs = row.pop(name)
            assert row == alone
            count = "completion_tokens" if name == "logprobs" else "prompt_tokens"
            assert len(logprobs) == row["usage"][count]
            assert all((entry["logprob"] or 0) <= 0 for entry in logprobs)


def test_the_same_text_has_the_same_log_probabilities_as_a_prompt_and_a_completion(
    source: Path, tmp_path: Path
) -> None:
    completed = rows_of(source, "--logprobs", "0")[0]["logprobs"]
    # As token ids: the whole text could be tokenized otherwise.
    prompt = rows_of(source, "--prompt-logprobs", "0")[0]["prompt_logprobs"]
    token_ids = [entry["token_id"] for entry in prompt + completed]
    whole = write_rows(tmp_path / "in.jsonl", [{"prompt_token_ids": token_ids}])
    (row,) = rows_of(whole, "--prompt-logprobs", "0")
    found = [entry["logprob"] for entry in row["prompt_logprobs"][len(prompt) :]]
    assert found == pytest.approx([entry["logprob"] for entry in completed], abs=1e-4)


def test_the_kept_sample_is_the_likeliest_of_those_drawn(source: Path) -> None:
    flags = (*HOT, "--logprobs", "0")
    ended = generate(source, "-q", "--n", "6", *flags, "--max-tokens", "9")
    every = ended.rows[0]["completions"]
    means = [sum(e["logprob"] for e in s["logprobs"]) / len(s["logprobs"]) for s in every]
    assert len({*means}) == 6
    kept = generate(source, "-q", "--best-of", "6", *flags, "--max-tokens", "9").rows[0]
    assert kept["completion"] == every[means.index(max(means))]["completion"]
    assert kept["usage"] == ended.rows[0]["usage"]


def test_a_budget_closes_the_thoughts_of_the_chats_that_think(tmp_path: Path) -> None:
    quick = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [{"messages": CHAT}, {"messages": CHAT, **quick}, {"prompt": RAW}]
    given = write_rows(tmp_path / "in.jsonl", rows)
    thinking, *others = rows_of(given, *GREEDY)
    for budget in (0, 2, 5):
        cut, *same = rows_of(given, *GREEDY, "--thinking-budget", str(budget))
        assert same == others
        assert thinking["reasoning"].startswith(cut["reasoning"])
        assert len(cut["reasoning"]) < len(thinking["reasoning"])
    (own, *_) = rows_of(
        write_rows(tmp_path / "own.jsonl", [{"messages": CHAT, "thinking_budget": 5}]),
        *(*GREEDY, "--thinking-budget", "0"),
    )
    assert own == cut


def test_the_models_own_repetition_penalty_is_a_default(
    source: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        if path.name != "generation_config.json":
            (model / path.name).symlink_to(path)
    config = json.loads((MODEL / "generation_config.json").read_bytes())
    own = {**config, "repetition_penalty": 1.9}
    (model / "generation_config.json").write_text(json.dumps(own))

    def texts(*flags: str) -> list[str]:
        fixed = ("--model", model, "-q", "--max-tokens", "40", *HOT)
        ended = call("generate", source, *fixed, *flags)
        assert ended.code == 0, ended
        return [row["completion"] for row in ended.rows]

    assert texts("--repetition-penalty", "1") == [row["completion"] for row in plain]
    assert texts() == [
        row["completion"] for row in rows_of(source, *ASKED["repetition_penalty"][1])
    ]


def test_rows_that_cannot_be_are_found_by_a_dry_run_too(tmp_path: Path) -> None:
    quick = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [
        {"prompt": RAW},
        {"prompt": RAW, "best_of": 2},  # the sample model is greedy
        {"prompt": RAW, "best_of": 2, "n": 3, "temperature": 1},
        {"prompt": RAW, "logit_bias": {"9999": 1}},
        {"prompt": RAW, "bad_words": ["a very long word that has more tokens than sixteen"]},
        {"messages": CHAT, "thinking_budget": 5, **quick},
        {"prompt_token_ids": [5] * 9000, "truncate_prompt_tokens": 8},
    ]
    given = write_rows(tmp_path / "in.jsonl", rows)
    ended = generate(given, "-o", tmp_path / "out.jsonl", "--max-tokens", "2")
    assert ended.code == 3
    report = generate(given, "--dry-run", "--max-tokens", "2")
    assert report.code == 3
    assert "2 good, 5 bad" in report.stderr
    assert "5 bad_parameters" in report.stderr
    assert "at most 4 " in report.stderr  # completion tokens, of two rows


def test_a_bad_word_of_too_many_tokens_ends_the_job(source: Path) -> None:
    ended = generate(source, "--bad-word", "a very long word that has more tokens than sixteen")
    assert (ended.code, ended.stdout) == (2, b"")
    assert "--bad-word" in ended.stderr


def test_the_engines_own_process_gives_the_same(source: Path, tmp_path: Path) -> None:
    stopped = [
        {"prompt": RAW, "stop": " 49", "logprobs": 1, "prompt_logprobs": 2, "bad_words": ["47"]},
        {"prompt": RAW, "best_of": 3, "n": 2, "temperature": 2, "max_tokens": 5},
        {"messages": CHAT, "thinking_budget": 2, "frequency_penalty": 1, "logit_bias": {"5": 9}},
    ]
    given = write_rows(tmp_path / "in.jsonl", stopped)
    flags = ("generate", given, "--model", MODEL, "--max-tokens", "30", "-q")
    apart: Run = run(*flags)
    assert apart.code == 0, apart
    assert apart.stdout == call(*flags).stdout
