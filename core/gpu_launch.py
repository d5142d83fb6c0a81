"""GpuLaunch: a launch under way on a GPU, and how its pinned results are read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.batch import BatchResult, Int32, RowNeeds
from nanovllm_cli.core.gpu_errors import gpu_errors
from nanovllm_cli.core.staging import Staging
from nanovllm_cli.core.token_choice import unpack, unpack_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLaunch:
    """`result` waits for it. All tensors are pinned int32 ones."""

    done: torch.cuda.Event
    out: Tensor  # [OUT_ROWS_BEFORE_TOKENS + num_steps, num_seqs]
    logprob_rows: Int32 | None = None
    logprobs: Tensor | None = None  # [num_steps, len(logprob_rows), 1 + 2 * k], packed
    prompt_logprobs: Tensor | None = None  # [num_targets, 1 + 2 * k], packed

    @classmethod
    def begin(
        cls,
        staging: Staging,
        out: Tensor,
        needs: RowNeeds | None,
        logprobs: Tensor | None,
        prompt_logprobs: Tensor | None,
    ) -> "GpuLaunch":
        """What was enqueued so far, of which these int32 tensors come; enqueues their copies.

        needs: whose log-probabilities `logprobs` are.
        """

        def to_host(values: Tensor) -> Tensor:
            host = staging.host_tensor(tuple(values.shape))
            return host.copy_(values.contiguous(), non_blocking=True)

        host_out = to_host(out)
        host_logprobs = None if logprobs is None else to_host(logprobs)
        host_prompt = None if prompt_logprobs is None else to_host(prompt_logprobs)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return cls(
            done=done,
            out=host_out,
            logprob_rows=None if needs is None else needs.logprob_rows,
            logprobs=host_logprobs,
            prompt_logprobs=host_prompt,
        )

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
