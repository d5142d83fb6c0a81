"""The command line: where a flag's value comes from, what a flag does, and what is left behind."""

import gzip
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from transformers import AutoTokenizer

from nanovllm_cli import __version__
from nanovllm_cli.app import app
from nanovllm_cli.options import GenerateOptions

from .cli import (
    COMMAND,
    MODEL,
    SAMPLE,
    Run,
    call,
    environment,
    generate,
    read_rows,
    run,
    write_rows,
)

QUESTION = "Q: 3+4=\nA:"
LONG = "Q: 46 to 52\nA:"  # the answer is the numbers between


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", [{"id": n, "prompt": QUESTION} for n in range(3)])


def parameters(name: str) -> list[Any]:
    command: Any = typer.main.get_command(app)
    return [p for p in command.commands[name].params if p.name not in ("inputs", "help")]


def rendered(hugging_face: Any, messages: list[dict[str, str]], **arguments: Any) -> int:
    """The number of tokens of a chat."""
    return len(
        hugging_face.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **arguments
        )
    )


# --- where a value comes from


def test_a_flag_comes_before_the_environment_before_the_file_before_the_default(
    chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text("temperature = 0.1\ntop-p = 0.2\nmax_tokens = 3\n")
    env = {
        "NANOVLLM_CONFIG": str(tmp_path / "job.toml"),
        "NANOVLLM_TEMPERATURE": "0.4",
        "NANOVLLM_TOP_P": "0.5",
    }
    ended = call("generate", "x.jsonl", "--temperature", "0.7", env=env)
    assert ended.code == 0, ended
    assert chosen[0].sampling == {"temperature": 0.7, "top_p": 0.5, "max_tokens": 3}
    assert chosen[0].seed == 0


def test_a_file_may_name_every_flag_and_the_input(
    chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(
        'output = "o.jsonl"\nstop = ["a b", "\\n"]\nthinking = false\nno-prefix-caching = true\n'
        'block-size = 16\nsystem = "Be brief."\nseed = 18446744073709551615\nquiet = true\n'
    )
    assert call("generate", "x.jsonl", "--config", tmp_path / "job.toml").code == 0
    (options,) = chosen
    assert options.inputs == ["x.jsonl"]
    assert options.output == "o.jsonl"
    assert options.stop == ("a b", "\n")
    assert options.prompt.enable_thinking is False
    assert options.prompt.system == "Be brief."
    assert options.engine.block_size == 16
    assert not options.engine.enable_prefix_caching
    assert options.seed == 2**64 - 1
    assert options.quiet


@pytest.mark.parametrize("command", ["generate", "score"])
def test_every_flag_has_an_environment_variable_of_its_name(command: str) -> None:
    found = parameters(command)
    assert len(found) > 35
    for parameter in found:
        name = next(name for name in parameter.opts if name.startswith("--"))
        assert parameter.envvar == "NANOVLLM_" + name[2:].replace("-", "_").upper(), name
        assert parameter.help, name


VALUES = {
    "--format": "openai",
    "--dtype": "float32",
    "--device": "cpu",
    "--gpu-memory-utilization": "0.5",
    "--temperature": "0.5",
    "--top-p": "0.5",
    "--min-p": "0.5",
    "--block-size": "32",
    "--template": "{a}",
    "--kv-cache-memory": "0.5",
    "--min-tokens": "2",
    "--presence-penalty": "0.5",
    "--frequency-penalty": "0.5",
    "--logit-bias": '{"5": 1}',
    "--max-tokens": "7",
    "--max-error-rate": "0.5",
    "--shard": "1/2",
    "--log-format": "json",
    "--attention-backend": "torch",
    "--output-columns": "id,completion",
    "--data-parallel-size": "1",  # more need more processes than these tests start
}
FILES = ("--template-file", "--prefix-file", "--chat-template")


@pytest.mark.parametrize("command", ["generate", "score"])
def test_every_environment_variable_does_what_its_flag_does(
    command: str, chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "yes.lark").write_text('start: "yes"')
    files = {"--json-schema": tmp_path / "schema.json", "--grammar": tmp_path / "yes.lark"}
    (tmp_path / "text").write_text("x")
    files |= dict.fromkeys(FILES, tmp_path / "text")
    values = {**VALUES, **{name: str(path) for name, path in files.items()}}
    number = 0
    for parameter in parameters(command):
        name = parameter.opts[0]
        if name in ("--config", "--debug", "--dry-run", "--single-process"):
            continue
        is_switch = getattr(parameter, "is_flag", False)
        value = values.get(name, "7")
        flag = [name] if is_switch else [name, value]
        call(command, "x.jsonl")
        assert call(command, "x.jsonl", *flag).code == 0, name
        env = {parameter.envvar: "1" if is_switch else value}
        assert call(command, "x.jsonl", env=env).code == 0, name
        default, by_flag, by_environment = chosen[-3:]
        assert by_flag == by_environment, name
        assert by_flag != default or value == str(parameter.default), name
        number += 1
    assert number > 30


def test_a_switch_can_be_off_in_the_environment(chosen: list[GenerateOptions]) -> None:
    for value, expected in (("0", False), ("false", False), ("1", True), ("", None)):
        assert call("generate", "x.jsonl", env={"NANOVLLM_THINKING": value}).code == 0
        assert chosen[-1].prompt.enable_thinking is expected
    assert call("generate", "x.jsonl", "--no-thinking", env={"NANOVLLM_THINKING": "1"}).code == 0
    assert chosen[-1].prompt.enable_thinking is False


def test_the_models_own_sampling_comes_last(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        (model / path.name).symlink_to(path)
    config = json.loads((MODEL / "generation_config.json").read_bytes())
    (model / "generation_config.json").unlink()
    own = {**config, "do_sample": True, "temperature": 3.0, "top_k": 50}
    (model / "generation_config.json").write_text(json.dumps(own))

    def texts(*flags: str, model: Path = model) -> list[str]:
        ended = call("generate", source, "--model", model, "--max-tokens", "8", "-q", *flags)
        assert ended.code == 0, ended
        return [row["completion"] for row in ended.rows]

    greedy = texts(model=MODEL)  # which says do_sample: false
    assert texts("--temperature", "0") == greedy
    assert texts() == texts("--temperature", "3", "--top-k", "50", model=MODEL) != greedy
    everything = texts("--temperature", "3", "--top-k", "0", model=MODEL)
    assert texts("--top-k", "0") == everything != texts()


def test_the_same_seed_gives_the_same_and_another_gives_another(source: Path) -> None:
    flags = ("--temperature", "2", "--max-tokens", "8", "--ignore-eos", "-q")
    first = generate(source, *flags).stdout
    assert generate(source, *flags, "--seed", "0").stdout == first
    assert generate(source, *flags, "--seed", "1").stdout != first
    texts = [json.loads(line)["completion"] for line in first.splitlines()]
    assert len(set(texts)) == 3, "rows of the same prompt draw for themselves"


def test_several_engines_and_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    outputs = []
    for flags in ((), ("--dp", "2"), ("--tp", "2")):
        outputs.append(tmp_path / f"{'-'.join(flags)}.jsonl")
        arguments = ["generate", SAMPLE / "prompts.jsonl", "--model", MODEL, "--limit", "24", "-q"]
        assert run(*arguments, "-o", outputs[-1], *flags).code == 0
    assert len({output.read_bytes() for output in outputs}) == 1


# --- the prompt


def test_a_template_is_filled_from_the_columns(tmp_path: Path, hugging_face: Any) -> None:
    rows = [{"a": "3", "b": 4, "prompt": "not this"}, {"a": "{b}", "b": "<|im_end|>"}, {"a": "x"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    ended = generate(source, "-p", "Q: {a}+{b}={{}}\nA:", "--max-tokens", "1", "-q")
    assert ended.code == 3
    texts = ["Q: 3+4={}\nA:", "Q: {b}+"]
    assert ended.rows[0]["usage"]["prompt_tokens"] == len(hugging_face.encode(texts[0]))
    assert ended.rows[1]["usage"]["prompt_tokens"] > len(hugging_face.encode(texts[1])) + 8
    assert json.loads(ended.stderr)["error"]["code"] == "template_error"


def test_chat_system_and_thinking_make_the_chat(source: Path, hugging_face: Any) -> None:
    user = {"role": "user", "content": QUESTION}
    system = {"role": "system", "content": "Be brief."}
    cases: list[tuple[tuple[str, ...], int]] = [
        ((), len(hugging_face.encode(QUESTION))),
        (("--chat",), rendered(hugging_face, [user])),
        (("--chat", "--thinking"), rendered(hugging_face, [user], enable_thinking=True)),
        (("--chat", "--no-thinking"), rendered(hugging_face, [user], enable_thinking=False)),
        (("--system", "Be brief."), rendered(hugging_face, [system, user])),
    ]
    for flags, expected in cases:
        (row,) = generate(source, *flags, "--max-tokens", "1", "--limit", "1", "-q").rows
        assert row["usage"]["prompt_tokens"] == expected, flags


def test_thinking_is_in_a_column_of_its_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is 14+78?"}]
    source = write_rows(tmp_path / "in.jsonl", [{"messages": messages}])
    (row,) = generate(source, "-q").rows
    assert row["reasoning"]
    (row,) = generate(source, "--no-thinking", "-q").rows
    assert row["reasoning"] is None
    (row,) = generate(source, "--max-tokens", "6", "-q").rows
    assert (row["completion"], row["finish_reason"]) == ("", "length")
    assert row["reasoning"]


def test_columns_of_other_names_can_be_the_prompt_the_chat_and_the_id(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"key": 1, "id": "same", "text": QUESTION},
        {"key": 2, "id": "same", "talk": [{"role": "user", "content": "What is 3+4?"}]},
        {"key": 2, "id": "other", "text": QUESTION},
        {"id": "none", "text": QUESTION},
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    flags = ("--prompt-column", "text", "--messages-column", "talk", "--id-column", "key")
    ended = generate(source, *flags, "--max-tokens", "2", "-q")
    assert [row["key"] for row in ended.rows] == [1, 2]
    codes = [json.loads(line)["error"]["code"] for line in ended.stderr.splitlines()]
    assert codes == ["duplicate_id", "bad_id"]


def test_parse_special_lets_a_raw_prompt_hold_control_tokens(tmp_path: Path) -> None:
    chat = "<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n"
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": chat}])
    as_text = generate(source, "--max-tokens", "1", "-q").rows[0]["usage"]["prompt_tokens"]
    (row,) = generate(source, "--parse-special", "-q").rows
    assert row["usage"]["prompt_tokens"] == 15 < as_text
    assert row["completion"] == "7"


# --- the completion


def test_a_stop_string_is_cut_from_the_text_even_across_tokens(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "List the numbers 46 to 56."}]}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    (whole,) = generate(source, "--no-thinking", "-q").rows
    text = whole["completion"]
    assert "48 49 50" in text
    for stops in (["8 49"], ["48"], [" 5", "zzz"], ["9 50 5", "51"], ["zzz"], ["4"]):
        flags = [flag for stop in stops for flag in ("--stop", stop)]
        (row,) = generate(source, "--no-thinking", "-q", *flags).rows
        ends = [text.index(stop) for stop in stops if stop in text]
        assert row["completion"] == text[: min(ends, default=None)], stops
        assert row["finish_reason"] == "stop"
        if ends:
            assert row["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    (own,) = generate(
        write_rows(tmp_path / "own.jsonl", [{**rows[0], "stop": ["49"]}]),
        *("--no-thinking", "-q", "--stop", "47"),
    ).rows
    assert own["completion"] == text[: text.index("49")]


def test_n_completions_are_drawn_apart_and_the_first_is_the_only_one(source: Path) -> None:
    flags = ("--temperature", "2", "--max-tokens", "6", "-q", "--limit", "2")
    ones = generate(source, *flags).rows
    threes = generate(source, *flags, "--n", "3").rows
    for one, three in zip(ones, threes, strict=True):
        assert "completion" not in three
        assert len({c["completion"] for c in three["completions"]}) > 1
        assert three["completions"][0]["completion"] == one["completion"]
        assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_min_tokens_and_ignore_eos_write_on(source: Path) -> None:
    for flags in (("--min-tokens", "20"), ("--ignore-eos",)):
        (row,) = generate(source, *flags, "--max-tokens", "25", "-q", "--limit", "1").rows
        assert row["usage"]["completion_tokens"] >= 20
    assert row["finish_reason"] == "length"


def test_format_openai_makes_every_row_an_openai_line(source: Path) -> None:
    ended = generate(source, "--format", "openai", "--max-tokens", "4", "-q", "--n", "2")
    for number, row in enumerate(ended.rows):
        assert row["custom_id"] == number
        assert [choice["index"] for choice in row["response"]["body"]["choices"]] == [0, 1]
        assert row["error"] is None


# --- files and streams


def test_every_kind_of_input_gives_the_same_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"r{n}", "prompt": f"Q: {n}+4=\nA:", "text": "caf\u00e9 \u2028 \U0001f600"}
        for n in range(5)
    ]
    plain = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(plain.splitlines(keepends=True)[:2]))
    with pa.CompressedOutputStream(folder / "b.jsonl.zst", "zstd") as file:
        file.write(b"".join(plain.splitlines(keepends=True)[2:4]))
    (folder / "c.ndjson.gz").write_bytes(gzip.compress(plain.splitlines()[4]))
    (folder / "notes.txt").write_text("not an input")
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    (tmp_path / "plain.jsonl").write_bytes(plain)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    flags = ("--max-tokens", "3", "-q")
    expected = generate(tmp_path / "plain.jsonl", *flags).rows
    assert [row["id"] for row in expected] == [row["id"] for row in rows]
    for given in ("crlf.jsonl", "rows.parquet", "folder", "folder/[abc].*"):
        assert generate(tmp_path / given, *flags).rows == expected, given
    for piped in (plain, gzip.compress(plain)):
        assert generate("-", *flags, stdin=piped).rows == expected
    mixed = generate("-", folder / "c.ndjson.gz", *flags, stdin=plain[: plain.index(b'{"id":"r4"')])
    assert mixed.rows == expected


