"""Quantized checkpoints, refused by name before their weights are read.

A number format is told by config.json, by a file beside it, or by the tensors themselves.
"""

import os
from pathlib import Path
from typing import Any

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.model_files import read_json, shown

# AutoGPTQ's, ModelOpt's and AutoAWQ's.
_FILES = ("quantize_config.json", "hf_quant_config.json", "quant_config.json")
# Where the tools keep a method's name, and a format's.
_NAMES = ("quant_method", "quant_algo", "format", "fmt", "bits", "w_bit")
_HINT = (
    "Number formats other than bf16, fp16 and fp32 are not supported yet. Use the unquantized "
    "model, or convert it to bfloat16."
)
# What tensors beside a quantized matrix are called.
SUFFIXES = (
    *("_scale", "_scale_inv", "_scale_2", "_zero_point", "_packed", "_g_idx", "_global_scale"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_map"),
)


def quantized(where: str, what: str, value: Any = None) -> ModelError:
    """Return the error for a quantized checkpoint; value: what describes the method."""
    return ModelError(f"{where}: the weights are quantized ({what}{_method_of(value)})", _HINT)


def refuse_quantized_files(path: Path) -> None:
    """Raise ModelError where a file beside config.json says that the weights are quantized."""
    for name in _FILES:
        if os.path.lexists(path / name):
            content = read_json(path / name)
            raise quantized(str(path / name), "its method", content.get("quantization", content))


def _method_of(value: Any) -> str:
    if not isinstance(value, dict):
        return "" if value is None else f": {shown(value)}"
    named = [f"{name} {value[name]}" for name in _NAMES if isinstance(value.get(name), str | int)]
    return ": " + shown(", ".join(named)).strip("'") if named else ""
