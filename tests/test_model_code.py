"""A checkpoint that brings code: none of it ever runs, and nothing is asked, whatever stdin says.

And what a start costs: the job's own process imports neither torch nor transformers.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.tokenizer import PromptTokenizer
from nanovllm_cli.tokenizer_files import tokenizer_directory

from .cli import MODEL, SAMPLE, environment, read_rows, run, write_rows

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("the checkpoint's code was run")
from transformers import PreTrainedTokenizerFast, PretrainedConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "evil"
"""
MAPS: dict[str, dict[str, Any]] = {
    "the tokenizer": {"tokenizer_config.json": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}},
    "the config": {"config.json": {"AutoConfig": "evil.EvilConfig"}},
    "both": {
        "tokenizer_config.json": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    },
}


def evil_model(folder: Path, maps: dict[str, Any], *, has_tokenizer_json: bool) -> Path:
    """A copy of the sample model that brings code, in old tokenizer files if need be."""
    path = folder / "model"
    shutil.copytree(MODEL, path)
    (path / "evil.py").write_text(CODE.format(mark=str(folder / "PWNED")))
    for name, auto_map in maps.items():
        content = json.loads((path / name).read_bytes())
        content["auto_map"] = auto_map
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "EvilTokenizer"
        (path / name).write_text(json.dumps(content))
    if not has_tokenizer_json:
        as_old_files(path)
    return path


def as_old_files(path: Path) -> None:
    """Take tokenizer.json apart into vocab.json and merges.txt, as checkpoints of old have them."""
    model = json.loads((path / "tokenizer.json").read_bytes())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
def test_the_code_of_a_checkpoint_is_not_run_whatever_stdin_says(
    maps: dict[str, Any], tmp_path: Path
) -> None:
    model = evil_model(tmp_path, maps, has_tokenizer_json=True)
    row = {"messages": [{"role": "user", "content": "What is 3+4?"}]}
    given = (json.dumps(row) + "\n").encode()
    flags = ("--model", model, "--max-tokens", "2")
    for stdin in (given + b"y\ny\n", b"y\ny\ny\n" + given):
        ended = run("generate", "-", *flags, stdin=stdin, cwd=tmp_path)
        assert ended.code == 3, ended.stderr  # the y's are bad rows
        assert "completion" in ended.rows[0]
        assert len(ended.rows) == 1, "stdout is data only"
        assert "custom code" not in ended.stderr
    assert not (tmp_path / "PWNED").exists()


def test_old_tokenizer_files_are_converted_and_their_code_is_not_run(tmp_path: Path) -> None:
    model = evil_model(tmp_path, MAPS["both"], has_tokenizer_json=False)
    with pytest.raises(ModelError, match=r"no tokenizer\.json, and transformers cannot make one"):
        PromptTokenizer(model)
    assert not (tmp_path / "PWNED").exists()


def test_old_tokenizer_files_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(MODEL, path)
    as_old_files(path)
    texts = ["Q: 3+4=\nA:", "What  is this?", "caf\u00e9 e\u0301 \u4f60"]
    converted = Tokenizer.from_file(str(tokenizer_directory(path) / "tokenizer.json"))
    whole = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in texts:
        assert converted.encode(text).ids == whole.encode(text).ids
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    flags = ("--max-tokens", "4", "--regex", "[0-9]+")
    ours, theirs = (run("generate", source, "--model", m, *flags) for m in (path, MODEL))
    assert ours.code == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert not (path / "tokenizer.json").exists(), "the model's directory is not ours to write"


IMPORTS = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sorted({"torch", "transformers"} & {*sys.modules}), file=sys.stderr))
from nanovllm_cli.app import main
main()
"""  # noqa: E501


@pytest.mark.parametrize("more", [(), ("--dp", "2"), ("--tp", "2"), ("--dry-run",)])
def test_the_jobs_process_imports_neither_torch_nor_transformers(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ["generate", SAMPLE / "prompts.jsonl", "--limit", "8", "--model", MODEL]
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS, *arguments, "-o", tmp_path / "out.jsonl", *more],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "IMPORTED\n" in ended.stderr


def least_seconds(*arguments: str | Path, code: int, times: int = 5) -> float:
    """Processor time of a command and its children: the least of several, as machines are busy."""
    seconds = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments).code == code
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_a_mistake_and_a_finished_job_are_told_before_an_engine_starts(tmp_path: Path) -> None:
    flags = ("--model", MODEL, "-o", tmp_path / "out.jsonl", "--max-tokens", "1")
    rows = [{"prompt": "Q: 3+4=\nA:"}] * 3
    source = write_rows(tmp_path / "in.jsonl", rows)
    # 0.5 s, and on a machine that is busy or slow a little more than it takes to show a help.
    most = max(0.5, 3 * least_seconds("generate", "--help", code=0))
    assert least_seconds("generate", tmp_path / "no.jsonl", *flags, code=66) < most
    unknown = ("--id-column", "no such column")
    assert least_seconds("generate", source, *flags, *unknown, code=2) < most
    assert run("generate", source, *flags).code == 0
    assert least_seconds("generate", source, *flags, code=0) < most


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 3000000000 }}", "needs too much memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes"),
        ("{{ raise_exception('not these') }}", "not these"),
    ],
)
def test_a_template_that_explodes_or_never_ends_is_an_error_of_its_rows(
    template: str, reason: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    source = write_rows(tmp_path / "in.jsonl", [chat, {"prompt": "Q: 3+4=\nA:"}, chat])
    output = tmp_path / "out.jsonl"
    ended = run("generate", source, "-o", output, "--model", model, "--max-tokens", "4")
    assert ended.code == 3, ended.stderr
    assert len(read_rows(output)) == 1
    errors = [row["error"] for row in read_rows(tmp_path / "out.jsonl.errors.jsonl")]
    assert [error["code"] for error in errors] == ["template_error"] * 2
    assert all(error["message"].startswith("the chat template failed: ") for error in errors)
    assert all(reason in error["message"] for error in errors)
