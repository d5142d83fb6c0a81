"""Every exit code, as `sh -c` in an almost empty environment sees it: cron's view of the command.

The message and the hint are on stderr, stdout holds rows only, and nobody gets a traceback.
"""

import gzip
import json
import os
import resource
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import ExitCode

from .cli import (
    MODEL,
    TIMEOUT_SECONDS,
    Run,
    call,
    environment,
    generate,
    read_rows,
    run,
    shell,
    write_rows,
)

GENERATE = f"nanovllm generate --model {shlex.quote(str(MODEL))} --max-tokens 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input files: two good rows, and inputs with something wrong."""
    path = tmp_path_factory.mktemp("exit_codes")
    good = [{"id": n, "prompt": f"Q: {n}+4=\nA:"} for n in range(2)]
    write_rows(path / "good.jsonl", good)
    write_rows(path / "some_bad.jsonl", [good[0], {"id": "x"}, good[1]])
    write_rows(path / "many.jsonl", [{"id": n, "prompt": f"Q: {n}+4=\nA:"} for n in range(300)])
    packed = gzip.compress((path / "many.jsonl").read_bytes())
    (path / "truncated.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (path / "exists.jsonl").write_text("precious")
    return path


def full(limit: int) -> Callable[[], None]:
    """For a child process: no file of its own may grow beyond `limit` bytes, as on a full disk."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))


# What cron runs: a line of shell, and the exit code it must have.
LINES: dict[str, tuple[str, int]] = {
    "good": (f"{GENERATE} good.jsonl -o good.out.jsonl --quiet", 0),
    "closed stderr": (f"{GENERATE} good.jsonl 2>&-", 0),
    "closed and full": (f"{GENERATE} good.jsonl -o closed.jsonl >&- 2> /dev/full", 0),
    "unknown flag": (f"{GENERATE} good.jsonl --max-tokns 3", 2),
    "unknown flag, full stderr": (f"{GENERATE} good.jsonl --max-tokns 3 2> /dev/full", 2),
    "some failed": (f"{GENERATE} some_bad.jsonl -o some_bad.out.jsonl --quiet", 3),
    "truncated": (f"{GENERATE} truncated.jsonl.gz -o o65.jsonl", 65),
    "no model": ("HF_HUB_OFFLINE=1 nanovllm generate good.jsonl --model Qwen3-0.6B", 66),
    "exists": (f"{GENERATE} good.jsonl -o exists.jsonl", 73),
    "full stdout": (f"{GENERATE} good.jsonl > /dev/full", 74),
    "full stdout, help": ("nanovllm --help > /dev/full", 74),
    "closed stdout": (f"{GENERATE} good.jsonl >&-", 141),
    # stdin stays open: nobody may wait for its end.
    "head, stdin open": (
        f"mkfifo fifo; sleep 1000 > fifo & cat many.jsonl fifo | {{ {GENERATE} -; "
        "echo $? > code; kill $!; } | head -1; exit $(cat code)",
        141,
    ),
    "full stdout, stdin open": (
        f"mkfifo open; sleep 1000 > open & cat many.jsonl open | {{ {GENERATE} - > /dev/full; "
        "echo $? > full.code; kill $!; }; exit $(cat full.code)",
        74,
    ),
}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(partial(shell, line, cwd=folder)) for name, (line, _) in LINES.items()
        }
        return {name: future.result() for name, future in started.items()}


@pytest.mark.parametrize("name", LINES)
def test_a_shell_sees_the_exit_code(name: str, runs: dict[str, Run]) -> None:
    line, code = LINES[name]
    assert runs[name].code == code, f"{line}: {runs[name]}"
    assert "Traceback" not in runs[name].stderr


@pytest.mark.parametrize("name", [name for name, (_, code) in LINES.items() if code > 3])
def test_an_error_is_on_stderr_and_not_on_stdout(name: str, runs: dict[str, Run]) -> None:
    stdout, stderr = runs[name].stdout, runs[name].stderr
    if name == "head, stdin open":  # the reader has its line, and there is nobody to tell
        assert stdout.count(b"\n") == 1
        json.loads(stdout)
        assert "error" not in stderr
        return
    assert stdout == b""
    if name != "full stdout, help":
        assert "error: " in stderr
    if not name.startswith("full"):
        assert "\n\nhint: " in stderr


def test_quiet_says_nothing_but_that_rows_failed(runs: dict[str, Run], folder: Path) -> None:
    assert (runs["good"].stdout, runs["good"].stderr) == (b"", "")
    assert len(read_rows(folder / "good.out.jsonl")) == 2
    (line,) = runs["some failed"].stderr.splitlines()
    assert line == "warning: 1 of 3 rows failed (1 no_prompt); see some_bad.out.jsonl.errors.jsonl"


def test_a_closed_stderr_does_not_send_messages_to_stdout(runs: dict[str, Run]) -> None:
    assert [row["id"] for row in runs["closed stderr"].rows] == [0, 1]
    assert runs["closed stderr"].stderr == ""


def test_a_job_that_writes_a_file_needs_neither_stdout_nor_stderr(
    runs: dict[str, Run], folder: Path
) -> None:
    assert len(read_rows(folder / "closed.jsonl")) == 2


def test_an_unknown_flag_is_answered_with_the_one_that_was_meant(runs: dict[str, Run]) -> None:
    assert runs["unknown flag"].stdout == b""
    assert runs["unknown flag"].stderr == (
        "error: no such option: --max-tokns\n\nhint: Did you mean --max-tokens?\n"
    )


def test_the_rows_that_failed_are_in_the_errors_file(runs: dict[str, Run], folder: Path) -> None:
    assert [row["id"] for row in read_rows(folder / "some_bad.out.jsonl")] == [0, 1]
    (error,) = read_rows(folder / "some_bad.out.jsonl.errors.jsonl")
    assert (error["id"], error["line"], error["error"]["code"]) == ("x", 2, "no_prompt")


def test_what_is_wrong_is_named_with_its_place(runs: dict[str, Run]) -> None:
    assert "truncated.jsonl.gz" in runs["truncated"].stderr
    assert "byte" in runs["truncated"].stderr
    assert "'Qwen3-0.6B'; tried the directory Qwen3-0.6B, the cache" in runs["no model"].stderr


def test_a_job_that_cannot_run_leaves_no_file(runs: dict[str, Run], folder: Path) -> None:
    assert (folder / "exists.jsonl").read_text() == "precious"
    assert {path.name for path in folder.iterdir()} == {
        *("good.jsonl", "some_bad.jsonl", "many.jsonl", "truncated.jsonl.gz", "exists.jsonl"),
        *("good.out.jsonl", "good.out.jsonl.stats.json", "closed.jsonl", "closed.jsonl.stats.json"),
        *(f"some_bad.out.jsonl{more}" for more in ("", ".errors.jsonl", ".stats.json")),
        *("fifo", "open", "code", "full.code"),
    }


def test_a_disk_that_fills_up_is_74_and_nothing_is_published(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "in.jsonl",
        [{"id": n, "prompt": "Q: 1+4=\nA:", "text": "x" * 50} for n in range(250)],
    )
    line = f"{GENERATE} in.jsonl -o out.jsonl --max-tokens 1"
    ended = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        preexec_fn=full(20_000),
        timeout=TIMEOUT_SECONDS,
    )
    assert ended.returncode == 74, ended.stderr
    assert ended.stdout == b""
    assert b"\nerror: cannot write out." in ended.stderr
    assert b"Traceback" not in ended.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if not name.endswith(".partial")} == {"in.jsonl"}


# --- without a shell: what a start of the command would only make slower


def one_row(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "Q: 3+4=\nA:"}])


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "hot")),
        *(("--top-p", "0"), ("--top-p", "1.5"), ("--top-p", "x")),
        *(("--top-k", "-2"), ("--top-k", "1.5")),
        *(("--min-p", "-0.1"), ("--min-p", "2")),
        *(("--max-tokens", "0"), ("--max-tokens", "many")),
        *(("--min-tokens", "-1"), ("--min-tokens", "5", "--max-tokens", "4")),
        *(("--n", "0"), ("--n", "129"), ("--seed", "-1"), ("--seed", str(2**64)), ("--stop", "")),
        *(("--repetition-penalty", value) for value in ("0", "-1", "101", "nan", "x")),
        *(("--presence-penalty", value) for value in ("-2.1", "2.1", "nan")),
        *(("--frequency-penalty", value) for value in ("-2.1", "2.1", "nan")),
        *(("--logit-bias", value) for value in ("5", "[]", "{5: 1}", '{"a": 1}', '{"5": 101}')),
        *(("--logit-bias", value) for value in ('{"5": NaN}', '{"5": "1"}', '{"5": true}')),
        *(("--bad-word", ""), ("--bad-word", "  ")),
        *(("--logprobs", "-1"), ("--logprobs", "21"), ("--logprobs", "x")),
        *(("--prompt-logprobs", "-1"), ("--prompt-logprobs", "21")),
        *(("--truncate-prompt-tokens", "0"), ("--truncate-prompt-tokens", "-1")),
        *(("--thinking-budget", "-1"), ("--thinking-budget", "x")),
        *(("--best-of", "0"), ("--best-of", "129"), ("--best-of", "2", "--n", "3")),
        *(("--timeout", "0"), ("--timeout", "-1"), ("--timeout", "nan"), ("--timeout", "inf")),
        *(
            ("--log-format", "xml"),
            ("--limit", "0"),
            ("--max-inflight", "0"),
            ("--max-num-seqs", "0"),
        ),
        *(("--max-num-batched-tokens", "0"), ("--max-model-len", "0"), ("--block-size", "17")),
        *(
            ("--max-model-len", "5000"),
            ("--device", "tpu"),
            ("--dtype", "int8"),
            ("--format", "csv"),
        ),
        *(("--kv-cache-memory", value) for value in ("0", "-1", "nan", "inf", "all")),
        *(
            ("--gpu-memory-utilization", "1.5"),
            ("--nonsense",),
            ("--temperature",),
        ),
        *(("--template", template) for template in ("{}", "{0}", "{a.b}", "{a[0]}", "{a!r}")),
        *(("--template", template) for template in ("{a:>5}", "{a", "a}", "{a.__class__}")),
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    ended = generate(one_row(tmp_path), "-o", output, *arguments)
    assert ended.code == 2, ended
    assert ended.stdout == b""
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
    flag = arguments[0].lstrip("-")
    assert flag in ended.stderr.replace("_", "-").replace("kv-cache-bytes", "kv-cache-memory")
    assert not output.exists()


@pytest.mark.parametrize(
    "flags",
    [
        *(("--prompt-column", "prmpt"), ("--messages-column", "prmpt"), ("--id-column", "prmpt")),
        *(("-p", "Say {prmpt}."), ("--dry-run", "--id-column", "prmpt")),
    ],
    ids=" ".join,
)
def test_a_flag_that_names_a_column_of_no_row_is_2(flags: tuple[str, ...], tmp_path: Path) -> None:
    ended = generate(one_row(tmp_path), *flags)
    assert (ended.code, ended.stdout) == (2, b"")
    assert "names the column 'prmpt'" in ended.stderr
    assert ended.stderr.endswith("hint: Did you mean 'prompt'?\n")


def test_an_input_that_cannot_be_used_is_65_and_named_with_the_place(tmp_path: Path) -> None:
    files = {
        "not.parquet": (b"PAR1 and no more", "not.parquet is damaged"),
        "text.parquet": (b"Once upon a time\n", "text.parquet is damaged"),
        "truncated.zst": (b"\x28\xb5\x2f\xfd\x04", "truncated.zst is damaged"),
        "bad.jsonl": (b'{"id": 1, "text": "a"}\n' * 120, "bad.jsonl:1: "),
        "short.jsonl": (b"{}\n", "short.jsonl:1: "),
        "archive.jsonl": (b"PK\x03\x04", "archive.jsonl is a zip archive"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        ended = generate(tmp_path / name, "-o", tmp_path / "out.jsonl")
        assert (ended.code, ended.stdout) == (65, b""), name
        assert message in ended.stderr
        assert "\n\nhint: " in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*files}


def test_an_input_that_is_not_there_is_66_and_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    source = one_row(tmp_path)
    for name in ("inn.jsonl", "*.parquet", "folder", "in.jsonl/x", "nowhere/in.jsonl"):
        ended = generate(source, tmp_path / name, "-o", tmp_path / "out.jsonl")
        assert (ended.code, ended.stdout) == (66, b""), name
        assert str(tmp_path / name) in ended.stderr
        assert "\n\nhint: " in ended.stderr
    assert "Did you mean" in generate(tmp_path / "inn.jsonl").stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "folder"}


def test_a_bad_value_in_the_environment_is_2(tmp_path: Path) -> None:
    ended = generate(one_row(tmp_path), env={"NANOVLLM_TOP_P": "high"})
    assert (ended.code, ended.stdout) == (2, b"")
    assert "NANOVLLM_TOP_P (--top-p) is 'high'" in ended.stderr


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("max-tokns = 3", "unknown key 'max-tokns'"),
        ("[sampling]\ntop_p = 1", "unknown key 'sampling'"),
        ("max-tokens = 'x'", "--max-tokens"),
        ("stop = 3", "stop = 3; it must be a string or a list of them"),
        ("stop = ['a', 1]", "a string or a list of them"),
        ("stop = ['a', '']", "--stop is ''; it must be a text that is not empty"),
        ("temperature = ", "is not a TOML file"),
        ("x = " + "[" * 3000 + "]" * 3000, "is not a TOML file"),
        ("temperature = -1", "temperature is -1"),
        ("bad-word = ['a', '']", "--bad-word is ('a', '')"),
        ("logit-bias = 5", "--logit-bias is '5'"),
        ("logprobs = 21", "logprobs is 21"),
    ],
)
def test_a_bad_config_file_is_2(toml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(toml)
    ended = generate(one_row(tmp_path), "--config", tmp_path / "job.toml")
    assert (ended.code, ended.stdout) == (2, b"")
    assert message in ended.stderr
    if "tokns" in toml:
        assert "Did you mean 'max-tokens'?" in ended.stderr


def test_a_missing_config_file_is_66(tmp_path: Path) -> None:
    ended = generate(one_row(tmp_path), "--config", tmp_path / "none.toml")
    assert ended.code == 66
    assert "none.toml" in ended.stderr


def test_no_command_and_unknown_commands_are_2() -> None:
    assert call().code == 2
    assert "error" not in call().stderr
    unknown = call("generat")
    assert unknown.code == 2
    assert "generat" in unknown.stderr
    assert "nanovllm --help" in unknown.stderr
    assert call("generate").code == 2


@pytest.mark.parametrize("name", ["exists", "directory", "device", "errors"])
def test_an_output_that_is_not_ours_is_refused(name: str, tmp_path: Path) -> None:
    source = one_row(tmp_path)
    (tmp_path / "old").write_text("precious")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    arguments, code = {
        "exists": (("-o", tmp_path / "old"), 73),
        "directory": (("-o", tmp_path / "folder", "--overwrite"), 2),
        "device": (("-o", "/dev/null", "--overwrite"), 2),
        "errors": (("--errors", tmp_path / "old"), 73),
    }[name]
    ended = generate(source, *arguments)
    assert (ended.code, ended.stdout) == (code, b"")
    assert "hint: " in ended.stderr
    assert (tmp_path / "old").read_text() == "precious"
    assert (tmp_path / "folder").is_dir()
    assert not os.path.isfile("/dev/null")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("errors", ["/dev/null", "fifo", "out.jsonl", "in.jsonl"])
def test_an_errors_file_that_is_none_is_refused(errors: str, tmp_path: Path) -> None:
    source = one_row(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    arguments = ("-o", tmp_path / "out.jsonl", "--errors", tmp_path / errors)
    ended = generate(source, *arguments)
    assert ended.code == 2
    assert source.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "fifo"}


def test_an_error_of_ours_is_1_with_a_traceback_only_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("nanovllm_cli.core.engine.Engine.from_checkpoint", broken)
    output = tmp_path / "out.jsonl"
    ended = generate(one_row(tmp_path), "-o", output, "--quiet")
    assert (ended.code, ended.stdout) == (1, b"")
    assert ended.stderr.startswith("error: internal error: RuntimeError: boom\n\nhint: ")
    assert "Traceback" not in ended.stderr
    assert not output.exists()
    ended = generate(one_row(tmp_path), "-o", output, "--debug")
    assert ended.code == 1
    assert "Traceback" in ended.stderr


def test_failed_rows_may_be_allowed(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": 1}])
    arguments = ("-o", tmp_path / "out.jsonl", "--max-tokens", "1", "--quiet")
    assert generate(rows, *arguments, "--allow-errors").code == 0
    assert len(read_rows(tmp_path / "out.jsonl.errors.jsonl")) == 1
    assert generate(rows, *arguments, "--overwrite").code == 3
    dry = ("--dry-run", "--quiet")
    assert generate(rows, *dry).code == 3
    assert generate(rows, *dry, "--allow-errors").code == 0


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_row_nested_too_deep_fails_alone(name: str, tmp_path: Path) -> None:
    deep = b'{"id": 1, "prompt": "a", "x": %s0%s}\n' % (b"[" * 300, b"]" * 300)
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n%s{"prompt": "b"}\n' % deep)
    ended = generate(tmp_path / "in.jsonl", "-o", tmp_path / name, "--max-tokens", "1", "-q")
    assert ended.code == 3, ended
    (error,) = read_rows(tmp_path / f"{name}.errors.jsonl")
    assert (error["id"], error["error"]["code"]) == (1, "too_deep")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"]}'),
        ("config.json", None),
        ("generation_config.json", b"{"),
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer.json", None),
        ("model.safetensors", None),
        ("model.safetensors", b"half"),
    ],
)
def test_a_model_with_a_broken_file_is_65(file: str, content: bytes | None, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        (model / path.name).symlink_to(path)
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    flags = ("--model", model, "-o", tmp_path / "out.jsonl", "--quiet")
    ended = call("generate", one_row(tmp_path), *flags)
    assert ended.code == 65, ended
    assert ended.stdout == b""
    assert ended.stderr.startswith("error: ")
    assert not (tmp_path / "out.jsonl").exists()


def test_weights_that_are_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).symlink_to(path)
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    ended = call("generate", one_row(tmp_path), "--model", model)
    assert ended.code == 65
    assert "safetensors" in ended.stderr


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "org/name", "Qwen3-4B", "a/b/c"])
def test_a_model_that_is_not_there_is_66(name: str, tmp_path: Path) -> None:
    ended = call("generate", one_row(tmp_path), "--model", name, "--offline")
    assert (ended.code, ended.stdout) == (66, b"")
    assert name in ended.stderr
    assert "hint: " in ended.stderr


def test_memory_that_is_too_small_is_69(tmp_path: Path) -> None:
    ended = generate(one_row(tmp_path), "--kv-cache-memory", "0.000001")
    assert (ended.code, ended.stdout) == (69, b"")
    assert "--kv-cache-memory" in ended.stderr


def test_errors_of_rows_go_to_stderr_where_rows_go_to_stdout(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": 1}])
    ended = generate(rows, "--max-tokens", "1", "--quiet")
    assert ended.code == 3
    assert [row["prompt"] for row in ended.rows] == ["a"]
    assert json.loads(ended.stderr)["error"]["code"] == "no_prompt"


def test_the_codes_are_those_that_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "SOME_ROWS_FAILED": 3,
        "INPUT_UNUSABLE": 65,
        "NOT_FOUND": 66,
        "UNAVAILABLE": 69,
        "OUTPUT_EXISTS": 73,
        "IO_ERROR": 74,
        "LOCKED": 75,
        "CONFIG_MISMATCH": 78,
        "HANGUP": 129,
        "INTERRUPTED": 130,
        "PIPE_CLOSED": 141,
        "TERMINATED": 143,
    }


@pytest.mark.parametrize(
    "flag",
    ["template-file", "prefix-file", "chat-template", "json-schema", "grammar", "config"],
)
def test_a_flags_file_that_has_no_end_is_2(flag: str, tmp_path: Path) -> None:
    source = one_row(tmp_path)
    for line in (f"--{flag} /dev/zero", f"--{flag} <(yes)"):
        ended = subprocess.run(
            ["bash", "-c", f"ulimit -v 8000000; exec nanovllm generate {source} {line}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 2, ended.stderr
        assert ("a device" if "zero" in line else "more than 16 MiB") in ended.stderr


def test_a_merge_of_a_directory_or_of_nothing_is_2(tmp_path: Path) -> None:
    for name in (".", "/", "", tmp_path):
        ended = run("merge", name, "-o", tmp_path / "m.jsonl")
        assert ended.code == 2, ended.stderr
