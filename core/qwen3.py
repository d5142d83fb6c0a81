"""Qwen3, dense: 0.6B to 32B (technical report: https://arxiv.org/abs/2505.09388).

Token ids in, logits out. A layer is x + attention(norm(x)), then x + mlp(norm(x)); attention has
grouped queries, an RMSNorm on every q and k head, and rotary positions; the MLP is SwiGLU.
"""

import torch
from torch import Tensor, nn

from nanovllm_cli.core.attention import AttentionPlan
from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.kv_cache import KVCache
from nanovllm_cli.core.layers import (
    Embedding,
    Linear,
    RMSNorm,
    RotaryTables,
    RowParallelLinear,
    rotary_tables,
)
from nanovllm_cli.core.parallel import ALONE, TensorParallel
from nanovllm_cli.kernels.qk_norm_rope_store import qk_norm_rope_store
from nanovllm_cli.kernels.swiglu import swiglu


class Attention(nn.Module):
    """Grouped-query attention with normalized and rotated q and k."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        q = parallel.shard(config.num_attention_heads * config.head_dim)
        kv = parallel.kv_shard(config.num_key_value_heads, config.head_dim)
        self.qkv_proj = Linear(config.hidden_size, q, kv, kv)
        self.o_proj = RowParallelLinear(q, config.hidden_size, parallel)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: RotaryTables, kv_cache: KVCache, attention: AttentionPlan
    ) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape, of several ranks a term."""
        q = qk_norm_rope_store(
            self.qkv_proj(x),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            rotary.cos,
            rotary.sin,
            attention.positions,
            attention.slot_mapping,
            kv_cache.k,
            kv_cache.v,
        )
        return self.o_proj(attention.attend(q, kv_cache).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        shard = parallel.shard(config.intermediate_size)
        self.gate_up_proj = Linear(config.hidden_size, shard, shard)
        self.down_proj = RowParallelLinear(shard, config.hidden_size, parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape, of several ranks a term."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, parallel)
        self.self_attn = Attention(config, parallel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, parallel)
        self.mlp = MLP(config, parallel)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotary: RotaryTables,
        kv_cache: KVCache,
        attention: AttentionPlan,
    ) -> Tensor:
        """x: [num_tokens, hidden_size], what the layer before adds to `residual` (in place).

        Of several ranks x is a term, as what it returns; the norms sum them.
        """
        x = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, rotary, kv_cache, attention)
        return self.mlp(self.post_attention_layernorm.add(x, residual))


class Qwen3(nn.Module):
    """The whole model, or one rank's part. Its weights are uninitialized until they are loaded."""

    def __init__(
        self, config: ModelConfig, max_model_len: int, parallel: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        self.part = config.part(parallel.size)  # the sizes of what this rank holds
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, parallel)
        self.layers = nn.ModuleList(
            DecoderLayer(config, parallel) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, parallel)
        self.lm_head = Linear(config.hidden_size, parallel.shard(config.vocab_size))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rotary = rotary_tables(config.rope, config.head_dim, max_model_len)

    def forward(
        self, token_ids: Tensor, kv_caches: list[KVCache], attention: AttentionPlan
    ) -> Tensor:
        """token_ids: int [num_tokens] -> hidden states [num_tokens, hidden_size], normalized."""
        x = self.embed_tokens(token_ids)
        residual = torch.zeros_like(x)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, residual, self.rotary, kv_cache, attention)
        return self.norm.add(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden_size] -> [num_rows, vocab_size], the same on every rank."""
        columns = self.lm_head(hidden, self.parallel.column_buffer(len(hidden)))
        return self.parallel.join_columns(columns, self.config.vocab_size)
