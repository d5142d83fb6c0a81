"""A job's engines: in this process, or each in one of its own, which starts ahead of loading."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.device_shares import start_children
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_client import EngineClient
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.engine_replicas import EngineReplicas

LoadEngine = Callable[[Path, EngineConfig], EngineClient]


def load_engine(path: Path, config: EngineConfig) -> EngineClient:
    """Load the engine with the checkpoint in the directory `path` into this process."""
    from nanovllm_cli.core.engine import Engine  # late: it imports torch

    return Engine.from_checkpoint(path, config)


class EngineProcesses:
    """A job's engines, each in a process of its own: a death costs a restart and not the job.

    Whatever ends the block ends the processes.
    """

    def __init__(self, num_engines: int, num_ranks_each: int) -> None:
        self._num_engines = num_engines
        self._num_ranks_each = num_ranks_each
        self._children: list[EngineChild] = []

    def __enter__(self) -> "EngineProcesses":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children:
            child.kill()  # nothing is left to kill where the job has closed it

    def start(self) -> None:
        """Start the processes, which import torch and wait for `load`."""
        self._children = start_children(self._num_engines, self._num_ranks_each)

    def load(self, path: Path, config: EngineConfig) -> EngineClient:
        """Have them load the checkpoint in the directory `path`; start them if nobody has yet."""
        if not self._children:
            self.start()
        if len(self._children) == 1:
            return EngineProcess(path, config, child=self._children[0])
        return EngineReplicas(
            path, config, num_replicas=len(self._children), children=self._children
        )
