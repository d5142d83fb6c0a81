"""Runner: what the engine asks of a device: Batch in, a Launch to read later."""

from typing import Protocol

from nanovllm_cli.core.batch import Batch, BatchResult


class Launch(Protocol):
    """One launch under way."""

    def result(self) -> BatchResult:
        """What it sampled; waits for it."""


class Runner(Protocol):
    """One device's weights, KV cache and slot table. Launches run in the order they come."""

    num_blocks: int  # of the KV cache, the scratch block included

    def launch(self, batch: Batch) -> Launch | None:
        """Start one launch; None for a ForwardBatch, of which nothing comes back."""
