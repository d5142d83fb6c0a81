"""The fingerprint of a run: everything that its results depend on, and nothing else.

Rows of two runs may be put together where their fingerprints are equal. Batch sizes, memory,
threads and names of files are not in it: a row has the same bits whatever they are. weights_hash.py
says what is promised of the weights.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import xxhash

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.model_files import read_file
from nanovllm_cli.core.resolved_config import resolve

from .exit_code import CommandError, ExitCode
from .files import as_text
from .options import GenerateOptions
from .weights_hash import weights_fingerprint

Fingerprint = dict[str, str]
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_MAX_SHOWN = 100  # characters
# Hashes that not every run keeps: those of version 0.1 have neither, and the second is asked for.
_OPTIONAL = ("weights_content", "weights_whole")
_OF_MODEL = ("config.json", "weights", "weights_content")


def fingerprint(
    options: GenerateOptions,
    *,
    model: Path,
    tokenizer: Path,
    sampling: dict[str, Any],
    say: Callable[[str], object] = lambda message: None,
) -> Fingerprint:
    """Name -> value, short enough to be shown; `sampling` is what rows get that say nothing.

    `say` is told what --verify-weights took. Raises UserError for a model or settings that cannot
    run.
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
        "attention_backend": engine.attention_backend,
        "max_model_len": engine.max_model_len,
        "shard": str(options.shard),
        **prompt,
        **sampling,
    }
    named = {name: _text(value) for name, value in settings.items() if value is not None}
    files = [model / name for name in _MODEL_FILES] + [
        tokenizer / name for name in _TOKENIZER_FILES
    ]
    hashes = {path.name: _hash_of(path) for path in files if os.path.exists(path)}
    return named | hashes | weights_fingerprint(model, is_whole=options.verify_weights, say=say)


def as_metadata(fingerprint: Fingerprint) -> dict[str, str]:
    """What a Parquet output says of the run that has made it."""
    return {"nanovllm.fingerprint": orjson.dumps(fingerprint).decode()}


def differences(old: Fingerprint, new: Fingerprint) -> str:
    """Every name whose value differs, with both values; empty where none does.

    A model is what its files hold: by which path or name it was given makes no difference, where
    both runs have hashed what they hold. Those of version 0.1 have not, and are told by name too.
    """
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names = [name for name in names if name not in _OPTIONAL or (name in old and name in new)]
    if all(name in old and old[name] == new.get(name) for name in _OF_MODEL):
        names = [name for name in names if name != "model"]
    of_weights = [name for name in names if name in ("weights", *_OPTIONAL)]
    names = [name for name in names if name not in of_weights[1:]]  # one says it
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
    return xxhash.xxh3_64_hexdigest(read_file(path))
