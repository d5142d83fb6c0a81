"""The published configurations of dense Qwen3, for `bench` without a checkpoint.

Source: the config.json of each model at https://huggingface.co/Qwen.
"""

from nanovllm_cli.core.config import ModelConfig, RopeConfig

#        hidden, layers, query heads, intermediate, tied embeddings
_SIZES = {
    "Qwen3-0.6B": (1024, 28, 16, 3072, True),
    "Qwen3-1.7B": (2048, 28, 16, 6144, True),
    "Qwen3-4B": (2560, 36, 32, 9728, True),
    "Qwen3-8B": (4096, 36, 32, 12288, False),
    "Qwen3-14B": (5120, 40, 40, 17408, False),
    "Qwen3-32B": (5120, 64, 64, 25600, False),
}


def builtin_config(name: str) -> ModelConfig | None:
    """The configuration of a short name; None for another."""
    if name not in _SIZES:
        return None
    hidden, layers, heads, intermediate, is_tied = _SIZES[name]
    return ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=is_tied,
        rope=RopeConfig(rope_type="default", theta=1e6),
        dtype="bfloat16",
        eos_token_ids=(151645, 151643),
    )
