"""safetensors -> the model's parameters, tensor by tensor from memory-mapped files.

A tensor that is missing, unexpected or misshapen is an error that names it. Checkpoint matrices
that we hold stacked (q, k, v and gate, up) are copied into their rows of the stack.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.layers import Linear
from nanovllm_cli.core.qwen3 import Qwen3

_STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files: those its index names, else all there are."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of tensors: {error!r}") from None
        files = [path / name for name in names]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ModelError(f"{path}: {index.name} names files that are not there: {missing}")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in (*path.glob("*.bin"), *path.glob("*.pt")))
        found = f"; it holds {', '.join(pickled)}" if pickled else ""
        raise ModelError(
            f"{path} holds no *.safetensors{found}",
            "Convert pickled weights with transformers: model.save_pretrained(DIR) writes "
            "safetensors. nanovllm never unpickles a file.",
        )
    return files


def load_weights(model: Qwen3, path: Path) -> None:
    """Fill `model`'s parameters from the checkpoint in `path`, converting to their dtype."""
    targets = _targets(model)
    loaded: set[str] = set()
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    if name == "lm_head.weight" and model.config.tie_word_embeddings:
                        continue  # a copy of the embedding that some checkpoints carry
                    if name not in targets:
                        raise ModelError(f"{file} holds an unexpected tensor {name!r}")
                    target = targets[name]
                    shape = list(tensors.get_slice(name).get_shape())
                    if shape != list(target.shape):
                        raise ModelError(
                            f"{file}: {name} has the shape {shape}; "
                            f"config.json asks for {list(target.shape)}"
                        )
                    target.copy_(tensors.get_tensor(name))
                    loaded.add(name)
        except SafetensorError as error:
            raise ModelError(f"{file} is not a whole safetensors file: {error}") from None
    missing = [name for name in targets if name not in loaded]
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} tensors: {', '.join(missing[:5])}"
            + (" ..." if len(missing) > 5 else ""),
            "Is the checkpoint whole?",
        )


def _targets(model: Qwen3) -> dict[str, Tensor]:
    """Where each tensor of the checkpoint goes: its name -> a parameter, or rows of one."""
    return {
        name if name.startswith("lm_head") else f"model.{name}": target
        for name, target in _named_parts(model)
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }


def _named_parts(model: Qwen3) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules():
        parent, _, own_name = module_name.rpartition(".")
        if isinstance(module, Linear) and own_name in _STACKS:
            parts = torch.split(module.weight.detach(), list(module.out_features))
            for part_name, part in zip(_STACKS[own_name], parts, strict=True):
                yield f"{parent}.{part_name}.weight", part
        else:
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{module_name}.{name}", parameter.detach()


def load_random_weights(model: Qwen3, seed: int = 0) -> None:
    """Fill `model` with random weights of a trained model's scale, on its own device."""
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    for name, target in _targets(model).items():
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02, generator=generator)
