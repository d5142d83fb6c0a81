"""An engine that needs no model: a completion is made of the prompt and the seed alone.

Requests finish in another order than they came in. With it a job is so quick that it can be killed
hundreds of times, and everything but the model is the real thing.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.request import Completion, Failure, Logprobs, Output, Request
from nanovllm_cli.core.stats import EngineStats


class FakeEngine:
    """Finishes `rows_per_step` random requests a step, each step taking `step_seconds`.

    `fails` says which requests cannot be completed.
    """

    def __init__(
        self,
        *,
        rows_per_step: int = 8,
        step_seconds: float = 0.0,
        order_seed: int = 0,
        fails: Callable[[Request], bool] = lambda request: False,
    ) -> None:
        self.stats = EngineStats()
        self.max_model_len = 4096
        self.attention_backend = "fake"
        self.num_added = 0
        self._rows_per_step = rows_per_step
        self._step_seconds = step_seconds
        self._random = random.Random(order_seed)
        self._fails = fails
        self._waiting: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def add(self, request: Request) -> Failure | None:
        self.num_added += 1
        self._waiting.append(request)
        return None

    def close(self) -> None:
        """It holds nothing."""

    def abort(self, request_id: int) -> None:
        self._waiting = [item for item in self._waiting if item.request_id != request_id]

    def step(self) -> list[Output]:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        outputs: list[Output] = []
        while self._waiting and len(outputs) < self._rows_per_step:
            at = self._random.randrange(len(self._waiting))
            self._waiting[at], self._waiting[-1] = self._waiting[-1], self._waiting[at]
            outputs.append(self._complete(self._waiting.pop()))
        return outputs

    def _complete(self, request: Request) -> Output:
        if self._fails(request):
            message = "this one never can"
            return Failure(request_id=request.request_id, code="nan_logits", message=message)
        prompt = np.asarray(request.prompt_token_ids, np.int64)
        seed = (int(prompt.sum()) + request.sampling.seed) % 2**32
        return Completion(
            request_id=request.request_id,
            token_ids=np.random.default_rng(seed).integers(40, 500, 6).astype(np.int32),
            finish_reason="length",
            num_prompt_tokens=len(prompt),
            num_cached_tokens=0,
            prompt_logprobs=self._logprobs(request),
        )

    def _logprobs(self, request: Request) -> Logprobs | None:
        """Made of each token and all before it; every token but one in eight is the likeliest."""
        if request.sampling.prompt_logprobs is None:
            return None
        start = request.sampling.prompt_logprobs_start
        token_ids = np.asarray(request.prompt_token_ids, np.int32)[start:]
        values = -(np.cumsum(request.prompt_token_ids)[start:] % 89).astype(np.float32) / 16
        top_ids = token_ids + (values < -4.9)
        return Logprobs(values=values, top_ids=top_ids[:, None], top_values=values[:, None])


def loader(engine: FakeEngine) -> Callable[[Path, EngineConfig], FakeEngine]:
    """What `generate` takes for a way to load an engine."""
    return lambda path, config: engine
