"""The shipped sample data through the real command: right answers, whole rows, equal bytes."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer

from .cli import MODEL, SAMPLE, Run, generate, read_rows, run

# The files with answers: what each is turned into, and the flags of its run.
OUTPUTS = {
    "prompts.jsonl": ("prompts.out.jsonl",),
    "prompts.parquet": ("parquet.out.parquet",),
    "openai_batch.jsonl": ("openai.out.jsonl",),
    "shared_prefix.jsonl": ("shared_64.out.jsonl", "--block-size", "64"),
}
BAD_CODES = {
    2: "invalid_json",
    3: "invalid_json",
    4: "invalid_json",
    5: "invalid_json",
    7: "empty_prompt",
    8: "no_prompt",
    9: "bad_prompt",
    10: "bad_messages",
    11: "bad_messages",
    12: "bad_messages",
    14: "unknown_setting",
    15: "bad_parameters",
    16: "bad_parameters",
    17: "bad_parameters",
    18: "bad_token_ids",
    19: "bad_prompt",
    20: "not_an_object",
    21: "prompt_too_long",
    22: "duplicate_id",
    24: "bad_prompt",
}
OTHER_SETTINGS = (
    *("--max-num-seqs", "7", "--max-inflight", "9", "--max-num-batched-tokens", "300"),
    *("--no-prefix-caching", "--block-size", "16"),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample_data")


@pytest.fixture(scope="session")
def runs(folder: Path) -> dict[str, Run]:
    """Every run that the tests look at, by its output's name: of the real command first of all.

    What is only compared with one of these is run in this process, while they run.
    """
    prompts = SAMPLE / "prompts.jsonl"
    bad_rows = SAMPLE / "bad_rows.jsonl"
    good_rows = folder / "good_rows.jsonl"
    lines = bad_rows.read_bytes().splitlines(keepends=True)
    good_rows.write_bytes(b"".join(lines[number - 1] for number in good_line_numbers()))
    sampled = ("--temperature", "2", "--seed", "5", "--limit", "96")
    real: dict[str, tuple[Path, tuple[str, ...]]] = {
        **{name: (SAMPLE / file, flags) for file, (name, *flags) in OUTPUTS.items()},
        "bad_rows.out.jsonl": (bad_rows, ()),
        "sampled.out.jsonl": (prompts, sampled),
    }
    in_process: dict[str, tuple[Path, tuple[str, ...]]] = {
        "shared_16.out.jsonl": (SAMPLE / "shared_prefix.jsonl", ("--block-size", "16")),
        "good_rows.out.jsonl": (good_rows, ()),
        "prompts_again.out.jsonl": (prompts, OTHER_SETTINGS),
        "sampled_otherwise.out.jsonl": (prompts, (*sampled, *OTHER_SETTINGS)),
    }
    with ThreadPoolExecutor(1) as pool:
        started = {
            name: pool.submit(
                partial(run, "generate", source, "-o", folder / name, "--model", MODEL, *flags)
            )
            for name, (source, flags) in real.items()
        }
        ended = {
            name: generate(source, "-o", folder / name, *flags)
            for name, (source, flags) in in_process.items()
        }
        return {**ended, **{name: future.result() for name, future in started.items()}}


def good_line_numbers() -> list[int]:
    expected = json.loads((SAMPLE / "bad_rows.expected.json").read_bytes())
    return [int(number) for number, reason in expected.items() if reason == "ok"]


def bad_line_numbers() -> list[int]:
    expected = json.loads((SAMPLE / "bad_rows.expected.json").read_bytes())
    return [int(n) for n, reason in expected.items() if reason not in ("ok", "blank line")]


def output_rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else read_rows(path)


def completion_of(row: dict[str, Any]) -> str:
    if "response" not in row:
        return row["completion"]
    choice = row["response"]["body"]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def answers_to(file: str, rows: list[dict[str, Any]]) -> list[str]:
    if file != "openai_batch.jsonl":
        return [row["answer"] for row in rows]
    answers = json.loads((SAMPLE / "openai_batch_answers.json").read_bytes())
    return [answers[row["custom_id"]] for row in rows]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    return row["body"].get("messages") if "body" in row else row.get("messages")


def thinks(row: dict[str, Any]) -> bool:
    arguments = row.get("chat_template_kwargs") or {}
    return messages_of(row) is not None and arguments.get("enable_thinking", True)


def test_the_model_is_no_larger_than_8_mb() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) <= 8_000_000


def test_the_shipped_prompts_are_all_completed(runs: dict[str, Run]) -> None:
    for name, ended in runs.items():
        assert ended.code == (3 if name == "bad_rows.out.jsonl" else 0), (name, ended.stderr)
        assert ended.stdout == b"", name


@pytest.mark.parametrize("file", OUTPUTS)
def test_at_least_95_percent_of_the_shipped_prompts_are_answered_right(
    file: str, runs: dict[str, Run], folder: Path
) -> None:
    rows = output_rows(folder / OUTPUTS[file][0])
    answers = answers_to(file, rows)
    wrong = [
        (row.get("id") or row.get("custom_id"), completion_of(row), answer)
        for row, answer in zip(rows, answers, strict=True)
        if completion_of(row).strip() != answer
    ]
    assert len(wrong) <= 0.05 * len(rows), wrong


def test_jsonl_rows_travel_through_byte_for_byte_and_in_order(
    runs: dict[str, Run], folder: Path
) -> None:
    for file in ("prompts.jsonl", "shared_prefix.jsonl"):
        given = (SAMPLE / file).read_bytes().splitlines()
        written = (folder / OUTPUTS[file][0]).read_bytes().splitlines()
        for before, after in zip(given, written, strict=True):
            assert after.startswith(before.removesuffix(b"}") + b',"completion":')
            added = list(json.loads(after))[len(json.loads(before)) :]
            assert added == ["completion", "reasoning", "finish_reason", "usage"]


def test_parquet_columns_travel_through_with_their_types_and_in_order(
    runs: dict[str, Run], folder: Path
) -> None:
    given = pq.read_table(SAMPLE / "prompts.parquet")
    written = pq.read_table(folder / OUTPUTS["prompts.parquet"][0])
    assert written.select(given.column_names).equals(given)
    assert written.column_names[len(given.column_names) :] == [
        *("completion", "reasoning", "finish_reason", "usage")
    ]


def test_rows_of_token_ids_are_completed(runs: dict[str, Run], folder: Path) -> None:
    rows = read_rows(folder / OUTPUTS["prompts.jsonl"][0])
    found = [row for row in rows if "prompt_token_ids" in row]
    assert len(found) == 64
    for row in found:
        assert row["usage"]["prompt_tokens"] == len(row["prompt_token_ids"])
        assert row["finish_reason"] == "stop"
        assert row["completion"].strip()


@pytest.mark.parametrize("file", ["prompts.jsonl", "prompts.parquet", "shared_prefix.jsonl"])
def test_thinking_is_split_off_the_answer(file: str, runs: dict[str, Run], folder: Path) -> None:
    rows = [
        row
        for row in output_rows(folder / OUTPUTS[file][0])
        if not row.get("prompt_token_ids")  # these may hold either
    ]
    assert {thinks(row) for row in rows} == {True, False}
    for row in rows:
        if thinks(row):
            assert row["reasoning"], row
            assert "think>" not in row["reasoning"] + row["completion"]
        else:
            assert row["reasoning"] is None, row


def test_openai_lines_give_openai_lines_in_order(runs: dict[str, Run], folder: Path) -> None:
    given = read_rows(SAMPLE / "openai_batch.jsonl")
    written = read_rows(folder / OUTPUTS["openai_batch.jsonl"][0])
    assert [row["custom_id"] for row in written] == [row["custom_id"] for row in given]
    assert len({row["id"] for row in written}) == len(written)
    for request, line in zip(given, written, strict=True):
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        body = line["response"]["body"]
        assert body["model"] == request["body"]["model"]
        assert body["created"] == 0  # no time in a row: two runs are the same
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        (choice,) = body["choices"]
        assert choice["index"] == 0
        assert choice["finish_reason"] == "stop"
        kind = Completion if request["url"] == "/v1/completions" else ChatCompletion
        kind.model_validate(body, strict=True)  # the official package's
        if request["url"] == "/v1/completions":
            assert body["object"] == "text_completion"
            assert choice["text"]
        else:
            assert body["object"] == "chat.completion"
            assert choice["message"]["role"] == "assistant"
            assert choice["message"]["reasoning_content"]


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_cached_tokens_are_the_shared_blocks_and_no_others(
    block_size: int, runs: dict[str, Run], folder: Path
) -> None:
    prompts = shared_prefix_prompts()
    everywhere = num_shared(prompts) // block_size * block_size
    assert everywhere >= 512
    stats = json.loads((folder / f"shared_{block_size}.out.jsonl.stats.json").read_bytes())
    assert stats["tokens"]["prompt"] == sum(map(len, prompts))
    cached = stats["tokens"]["cached"]
    assert cached == sum(cached_by_hand(prompts, block_size))
    # What all rows share; some share a block more with a row before them.
    assert cached >= everywhere * (len(prompts) - 1)
    assert stats["tokens"]["prefix_hit_rate"] == pytest.approx(
        cached / sum(map(len, prompts)), abs=1e-4
    )


def shared_prefix_prompts() -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    return [
        tokenizer.apply_chat_template(
            row["messages"],
            add_generation_prompt=True,
            return_dict=False,
            **row.get("chat_template_kwargs", {}),
        )
        for row in read_rows(SAMPLE / "shared_prefix.jsonl")
    ]


def num_shared(prompts: list[list[int]]) -> int:
    """Tokens with which all of `prompts` begin."""
    columns = list(zip(*prompts, strict=False))
    return next((at for at, ids in enumerate(columns) if len(set(ids)) > 1), len(columns))


def cached_by_hand(prompts: list[list[int]], block_size: int) -> Iterator[int]:
    """For each prompt, the whole blocks that one before it begins with; one token is always run."""
    seen: set[tuple[int, ...]] = set()
    for ids in prompts:
        ends = range(block_size, len(ids) + 1, block_size)
        yield max((e for e in ends if e < len(ids) and tuple(ids[:e]) in seen), default=0)
        seen.update(tuple(ids[:end]) for end in ends)


def test_exactly_the_bad_rows_fail_and_each_says_why(runs: dict[str, Run], folder: Path) -> None:
    lines = (SAMPLE / "bad_rows.jsonl").read_bytes().splitlines()
    errors = read_rows(folder / "bad_rows.out.jsonl.errors.jsonl")
    assert [error["line"] for error in errors] == bad_line_numbers()
    assert {error["line"]: error["error"]["code"] for error in errors} == BAD_CODES
    for error in errors:
        assert error["source"].endswith("bad_rows.jsonl")
        assert error["error"]["message"]
        if error["line"] != 20:  # a list, which has no id
            assert f'"id": "{error["id"]}"'.encode() in lines[error["line"] - 1]
    stats = json.loads((folder / "bad_rows.out.jsonl.stats.json").read_bytes())
    assert stats["exit_code"] == 3
    assert stats["rows"]["completed"] == len(good_line_numbers())
    assert stats["rows"]["failed"] == len(errors)


def test_the_good_rows_do_not_notice_the_bad_ones(runs: dict[str, Run], folder: Path) -> None:
    written = (folder / "bad_rows.out.jsonl").read_bytes()
    assert written.count(b"\n") == len(good_line_numbers())
    assert written == (folder / "good_rows.out.jsonl").read_bytes()
    assert not (folder / "good_rows.out.jsonl.errors.jsonl").exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("prompts.out.jsonl", "prompts_again.out.jsonl"),
        ("sampled.out.jsonl", "sampled_otherwise.out.jsonl"),
        ("shared_64.out.jsonl", "shared_16.out.jsonl"),
    ],
)
def test_two_runs_are_byte_identical_whatever_the_batch_and_the_cache(
    one: str, other: str, runs: dict[str, Run], folder: Path
) -> None:
    assert (folder / one).read_bytes() == (folder / other).read_bytes()


def test_a_temperature_changes_the_output(runs: dict[str, Run], folder: Path) -> None:
    greedy = read_rows(folder / "prompts.out.jsonl")[:96]
    sampled = read_rows(folder / "sampled.out.jsonl")
    assert len(sampled) == 96
    pairs = zip(greedy, sampled, strict=True)
    assert sum(one["completion"] != other["completion"] for one, other in pairs) > 10


def test_only_outputs_and_statistics_are_left(runs: dict[str, Run], folder: Path) -> None:
    expected = {"good_rows.jsonl", "bad_rows.out.jsonl.errors.jsonl"}
    expected |= {name for output in runs for name in (output, f"{output}.stats.json")}
    assert {path.name for path in folder.iterdir()} == expected
