"""Flags and values as users of other tools write them, and what is said of those not known here."""

import os
from pathlib import Path

import pytest

from nanovllm_cli.flag_command import unknown_variables
from nanovllm_cli.options import GenerateOptions

from .cli import MODEL, SAMPLE, Run, call, run


def begin(*flags: str | Path, command: str = "generate", env: dict[str, str] | None = None) -> Run:
    return call(command, "x.jsonl", *flags, env=env)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("--no-enable-prefix-caching", "--no-prefix-caching"),
        ("--dtype half", "--dtype float16"),
        ("--dtype float", "--dtype float32"),
        ("--torch_dtype bfloat16", "--dtype bfloat16"),
        ("--device gpu", "--device cuda"),
        ("--attention-backend TRITON_ATTN", "--attention-backend triton"),
        ("--attention-backend FLASH_ATTN", "--attention-backend flash-attn"),
        ("--max-model-len 32k", "--max-model-len 32000"),
        ("--max-model-len 1.5K", "--max-model-len 1536"),
        ("--max-model-len auto", ""),
        ("--max_model_len=-1", ""),
        ("--max-num-batched-tokens 8K", "--max-num-batched-tokens 8192"),
        ("--kv-cache-memory-bytes 20G", "--kv-cache-memory 20"),
        ("--kv-cache-memory-bytes=1073741824", "--kv-cache-memory 1"),
        ("--max-new-tokens 7", "--max-tokens 7"),
        ("--max_new_tokens=7", "--max-tokens=7"),
        ("-c 4096 --temp 0.5 --n-predict 3", "--max-model-len 4096 --temperature 0.5 "
         "--max-tokens 3"),
        ("--output-file o.jsonl", "-o o.jsonl"),
        ("-i y.jsonl", "y.jsonl"),
        ("--input-file=y.jsonl --tp 1", "y.jsonl"),
        ("--tensor_parallel_size 1", "--tp 1"),
        # The value of a flag is no flag.
        ("--stop --max-new-tokens --stop -i", "--stop=--max-new-tokens --stop=-i"),
    ],
)  # fmt: skip
def test_another_name_does_what_ours_does(
    foreign: str, ours: str, chosen: list[GenerateOptions]
) -> None:
    for flags in (foreign, ours):
        ended = begin(*flags.split())
        assert (ended.code, ended.stderr) == (0, ""), flags
    assert chosen[0] == chosen[1]
    assert begin().code == 0
    is_default = ours in ("", "--tp 1")
    assert (chosen[2] == chosen[1]) == is_default


