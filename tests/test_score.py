"""`nanovllm score`: what is scored of a row, as a job with an engine that needs no model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanovllm_cli.core.request import Completion, Logprobs, Request
from nanovllm_cli.exit_code import ExitCode
from nanovllm_cli.feeder import TokenizedPrompt, tokenize
from nanovllm_cli.output_columns import SCORE_COLUMNS, OutputColumns
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.row_plan import RowPlan
from nanovllm_cli.rows import BadRow, Row
from nanovllm_cli.score import score_line
from nanovllm_cli.score_command import SAMPLING
from nanovllm_cli.shard import Shard
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL, call, read_rows, write_rows
from .fake_engine import FakeEngine
from .job_folder import JobFolder
from .parsing import USER, bad, chat_line, good

SCORED: dict[str, Any] = {"pair_columns": ("context", "continuation")}
OPTIONS: dict[str, Any] = {"prompt": PromptOptions(**SCORED), "sampling": SAMPLING}
RESULTS = ["logprob", "num_scored_tokens", "perplexity", "is_greedy"]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(MODEL)


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def tokens(
    columns: dict[str, Any], tokenizer: PromptTokenizer, **options: Any
) -> tuple[list[int], int | None]:
    """The tokens of a row, and which is the first to be scored."""
    (fed,) = tokenize([good(columns, **SCORED, **options)], tokenizer)
    assert isinstance(fed, TokenizedPrompt), fed
    return fed.token_ids, fed.first_scored


def refusal(columns: dict[str, Any], tokenizer: PromptTokenizer) -> BadRow:
    (fed,) = tokenize([good(columns, **SCORED)], tokenizer)
    assert isinstance(fed, BadRow), fed
    return fed


# --- rows


def test_a_pair_is_one_text_whose_context_ends_in_no_white_space() -> None:
    prompt = good({"context": "a \n", "continuation": " b"}, **SCORED)
    assert (prompt.context, prompt.text) == ("a", "a \n b")
    prompt = good({"context": "", "continuation": "b"}, **SCORED)
    assert (prompt.context, prompt.text) == ("", "b")


def test_columns_of_a_pair_can_have_other_names() -> None:
    options = {"pair_columns": ("prompt", "answer")}
    prompt = good({"prompt": "a", "answer": " b", "continuation": 1}, **options)
    assert (prompt.context, prompt.text) == ("a", "a b")
    assert good({"prompt": "a"}, **options).context is None


def test_a_context_without_a_continuation_is_data() -> None:
    prompt = good({"context": {"any": 1}, "prompt": "x", "continuation": None}, **SCORED)
    assert (prompt.text, prompt.context) == ("x", None)


def test_what_is_scored_has_no_settings() -> None:
    columns = {"n": "x", "temperature": "hot", "best_of": 4, "max_new_tokens": []}
    assert good({"prompt": "x", **columns}, **SCORED).sampling == {}


@pytest.mark.parametrize(
    ("code", "columns", "words"),
    [
        ("bad_prompt", {"continuation": "b"}, "context is null"),
        ("bad_prompt", {"continuation": "b", "context": 1}, "context is 1"),
        ("bad_prompt", {"continuation": 1, "context": "a"}, "continuation is 1"),
        ("empty_prompt", {"continuation": "", "context": "a"}, "continuation is empty"),
        ("bad_prompt", {"continuation": "b", "context": "a", "prompt": "c"}, "prompt and cont"),
        ("bad_prompt", {"continuation": "b", "context": "a", "messages": [USER]}, "messages and"),
        ("bad_prompt", {"prompt": "b", "messages": [USER]}, "more than one of continuation,"),
        ("no_prompt", {"context": "a"}, "none of continuation, prompt, messages and"),
        ("empty_prompt", {"prompt": ""}, "prompt is empty"),
        ("bad_openai_line", chat_line(), "never scored"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(
    code: str, columns: dict[str, Any], words: str
) -> None:
    bad(code, columns, words, **SCORED)


# --- tokens


@given(context=st.text(max_size=20), continuation=st.text(min_size=1, max_size=9))
def test_pairs_are_tokenized_as_by_lm_evaluation_harness(
    tokenizer: PromptTokenizer, hugging_face: Any, context: str, continuation: str
) -> None:
    columns = {"context": context, "continuation": continuation}
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces:
        continuation = context[-num_spaces:] + continuation
        context = context[:-num_spaces]
    whole = hugging_face.encode(context + continuation)
    context_ids = hugging_face.encode(context)
    if not context:
        context_ids, whole = [hugging_face.eos_token_id], [hugging_face.eos_token_id, *whole]
    if len(whole) > len(context_ids):
        assert tokens(columns, tokenizer) == (whole, len(context_ids))
    else:
        assert refusal(columns, tokenizer).code == "nothing_to_score"


def test_a_text_and_a_chat_are_scored_from_their_second_token_on(
    tokenizer: PromptTokenizer, hugging_face: Any
) -> None:
    assert tokens({"prompt": "a b"}, tokenizer) == (hugging_face.encode("a b"), 1)
    assert tokens({"prompt_token_ids": [5, 6, 7]}, tokenizer) == ([5, 6, 7], 1)
    chat = [USER, {"role": "assistant", "content": "Ho"}]
    whole = hugging_face.apply_chat_template(chat, return_dict=False)
    assert tokens({"messages": chat}, tokenizer) == (whole, 1), "without a turn to be generated"


def test_a_control_token_in_a_pair_is_text_unless_it_is_parsed(hugging_face: Any) -> None:
    columns = {"context": "<|im_start|>", "continuation": "x"}
    ids, first = tokens(columns, PromptTokenizer(MODEL, parse_special=True))
    assert (ids, first) == (hugging_face.encode("<|im_start|>x"), 1)
    ids, first = tokens(columns, PromptTokenizer(MODEL))
    assert first is not None
    assert first > 3
    end = hugging_face.eos_token
    parses = PromptTokenizer(MODEL, parse_special=True)
    ids, first = tokens({"context": "", "continuation": f"{end}x"}, parses)
    assert (ids, first) == (hugging_face.encode(f"{end}x"), 1), "as lm-evaluation-harness has it"


def test_a_single_token_has_nothing_to_score(tokenizer: PromptTokenizer) -> None:
    row = refusal({"prompt_token_ids": [5]}, tokenizer)
    assert row.code == "nothing_to_score"
    assert row.message == "the prompt has 1 tokens, and the first 1 are not scored"


# --- the line


def line_of(values: list[float], top_ids: list[int]) -> dict[str, Any]:
    columns = {"id": 1, "prompt": "x"}
    raw = b'{"prompt": "x"}'
    row = Row(index=0, source="s", line=1, raw=raw, columns=json.loads(raw))
    prompt = to_prompt(row, PromptOptions(**SCORED))
    assert isinstance(prompt, Prompt)
    plan = RowPlan(
        prompt=prompt, token_ids=[9, 1, 2], requests=[], num_shown=1, stop=(), shows_logprobs=False
    )
    logprobs = Logprobs(
        values=np.array(values, np.float32),
        top_ids=np.array(top_ids, np.int32)[:, None],
        top_values=np.zeros((len(values), 1), np.float32),
    )
    completion = Completion(
        request_id=0,
        token_ids=np.array([7], np.int32),
        finish_reason="length",
        num_prompt_tokens=3,
        num_cached_tokens=0,
        prompt_logprobs=logprobs,
    )
    columns = OutputColumns(results=SCORE_COLUMNS)
    line = score_line(plan, completion, columns, has_token_logprobs=False)
    return dict(json.loads(line))


def test_a_line_has_the_sum_and_the_perplexity() -> None:
    row = line_of([-0.5, -1.5], [1, 2])
    assert row == {"prompt": "x", "logprob": -2.0, "num_scored_tokens": 2, "perplexity": math.e,
                   "is_greedy": True}  # fmt: skip
    assert line_of([-0.5, -1.5], [1, 3])["is_greedy"] is False
    assert line_of([-1.5], [2])["num_scored_tokens"] == 1


def test_a_perplexity_beyond_all_floats_is_null() -> None:
    assert line_of([-900.0, -900.0], [1, 2])["perplexity"] is None
    assert line_of([-900.0, -900.0], [1, 2])["logprob"] == -1800.0


# --- the job


def rows_of(count: int) -> list[dict[str, Any]]:
    """Pairs of which four share a context, and a row in ten that is bad."""
    return [
        {"id": n, "context": f"Q: {n // 4}+{n // 4}=\nA: ", "continuation": f"{n % 4}"}
        if n % 10 != 7
        else {"id": n}
        for n in range(count)
    ]


def test_a_job_asks_for_the_scores_of_the_continuations_alone(
    tmp_path: Path, hugging_face: Any
) -> None:
    asked: list[Request] = []
    engine = FakeEngine(fails=lambda request: bool(asked.append(request)))
    folder = JobFolder(tmp_path / "job", rows_of(7))
    assert folder.run(engine, **OPTIONS) == (0, 7)
    for request in asked:
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.prompt_logprobs, sampling.temperature) == (1, 1, 0.0)
        text = rows_of(7)[request.request_id >> 10]["context"].rstrip()
        assert sampling.prompt_logprobs_start == len(hugging_face.encode(text))
    rows = read_rows(folder.output)
    assert [[*row] for row in rows] == [["id", "context", "continuation", *RESULTS]] * 7
    stats = folder.stats
    assert stats["command"] == "score"
    assert stats["rows"]["finish_reasons"] == {}


def test_token_logprobs_are_a_column_whose_sum_is_the_rows(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", [{"prompt": "a text of some tokens"}])
    assert folder.run(token_logprobs=True, **OPTIONS)[0] == 0
    (row,) = read_rows(folder.output)
    assert len(row["token_logprobs"]) == row["num_scored_tokens"] > 3
    assert math.isclose(sum(row["token_logprobs"]), row["logprob"], rel_tol=1e-6)


def test_a_stopped_job_goes_on_and_its_bytes_are_those_of_one_run(tmp_path: Path) -> None:
    whole = JobFolder(tmp_path / "whole", rows_of(80))
    assert whole.run(**OPTIONS)[0] == 3
    folder = JobFolder(tmp_path / "job", rows_of(80))
    folder.stop_after(3, **OPTIONS)
    num_done = len(folder.journalled)
    assert 0 < num_done < 80
    error = folder.refused(**{**OPTIONS, "token_logprobs": True})
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert "token_logprobs: unset -> true" in error.message
    assert folder.run(FakeEngine(order_seed=5), **OPTIONS)[0] == 3
    assert folder.output.read_bytes() == whole.output.read_bytes()
    assert len(read_rows(folder.output)) == 72
    assert {row["error"]["code"] for row in read_rows(folder.errors)} == {"no_prompt"}
    assert folder.done(**OPTIONS) == 3


def test_a_score_does_not_go_on_as_completions(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", [{"prompt": "a b c"}])
    assert folder.run(**OPTIONS)[0] == 0
    error = folder.refused()
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert 'pair_columns: ["context","continuation"] -> unset' in error.message


def test_scores_have_their_types_in_parquet_and_completions_travel_through(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", [], name="out.parquet")
    given = pa.table({
        "prompt": ["a b c", "d e f"],
        "completion": pa.array(["x", "y"], pa.large_string()),
        "logprob": ["old", "old"],
    })  # fmt: skip
    folder.input = folder.path / "in.parquet"
    pq.write_table(given, folder.input)
    assert folder.run(token_logprobs=True, **OPTIONS)[0] == 0
    found = pq.read_table(folder.output)
    assert found.schema == pa.schema([
        ("prompt", pa.string()), ("completion", pa.large_string()), ("logprob", pa.float64()),
        ("num_scored_tokens", pa.int64()), ("perplexity", pa.float64()),
        ("is_greedy", pa.bool_()), ("token_logprobs", pa.list_(pa.field("element", pa.float32()))),
    ])  # fmt: skip
    assert found.column("completion").to_pylist() == ["x", "y"]


def test_merged_scores_are_those_of_one_run(tmp_path: Path) -> None:
    more = {**OPTIONS, "output_columns": ("perplexity", "completion", "id")}
    rows = [{"id": n, "prompt": f"row {n}", "completion": "x"} for n in range(9)]
    folder = JobFolder(tmp_path / "job", rows, name="one.parquet")
    assert folder.run(**more)[0] == 0
    for number in (1, 2):
        output = str(folder.path / f"out-{number}.jsonl")
        assert folder.run(output=output, shard=Shard.parse(f"{number}/2"), **more)[0] == 0
    merged = folder.path / "merged.parquet"
    shards = sorted(folder.path.glob("out-?.jsonl"))
    assert call("merge", *shards, "-o", merged, "-q").code == 0
    assert merged.read_bytes() == folder.output.read_bytes()
    stats = json.loads((folder.path / "merged.parquet.stats.json").read_bytes())
    assert stats["command"] == "score"


# --- the command


def score(*arguments: str | Path, **more: Any) -> Any:
    return call("score", *arguments, "--model", MODEL, **more)


def test_a_column_that_no_row_has_is_a_mistake_of_the_command(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"ctx": "a", "continuation": "b"}] * 2)
    ended = score(source, "--context-column", "ctxt")
    assert ended.code == ExitCode.USAGE
    assert "--context-column names the column 'ctxt'" in ended.stderr
    assert "Did you mean 'ctx'?" in ended.stderr
    ended = score(source, "--continuation-column", "x")
    assert ended.code == ExitCode.USAGE
    ended = score(source, "--context-column", "continuation")
    assert ended.code == ExitCode.USAGE
    assert "are both 'continuation'" in ended.stderr
    ended = score(source, "--output-columns", "completion")
    assert ended.code == ExitCode.USAGE, "no result of a score"
    ended = score(source)
    assert ended.code == ExitCode.INPUT_UNUSABLE
    assert "A row needs a context and a continuation" in ended.stderr


def test_flags_of_generating_are_unknown_to_score() -> None:
    for flag in ("--temperature", "--max-tokens", "--chat", "--format", "--n"):
        ended = score("x.jsonl", flag, "1")
        assert ended.code == ExitCode.USAGE
        assert f"no such option: {flag}" in ended.stderr.lower()


def test_a_dry_run_counts_what_would_be_scored(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*rows_of(10), {"prompt_token_ids": [1]}])
    ended = score(source, "--dry-run")
    assert ended.code == ExitCode.SOME_ROWS_FAILED
    assert "9 good, 2 bad" in ended.stderr
    assert "1 nothing_to_score" in ended.stderr
    assert "completion" not in ended.stderr
