"""`nanovllm doctor`: what this machine is, and what a job would run on."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

import orjson
import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from nanovllm_cli import __version__

from .exit_code import CommandError, ExitCode
from .models import SHORT_NAMES, resolve_model
from .writer import io_errors

_PACKAGES = ("torch", "triton", "flash-attn", "transformers", "safetensors", "pyarrow")


def doctor(*, as_json: bool) -> ExitCode:
    """Report on stdout: a table for people, or one JSON document."""
    report = _report()
    if as_json:
        with io_errors("standard output"):
            sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
            sys.stdout.flush()
        return ExitCode.OK
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value)) or "none"
        table.add_row(name.replace("_", " "), str(value))
    with io_errors("standard output"):
        Console().print(table, highlight=False)
    return ExitCode.OK


def _report() -> dict[str, Any]:
    return {
        "nanovllm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        **_choice(),
        "models_cached": [name for name in SHORT_NAMES if _is_cached(name)],
        "model_cache": constants.HF_HUB_CACHE,
    }


def _choice() -> dict[str, str]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return {
            "runs_on": "cuda",
            "dtype": "bfloat16",
            "attention": "Triton: split-KV decode, varlen prefill, both over pages",
            "decode": "CUDA graphs",
        }
    return {
        "runs_on": "cpu",
        "dtype": "float32",
        "attention": "plain PyTorch over pages, the same bits in every batch",
        "decode": "eager",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"


def _is_cached(name: str) -> bool:
    try:
        resolve_model(name, offline=True)
    except CommandError:
        return False
    return True
