"""`nanovllm doctor`: what this machine is, and what a job would run on."""

import errno
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import torch
import torch.distributed as dist
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from nanovllm_cli import __version__
from nanovllm_cli.core.attention_backend import (
    AttentionBackend,
    attention_backends,
    choose_attention_backend,
)
from nanovllm_cli.core.collectives import FUSED, FUSED_SIZES, NCCL
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.resolved_config import check_gpu, resolve

from .builtin_configs import builtin_config
from .exit_code import ExitCode
from .files import io_errors
from .gpus import GpuLink, describe_links, find_gpus, find_links
from .models import SHORT_NAMES, resolve_model
from .placement import Needs, advise, advise_cpu

_PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "transformers",
    "safetensors",
    "pyarrow",
    "llguidance",
)
_NOT_INSTALLED = "not installed"


class _Stdout(Console):
    """A console on stdout; that its reader has left is the command's affair, and not rich's."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def doctor(*, as_json: bool, model: str | None = None) -> ExitCode:
    """Report on stdout: a table for people, or one JSON document; `model`: a name to advise on.

    Raises CommandError where there is no such model.
    """
    report = _report()
    if model is not None:
        report["advice"] = {model: _advice(_find_config(model))}
    report["verdict"] = verdict(report)
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
    gpus = find_gpus()
    return {
        "nanovllm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": list(map(str, gpus)),
        **_connections(len(gpus)),
        **_choice(),
        "models_cached": [name for name in SHORT_NAMES if _is_cached(name)],
        "model_cache": constants.HF_HUB_CACHE,
    }


def verdict(report: Mapping[str, Any]) -> str:
    """Return one sentence of what a job would run on here, and what is missing."""
    where = f"{report['runs_on']}, in {report['dtype']}"
    if report["runs_on"] == "cuda":
        where = f"{_count(len(report['gpus']), 'GPU')}, in {report['dtype']}"
    elif not report["gpus"]:
        where += ", since there is no GPU that torch can use"
    missing = ""
    if report["packages"]["llguidance"] == _NOT_INSTALLED:
        missing = ". JSON schemas and other grammars need llguidance: pip install llguidance"
    return f"Ready: jobs run on {where}{missing}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _connections(num_gpus: int) -> dict[str, Any]:
    """How ranks would exchange what they compute."""
    if num_gpus < 2:
        return {}
    links = find_links(num_gpus)
    has_nccl = dist.is_available() and dist.is_nccl_available()
    shared_memory = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return {
        "gpu_links": describe_links(links),
        "nccl": _nccl_version() if has_nccl else "not in this torch",
        "shared_memory_gib": round(shared_memory / 2**30, 1),
        "all_reduce": {f"--tp {n}": all_reduce(n, links) for n in (2, 4, 8) if n <= num_gpus},
    }


def _nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def all_reduce(num_ranks: int, links: Sequence[GpuLink]) -> str:
    """As GpuCollectives chooses it."""
    are_peers = all(link.are_peers for link in links if max(link.pair) < num_ranks)
    return FUSED if are_peers and num_ranks in FUSED_SIZES else NCCL


def _find_config(name: str) -> ModelConfig:
    """Of a model that need not be here; raises CommandError where nothing is known of it."""
    return builtin_config(name) or ModelConfig.from_directory(resolve_model(name, offline=True))


def _advice(model: ModelConfig) -> str:
    settings = resolve(EngineConfig(), model)
    if settings.device == "cpu":
        return advise_cpu(model, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return advise(Needs.of(model, settings), find_gpus())


def _choice() -> dict[str, Any]:
    """What a job without flags runs on; prefills on a GPU have several backends to choose from."""
    try:
        gpu = check_gpu()
    except UserError as error:
        is_there = len(find_gpus()) > 0
        return {
            "runs_on": f"cpu, with --device cpu: {error.message}" if is_there else "cpu",
            "dtype": "float32",
            "attention": "plain PyTorch over pages, the same bits in every batch",
            "decode": "eager",
        }
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "block_size": EngineConfig().block_size,
        "capability": gpu.capability,
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
        return _NOT_INSTALLED


def _is_cached(name: str) -> bool:
    try:
        resolve_model(name, offline=True)
    except UserError:
        return False
    return True
