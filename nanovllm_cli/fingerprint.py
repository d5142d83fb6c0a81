"""The fingerprint of a run: everything that its results depend on, and nothing else.

Rows of two runs may be put together where their fingerprints are equal. Batch sizes, memory,
threads and names of files are not in it: a row has the same bits whatever they are.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import xxhash

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.resolved_config import resolve

from .exit_code import CommandError, ExitCode
from .files import as_text
from .options import GenerateOptions

Fingerprint = dict[str, str]
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_SAMPLE_BYTES = 4096
_MAX_SHOWN = 100  # characters
_MAX_HEADER_BYTES = 100 << 20  # as safetensors has it


def fingerprint(
    options: GenerateOptions, *, model: Path, tokenizer: Path, sampling: dict[str, Any]
) -> Fingerprint:
    """Name -> value, short enough to be shown; `sampling` is what rows get that say nothing.

    Raises UserError for a model or settings that cannot run.
    """
    engine = resolve(options.engine, ModelConfig.from_directory(model))
    prompt = {name: value for name, value in asdict(options.prompt).items() if name != "sampling"}
    settings: dict[str, Any] = {
        "model": options.model,
        "served_model_name": options.served_model_name,
        "format": options.format,
        "output_columns": ",".join(options.output_columns) or None,
        "n": options.n,
        "best_of": options.best_of,
        "stop": list(options.stop),
        "bad_words": list(options.bad_words) or None,
        "truncate_prompt_tokens": options.truncate_prompt_tokens,
        "thinking_budget": options.thinking_budget,
        "seed": options.seed,
        "parse_special": options.parse_special,
        "token_logprobs": options.token_logprobs or None,
        "device": engine.device,
        "dtype": engine.dtype,
        # Sums over ranks have other last bits.
        "tensor_parallel_size": ranks if (ranks := engine.tensor_parallel_size) > 1 else None,
        "attention_backend": engine.attention_backend and engine.attention_backend.name,
        "max_model_len": engine.max_model_len,
        "shard": str(options.shard),
        **prompt,
        **sampling,
    }
    named = {name: _text(value) for name, value in settings.items() if value is not None}
    files = [model / name for name in _MODEL_FILES] + [
        tokenizer / name for name in _TOKENIZER_FILES
    ]
    hashes = {path.name: _hash_of(path) for path in files if path.exists()}
    weights = xxhash.xxh3_128()
    for path in sorted(model.glob("*.safetensors")):
        weights.update(_weights_sample(path))
    return named | hashes | {"weights": weights.hexdigest()}


def differences(old: Fingerprint, new: Fingerprint) -> str:
    """Every name whose value differs, with both values; empty where none does."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{n}: {old.get(n, 'unset')} -> {new.get(n, 'unset')}" for n in names)


def check_same(old: Fingerprint, new: Fingerprint, *, of: Path) -> None:
    """Raise CommandError CONFIG_MISMATCH where the file `of` was made with other settings."""
    if changes := differences(old, new):
        raise CommandError(
            f"{of} is of other settings ({changes})",
            "Run it with the settings it had, name another output, or discard it with --restart.",
            exit_code=ExitCode.CONFIG_MISMATCH,
        )


def _text(value: Any) -> str:
    """The value, or for a long text its length and hash: values are shown, and kept in files."""
    text = as_text(value) if isinstance(value, str) else orjson.dumps(value).decode()
    if len(text) <= _MAX_SHOWN:
        return text
    return f"{len(text)} characters, xxh3 {xxhash.xxh3_64_hexdigest(text.encode())}"


def _hash_of(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def _weights_sample(path: Path) -> bytes:
    """Name, size, header, and the first 4 KiB of every tensor of a safetensors file.

    To read all of it would cost as much as to load it. Training changes every tensor, and a
    tensor that was replaced differs in its beginning; a single value changed far inside one of
    them goes unseen. https://huggingface.co/docs/safetensors
    """
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _MAX_HEADER_BYTES))
        parts = [path.name.encode(), b"%d" % num_bytes, header]
        try:
            tensors = orjson.loads(header)
            starts = [t["data_offsets"][0] for n, t in tensors.items() if n != "__metadata__"]
        except (ValueError, AttributeError, TypeError, KeyError, IndexError):
            return b"\0".join(parts)  # not safetensors, as the loader will say
        for start in sorted(starts):
            parts.append(os.pread(file.fileno(), _SAMPLE_BYTES, 8 + length + start))
        return b"\0".join(parts)
