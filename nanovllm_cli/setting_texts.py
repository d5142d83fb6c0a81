"""Values of flags as people write them: `32k` tokens, `20G` of memory, `half`, `gpu`.

Each function takes the flag's name, for its message, and raises UserError.
"""

import re

from nanovllm_cli.core.errors import UserError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKmMgGtT]?)(i?[bB])?")
# As vLLM reads them: k is a thousand, K is 1024.
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MAX_TOKENS = 2**31 - 1
_MAX_GIB = 2.0**20  # a million GiB, which no machine has

_DTYPES = {name: name for name in ("auto", "float32", "bfloat16", "float16")}
_DTYPES |= {"half": "float16", "float": "float32"}
_DTYPES |= {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_DEVICES = {name: name for name in ("auto", "cpu", "cuda")} | {"gpu": "cuda"}
_BACKENDS = {name: name for name in ("auto", "triton", "torch", "flash-attn", "flash-attn-3")}
_BACKENDS |= {"triton-attn": "triton", "torch-sdpa": "torch", "sdpa": "torch", "eager": "torch"}
_BACKENDS |= {"flash-attention-2": "flash-attn", "flash-attention-3": "flash-attn-3"}


def dtype_of(flag: str, text: str) -> str:
    """Return a number format by any of its usual names."""
    return _choice(flag, text, _DTYPES, "a number format")


def device_of(flag: str, text: str) -> str:
    """Return a kind of device."""
    return _choice(flag, text, _DEVICES, "a kind of device")


def attention_backend_of(flag: str, text: str) -> str:
    """Return an attention backend by its name here or vLLM's."""
    return _choice(flag, text, _BACKENDS, "an attention backend")


def num_tokens_of(flag: str, text: str | None) -> int | None:
    """Return a number of tokens: 4096, 32k (32,000), 32K (32,768); None for auto and -1."""
    if text is None or text.lower() == "auto" or text == "-1":
        return None
    found = _SIZE.fullmatch(text)
    number = 0.0 if found is None or found[3] else float(found[1]) * _UNITS[found[2]]
    if not 1 <= number <= _MAX_TOKENS or number != int(number):
        raise UserError(
            f"{flag} is {text!r}; it must be a number of tokens from 1 to {_MAX_TOKENS}",
            "Write 4096, 32k (32,000) or 32K (32,768).",
        )
    return int(number)


def kv_cache_bytes(flag: str, gib: float | None) -> int | None:
    """Return the size of the KV cache in bytes; None where it is not given."""
    if gib is None:
        return None
    if not 0 < gib <= _MAX_GIB:
        raise UserError(
            f"{flag} is {gib:g}; it must be above 0 and at most {_MAX_GIB:.0f} (GiB)",
        )
    return int(gib * 2**30)


def gib_of_bytes(flag: str, text: str) -> str:
    """Return a number of bytes, written like 20G, as GiB."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(
            f"{flag} is {text!r}; it must be a number of bytes", "Write 20G, or 21474836480."
        )
    return repr(float(found[1]) * _UNITS[found[2].upper()] / 2**30)


def _choice(flag: str, text: str, names: dict[str, str], kind: str) -> str:
    value = names.get(text.lower().replace("_", "-"))
    if value is None:
        chosen = dict.fromkeys(names.values())
        raise UserError(
            f"{flag} {text} is not {kind}",
            f"Choose one of {', '.join(chosen)}.",
        )
    return value