def test_what_is_always_so_is_said_once_and_the_job_runs(chosen: list[GenerateOptions]) -> None:
    flags = ("--enable-chunked-prefill", "--reasoning-parser", "qwen3", "--enable_prefix_caching")
    flags += ("--trust-remote-code", "--trust-remote-code", "-ngl", "99", "--max-tokens", "3")
    told = begin(*flags)
    assert told.code == 0
    assert told.stderr.splitlines() == [
        "--enable-chunked-prefill is left out: long prompts are always prefilled in chunks",
        "--reasoning-parser is left out: a thought is always in a column of its own",
        "--enable-prefix-caching is left out: prefixes are always cached",
        "--trust-remote-code is left out: no code of a model is ever run",
        "-ngl is left out: a model is on the GPU as a whole",
    ]
    assert chosen[0].sampling == {"max_tokens": 3}
    assert begin(*flags, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ("--quantization fp8", "quantized ones are not supported", "not quantized"),
        ("--kv_cache_dtype=fp8", "--kv-cache-dtype is not a flag of nanovllm", "Leave it out."),
        ("--chat-templte x", "no such option: --chat-templte", "Did you mean --chat-template?"),
        ("--enable-lora", "LoRA adapters are not supported", "merge_and_unload"),
        ("--load-format dummy", "safetensors files only", "bench"),
        ("--pipeline-parallel-size 2", "engines are processes of this machine", "--tp and --dp"),
        ("--download-dir x", "set by the environment", "HF_HUB_CACHE"),
        ("--tokenizer-revision x", "part of its name", "org/name@revision"),
        ("--num-beams 4", "there is no beam search", "--best-of"),
        ("--disable-sliding-window", "no such option: --disable-sliding-window", "--help"),
        ("-model m", "-model has one dash", "Write --model."),
        ("-max-tokens 3", "-max-tokens has one dash", "Write --max-tokens."),
        ("--dtype int4", "--dtype int4 is not a number format",
         "Choose one of auto, float32, bfloat16, float16."),
        ("--device tpu", "--device tpu is not a kind of device", "Choose one of auto, cpu, cuda."),
        ("--attention-backend FLASHINFER", "is not an attention backend", "Choose one of auto, tr"),
        ("--max-model-len 3x", "--max-model-len is '3x'; it must be a number of tokens", "32k"),
        ("--max-model-len 0", "--max-model-len is '0'; it must be a number of tokens", "32k"),
        ("--max-model-len 1.0001k", "--max-model-len is '1.0001k'", "32k"),
        ("--kv-cache-memory-bytes much", "--kv-cache-memory-bytes is 'much'", "20G"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_told_in_a_sentence(
    flags: str, message: str, hint: str, chosen: list[GenerateOptions]
) -> None:
    ended = begin(*flags.split())
    assert (ended.code, ended.stdout) == (2, b"")
    told, _, told_hint = ended.stderr.partition("\n\nhint: ")
    assert message in told
    assert hint in told_hint
    assert chosen == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-tokens ten", "--max-tokens is 'ten'; it must be a whole number"),
        ("--max-tokens=1.5", "--max-tokens is '1.5'; it must be a whole number"),
        ("--limit 0", "--limit is '0'; it must be a whole number of at least 1"),
        ("--temperature hot", "--temperature is 'hot'; it must be a number"),
        ("--kv-cache-memory 1e300", "--kv-cache-memory is 1e+300; it must be above 0 and at most"),
        (f"--limit {10**21}", f"--limit is {10**21}; it must be at most"),
        (f"--top-k {10**21}", f"--top-k is {10**21}; it must be at most"),
        (f"--max-tokens {10**21}", f"--max-tokens is {10**21}; it must be at most"),
        (f"--max-num-seqs {10**9}", f"--max-num-seqs is {10**9}; it must be at most 1048576"),
        ("--timeout nan", "--timeout is nan; it must be above 0"),
        ("--timeout inf", "--timeout is inf; it must be above 0"),
        ("--wait-lock inf", "--wait-lock is inf; it must be 0 to"),
        ("--wait-lock nan", "--wait-lock is nan; it must be 0 to"),
        (f"--logit-bias {'[' * 100_000}", "--logit-bias is '[[["),
    ],
)
def test_a_value_that_is_none_or_out_of_range_is_told_with_its_flag(
    flags: str, message: str, chosen: list[GenerateOptions]
) -> None:
    ended = begin(*flags.split())
    assert (ended.code, ended.stdout) == (2, b"")
    assert ended.stderr.startswith(f"error: {message}")
    assert chosen == []


def test_a_value_of_a_variable_and_of_a_file_is_told_with_where_it_is_from(tmp_path: Path) -> None:
    told = begin(env={"NANOVLLM_MAX_TOKENS": "ten"})
    assert told.code == 2
    expected = "error: NANOVLLM_MAX_TOKENS (--max-tokens) is 'ten'; it must be a whole number\n"
    assert told.stderr == expected
    (tmp_path / "job.toml").write_text("max-tokens = 'ten'")
    told = begin("--config", tmp_path / "job.toml")
    assert (told.code, "--max-tokens is 'ten'" in told.stderr) == (2, True)


