"""Engine: requests in, completions out, one launch a step.

`step` plans the next launch, hands it to the runner and reads the oldest one that is due. With
`max_launches_in_flight` above 0 the host plans and reads while the device works.
"""

import os
import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanovllm_cli.core.batch import PrefillBatch, SampleBatch
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.cpu_runner import CpuRunner
from nanovllm_cli.core.gpu_errors import check_weights_fit, gpu_errors
from nanovllm_cli.core.gpu_runner import GpuRunner
from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.core.loader import load_random_weights, load_weights
from nanovllm_cli.core.parallel import ALONE, TensorParallel
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.rank_group import RankGroup, start_ranks
from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.resolved_config import resolve
from nanovllm_cli.core.runner import Launch, Runner
from nanovllm_cli.core.scheduler import Scheduler
from nanovllm_cli.core.stats import EngineStats


class Engine:
    """A loaded model and its scheduler; ready to run when the constructor returns.

    Raises ModelError for a checkpoint that cannot be used and MemoryTooSmall.
    """

    def __init__(self, model: Qwen3, config: EngineConfig, ranks: RankGroup | None = None) -> None:
        """ranks: those that hold the other parts of the model; they are taken over."""
        model_config = model.config
        resolved = resolve(config, model_config)
        self._ranks = ranks
        make = partial(make_runner, model, config)
        self._runner = make() if ranks is None else ranks.runner(make)
        self.device = resolved.device
        collectives = model.parallel.collectives
        self.all_reduce = collectives.all_reduce if collectives is not None else None
        self.attention_backend = resolved.attention_backend or "pytorch"
        self.num_blocks = self._runner.num_blocks
        # One block is scratch. A small cache shortens what can be asked for.
        longest = (self.num_blocks - 1) * resolved.block_size
        self.max_model_len = min(resolved.max_model_len, longest)
        self.max_num_seqs = resolved.max_num_seqs
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
            grammars=Grammars(
                None if config.tokenizer_path is None else Path(config.tokenizer_path),
                vocab_size=model_config.vocab_size,
                eos_token_ids=model_config.eos_token_ids,
            ),
        )
        self._max_launches_in_flight = resolved.max_launches_in_flight
        self._launches: deque[tuple[Launch, bool]] = deque()  # whether it is a decode window
        self._last_read = time.perf_counter()

    @classmethod
    def from_checkpoint(cls, path: Path, config: EngineConfig) -> "Engine":
        """Load the checkpoint in the directory `path`."""
        return cls.load(path, config)

    @classmethod
    def load(cls, source: Path | ModelConfig, config: EngineConfig) -> "Engine":
        """Load the checkpoint in a directory, or make random weights of some sizes.

        With several ranks this process is the first of them and starts the others.
        """
        if config.tokenizer_path is None and isinstance(source, Path):
            config = replace(config, tokenizer_path=os.fspath(source))
        ranks = start_ranks(source, ModelConfig.of(source), config)
        try:
            model = load_model(source, config, ALONE if ranks is None else ranks.parallel)
            return cls(model, config, ranks)
        except BaseException:
            if ranks is not None:
                ranks.close()
            raise

    def close(self) -> None:
        """End the other ranks' processes; without any there is nothing to end."""
        if self._ranks is not None:
            self._launches.clear()
            del self._runner  # a GPU's graphs hold collectives, and NCCL waits for their end
            self._ranks.close()

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
            if not self._launches and not isinstance(batch, SampleBatch):
                self._last_read = time.perf_counter()
            is_decode = not isinstance(batch, PrefillBatch)
            own = self._runner.launch(batch)
            if own is not None:
                self._launches.append((own, is_decode))
        if self._launches and (batch is None or len(self._launches) > self._max_launches_in_flight):
            launch, is_decode = self._launches.popleft()
            result = launch.result()
            self._count_seconds(is_decode=is_decode)
            return self._scheduler.update(result)
        assert batch is not None or not self.has_work, "the scheduler makes no progress"
        return []

    def _count_seconds(self, *, is_decode: bool) -> None:
        """A launch has the time from the end of the one before it to its own end."""
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        if is_decode:
            self.stats.decode_seconds += seconds
        else:
            self.stats.prefill_seconds += seconds


def load_model(
    source: Path | ModelConfig, config: EngineConfig, parallel: TensorParallel = ALONE
) -> Qwen3:
    """One rank's part of the checkpoint in a directory, or of random weights of some sizes."""
    model = build_model(ModelConfig.of(source), config, parallel)
    with gpu_errors(is_start=True):
        if isinstance(source, ModelConfig):
            load_random_weights(model)
        else:
            load_weights(model, source)
    return model


def build_model(
    model_config: ModelConfig, config: EngineConfig, parallel: TensorParallel = ALONE
) -> Qwen3:
    """The model with uninitialized weights, on the device and in the dtype of `config`."""
    resolved = resolve(config, model_config)
    check_weights_fit(model_config.part(parallel.size), resolved)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, resolved.dtype))
    try:
        with gpu_errors(is_start=True), torch.device(resolved.device):
            return Qwen3(model_config, resolved.max_model_len, parallel)
    finally:
        torch.set_default_dtype(default)


def make_runner(model: Qwen3, config: EngineConfig) -> Runner:
    """For the device that `model` lies on."""
    resolved = resolve(config, model.config)
    return CpuRunner(model, resolved) if resolved.device == "cpu" else GpuRunner(model, resolved)
