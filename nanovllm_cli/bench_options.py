"""BenchOptions: everything `nanovllm bench` can be told, with every default."""

import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.sampling_params import SamplingParams

from .options import DEFAULT_MODEL
from .workloads import WORKLOADS


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One measurement."""

    model: str = DEFAULT_MODEL
    workload: str = "nano"  # or a file of prompts
    repeats: int = 3
    temperature: float = 0.6
    max_tokens: int | None = None  # for each prompt of a file; None: 128
    limit: int | None = None  # of the workload's sequences
    compare: Path | None = None  # an earlier record
    fail_if_slower: float | None = None  # percent
    profile: Path | None = None  # a directory for traces
    data_parallel_size: int = 1  # engines
    weak_scaling: bool = False  # the whole workload for each engine, not a share of it
    single: bool = True  # one engine alone as well, where several GPUs are measured
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("repeats", self.repeats, 1),
            ("max-tokens", self.max_tokens, 1),
            ("limit", self.limit, 1),
            ("data-parallel-size", self.data_parallel_size, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        try:
            SamplingParams(temperature=self.temperature)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        if not self.is_fixed and not self._looks_like_a_file:
            near = difflib.get_close_matches(self.workload, WORKLOADS, n=1)
            raise UserError(
                f"there is no workload {self.workload!r}, and no file of that name",
                f"Did you mean {near[0]}?" if near else f"There are {', '.join(WORKLOADS)}.",
            )
        if self.is_fixed and self.max_tokens is not None:
            raise UserError(
                f"--max-tokens is for a file of prompts; {self.workload} has lengths of its own"
            )
        if self.fail_if_slower is not None:
            if self.compare is None:
                raise UserError(
                    "--fail-if-slower needs a record to compare with",
                    "Add --compare OLD.json, what an earlier bench wrote to stdout.",
                )
            if not 0 <= self.fail_if_slower < 100 or math.isnan(self.fail_if_slower):
                raise UserError(
                    f"--fail-if-slower is {self.fail_if_slower:g}; it is a percentage, from 0 to "
                    "below 100"
                )
        if self.weak_scaling and self.data_parallel_size == 1:
            raise UserError("--weak-scaling is for several engines", "Add --data-parallel-size N.")
        if self.profile is not None and self.data_parallel_size > 1:
            raise UserError(
                f"--profile is for an engine in this process; with --data-parallel-size "
                f"{self.data_parallel_size} each is in one of its own",
                "Profile one engine, with --data-parallel-size 1: the others do the same.",
            )
        if self.profile is not None and self.profile.exists() and not self.profile.is_dir():
            raise UserError(f"--profile {self.profile} is no directory")

    @property
    def num_gpus(self) -> int:
        """On a CPU, processes."""
        return self.data_parallel_size * self.engine.tensor_parallel_size

    @property
    def num_copies(self) -> int:
        """How often the workload is run in one pass."""
        return self.data_parallel_size if self.weak_scaling else 1

    @property
    def is_fixed(self) -> bool:
        """Whether the workload is one of ours."""
        return self.workload in WORKLOADS

    @property
    def _looks_like_a_file(self) -> bool:
        name = self.workload
        return name == "-" or "." in name or os.sep in name or Path(name).exists()