def test_sizes_may_stand_in_variables_and_files(
    chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text("max-model-len = 2048\nmax-num-batched-tokens = '4K'")
    assert begin("--config", tmp_path / "job.toml").code == 0
    assert begin(env={"NANOVLLM_MAX_MODEL_LEN": "2k", "NANOVLLM_DTYPE": "half"}).code == 0
    engines = [options.engine for options in chosen]
    assert (engines[0].max_model_len, engines[0].max_num_batched_tokens) == (2048, 4096)
    assert (engines[1].max_model_len, engines[1].dtype) == (2000, "float16")


def test_a_variable_that_is_not_known_is_warned_about(chosen: list[GenerateOptions]) -> None:
    env = {"NANOVLLM_MAX_TOKNS": "3", "NANOVLLM_WORKLOAD": "nano", "NANOVLLM_EMPTY": ""}
    told = begin(env=env)
    assert told.code == 0
    assert told.stderr == (
        "warning: the environment variable NANOVLLM_MAX_TOKNS is not a setting of nanovllm, and "
        "has no effect\n\nhint: Did you mean NANOVLLM_MAX_TOKENS?\n"
    )
    assert begin("-q", env=env).stderr == ""


def test_the_tests_own_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NANOVLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOVLLM_SINGLE_PROCESS", "1")
    assert unknown_variables({"NANOVLLM_SINGLE_PROCESS"}) == []
    assert unknown_variables({"NANOVLLM_MODEL"}) == [("NANOVLLM_SINGLE_PROCESS", None)]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("out.csv", "Write .parquet, then: duckdb"),
        ("out.tsv", "duckdb"),
        ("out.xlsx", "duckdb"),
        ("out.txt", "End the name in .jsonl or .ndjson"),
        ("out.json", "end the name in .jsonl"),
        ("out.json.gz", "end the name in .jsonl"),
        ("out.jsonl.bz2", "End the name in"),
        ("out.jsonl.xz", "End the name in"),
        ("out.arrow", "End the name in"),
        ("out.jsnol", "End the name in"),
        ("out.parquet.gz", "End the name in"),
        ("out.PARQUET", "in lower case: .parquet"),
        ("folder", "folder/out.jsonl"),
        ("new/", "new/out.jsonl"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "merge"])
def test_an_output_of_another_format_is_refused(
    command: str, name: str, hint: str, chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    ended = call(command, "x.jsonl", "-o", f"{tmp_path}/{name}")
    assert (ended.code, ended.stdout) == (2, b"")
    assert name in ended.stderr
    assert hint in ended.stderr.partition("\n\nhint: ")[2]
    assert chosen == []
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "here"}


@pytest.mark.parametrize(
    "name",
    ["-", "o.jsonl", "o.ndjson", "o.jsonl.gz", "o.ndjson.zst", "o.parquet", "o.gz", "out", "o.1"],
)
def test_an_output_of_a_known_format_or_of_none_is_taken(
    name: str, chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    assert begin("-o", name if name == "-" else tmp_path / name).code == 0
    assert len(chosen) == 1


def test_the_real_command_runs_a_line_of_another_tool(tmp_path: Path) -> None:
    line = "--max_new_tokens 2 --max-model-len 1k --enable-chunked-prefill --dtype float"
    arguments = ["generate", "--model", MODEL, "--limit", "2", *line.split()]
    files = ["--input-file", SAMPLE / "prompts.jsonl", "--output-file", tmp_path / "out.jsonl"]
    ended = run(*arguments, *files)
    assert ended.code == 0, ended.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert ended.stderr.startswith("--enable-chunked-prefill is left out: ")


def test_completion_can_be_shown() -> None:
    is_named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = run("--show-completion", "bash", env=is_named)
    assert ended.code == 0, ended.stderr
    assert b"complete" in ended.stdout
    line = {"COMP_WORDS": "nanovllm gen", "COMP_CWORD": "1"}
    names = run(env={"_NANOVLLM_COMPLETE": "complete_bash", **line})
    assert names.stdout.split() == [b"generate"]