def test_an_output_is_packed_as_its_name_says(source: Path, tmp_path: Path) -> None:
    flags = ("--max-tokens", "3", "-q")
    expected = generate(source, *flags).stdout
    outputs = [tmp_path / "new" / f"o.jsonl{suffix}" for suffix in ("", ".gz", ".zst")]
    for output in outputs:
        assert generate(source, *flags, "-o", output).code == 0
    plain, packed, zstd = outputs
    assert plain.read_bytes() == expected
    assert gzip.decompress(packed.read_bytes()) == expected
    with pa.input_stream(zstd, compression="zstd") as file:
        assert file.read() == expected
    stats = {f"{output.name}.stats.json" for output in outputs}
    assert {path.name for path in plain.parent.iterdir()} == {o.name for o in outputs} | stats


def test_unordered_rows_come_as_they_finish(tmp_path: Path) -> None:
    rows = [{"id": "slow", "prompt": QUESTION, "ignore_eos": True, "max_tokens": 200}]
    rows += [{"id": f"fast{n}", "prompt": QUESTION, "max_tokens": 1} for n in range(5)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    ordered, unordered = generate(source, "-q"), generate(source, "-q", "--unordered")
    assert [row["id"] for row in ordered.rows] == [row["id"] for row in rows]
    assert unordered.rows[-1]["id"] == "slow"
    assert sorted(unordered.stdout.splitlines()) == sorted(ordered.stdout.splitlines())


def test_the_first_rows_only_with_a_limit(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "a"}, [], {"prompt": "b"}, {"prompt": "c"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    ended = generate(source, "--limit", "3", "--max-tokens", "1", "-q")
    assert [row["prompt"] for row in ended.rows] == ["a", "b"]
    assert ended.stderr.count("not_an_object") == 1
    again = generate("-", "--limit", "1", "--max-tokens", "1", "-q", stdin=source.read_bytes())
    assert len(again.rows) == 1


def test_failed_rows_go_where_they_are_wanted(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": 1}])
    errors = tmp_path / "else" / "errors.jsonl"
    ended = generate(source, "--errors", errors, "--max-tokens", "1", "-q")
    assert ended.code == 3
    assert ended.stderr == f"warning: 1 of 2 rows failed (1 no_prompt); see {errors}\n"
    (error,) = read_rows(errors)
    assert error == {
        "id": 1,
        "source": str(source),
        "line": 2,
        "error": error["error"],
    }
    assert error["error"]["code"] == "no_prompt"


def test_overwrite_replaces_an_output_and_its_old_errors(source: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "o.jsonl", tmp_path / "o.jsonl.errors.jsonl"
    output.write_text("old")
    errors.write_text("old")
    flags = ("-o", output, "--max-tokens", "1", "-q")
    assert generate(source, *flags).code == 73
    assert (output.read_text(), errors.read_text()) == ("old", "old")
    assert generate(source, *flags, "--overwrite").code == 0
    assert len(read_rows(output)) == 3
    assert not errors.exists()


def test_an_output_never_replaces_its_input(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [QUESTION], "n_old": [7]}), path)
    before = path.read_bytes()
    ended = generate(path, "-o", path, "--overwrite", "--max-tokens", "1", "-q")
    assert ended.code == 2
    assert "rows.parquet is an input and also the output" in ended.stderr
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_rows_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n \n")
    for name in ("o.jsonl", "o.parquet"):
        ended = generate(tmp_path / "in.jsonl", "-o", tmp_path / name, "-q")
        assert ended.code == 0, ended
        assert (tmp_path / name).exists()


def test_only_the_partial_file_is_left_by_a_job_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("nanovllm_cli.core.engine.Engine.step", broken)
    assert generate(source, "-o", tmp_path / "o.jsonl").code == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if not name.endswith(".partial")} == {"in.jsonl"}
    monkeypatch.undo()
    assert generate(source, "-o", tmp_path / "o.jsonl", "--max-tokens", "1").code == 0
    assert not list(tmp_path.glob("o.jsonl.partial"))


def test_the_statistics_add_up(tmp_path: Path) -> None:
    rows = [{"prompt": QUESTION}, {"id": 1}, {"prompt": QUESTION, "max_tokens": 1}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert generate(source, "-o", tmp_path / "o.jsonl", "--seed", "3").code == 3
    written = read_rows(tmp_path / "o.jsonl")
    stats = json.loads((tmp_path / "o.jsonl.stats.json").read_bytes())
    assert stats["nanovllm_version"] == __version__
    assert (stats["seed"], stats["exit_code"]) == (3, 3)
    assert stats["rows"] == {
        "done": 3,
        "resumed": 0,
        "completed": 2,
        "failed": 1,
        "failed_by_code": {"no_prompt": 1},
        "finish_reasons": {"stop": 1, "length": 1},
    }
    for kind in ("prompt", "completion"):
        counted = sum(row["usage"][f"{kind}_tokens"] for row in written)
        assert stats["tokens"][kind] == counted
    assert stats["elapsed_seconds"] >= stats["phases_seconds"]["generate"] > 0


# --- reports


def test_a_dry_run_reports_and_makes_nothing(tmp_path: Path, hugging_face: Any) -> None:
    rows = [{"id": n, "prompt": f"Q: {n}+4=\nA:", "max_tokens": 5} for n in range(10)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    ended = generate(source, "--dry-run", "-o", tmp_path / "new" / "o.jsonl")
    assert (ended.code, ended.stdout) == (0, b"")
    tokens = [len(hugging_face.encode(str(row["prompt"]))) for row in rows]
    assert "10 good, 0 bad" in ended.stderr
    assert f"{sum(tokens)}, the longest prompt {max(tokens)}" in ended.stderr
    assert "at most 50" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_dry_run_finds_the_bad_rows_that_the_job_would_find() -> None:
    expected = json.loads((SAMPLE / "bad_rows.expected.json").read_bytes())
    num_good = sum(reason == "ok" for reason in expected.values())
    num_bad = len(expected) - num_good - 1  # a blank line is no row
    ended = generate(SAMPLE / "bad_rows.jsonl", "--dry-run")
    assert ended.code == 3
    assert f"{num_good} good, {num_bad} bad" in ended.stderr
    for code in ("1 prompt_too_long", "1 bad_token_ids", "1 duplicate_id", "4 invalid_json"):
        assert code in ended.stderr


def test_doctor_reports_to_people_and_to_programs() -> None:
    report = json.loads(call("doctor", "--json").stdout)
    assert report["nanovllm"] == __version__
    assert report["packages"]["torch"]
    assert {"gpus", "cpu_threads", "runs_on", "attention", "models_cached"} <= set(report)
    shown = call("doctor")
    assert shown.code == 0
    assert __version__ in shown.stdout.decode()
    assert "attention" in shown.stdout.decode()
    assert shown.stderr == ""
    last = " ".join(shown.stdout.decode().partition("verdict")[2].split())
    assert last == report["verdict"]
    if not report["gpus"]:
        assert last.startswith("Ready: jobs run on cpu, in float32, since there is no GPU that")
    assert report["packages"]["llguidance"][0].isdigit()


def test_doctor_advises_on_a_model_that_is_not_here(tmp_path: Path) -> None:
    report = json.loads(call("doctor", "--json", "--model", "Qwen3-32B").stdout)
    (advice,) = report["advice"].values()
    if not report["gpus"]:
        assert advice.startswith("there is no GPU to run it on; on the CPU its weights, 122.0 GiB")
    assert "advice" not in json.loads(call("doctor", "--json").stdout)
    for name, code in (("Qwen4-1B", 66), (str(tmp_path), 65)):
        ended = call("doctor", "--model", name)
        assert (ended.code, ended.stdout) == (code, b""), ended.stderr


def test_the_version_is_shown() -> None:
    assert call("--version").stdout.decode() == f"nanovllm {__version__}\n"


@pytest.mark.parametrize(
    ("command", "example"),
    [("generate", "prompts.jsonl -o out.jsonl"), ("score", "pairs.jsonl -o scores.jsonl")],
)
def test_help_shows_an_example_first_and_flags_in_panels(command: str, example: str) -> None:
    shown = call(command, "--help").stdout.decode()
    assert shown.index(f"nanovllm {command} {example}") < shown.index("--output")
    panels = {"generate": ("Sampling",), "score": ()}[command]
    for panel in ("Output", "Prompts", "Model", "Engine", "Run", *panels):
        assert f" {panel} " in shown
    for parameter in parameters(command):
        assert parameter.opts[0] in shown, parameter.opts


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python keeps what it compiles, as in an installation."""
    return {**environment(PYTHONPYCACHEPREFIX=str(tmp_path_factory.mktemp("pyc"))),
            "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip


def cpu_seconds(command: list[str | Path], env: dict[str, str]) -> float:
    """The least of five runs, after one that is not counted."""
    seconds = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds[1:])


def test_help_is_there_in_three_tenths_of_a_second(compiled: dict[str, str]) -> None:
    # Processor time: the wall clock measures the neighbours too.
    assert cpu_seconds([COMMAND, "--help"], compiled) <= 0.3
    assert cpu_seconds([COMMAND, "generate", "--help"], compiled) <= 0.45  # Typer alone: 0.25


def test_help_imports_nothing_heavy(compiled: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from nanovllm_cli.app import main\n"
        "sys.argv = ['nanovllm', 'generate', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=compiled, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in ended.stderr.split()}
    assert "nanovllm_cli" in loaded
    heavy = {"torch", "transformers", "tokenizers", "pyarrow", "numpy", "huggingface_hub"}
    assert not loaded & heavy


# --- the real command, where a process makes a difference


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Real runs, two at a time."""
    folder = tmp_path_factory.mktemp("real")
    rows = [{"id": n, "prompt": QUESTION} for n in range(3)]
    plain = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    flags = ("--model", MODEL, "--max-tokens", "3")
    packed = gzip.compress(plain)
    with ThreadPoolExecutor(2) as pool:
        piped = pool.submit(run, "generate", "-", *flags, stdin=packed, cwd=folder)
        debugged = pool.submit(
            *(run, "generate", "-", "--quiet", "-o", "sub/dir/out.jsonl", *flags),
            stdin=plain,
            cwd=folder,
            env={"NANOVLLM_MAX_TOKENS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDEVMODE": "1"},
        )
        doctor = pool.submit(run, "doctor", "--json", cwd=folder)
        found = {"piped": piped.result(), "file": debugged.result(), "doctor": doctor.result()}
    written = (folder / "sub" / "dir" / "out.jsonl").read_bytes()
    return {**found, "written": Run(code=0, stdout=written, stderr="")}


def test_a_packed_stdin_gives_rows_on_stdout(real: dict[str, Run]) -> None:
    assert real["piped"].code == 0, real["piped"]
    assert [row["id"] for row in real["piped"].rows] == [0, 1, 2]
    assert "3 completed, 0 failed" in real["piped"].stderr
    assert "\x1b" not in real["piped"].stderr, "no terminal, no colours"


def test_the_directory_of_an_output_is_made(real: dict[str, Run]) -> None:
    assert real["file"].code == 0, real["file"]
    assert real["file"].stdout == b""
    assert real["written"].stdout == real["piped"].stdout, "the flag comes before the environment"


def test_python_has_nothing_to_complain_of(real: dict[str, Run]) -> None:
    # In its development mode it names what was left open or was deprecated.
    ours = [line for line in real["file"].stderr.splitlines() if "nanovllm" in line]
    assert ours == []


def test_doctor_writes_one_document(real: dict[str, Run]) -> None:
    assert real["doctor"].code == 0
    assert json.loads(real["doctor"].stdout)["nanovllm"] == __version__
    assert real["doctor"].stderr == ""


def test_the_module_is_the_command_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "nanovllm_cli", "--version"],
        env=environment(),
        cwd=os.sep,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, f"nanovllm {__version__}\n")
