"""A checkpoint's tensors by the headers of its safetensors files, without torch.

Every header is checked as the safetensors library checks it: its length, its JSON, each tensor's
bytes against its shape and number format, no gap and no overlap, and the file's end
(https://huggingface.co/docs/safetensors). Then names, shapes and formats are compared with what
config.json implies. The command does this before any engine starts, a dry run too, and the loader
once more before it reads a value, so that what is wrong is said in the same words everywhere.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.model_files import open_file, read_json, shown, unreadable
from nanovllm_cli.core.quantization import SUFFIXES, quantized

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 32 << 20  # that of 1024 layers has 2 MB
_SUFFIX = ".safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_NUM_BITS = {
    **{name: 8 * size for name, size in _FLOATS.items()},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I32": 32, "U32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it; `start` and `end` are offsets in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files: those its index names, else all there are."""
    index = path / INDEX
    if os.path.lexists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map, which names the files of the tensors")
        names = set()
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name != os.path.basename(name) or "\0" in name:
                raise ModelError(f"{index} names for {shown(tensor)} the file {shown(name)}")
            if not name.endswith(_SUFFIX):
                raise ModelError(
                    f"{index} names for {shown(tensor)} the file {shown(name)}; its name must "
                    f"end with {_SUFFIX}"
                )
            names.add(name)
        missing = sorted(name for name in names if not os.path.lexists(path / name))
        if missing:
            raise ModelError(
                f"{path}: {INDEX} names files that are not there: {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                "Is the checkpoint whole?",
            )
        return [path / name for name in sorted(names)]
    try:
        found = sorted(os.listdir(path))
    except OSError as error:
        raise unreadable(path, error) from None
    files = [path / name for name in found if name.endswith(_SUFFIX) and not name.startswith(".")]
    if not files:
        others = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
        held = f"; it holds {', '.join(others)}" if others else ""
        raise ModelError(
            f"{path} holds no *{_SUFFIX}{held}",
            "Convert pickled weights with transformers: model.save_pretrained(DIR) writes "
            "safetensors. nanovllm never unpickles a file.",
        )
    return files


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this config holds, by its name."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (key_value, hidden)),
            ("self_attn.v_proj", (key_value, hidden)),
            ("self_attn.q_norm", (config.head_dim,)),
            ("self_attn.k_norm", (config.head_dim,)),
            ("self_attn.o_proj", (hidden, query)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (intermediate, hidden)),
            ("mlp.up_proj", (intermediate, hidden)),
            ("mlp.down_proj", (hidden, intermediate)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def check_checkpoint(path: Path, config: ModelConfig) -> None:
    """Raise ModelError where the headers of the checkpoint in `path` are not as `config` implies.

    Headers alone are read. Whether a head beside tied embeddings has their values is left to
    `check_tied_head`.
    """
    checked_tensors(path, config)


def checked_tensors(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by its name; raises ModelError as `check_checkpoint`."""
    expected = expected_shapes(config)
    allowed = expected
    if config.tie_word_embeddings:  # some checkpoints carry a copy of the embedding
        allowed = expected | {_HEAD: expected[_EMBEDDING]}
    found: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        for tensor in read_header(file):
            name = tensor.name
            if name not in allowed:
                if name.endswith(SUFFIXES):
                    raise quantized(str(file), f"it holds {shown(name)}")
                raise ModelError(f"{file} holds an unexpected tensor {shown(name)}")
            if name in found:
                raise ModelError(f"{file}: {name} is in {found[name].file.name} as well")
            if tensor.dtype not in _FLOATS:
                raise quantized(str(file), f"{name} is stored as {shown(tensor.dtype)}")
            if tensor.shape != allowed[name]:
                raise ModelError(
                    f"{file}: {name} has the shape {shown(list(tensor.shape))}; "
                    f"config.json asks for {list(allowed[name])}"
                )
            found[name] = tensor
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} tensors: {', '.join(missing[:5])}"
            + (" ..." if len(missing) > 5 else ""),
            "Is the checkpoint whole?",
        )
    return found


def check_tied_head(tensors: dict[str, StoredTensor]) -> None:
    """Raise ModelError where tied embeddings come with a head of other values.

    tensors: `checked_tensors` of a config that ties them.
    """
    if _HEAD not in tensors:
        return
    embedding, head = tensors[_EMBEDDING], tensors[_HEAD]
    if embedding.dtype != head.dtype or not _have_equal_bytes(embedding, head):
        raise ModelError(
            f"{head.file}: {_HEAD} differs from {_EMBEDDING}, and config.json has "
            "tie_word_embeddings = True, which makes them one matrix",
            "If the model was trained with a head of its own, set tie_word_embeddings to false in "
            "config.json; else remove lm_head.weight from the file.",
        )


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes; raises ModelError."""
    descriptor = open_file(file)
    try:
        num_bytes = os.fstat(descriptor).st_size
        start = _read(descriptor, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise _not_whole(file, f"it has {num_bytes} bytes")
        if length > MAX_HEADER_BYTES:
            raise _not_whole(file, f"its header has {length} bytes; at most {MAX_HEADER_BYTES}")
        if 8 + length > num_bytes:
            raise _not_whole(file, f"its header has {length} bytes, the file {num_bytes}")
        header = _read(descriptor, length, 8)
    except OSError as error:
        raise unreadable(file, error) from None
    finally:
        os.close(descriptor)
    if len(header) < length:
        raise _not_whole(file, "it was cut while it was read")
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _not_whole(file, f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise _not_whole(file, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _not_whole(file, "its __metadata__ is not an object of texts")
    tensors = [
        _stored_tensor(file, name, entry, 8 + length, num_bytes) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "follows a gap"
            raise _not_whole(file, f"{shown(tensor.name)} {what}")
        end = tensor.end
    if end != num_bytes:
        raise _not_whole(file, f"its tensors end at byte {end}, the file at {num_bytes}")
    return tensors


def _stored_tensor(
    file: Path, name: str, entry: object, data_start: int, num_bytes: int
) -> StoredTensor:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(dtype, str)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise _not_whole(file, f"the header of {shown(name)} is {shown(entry)}")
    start, end = offsets
    if not start <= end <= num_bytes - data_start:
        raise _not_whole(
            file,
            f"{shown(name)} is at bytes {shown(start)} to {shown(end)} of {num_bytes - data_start}",
        )
    num_bits = _NUM_BITS.get(dtype)
    if num_bits is not None and math.prod(shape) * num_bits != 8 * (end - start):
        raise _not_whole(
            file,
            f"{shown(name)} has {end - start} bytes; {dtype} {shown(shape)} takes others",
        )
    return StoredTensor(
        file=file,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + start,
        end=data_start + end,
    )


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether it is a short list of whole numbers that 63 bits hold: what a shape may be."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


def _read(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """So many bytes from `offset` on, fewer only at the file's end."""
    parts = []
    while num_bytes and (part := os.pread(descriptor, num_bytes, offset)):
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def _have_equal_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    descriptors: list[int] = []
    file = one.file
    try:
        for file in (one.file, other.file):
            descriptors.append(open_file(file))
        for offset in range(0, one.end - one.start, _COMPARED_BYTES):
            num_bytes = min(_COMPARED_BYTES, one.end - one.start - offset)
            parts = [
                _read(descriptor, num_bytes, tensor.start + offset)
                for descriptor, tensor in zip(descriptors, (one, other), strict=True)
            ]
            if parts[0] != parts[1]:
                return False
    except OSError as error:
        raise unreadable(file, error) from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return True


def _not_whole(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file} is not a whole safetensors file: {reason}",
        "Get the file again from where the model came.",
    )
