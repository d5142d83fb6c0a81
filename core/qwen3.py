"""Qwen3, dense: 0.6B to 32B (technical report: https://arxiv.org/abs/2505.09388).

Token ids in, logits out. A layer is x + attention(norm(x)), then x + mlp(norm(x)); attention has
grouped queries, an RMSNorm on every q and k head, and rotary positions; the MLP is SwiGLU.
"""

import torch
from torch import Tensor, nn

from nanovllm_cli.core.attention import AttentionMetadata, KVCache, attend
from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.layers import Embedding, Linear, RMSNorm, rotary_tables
from nanovllm_cli.kernels.rotary import rotary_reference
from nanovllm_cli.kernels.swiglu import swiglu_reference


class Attention(nn.Module):
    """Grouped-query attention with normalized and rotated q and k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_size, kv_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape."""
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q = rotary_reference(self.q_norm(q), cos, sin)
        k = rotary_reference(self.k_norm(k), cos, sin)
        out = attend(q, k, v, kv_cache, metadata)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, size, size)
        self.down_proj = Linear(size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape."""
        return self.down_proj(swiglu_reference(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv_cache, metadata)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The whole model. Its weights are uninitialized until the loader fills them."""

    def __init__(self, config: ModelConfig, max_model_len: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Tables are fp32 whatever the weights' dtype, as Hugging Face computes them.
        with torch.device("cpu"):
            self.cos, self.sin = rotary_tables(config.rope, config.head_dim, max_model_len)

    def forward(
        self, token_ids: Tensor, kv_caches: list[KVCache], metadata: AttentionMetadata
    ) -> Tensor:
        """token_ids: int64 [num_tokens] -> hidden states [num_tokens, hidden_size], normalized."""
        cos, sin = self.cos[metadata.positions], self.sin[metadata.positions]
        x = self.embed_tokens(token_ids)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, cos, sin, kv_cache, metadata)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden_size] -> [num_rows, vocab_size]."""
        return self.lm_head(hidden)
