"""Engine: requests in, completions out, one launch a step.

`step` plans the next launch, hands it to the runner and reads the oldest one that is due. With
`max_launches_in_flight` above 0 the host plans and reads while the device works.
"""

import time
from collections import deque
from pathlib import Path

import torch

from nanovllm_cli.core.batch import DecodeBatch
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.cpu_runner import CpuRunner
from nanovllm_cli.core.gpu_errors import check_weights_fit, gpu_errors
from nanovllm_cli.core.gpu_runner import GpuRunner
from nanovllm_cli.core.loader import load_weights
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.resolved_config import resolve
from nanovllm_cli.core.runner import Launch, Runner
from nanovllm_cli.core.scheduler import Scheduler
from nanovllm_cli.core.stats import EngineStats


class Engine:
    """A loaded model and its scheduler; ready to run when the constructor returns.

    Raises ModelError for a checkpoint that cannot be used and MemoryTooSmall.
    """

    def __init__(self, model: Qwen3, config: EngineConfig) -> None:
        model_config = model.config
        resolved = resolve(config, model_config)
        runner = CpuRunner if resolved.device == "cpu" else GpuRunner
        self._runner: Runner = runner(model, resolved)
        self.device = resolved.device
        backend = resolved.attention_backend
        self.attention_backend = backend.name if backend is not None else "pytorch"
        self.num_blocks = self._runner.num_blocks
        # One block is scratch. A small cache shortens what can be asked for.
        longest = (self.num_blocks - 1) * resolved.block_size
        self.max_model_len = min(resolved.max_model_len, longest)
        self._scheduler = Scheduler(
            BlockManager(
                self.num_blocks,
                resolved.block_size,
                enable_prefix_caching=resolved.enable_prefix_caching,
                hash_bits=resolved.hash_bits,
            ),
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            max_model_len=self.max_model_len,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_window_steps=resolved.max_window_steps,
        )
        self._max_launches_in_flight = resolved.max_launches_in_flight
        self._launches: deque[Launch] = deque()

    @classmethod
    def from_checkpoint(cls, path: Path, config: EngineConfig) -> "Engine":
        """Load the checkpoint in the directory `path`."""
        model_config = ModelConfig.from_directory(path)
        model = build_model(model_config, config)
        with gpu_errors(is_start=True):
            load_weights(model, path)
        return cls(model, config)

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure at once."""
        return self._scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """Drop a request; it gives no further output."""
        self._scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Make one launch, if there is one to make, and read what is due."""
        batch = self._scheduler.schedule()
        if batch is not None:
            start = time.perf_counter()
            self._launches.append(self._runner.launch(batch))
            seconds = time.perf_counter() - start
            if isinstance(batch, DecodeBatch):
                self.stats.decode_seconds += seconds
            else:
                self.stats.prefill_seconds += seconds
        if self._launches and (batch is None or len(self._launches) > self._max_launches_in_flight):
            return self._scheduler.update(self._launches.popleft().result())
        assert batch is not None or not self.has_work, "the scheduler makes no progress"
        return []


def build_model(model_config: ModelConfig, config: EngineConfig) -> Qwen3:
    """The model with uninitialized weights, on the device and in the dtype of `config`."""
    resolved = resolve(config, model_config)
    check_weights_fit(model_config, resolved)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, resolved.dtype))
    try:
        with gpu_errors(is_start=True), torch.device(resolved.device):
            return Qwen3(model_config, resolved.max_model_len)
    finally:
        torch.set_default_dtype(default)
