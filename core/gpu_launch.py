"""GpuLaunch: a launch under way on a GPU, and how its pinned results are read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import BatchResult, Int32
from nanovllm_cli.core.gpu_errors import gpu_errors
from nanovllm_cli.core.token_choice import unpack, unpack_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLaunch:
    """`result` waits for it. All tensors are pinned int32 ones."""

    done: torch.cuda.Event
    out: Tensor  # [OUT_ROWS_BEFORE_TOKENS + num_steps, num_seqs]
    logprob_rows: Int32 | None = None
    logprobs: Tensor | None = None  # [num_steps, len(logprob_rows), 1 + 2 * k], packed
    prompt_logprobs: Tensor | None = None  # [num_targets, 1 + 2 * k], packed

    @gpu_errors()
    def result(self) -> BatchResult:
        """The tokens, copied out of the pinned buffer."""
        self.done.synchronize()
        num_tokens, is_stopped, is_nan, *token_ids = self.out.numpy().copy()
        logprobs, prompt = None, self.prompt_logprobs
        if self.logprobs is not None and self.logprob_rows is not None:
            logprobs = unpack_steps(self.logprob_rows, self.logprobs.numpy())
        return BatchResult(
            token_ids=np.stack(token_ids, axis=1),
            num_tokens=num_tokens,
            is_stopped=is_stopped != 0,
            is_nan=is_nan != 0,
            logprobs=logprobs,
            prompt_logprobs=None if prompt is None else unpack(prompt.numpy()),
        )
