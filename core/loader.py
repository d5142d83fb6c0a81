"""safetensors -> the model's parameters, tensor by tensor from memory-mapped files.

A tensor that is missing, unexpected or misshapen is an error that names it. Checkpoint matrices
that we hold stacked (q, k, v and gate, up) are copied into their rows of the stack.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.layers import Embedding, Linear
from nanovllm_cli.core.parallel import Shard, whole
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


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor of the checkpoint goes: the part that this rank holds of it."""

    tensor: Tensor  # a parameter, or rows of one
    shards: tuple[Shard, ...]  # of the checkpoint's tensor, one for each dimension

    @property
    def shape(self) -> list[int]:
        """The whole tensor's."""
        return [shard.whole for shard in self.shards]

    @property
    def part(self) -> tuple[slice, ...]:
        return tuple(slice(shard.start, shard.stop) for shard in self.shards)

    def fill(self, values: Tensor) -> None:
        """values: of `part`. What is padding stays as it is."""
        self.tensor[tuple(slice(0, size) for size in values.shape)].copy_(values)


def load_weights(model: Qwen3, path: Path) -> None:
    """Fill `model`'s parameters from the checkpoint in `path`, converting to their dtype.

    Of a matrix that the ranks share out only this rank's part is read.
    """
    targets = targets_of(model)
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
                    stored = tensors.get_slice(name)
                    if stored.get_shape() != target.shape:
                        raise ModelError(
                            f"{file}: {name} has the shape {stored.get_shape()}; "
                            f"config.json asks for {target.shape}"
                        )
                    target.fill(stored[target.part])
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


def load_random_weights(model: Qwen3, seed: int = 0) -> None:
    """Fill `model` with random weights of a trained model's scale, on its own device.

    They are the same for any number of ranks: each draws whole tensors and keeps its part.
    """
    weight = model.embed_tokens.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    for name, target in targets_of(model).items():
        if name.endswith("norm.weight"):
            target.tensor.fill_(1.0)
        else:
            drawn = torch.empty(target.shape, dtype=weight.dtype, device=weight.device)
            target.fill(drawn.normal_(0.0, 0.02, generator=generator)[target.part])


def targets_of(model: Qwen3) -> dict[str, Target]:
    """Where each tensor of the checkpoint goes, by its name."""
    return {
        name if name.startswith("lm_head") else f"model.{name}": target
        for name, target in _named_targets(model)
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }


def _named_targets(model: Qwen3) -> Iterator[tuple[str, Target]]:
    for module_name, module in model.named_modules():
        parent, _, own_name = module_name.rpartition(".")
        if isinstance(module, Linear):
            lengths = [shard.length for shard in module.out_shards]
            rows = torch.split(module.weight.detach(), lengths)
            names = [f"{parent}.{name}" for name in _STACKS.get(own_name, ())] or [module_name]
            for name, part, shard in zip(names, rows, module.out_shards, strict=True):
                yield f"{name}.weight", Target(part, (shard, module.in_shard))
        elif isinstance(module, Embedding):
            weight = module.weight.detach()
            yield f"{module_name}.weight", Target(weight, (module.shard, whole(weight.shape[1])))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                shards = tuple(map(whole, parameter.shape))
                yield f"{module_name}.{name}", Target(parameter.detach(), shards)
