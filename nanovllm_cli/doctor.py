"""`nanovllm doctor`: what this machine is, and what a job would run on."""

import errno
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
from nanovllm_cli.core.attention_backend import (
    AttentionBackend,
    attention_backends,
    choose_attention_backend,
)
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.resolved_config import check_gpu

from .exit_code import CommandError, ExitCode
from .files import io_errors
from .models import SHORT_NAMES, resolve_model

_PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "transformers",
    "safetensors",
    "pyarrow",
)


class _Stdout(Console):
    """A console on stdout; that its reader has left is the command's affair, and not rich's."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


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
            value = "\n".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value)) or "none"
        table.add_row(name.replace("_", " "), str(value))
    with io_errors("standard output"):
        _Stdout().print(table, highlight=False)
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


def _choice() -> dict[str, Any]:
    """What a job without flags runs on; prefills on a GPU have several backends to choose from."""
    try:
        check_gpu()
    except UserError as error:
        is_there = torch.cuda.is_available()
        return {
            "runs_on": f"cpu, with --device cpu: {error.message}" if is_there else "cpu",
            "dtype": "float32",
            "attention": "plain PyTorch over pages, the same bits in every batch",
            "decode": "eager",
        }
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "block_size": EngineConfig().block_size,
        "capability": torch.cuda.get_device_capability(),
    }
    chosen = choose_attention_backend("auto", **settings)
    return {
        "runs_on": "cuda",
        "dtype": settings["dtype"],
        "attention": f"prefill {chosen.name}, decode triton",
        "attention_backends": {
            name: found.name if isinstance(found, AttentionBackend) else f"not used: {found}"
            for name, found in attention_backends(**settings).items()
        },
        "decode": "CUDA graphs",
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
