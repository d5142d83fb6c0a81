"""A dry run and the job: what one finds good the other does, with the same codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.kv_sizes import longest_sequence
from nanovllm_cli.core.resolved_config import resolve

from .cli import MODEL, Run, environment, generate, read_rows, write_rows

CHAT = [{"role": "user", "content": "What is 3+4?"}]
RAW = "Q: 1+4=\nA:"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# A row, and the code of its error.
ROWS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": RAW}, None),
    ({"prompt": RAW, "stop_token_ids": list(range(14))}, None),
    ({"prompt": RAW, "stop_token_ids": list(range(15))}, "bad_parameters"),
    ({"prompt": RAW, "stop_token_ids": list(range(14)), "ignore_eos": True}, None),
    ({"prompt": RAW, "stop_token_ids": [1088]}, "bad_parameters"),
    ({"prompt": RAW, "logit_bias": {"1088": 1}}, "bad_parameters"),
    ({"prompt": RAW, "logprobs": 20, "prompt_logprobs": 20}, None),
    ({"prompt_token_ids": [1, 1087]}, None),
    ({"prompt_token_ids": [1, 1088]}, "bad_token_ids"),
    ({"prompt_token_ids": [5] * 95}, None),
    ({"prompt_token_ids": [5] * 127}, None),
    ({"prompt_token_ids": [5] * 128}, "prompt_too_long"),
    ({"prompt": RAW, "guided_json": SCHEMA}, None),
    ({"prompt": RAW, "guided_regex": "(a"}, "bad_grammar"),
    ({"prompt": RAW, "guided_json": {"type": "nothing"}}, "bad_grammar"),
    # The end of a thought is a stop token too, where a grammar begins after it.
    ({"messages": CHAT, "guided_json": SCHEMA, "stop_token_ids": list(range(13))}, None),
    ({"messages": CHAT, "guided_json": SCHEMA, "stop_token_ids": list(range(14))},
     "bad_parameters"),
]  # fmt: skip
# 128 tokens: two blocks of 64, and the scratch block.
KV_FLAGS = ("--kv-cache-memory", str(3 * 64 * 2 * 4 * 2 * 64 * 4 / 2**30))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "in.jsonl", [{"id": f"r{i}", **row} for i, (row, _) in enumerate(ROWS)]
    )


def test_a_dry_run_has_the_codes_of_the_job(rows: Path, tmp_path: Path) -> None:
    expected = {f"r{i}": code for i, (_, code) in enumerate(ROWS) if code is not None}
    ended = generate(rows, "-o", tmp_path / "out.jsonl", "--max-tokens", "1", *KV_FLAGS)
    assert ended.code == 3, ended
    failed = read_rows(tmp_path / "out.jsonl.errors.jsonl")
    assert {row["id"]: row["error"]["code"] for row in failed} == expected
    dry = generate(rows, "--dry-run", "--max-tokens", "1", *KV_FLAGS)
    assert dry.code == 3
    assert f"{len(ROWS) - len(expected)} good, {len(expected)} bad" in dry.stderr
    for code in set(expected.values()):
        assert f"{list(expected.values()).count(code)} {code}" in dry.stderr


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_dry_run_of_a_single_row_ends_as_the_job_does(number: int, tmp_path: Path) -> None:
    row, code = ROWS[number]
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": RAW}, row])
    ended = generate(source, "--dry-run", *KV_FLAGS)
    assert ended.code == (0 if code is None else 3), ended
    assert f"1 {code}" in ended.stderr or code is None


def test_a_limit_of_completions_is_none_of_prompts_however_many_rows_there_are(
    tmp_path: Path,
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": RAW * 3}] * 600)
    ended = generate(rows, "--max-tokens", "1", "--dry-run")
    assert ended.code == 0, ended.stderr
    assert "600 good, 0 bad" in ended.stderr


def test_a_job_without_room_for_a_row_is_69_dry_too(rows: Path) -> None:
    for more in ([], ["--dry-run"]):
        ended = generate(rows, "--kv-cache-memory", "0.0001", *more)
        assert ended.code == 69, ended
        assert "bytes are left for the KV cache" in ended.stderr


def test_a_grammar_of_all_rows_that_the_model_has_no_tokens_for_is_2_dry_too(
    rows: Path, tmp_path: Path
) -> None:
    grammar = tmp_path / "x.lark"
    grammar.write_text("start: <|nothing|>")
    for more in ([], ["--dry-run"]):
        ended: Run = generate(rows, "--grammar", grammar, *more)
        assert ended.code == 2, ended
        assert "cannot be used with this model" in ended.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_model_len": 100},
        {"block_size": 16},
        {"kv_cache_bytes": 3 << 20},
        {"max_num_seqs": 1},
    ],
    ids=str,
)
def test_the_longest_sequence_is_the_engines(settings: dict[str, Any]) -> None:
    config = EngineConfig(device="cpu", **settings)
    model = ModelConfig.from_directory(MODEL)
    engine = Engine.from_checkpoint(MODEL, config)
    assert longest_sequence(model, resolve(config, model)) == engine.max_model_len
    engine.close()


def test_a_dry_run_tells_what_the_weights_are(rows: Path) -> None:
    ended = generate(rows, "--dry-run", "--allow-errors")
    assert ended.code == 0
    assert "46 tensors in 1 file, 3.8 MiB" in ended.stderr


def test_what_looks_at_a_models_files_imports_no_torch() -> None:
    modules = [
        "nanovllm_cli.core.config",
        "nanovllm_cli.core.checkpoint",
        "nanovllm_cli.core.request_checks",
        "nanovllm_cli.models",
        "nanovllm_cli.weights_hash",
    ]
    script = (
        f"import sys, importlib, json; [importlib.import_module(m) for m in {modules}];"
        "print(json.dumps([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment(), check=True
    )
    assert json.loads(ended.stdout) == []
