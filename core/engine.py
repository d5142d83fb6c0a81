"""Engine: requests in, completions out, one launch a step.

`step` plans the next launch, hands it to the runner and reads the oldest one that is due. With
`max_launches_in_flight` above 0 the host plans and reads while the device works.
"""

import os
import time
from collections import deque
from pathlib import Path

import torch

from nanovllm_cli.core.batch import BatchResult, DecodeBatch
from nanovllm_cli.core.block_manager import BlockManager
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.errors import MemoryTooSmall, UserError
from nanovllm_cli.core.loader import load_weights
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.runner import ModelRunner
from nanovllm_cli.core.scheduler import Scheduler
from nanovllm_cli.core.stats import EngineStats

_CPU_WINDOW_STEPS = 4
_CPU_KV_TOKENS_PER_SEQ = 1024  # the default cache holds so many of each running sequence
_CPU_KV_BYTES = 4 << 30  # and is no larger than this, nor than half the free memory


class Engine:
    """A loaded model and its scheduler; ready to run when the constructor returns.

    Raises ModelError for a checkpoint that cannot be used and MemoryTooSmall.
    """

    def __init__(self, model: Qwen3, config: EngineConfig) -> None:
        model_config = model.config
        dtype_bytes = model.embed_tokens.weight.element_size()
        block_bytes = model_config.kv_bytes_per_token(dtype_bytes) * config.block_size
        max_model_len = resolve_max_model_len(model_config, config)
        blocks_per_seq = -(-max_model_len // config.block_size)
        kv_cache_bytes = config.kv_cache_bytes
        if kv_cache_bytes is None:
            wanted = config.max_num_seqs * min(max_model_len, _CPU_KV_TOKENS_PER_SEQ)
            wanted_blocks = max(-(-wanted // config.block_size), blocks_per_seq) + 1
            kv_cache_bytes = min(wanted_blocks * block_bytes, _CPU_KV_BYTES, _free_memory() // 2)
        # One block is scratch. Fewer than a longest sequence needs shorten what can be asked for.
        num_blocks = min(kv_cache_bytes // block_bytes, config.max_num_seqs * blocks_per_seq + 1)
        if num_blocks < 2:
            raise MemoryTooSmall(
                f"the KV cache has {kv_cache_bytes} bytes; one block of {config.block_size} tokens "
                f"and the scratch block need {2 * block_bytes}",
                "Raise --kv-cache-memory or lower --block-size.",
            )
        self.model_config = model_config
        self.max_model_len = min(max_model_len, (num_blocks - 1) * config.block_size)
        self.num_blocks = num_blocks
        self.block_size = config.block_size
        self._runner = ModelRunner(
            model,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            num_threads=config.num_threads,
        )
        self._scheduler = Scheduler(
            BlockManager(
                num_blocks,
                config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
                hash_bits=config.hash_bits,
            ),
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_window_steps=config.max_window_steps or _CPU_WINDOW_STEPS,
        )
        self._max_launches_in_flight = config.max_launches_in_flight
        self._launches: deque[BatchResult] = deque()

    @classmethod
    def from_checkpoint(cls, path: Path, config: EngineConfig) -> "Engine":
        """Load the checkpoint in the directory `path`."""
        model_config = ModelConfig.from_directory(path)
        model = build_model(model_config, config)
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
            self._launches.append(self._runner.run(batch))
            seconds = time.perf_counter() - start
            if isinstance(batch, DecodeBatch):
                self.stats.decode_seconds += seconds
            else:
                self.stats.prefill_seconds += seconds
        if self._launches and (batch is None or len(self._launches) > self._max_launches_in_flight):
            return self._scheduler.update(self._launches.popleft())
        assert batch is not None or not self.has_work, "the scheduler makes no progress"
        return []


def build_model(model_config: ModelConfig, config: EngineConfig) -> Qwen3:
    """The model with uninitialized weights, on the device and in the dtype of `config`."""
    if config.device == "cuda":
        raise UserError("this version runs on the CPU only", "Leave out --device.")
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen3(model_config, resolve_max_model_len(model_config, config))
    finally:
        torch.set_default_dtype(default)


def resolve_max_model_len(model_config: ModelConfig, config: EngineConfig) -> int:
    """The longest sequence, prompt and completion; never more than the model was made for."""
    longest = model_config.max_context
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise UserError(
            f"max_model_len is {config.max_model_len}; the model was made for {longest}",
            "Longer contexts need a rope_parameters entry (YaRN) in the model's config.json.",
        )
    return config.max_model_len


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
