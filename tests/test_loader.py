"""Loading weights: every file and tensor that is not as it should be is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm_cli.core.checkpoint import weight_files
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import build_model, load_model
from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.loader import (
    Target,
    load_random_weights,
    load_weights,
    targets_of,
)
from nanovllm_cli.core.parallel import TensorParallel
from nanovllm_cli.core.qwen3 import Qwen3

MakeCheckpoint = Callable[..., Path]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """One to be spoilt: untied, in one file."""
    return Path(shutil.copytree(make_checkpoint(tie_word_embeddings=False), tmp_path / "one"))


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """One to be spoilt: tied, in many files."""
    return Path(shutil.copytree(make_checkpoint(max_shard_size="30KB"), tmp_path / "many"))


def load(path: Path, **config: Any) -> Qwen3:
    model = build_model(ModelConfig.from_directory(path), EngineConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_weights(model, path)
    return model


def change(path: Path, change_tensors: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change_tensors(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def parts(model: Qwen3, layer: int) -> dict[str, Tensor]:
    """A layer's weights by the checkpoint's names, cut from our stacks by hand."""
    attention, mlp = model.layers[layer].self_attn, model.layers[layer].mlp
    q, k, v = attention.qkv_proj.weight.split((4 * 32, 2 * 32, 2 * 32))
    gate, up = mlp.gate_up_proj.weight.split((96, 96))
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.self_attn.q_proj.weight": q,
        f"{prefix}.self_attn.k_proj.weight": k,
        f"{prefix}.self_attn.v_proj.weight": v,
        f"{prefix}.self_attn.o_proj.weight": attention.o_proj.weight,
        f"{prefix}.self_attn.q_norm.weight": attention.q_norm.weight,
        f"{prefix}.self_attn.k_norm.weight": attention.k_norm.weight,
        f"{prefix}.mlp.gate_proj.weight": gate,
        f"{prefix}.mlp.up_proj.weight": up,
        f"{prefix}.mlp.down_proj.weight": mlp.down_proj.weight,
        f"{prefix}.input_layernorm.weight": model.layers[layer].input_layernorm.weight,
        f"{prefix}.post_attention_layernorm.weight": (
            model.layers[layer].post_attention_layernorm.weight
        ),
    }


def test_every_tensor_comes_to_its_place(checkpoint: Path) -> None:
    model = load(checkpoint)
    tensors = load_file(checkpoint / WEIGHTS)
    ours = {
        **parts(model, 0),
        **parts(model, 1),
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor), name


def test_a_checkpoint_in_many_files_is_the_same_as_in_one(
    sharded: Path, make_checkpoint: MakeCheckpoint
) -> None:
    whole, pieces = load(make_checkpoint()), load(sharded)
    assert len(weight_files(sharded)) > 5
    for (name, one), (_, other) in zip(
        whole.named_parameters(), pieces.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_checkpoint_in_many_files_without_an_index_is_loaded_too(sharded: Path) -> None:
    expected = load(sharded).layers[1].mlp.down_proj.weight
    (sharded / INDEX).unlink()
    assert torch.equal(load(sharded).layers[1].mlp.down_proj.weight, expected)


def test_a_checkpoint_whose_path_is_not_utf_8_is_loaded_too(checkpoint: Path) -> None:
    expected = load(checkpoint).norm.weight
    named = checkpoint.rename(checkpoint.with_name(os.fsdecode(b"mod\xe9l")))
    assert torch.equal(load(named).norm.weight, expected)


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    save_file({"something.else": torch.ones(1)}, sharded / "consolidated.safetensors")
    load(sharded)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_weights_are_converted_to_the_dtype_asked_for(
    dtype: str, expected: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(dtype="bfloat16")
    stored = load_file(path / WEIGHTS)["model.embed_tokens.weight"]
    assert stored.dtype == torch.bfloat16
    model = load(path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.equal(model.embed_tokens.weight, stored.to(expected))
    assert torch.get_default_dtype() == torch.float32


def test_a_tied_checkpoint_has_one_matrix_for_embedding_and_head(
    make_checkpoint: MakeCheckpoint,
) -> None:
    model = load(make_checkpoint())
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tied_checkpoint_may_carry_a_copy_of_its_embedding(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_checkpoint(), tmp_path / "copy"))
    change(
        path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    model = load(path)
    assert torch.equal(model.embed_tokens.weight, load(make_checkpoint()).embed_tokens.weight)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(checkpoint, lambda t: t.pop(name))
    with pytest.raises(ModelError, match=r"lacks 1 tensors?: model\.layers\.1\.self_attn\.k_proj"):
        load(checkpoint)


def test_of_many_missing_tensors_the_first_are_named_and_all_are_counted(
    checkpoint: Path,
) -> None:
    def drop_layer(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            del tensors[name]

    change(checkpoint, drop_layer)
    with pytest.raises(ModelError, match=r"lacks 11 tensors: model\.layers\.0\..*\.\.\."):
        load(checkpoint)


def test_a_missing_head_of_an_untied_checkpoint_is_named(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.qkv_proj.weight",
        "score.weight",
    ],
)
def test_an_unexpected_tensor_is_named_with_its_file(name: str, checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({name: torch.ones(3)}))
    with pytest.raises(ModelError) as caught:
        load(checkpoint)
    assert name in caught.value.message
    assert str(checkpoint / WEIGHTS) in caught.value.message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.v_proj.weight", (64, 63)),
        ("model.layers.1.mlp.gate_proj.weight", (97, 64)),
        ("model.embed_tokens.weight", (159, 64)),
        ("model.norm.weight", (64, 1)),
        ("model.layers.0.self_attn.q_norm.weight", (1,)),
        ("model.norm.weight", ()),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    name: str, shape: tuple[int, ...], checkpoint: Path
) -> None:
    expected = list(load_file(checkpoint / WEIGHTS)[name].shape)
    change(checkpoint, lambda t: t.update({name: torch.ones(shape)}))
    with pytest.raises(ModelError) as caught:
        load(checkpoint)
    for part in (name, str(list(shape)), str(expected), WEIGHTS):
        assert part in caught.value.message


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 100, 20_000, -1])
def test_a_truncated_file_is_named(num_bytes: int, checkpoint: Path) -> None:
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        load(checkpoint)
    assert str(file) in caught.value.message


def test_a_file_of_something_else_is_named(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>404</html>" * 10)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(checkpoint)


def test_an_index_naming_files_that_are_not_there_names_them(sharded: Path) -> None:
    lost = weight_files(sharded)[2]
    lost.unlink()
    with pytest.raises(ModelError) as caught:
        load(sharded)
    assert lost.name in caught.value.message
    assert weight_files_named(sharded) - {lost.name} == {f.name for f in sharded.glob("*.safeten*")}


def weight_files_named(path: Path) -> set[str]:
    return set(json.loads((path / INDEX).read_text())["weight_map"].values()) | {INDEX}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_a_way_to_convert_them(
    name: str, checkpoint: Path
) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / name)
    with pytest.raises(ModelError, match=name) as caught:
        load(checkpoint)
    assert caught.value.hint is not None
    assert "save_pretrained" in caught.value.hint


def test_a_directory_without_weights_is_an_error(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load(checkpoint)


def test_random_weights_fill_every_parameter_and_are_the_same_each_time(
    make_checkpoint: MakeCheckpoint,
) -> None:
    for path in (make_checkpoint(), make_checkpoint(tie_word_embeddings=False)):
        models = [build_model(ModelConfig.from_directory(path), EngineConfig()) for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1), strict=True):
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            load_random_weights(model, seed)
        for (name, first), second, third in zip(
            models[0].named_parameters(),
            models[1].parameters(),
            models[2].parameters(),
            strict=True,
        ):
            assert first.isfinite().all(), name
            assert torch.equal(first, second), name
            if not name.endswith("norm.weight"):
                assert not torch.equal(first, third), name
                assert 0.01 < first.std() < 0.03


# Parts of ranks


def load_part(path: Path, rank: int, size: int) -> Qwen3:
    config = EngineConfig(tensor_parallel_size=size)
    parallel = TensorParallel(rank, size)
    return load_model(path, config, parallel)


def join(parts: list[Target]) -> Tensor:
    """The checkpoint's tensor of every rank's part of it; where some hold the same, they agree."""
    whole = torch.full(parts[0].shape, torch.nan)
    for part in parts:
        own = part.tensor[tuple(slice(0, s.stop - s.start) for s in part.shards)]
        there = whole[part.part]
        assert there.isnan().all() or torch.equal(there, own)
        whole[part.part] = own
    return whole


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_are_the_checkpoint(
    size: int, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(tie_word_embeddings=False, vocab_size=162)
    parts = [targets_of(load_part(path, rank, size)) for rank in range(size)]
    for name, tensor in load_file(path / WEIGHTS).items():
        assert torch.equal(join([part[name] for part in parts]), tensor), name


def test_a_rank_reads_and_holds_no_more_than_its_part(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tie_word_embeddings=False)
    num_read = 0
    fill = Target.fill

    def counting_fill(target: Target, values: Tensor) -> None:
        nonlocal num_read
        num_read += values.numel()
        fill(target, values)

    monkeypatch.setattr(Target, "fill", counting_fill)
    whole = load(path)
    num_whole, num_read = num_read, 0
    part = load_part(path, 1, 2)
    assert num_whole == sum(p.numel() for p in whole.parameters())
    assert num_read == sum(p.numel() for p in part.parameters())
    assert num_read == part.part.num_parameters < 0.51 * num_whole


def test_random_weights_are_the_same_for_any_number_of_ranks(
    make_checkpoint: MakeCheckpoint,
) -> None:
    sizes = ModelConfig.from_directory(make_checkpoint(tie_word_embeddings=False))
    whole = targets_of(load_model(sizes, EngineConfig()))
    config = EngineConfig(tensor_parallel_size=4)
    parts = [targets_of(load_model(sizes, config, TensorParallel(rank, 4))) for rank in range(4)]
    for name, target in whole.items():
        assert torch.equal(join([part[name] for part in parts]), target.tensor), name
