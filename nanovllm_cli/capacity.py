"""How many engine processes this machine can hold, asked before any of them is started.

A slip of the keys (`--dp 99`) would otherwise start 99 processes, fill the memory, and take other
programs down with it. Imports nothing slow: torch is not there yet when this is asked.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from nanovllm_cli.core import cuda_driver
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.errors import UserError

from .builtin_configs import builtin_config

_LEAST_PROCESSES = 8  # allowed on any CPU: a few more than there are cores only cost time
_PROCESS_BYTES = 350 << 20  # of Python with torch, before any weight is loaded: 220 to 330 MB
_WEIGHT_BYTES = 4  # float32, which is what a CPU computes in
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")


def check_job_fits(config: EngineConfig, num_replicas: int, model: str) -> None:
    """Raise UserError if the engines of a job are more than this machine can hold.

    One process alone is always tried: what it needs is seen when it loads.
    """
    if config.tensor_parallel_size * num_replicas == 1:
        return
    num_gpus = 0 if config.device == "cpu" else len(cuda_driver.visible_gpus())
    if config.device == "cuda" and num_gpus == 0:
        return  # that there is none is another error
    check_processes(
        num_replicas,
        config.tensor_parallel_size,
        cores=usable_cores(),
        num_gpus=num_gpus,
        memory_bytes=available_memory(),
        weights_bytes=_WEIGHT_BYTES * _num_parameters(model),
    )


def check_processes(
    dp: int,
    tp: int,
    *,
    cores: int,
    num_gpus: int,
    memory_bytes: int | None,
    weights_bytes: int,
) -> None:
    """Raise UserError if `dp` engines of `tp` processes each do not fit, with what would fit.

    With GPUs each process needs one of its own. On a CPU the processes share `cores` cores and
    `memory_bytes` bytes (None: not known), of which each engine needs `weights_bytes` for weights.
    """
    num_processes = dp * tp
    flags = f"--dp {dp}" if tp == 1 else f"--tp {tp}" if dp == 1 else f"--dp {dp} with --tp {tp}"
    if num_gpus:
        if num_processes > num_gpus:
            raise UserError(
                f"{flags} needs {_count(num_processes, 'GPU')}, and this machine shows "
                f"{_count(num_gpus, 'GPU')}",
                _what_fits(num_gpus, tp, "one GPU for each process"),
            )
        return
    most = max(cores, _LEAST_PROCESSES)
    if num_processes > most:
        raise UserError(
            f"{flags} would start {num_processes} processes; on this CPU, with "
            f"{_count(cores, 'usable core')}, at most {most} are allowed",
            _what_fits(most, tp, "more processes than cores make no job faster"),
        )
    needed = num_processes * _PROCESS_BYTES + dp * weights_bytes
    if memory_bytes is not None and needed > memory_bytes:
        fitting = max(memory_bytes // (tp * _PROCESS_BYTES + weights_bytes), 0) * tp
        raise UserError(
            f"{flags} needs about {_gib(needed)} GiB of memory for {num_processes} processes, and "
            f"{_gib(memory_bytes)} GiB are available",
            _what_fits(fitting, tp, "each engine holds all weights"),
        )


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and the CPU quota of its cgroups."""
    cores = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        quota, period = _numbers(group / "cpu.max", 2)  # "max 100000" where there is no limit
        if quota is None:
            (quota,) = _numbers(group / "cpu.cfs_quota_us", 1)
            (period,) = _numbers(group / "cpu.cfs_period_us", 1)
        if quota is not None and period and quota > 0:
            cores = min(cores, -(-quota // period))
    return max(cores, 1)


def available_memory() -> int | None:
    """Bytes that may still be taken: of the machine, and of this process's cgroups."""
    rooms = []
    try:
        fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        rooms.append(int(fields["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    for group in _groups("memory"):
        for most, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            (limit,), (taken,) = _numbers(group / most, 1), _numbers(group / used, 1)
            if limit is not None and taken is not None:
                rooms.append(max(limit - taken + _statistic(group / "memory.stat", cached), 0))
    return min(rooms, default=None)


def _num_parameters(model: str) -> int:
    """Of a model whose sizes are known without the hub; 0 where they are not."""
    config = builtin_config(model)
    try:
        if config is None and Path(model).is_dir():
            config = ModelConfig.from_directory(Path(model))
        return 0 if config is None else config.num_parameters
    except (UserError, OSError, ValueError, TypeError):  # the model's own check says so later
        return 0


def _groups(controller: str) -> Iterator[Path]:
    """The directories of this process's cgroups, of version 2 and of version 1, up to the root."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        group = root / path.lstrip("/")
        while True:  # a container may see its own group as the root
            yield group
            if group == root or root not in group.parents:
                break
            group = group.parent


def _numbers(path: Path, count: int) -> list[int | None]:
    """The first numbers in a file of a cgroup; None for a word, or where there is no file."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    found = [int(word) if word.lstrip("-").isdigit() else None for word in words[:count]]
    return found + [None] * (count - len(found))


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _what_fits(most: int, tp: int, why: str) -> str:
    engines = most // tp
    fits = f"--dp {engines}" if tp == 1 else f"--dp {engines} with --tp {tp}"
    if engines < 1:
        return f"Lower --tp to {most} or less: {why}." if most > 1 else f"Leave it out: {why}."
    return f"{fits} fits: {why}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
