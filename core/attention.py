"""Attention over pages: where the tokens of one launch or step lie, and how they are attended to.

An AttentionPlan is made once for a launch or a step and serves every layer. The K and V of all its
tokens are stored before any is attended to, so that sequences of one launch may share a block that
one of them computes.
"""

from typing import Protocol

from torch import Tensor

from nanovllm_cli.core.kv_cache import KVCache


class AttentionPlan(Protocol):
    """positions, slot_mapping (where each token's K and V go): int [num_tokens]."""

    @property
    def positions(self) -> Tensor: ...

    @property
    def slot_mapping(self) -> Tensor: ...

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same; K and V are in their pages."""
