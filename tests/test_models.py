"""Names of models: what is no checkpoint of ours is told by what it is, with what to do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.core.errors import ModelError, UserError
from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.models import default_sampling, resolve_model, resolve_tokenizer
from nanovllm_cli.run_job import exit_code_of

from .cli import MODEL, call, write_rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the sample model, to be changed."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def refusal(name: str | Path, code: int = 66) -> UserError:
    """What `name` is refused with."""
    with pytest.raises(UserError) as caught:
        resolve_model(str(name), offline=True)
    assert exit_code_of(caught.value) == code
    assert caught.value.hint
    for noise in ("Error", "Errno", "internal"):
        assert noise not in f"{caught.value.message} {caught.value.hint}"
    return caught.value


def test_a_file_is_refused_with_its_directory() -> None:
    error = refusal(MODEL / "model.safetensors")
    assert "is a file, and a model is a directory" in error.message
    assert str(error.hint).endswith(f"--model {MODEL}")


@pytest.mark.parametrize("is_there", [True, False])
def test_gguf_is_not_read(is_there: bool, tmp_path: Path) -> None:
    file = tmp_path / "Qwen3-0.6B-Q8_0.gguf"
    if is_there:
        file.write_bytes(b"GGUF")
        assert "GGUF" in refusal(tmp_path, 65).message
    error = refusal(file)
    assert "is a GGUF file, and nanovllm reads safetensors only" in error.message
    assert "Qwen/Qwen3-0.6B" in str(error.hint)


def test_an_adapter_is_refused_with_a_command_that_merges_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    error = refusal(tmp_path, 65)
    assert "is an adapter (LoRA)" in error.message
    assert "merge_and_unload" in str(error.hint)
    assert str(tmp_path) in str(error.hint)


def test_an_adapter_beside_weights_is_not_passed_over(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "does not apply adapters" in refusal(model, 65).message
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    ended = call("generate", source, "--model", model)
    assert (ended.code, ended.stdout) == (65, b"")


def test_a_model_that_is_not_here_is_told_with_the_command_that_fetches_it() -> None:
    error = refusal("Qwen3-4B")
    assert "hf download Qwen/Qwen3-4B." in str(error.hint)
    error = refusal("org/name@v2")
    assert "hf download org/name --revision v2." in str(error.hint)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen/Qwen3-06B", "Qwen/Qwen3-0.6B"),
        ("Qwen3-06B", "Qwen/Qwen3-0.6B"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-32b", "Qwen/Qwen3-32B"),
        ("Qwen3-1.7", "Qwen/Qwen3-1.7B"),
    ],
)
def test_a_misspelt_name_is_told_with_the_right_one(name: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in str(refusal(name).hint)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "org/Qwen3-06B", "nowhere"])
def test_another_name_is_not_taken_for_a_misspelt_one(name: str) -> None:
    assert "Did you mean" not in str(refusal(name).hint)


@pytest.mark.parametrize(
    "name", ["~", "~/model", "~nobody-of-that-name/model"], ids=["~", "in ~", "another's"]
)
def test_a_home_that_is_not_known_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # as in a container without /etc/passwd
    assert "home directory" in refusal(name).message


@pytest.mark.parametrize(
    "name",
    ["a\0b", "x" * 5000, "a/" * 50, "\udce9", "org/\udce9", "org/name@\udce9", "org/na me", "org/",
     "/name", "org/..", "org/a--b", "@", "org/name@"],
    ids=ascii,
)  # fmt: skip
def test_what_is_not_a_name_is_told_so(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_model(name, offline=True)
    assert exit_code_of(caught.value) in (2, 66)
    (caught.value.message + str(caught.value.hint)).encode()


def test_a_model_whose_name_is_not_unicode_is_found(model: Path) -> None:
    named = model.with_name(os.fsdecode(b"mod\xe9l"))
    model.rename(named)
    assert resolve_model(str(named)) == named
    assert resolve_tokenizer(str(named)) == named
    (named / "config.json").unlink()
    (named / "adapter_config.json").write_text("{}")
    error = refusal(named, 65)
    (error.message + str(error.hint)).encode()


# generation_config.json


def write_generation(path: Path, **values: Any) -> None:
    (path / "generation_config.json").write_text(json.dumps(values))


def test_the_models_own_sampling_is_taken_as_it_is(model: Path) -> None:
    values = {"temperature": 1, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05, "top_k": 20}
    write_generation(model, **values, do_sample=True)
    found = default_sampling(model)
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values.items()
    }
    write_generation(model, **dict.fromkeys(values), do_sample=None)
    assert default_sampling(model) == {}
    for top_k in (0, -1):
        write_generation(model, top_k=top_k, temperature=0.6, do_sample=False)
        assert default_sampling(model) == {"temperature": 0.0}
    (model / "generation_config.json").unlink()
    assert default_sampling(model) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", 1000),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", [0.9]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", {}),
        ("top_k", 20.0),
        ("top_k", "20"),
        ("top_k", -2),
        ("top_k", 10**30),
        ("top_k", False),
        ("do_sample", "true"),
        ("do_sample", 1),
    ],
)
def test_sampling_that_cannot_be_is_65_with_the_file_and_the_value(
    name: str, value: object, model: Path, tmp_path: Path
) -> None:
    write_generation(model, **{name: value})
    with pytest.raises(ModelError) as caught:
        default_sampling(model)
    assert not isinstance(caught.value, CommandError)
    for part in (str(model / "generation_config.json"), name, str(value)):
        assert part in caught.value.message
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    for more in ([], ["--dry-run"]):
        assert call("generate", source, "--model", model, *more).code == 65
