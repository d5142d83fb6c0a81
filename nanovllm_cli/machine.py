"""What a measurement ran on: the device, the software, the commit."""

import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

import torch

from nanovllm_cli import __version__

from .nvml import Nvml


def device_name(device: str) -> str:
    """The GPU's or the CPU's product name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def gpu_counters(device: str, num_gpus: int = 1) -> Nvml | None:
    """The counters of so many GPUs, the first that torch sees; None for a CPU."""
    if device != "cuda":
        return None
    return Nvml(*(str(torch.cuda.get_device_properties(i).uuid) for i in range(num_gpus)))


def software(counters: Nvml | None) -> dict[str, str | None]:
    """Versions of all that a speed depends on; None for what is not there."""
    return {
        "nanovllm": __version__,
        "commit": git_commit(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": None if counters is None else counters.driver_version(),
        "platform": platform.platform(),
    }


def git_commit(checkout: Path) -> str | None:
    """The commit that `checkout` stands at, read without git; None where it is no checkout.

    It says nothing of changes that are not committed.
    """
    try:
        directory = checkout / ".git"
        if directory.is_file():  # a worktree
            directory = checkout / directory.read_text().removeprefix("gitdir:").strip()
        head = (directory / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = directory / "commondir"
        if common.exists():
            directory = directory / common.read_text().strip()
        if (directory / name).exists():
            return (directory / name).read_text().strip()
        for line in (directory / "packed-refs").read_text().splitlines():
            commit, _, packed = line.partition(" ")
            if packed == name:
                return commit
    except OSError:
        pass
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
