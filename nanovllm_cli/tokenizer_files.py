"""TokenizerFiles: what a checkpoint says of its tokenizer, read by us and checked.

transformers' AutoTokenizer would run a checkpoint's own Python if whoever is at the terminal, or a
pipe, says "y". So tokenizer.json is read here, and the other files are read for two things alone:
the names of the special tokens, and the chat templates. Only a checkpoint without tokenizer.json
needs transformers, to convert it: in a child process that gets no input.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.model_files import read_file, read_json

TOKENIZER_FILE = "tokenizer.json"
_CONVERTIBLE = ("vocab.json", "tokenizer.model", "vocab.txt", "spiece.model", "tiktoken.model")
_CONVERT_SECONDS = 600.0
_WHOLE = "Is the checkpoint whole?"
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
# What transformers' class for Qwen has where tokenizer_config.json does not say.
_QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """The tokenizer of the checkpoint in a directory."""

    path: Path  # of tokenizer.json
    content: dict[str, Any]  # tokenizer.json's
    added_tokens: dict[str, int]  # text -> id
    special_tokens: dict[str, str]  # "bos_token" and the like -> text; those that there are
    chat_templates: dict[str, str]  # by name; "default" is the one that most have alone

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """Raises ModelError for files that cannot be used."""
        path = tokenizer_directory(directory) / TOKENIZER_FILE
        content = read_json(path)
        config = _read_if_there(directory / "tokenizer_config.json")
        return cls(
            path=path,
            content=content,
            added_tokens=_added_tokens(path, content),
            special_tokens=_special_tokens(directory, config),
            chat_templates=_chat_templates(directory, config),
        )


@lru_cache(maxsize=8)
def tokenizer_directory(directory: Path) -> Path:
    """The directory with tokenizer.json: `directory`, or one with what it was converted to.

    The latter lasts as long as this process. Raises ModelError.
    """
    if (directory / TOKENIZER_FILE).exists():
        return directory
    found = [name for name in _CONVERTIBLE if (directory / name).exists()]
    if not found:
        raise ModelError(f"{directory} has no {TOKENIZER_FILE}", _WHOLE)
    converted = Path(_temporary_directory().name) / str(len(_converted))
    _converted.append(converted)
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "nanovllm_cli.convert_tokenizer", directory, converted],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=_CONVERT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _not_converted(directory, found, f"it took over {_CONVERT_SECONDS:g} s") from None
    if not (converted / TOKENIZER_FILE).exists():
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        raise _not_converted(directory, found, lines[-1] if lines else "it has no fast version")
    return converted


_converted: list[Path] = []


@lru_cache(maxsize=1)
def _temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="nanovllm-")


def _not_converted(directory: Path, found: list[str], reason: str) -> ModelError:
    return ModelError(
        f"{directory} has no {TOKENIZER_FILE}, and transformers cannot make one of "
        f"{', '.join(found)}: {reason}",
        "Convert it where it was trained: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _added_tokens(path: Path, content: dict[str, Any]) -> dict[str, int]:
    tokens = content.get("added_tokens")
    if not isinstance(tokens, list):
        raise ModelError(f"{path} has no list of added_tokens", _WHOLE)
    added: dict[str, int] = {}
    for token in tokens:
        match token:
            case {"content": str(text), "id": int(token_id), **fields} if text and token_id >= 0:
                flags = [fields.get(name) for name in _FLAGS]
            case _:
                flags = [None]
        if not all(isinstance(flag, bool) for flag in flags):
            raise ModelError(f"{path} has an added token that is not one: {token!r:.100}", _WHOLE)
        if fields["lstrip"] or fields["rstrip"] or fields["single_word"]:
            raise ModelError(
                f"{path}: the added token {text!r} has lstrip, rstrip or single_word set, which "
                "nanovllm does not know"
            )
        added[text] = token_id
    return added


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """As transformers takes them together: a template may name any of them."""
    given: dict[str, Any] = {}
    if config.get("tokenizer_class", _QWEN_CLASSES[0]) in _QWEN_CLASSES:
        given |= _QWEN_DEFAULTS
    if "added_tokens_decoder" not in config:
        given |= _read_if_there(directory / "special_tokens_map.json")
    given |= {name: config[name] for name in _SPECIAL if name in config}
    found = {}
    for name in _SPECIAL:
        value = given.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise ModelError(f"{directory}: the {name} is {value!r:.100}; it must be text", _WHOLE)
        found[name] = text
    return found


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Those in files of their own go before tokenizer_config.json's."""
    files = {"default": directory / "chat_template.jinja"}
    more = directory / "additional_chat_templates"
    files |= {path.stem: path for path in sorted(more.glob("*.jinja"))}
    in_files = {name: _read_text(path) for name, path in files.items() if path.exists()}
    if in_files:
        return in_files
    value = config.get("chat_template")
    if value is None:
        return {}
    named = [{"name": "default", "template": value}] if isinstance(value, str) else value
    templates: dict[str, str] = {}
    for item in named if isinstance(named, list) else [None]:
        name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (0, 0)
        if not isinstance(name, str) or not isinstance(text, str):
            place = directory / "tokenizer_config.json"
            raise ModelError(
                f"{place}: chat_template must be text, or a list of named ones", _WHOLE
            )
        templates[name] = text
    return templates


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 at byte {error.start}", _WHOLE) from None
