"""Headers of weights against config.json, before anything is loaded; quantized and tied weights."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm_cli.core.checkpoint import INDEX, check_checkpoint, expected_shapes, read_header
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import build_model
from nanovllm_cli.core.errors import ModelError, ModelFileMissing, ModelUnreadable
from nanovllm_cli.core.loader import load_weights, targets_of
from nanovllm_cli.fingerprint import fingerprint
from nanovllm_cli.options import GenerateOptions

from .cli import MODEL, call, write_rows

MakeCheckpoint = Callable[..., Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def tied(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """One to be spoilt: its embedding is its head."""
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "tied"))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A copy of the sample model, to be spoilt."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def change(path: Path, change_tensors: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change_tensors(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def set_keys(path: Path, **values: Any) -> None:
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | values))


def check(path: Path) -> None:
    check_checkpoint(path, ModelConfig.from_directory(path))


def write_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@contextmanager
def as_another_user() -> Iterator[None]:
    """For root, who may read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# What config.json implies


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_expected_tensors_are_those_that_the_loader_fills(
    is_tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(
        tie_word_embeddings=is_tied,
        num_hidden_layers=3,
        num_attention_heads=6,
        head_dim=16,
        hidden_size=48,
        intermediate_size=100,
    )
    config = ModelConfig.from_directory(path)
    targets = targets_of(build_model(config, EngineConfig()))
    assert expected_shapes(config) == {name: tuple(t.shape) for name, t in targets.items()}
    check_checkpoint(path, config)
    stored = {t.name: t.shape for t in read_header(path / WEIGHTS)}
    assert stored == expected_shapes(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 1087), ("num_hidden_layers", 5), ("num_hidden_layers", 3), ("head_dim", 32)],
)
def test_a_dry_run_finds_weights_of_another_config(
    key: str, value: int, sample: Path, tmp_path: Path
) -> None:
    set_keys(sample / "config.json", **{key: value})
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    ended = call("generate", source, "--model", sample, "--dry-run")
    assert ended.code == 65, ended
    assert "config.json asks for" in ended.stderr or "tensor" in ended.stderr


@pytest.mark.parametrize("num_bytes", [0, 5, 3_000_000])
def test_a_dry_run_finds_truncated_and_missing_weights(
    num_bytes: int, sample: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    os.truncate(sample / WEIGHTS, num_bytes)
    ended = call("generate", source, "--model", sample, "--dry-run")
    assert ended.code == 65, ended
    assert "not a whole safetensors file" in ended.stderr
    (sample / WEIGHTS).unlink()
    assert call("generate", source, "--model", sample, "--dry-run").code == 65


# Headers


def test_what_the_header_says_is_what_the_file_holds(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3, 5), "b": torch.rand(7).bfloat16(), "c": torch.zeros(0, 4).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors")}
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        name: list(t.shape) for name, t in found.items()
    }
    for name, tensor in tensors.items():
        values = content[found[name].start : found[name].end]
        assert values == tensor.view(torch.uint8).numpy().tobytes()


A, B = ({"dtype": "F32", "shape": [2], "data_offsets": [n, n + 8]} for n in (0, 8))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": A, "b": A}, "overlaps"),
        ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, "overlaps"),
        ({"b": B}, "follows a gap"),
        ({"a": A}, "tensors end at byte"),
        ({"a": {**A, "shape": [3]}, "b": B}, "takes others"),
        ({"a": {**A, "dtype": "F16"}, "b": B}, "takes others"),
        ({"a": {**A, "shape": [-2]}, "b": B}, "the header of 'a'"),
        ({"a": {**A, "shape": [True, 2]}, "b": B}, "the header of 'a'"),
        ({"a": {**A, "shape": [10**40]}, "b": B}, "the header of 'a'"),
        ({"a": {**A, "shape": [1] * 9}, "b": B}, "the header of 'a'"),
        ({"a": {**A, "data_offsets": [8, 0]}, "b": B}, "bytes 8 to 0"),
        ({"a": {**A, "data_offsets": [0, 80]}, "b": B}, "bytes 0 to 80"),
        ({"a": {**A, "data_offsets": [0]}, "b": B}, "the header of 'a'"),
        ({"a": {**A, "dtype": 32}, "b": B}, "the header of 'a'"),
        ({"a": {}, "b": B}, "the header of 'a'"),
        ({"a": None, "b": B}, "the header of 'a'"),
        ({"a": 5, "b": B}, "the header of 'a'"),
        ({"a": A, "b": B, "__metadata__": {"format": 3}}, "__metadata__"),
        ({"a": A, "b": B, "__metadata__": ["pt"]}, "__metadata__"),
        ([], "not a JSON object"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' * 50_000, "not JSON"),
    ],
    ids=str,
)
def test_a_bad_header_is_named_with_the_reason(header: object, words: str, tmp_path: Path) -> None:
    file = write_file(tmp_path / "x.safetensors", header, b"\0" * 16)
    with pytest.raises(ModelError, match="is not a whole safetensors file") as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert words in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 33 << 20])
def test_a_header_of_absurd_length_takes_no_memory(length: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(file, 100 << 20)
    with pytest.raises(ModelError, match="its header has"):
        read_header(file)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS, INDEX])
