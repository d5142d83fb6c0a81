"""safetensors -> the model's parameters, tensor by tensor from memory-mapped files.

What checkpoint.py finds wrong with the files is an error before a value is read. Checkpoint
matrices that we hold stacked (q, k, v and gate, up) are copied into their rows of the stack.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm_cli.core.checkpoint import StoredTensor, check_tied_head, checked_tensors
from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.layers import Embedding, Linear
from nanovllm_cli.core.model_files import open_file, unreadable
from nanovllm_cli.core.parallel import Shard, whole
from nanovllm_cli.core.qwen3 import Qwen3

_STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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

    Of a matrix that the ranks share out only this rank's part is read. Raises ModelError.
    """
    stored = checked_tensors(path, model.config)
    if model.config.tie_word_embeddings and model.parallel.rank == 0:
        check_tied_head(stored)
    targets = targets_of(model)
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in stored.values():
        if tensor.name in targets:  # not the copy of a tied embedding
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, tensors in by_file.items():
        try:
            with _utf8_name(file) as name, safe_open(name, framework="pt") as opened:
                for tensor in tensors:
                    target = targets[tensor.name]
                    target.fill(opened.get_slice(tensor.name)[target.part])
        except (SafetensorError, FileNotFoundError) as error:  # it has changed since
            raise ModelError(f"{file} is not a whole safetensors file: {error}") from None
        except OSError as error:
            raise unreadable(file, error) from None


@contextmanager
def _utf8_name(file: Path) -> Iterator[Path]:
    """A name of `file` that safetensors takes, which refuses one that is not UTF-8."""
    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:
        descriptor = open_file(file)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield file


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
