"""How long a text can be that is not surely too many tokens: longer ones need not be tokenized."""

from pathlib import Path
from typing import Any

import orjson

from nanovllm_cli.core.config import ModelConfig

from .options import GenerateOptions

_MOST_SHRUNK = 4  # NFC: three jamo of three bytes each are one syllable of three


def max_text_bytes(options: GenerateOptions, model: Path, tokenizer: Path) -> int | None:
    """The most bytes of UTF-8 that the tokens of a prompt can stand for; None if it is unknown.

    It is known of byte-level BPE, where each byte of a text is in a token of the vocabulary. Others
    have tokens that stand for any number of characters.
    """
    if options.truncate_prompt_tokens is not None:
        return None  # the end of a text is enough
    max_model_len = options.engine.max_model_len
    if max_model_len is None:
        max_model_len = ModelConfig.from_directory(model).max_context
    try:
        content = orjson.loads((tokenizer / "tokenizer.json").read_bytes())
        if content["model"]["type"] != "BPE" or not _is_byte_level(content["pre_tokenizer"]):
            return None
        if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            return None
        # A character of a name is a byte; an added token is matched as it is written.
        names = [*content["model"]["vocab"], *(t["content"] for t in content["added_tokens"])]
        return max_model_len * _MOST_SHRUNK * max(len(name.encode()) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the tokenizer's own reader says what is wrong


def _is_byte_level(part: Any) -> bool:
    kinds = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    return any(kind["type"] == "ByteLevel" for kind in kinds)