def test_what_is_not_a_regular_file_is_refused_without_a_wait(name: str, sample: Path) -> None:
    (sample / name).unlink(missing_ok=True)
    os.mkfifo(sample / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        check(sample)
    (sample / name).unlink()
    (sample / name).mkdir()
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        check(sample)


def test_a_tensor_in_two_files_is_refused(sample: Path) -> None:
    shutil.copy(sample / WEIGHTS, sample / "other.safetensors")
    with pytest.raises(ModelError, match=r"is in model\.safetensors as well|is in other"):
        check(sample)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": 3}, "the file 3"),
        ({"a": None}, "the file None"),
        ({"a": "../model.safetensors"}, "the file '../model.safetensors'"),
        ({"a": "/etc/passwd"}, "the file '/etc/passwd'"),
        ({"a": "config.json"}, "must end with .safetensors"),
        ({"a": "x\0.safetensors"}, "the file"),
        ({"a": "lost.safetensors"}, "lost.safetensors"),
    ],
    ids=str,
)
def test_an_index_names_files_of_its_own_directory(
    weight_map: object, words: str, sample: Path
) -> None:
    (sample / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError) as caught:
        check(sample)
    assert words in caught.value.message
    assert INDEX in caught.value.message


# Files that cannot be read


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_a_file_of_another_user_is_66(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        path = Path(shutil.copytree(MODEL, Path(folder) / "model"))
        os.chmod(folder, 0o755)
        (path / name).chmod(0)
        denied = f"cannot read .*{name}: Permission denied"
        with as_another_user(), pytest.raises(ModelFileMissing, match=denied):
            check(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_user_is_66(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(MODEL, Path(folder) / "model"))
        os.chmod(folder, 0o755)
        (path / name).chmod(0)
        options = GenerateOptions(inputs=["-"], engine=EngineConfig(device="cpu"))
        denied = f"cannot read .*{name}: Permission denied"
        with as_another_user(), pytest.raises(ModelFileMissing, match=denied):
            fingerprint(options, model=path, tokenizer=path, sampling={})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_a_file_that_the_disk_does_not_give_is_74(name: str, sample: Path, tmp_path: Path) -> None:
    (sample / name).unlink()
    (sample / name).symlink_to("/proc/self/mem")  # EIO at its first byte
    with pytest.raises(ModelUnreadable, match=f"cannot read .*{name}: Input/output error"):
        check(sample)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    ended = call("generate", source, "--model", sample)
    assert ended.code == 74, ended
    assert "internal" not in ended.stderr


# Quantized weights


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"config_groups": {}}, "quantization_config"),
        (["gptq"], "gptq"),
        (True, "True"),
    ],
    ids=str,
)
def test_a_quantization_config_is_refused_by_its_method(
    value: object, words: str, sample: Path
) -> None:
    set_keys(sample / "config.json", quantization_config=value)
    (sample / WEIGHTS).unlink()  # nothing of them is looked at
    with pytest.raises(ModelError, match="quantized") as caught:
        check(sample)
    assert words in caught.value.message
    assert "not supported yet" in str(caught.value.hint)


def test_no_quantization_is_no_quantization(sample: Path) -> None:
    set_keys(sample / "config.json", quantization_config=None, compression_config={})
    check(sample)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}, "gptq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("quant_config.json", {"w_bit": 4}, "w_bit 4"),
    ],
)
def test_a_file_that_tells_of_quantization_is_refused(
    name: str, content: object, words: str, sample: Path
) -> None:
    (sample / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{name}: the weights are quantized.*{words}"):
        check(sample)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_number_format_are_named(dtype: torch.dtype, sample: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(sample, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(ModelError, match=f"{name} is stored as"):
        check(sample)
    with pytest.raises(ModelError, match=f"{name} is stored as"):
        load_weights(build_model(ModelConfig.from_directory(sample), EngineConfig()), sample)


def test_scales_beside_a_matrix_are_known_as_quantization(sample: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    change(sample, lambda t: t.update({name: torch.ones(4, 2)}))
    with pytest.raises(ModelError, match=f"quantized.*{name}"):
        check(sample)


# Tied embeddings


def load(path: Path) -> None:
    load_weights(build_model(ModelConfig.from_directory(path), EngineConfig()), path)


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tied: Path) -> None:
    def add_head(tensors: dict[str, Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1  # one value, the last
        tensors["lm_head.weight"] = head

    change(tied, add_head)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs.*embed_tokens") as caught:
        load(tied)
    assert "tie_word_embeddings" in str(caught.value.hint)
    set_keys(tied / "config.json", tie_word_embeddings=False)
    load(tied)  # as the hint has it


def test_the_job_and_its_dry_run_refuse_such_a_head(sample: Path, tmp_path: Path) -> None:
    change(sample, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    for more in ([], ["--dry-run"]):
        ended = call("generate", source, "--model", sample, *more)
        assert ended.code == 65, ended
        assert "lm_head.weight differs" in ended.stderr


@pytest.mark.parametrize("shape", [(160, 63), (159, 64), (160,)])
def test_a_misshapen_head_beside_a_tied_embedding_is_named(
    shape: tuple[int, ...], tied: Path
) -> None:
    change(tied, lambda t: t.update({"lm_head.weight": torch.ones(shape)}))
    with pytest.raises(ModelError, match=r"lm_head\.weight has the shape"):
        load(tied)
