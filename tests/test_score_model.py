"""`nanovllm score` with the sample model: against transformers, with the prefix cache, killed."""

import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from .cli import COMMAND, MODEL, SAMPLE, call, environment, run, write_rows

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reference() -> Any:
    return Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def pairs() -> Rows:
    """Four contexts of some hundred tokens, each with a right answer and wrong ones."""
    rules = json.loads((SAMPLE / "shared_prefix.jsonl").read_bytes().splitlines()[0])
    text = rules["messages"][0]["content"]
    return [
        {"id": n, "context": f"{text}\n{n // 8}\nQ: {n // 8}+4=\nA:", "continuation": f" {n % 8}"}
        for n in range(32)
    ]


def score(*arguments: str | Path) -> Any:
    return call("score", *arguments, "--model", MODEL, "--quiet")


def test_scores_are_those_of_a_transformers_forward_pass(
    tmp_path: Path, reference: Any, hugging_face: Any, pairs: Rows
) -> None:
    question = {"role": "user", "content": "What is 3+4?"}
    chat = [question, {"role": "assistant", "content": "7"}]
    rows: Rows = [
        *pairs,
        {"prompt": "Q: 3+4=\nA: 7"},
        {"prompt": "Of every kind some.\n" * 30},
        {"messages": chat},
        {"prompt_token_ids": [*range(100, 230)]},
        {"context": "", "continuation": "Q: 3+4=\nA: 7"},
        {"context": "Q: 3+4=\nA: \n ", "continuation": "7"},
    ]
    whole = [
        *(hugging_face.encode(row["context"] + row["continuation"]) for row in pairs),
        hugging_face.encode("Q: 3+4=\nA: 7"),
        hugging_face.encode("Of every kind some.\n" * 30),
        hugging_face.apply_chat_template(chat, return_dict=False),
        [*range(100, 230)],
        [hugging_face.eos_token_id, *hugging_face.encode("Q: 3+4=\nA: 7")],
        hugging_face.encode("Q: 3+4=\nA: \n 7"),
    ]
    starts = [
        *(len(hugging_face.encode(row["context"])) for row in pairs),
        *([1] * 5),
        len(hugging_face.encode("Q: 3+4=\nA:")),
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    found = score(source, "--token-logprobs", "--max-num-batched-tokens", "256").rows
    assert len(found) == len(rows)
    num_greedy = 0
    for row, token_ids, start in zip(found, whole, starts, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([token_ids])).logits[0]
        targets = torch.tensor(token_ids[start:])
        logprobs = torch.log_softmax(logits[start - 1 : -1], dim=-1)
        expected = logprobs.gather(1, targets[:, None])[:, 0]
        assert row["num_scored_tokens"] == len(targets)
        assert torch.tensor(row["token_logprobs"]) == pytest.approx(expected, abs=1e-4)
        assert row["logprob"] == pytest.approx(float(expected.double().sum()), abs=1e-3)
        assert row["perplexity"] == pytest.approx(math.exp(-float(expected.mean())), rel=1e-4)
        is_greedy = bool((logprobs.argmax(dim=-1) == targets).all())
        assert row["is_greedy"] is is_greedy
        num_greedy += is_greedy
    assert 0 < num_greedy < len(rows)


def test_contexts_that_rows_share_are_computed_once_and_the_bytes_are_the_same(
    tmp_path: Path, pairs: Rows
) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs)
    with_cache, without = tmp_path / "with.jsonl", tmp_path / "without.jsonl"
    flags = ("--max-num-batched-tokens", "2048")
    assert score(source, "-o", with_cache, *flags).code == 0
    assert score(source, "-o", without, *flags, "--no-prefix-caching").code == 0
    assert with_cache.read_bytes() == without.read_bytes()
    stats = json.loads((tmp_path / "with.jsonl.stats.json").read_bytes())
    assert stats["tokens"]["prefix_hit_rate"] > 0.8
    assert stats["tokens"]["completion"] == 0


def test_a_text_as_long_as_the_models_limit_is_that_rows_error(tmp_path: Path) -> None:
    rows = [{"prompt_token_ids": [*range(100, 100 + length)]} for length in (63, 64)]
    ended = score(write_rows(tmp_path / "in.jsonl", rows), "--max-model-len", "64")
    assert ended.code == 3
    assert [row["num_scored_tokens"] for row in ended.rows] == [62]
    error = json.loads(ended.stderr)["error"]
    assert error["code"] == "prompt_too_long"
    assert "64 tokens" in error["message"]


def test_several_engines_write_the_bytes_of_one(tmp_path: Path, pairs: Rows) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs)
    for flags in ((), ("--dp", "2")):
        output = tmp_path / f"{len(flags)}.jsonl"
        assert run("score", source, "-o", output, "--model", MODEL, "-q", *flags).code == 0
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_killed_score_goes_on_and_no_byte_differs(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.partial"
    rows: Rows = [{"id": n, "prompt": f"Row {n}. " * 40} for n in range(150)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    arguments = ["score", source, "--model", MODEL, "--quiet", "--max-num-seqs", "4"]
    arguments += ["--max-num-batched-tokens", "256", "--token-logprobs"]
    assert run(*arguments, "-o", whole).code == 0
    num_kills = seen = 0
    while num_kills < 3:
        process = subprocess.Popen(
            [COMMAND, *arguments, "-o", output], env=environment(HF_HUB_OFFLINE="1")
        )
        while process.poll() is None:  # until it has done some rows more
            size = journal.stat().st_size if journal.exists() else 0
            if size > seen:
                seen = size
                process.kill()
                num_kills += 1
            time.sleep(0.005)
        assert process.wait() == -9, "it was quicker than the test"
    assert run(*arguments, "-o", output).code == 0
    assert output.read_bytes() == whole.read_bytes()
