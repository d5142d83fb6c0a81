"""Every default and check: what the model is (ModelConfig), how the engine runs (EngineConfig).

`ModelConfig.from_hf` is the only reader of Hugging Face's config.json. It takes no silent default:
a key that changes the results and is missing is an error.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from nanovllm_cli.core.errors import ModelError, UserError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
AttentionBackendName = Literal["auto", "triton", "flash-attn", "flash-attn-3", "torch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding; every field below `theta` is YaRN's.

    YaRN: Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """

    rope_type: Literal["default", "yarn"]
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None  # on cos and sin; None: from the factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense Qwen3, as its config.json and generation_config.json describe it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: str  # the checkpoint's
    eos_token_ids: tuple[int, ...] = ()

    @property
    def max_context(self) -> int:
        """The longest sequence. YaRN is added to Qwen3 without a new max_position_embeddings."""
        stretched = int(self.rope.factor * self.rope.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def num_parameters(self) -> int:
        """Weights in all, the tied embedding counted once."""
        attention = (self.num_attention_heads + self.num_key_value_heads) * 2 * self.head_dim
        layer = self.hidden_size * (attention + 3 * self.intermediate_size)
        norms = self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim) + self.hidden_size
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embedding + norms

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token holds over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def part(self, num_ranks: int) -> "ModelConfig":
        """Return the sizes of what each of `num_ranks` ranks holds of the model."""
        if num_ranks == 1:
            return self
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // num_ranks,
            num_key_value_heads=max(self.num_key_value_heads // num_ranks, 1),
            intermediate_size=self.intermediate_size // num_ranks,
            vocab_size=-(-self.vocab_size // num_ranks),
        )

    @classmethod
    def of(cls, source: "Path | ModelConfig") -> "ModelConfig":
        """Return the config of the checkpoint in a directory, or the one given."""
        return source if isinstance(source, ModelConfig) else cls.from_directory(source)

    @classmethod
    def from_directory(cls, path: Path) -> "ModelConfig":
        """The config of the checkpoint in `path`; raises ModelError."""
        generation = path / "generation_config.json"
        generation_config = _read_json(generation) if generation.exists() else {}
        return cls.from_hf(_read_json(path / "config.json"), generation_config)

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation_config: dict[str, Any]) -> "ModelConfig":
        """From Hugging Face's dicts, in transformers 4's spelling or 5's; raises ModelError."""

        def need(key: str) -> Any:
            if key not in config:
                raise ModelError(f"config.json has no {key!r}", "Is the checkpoint whole?")
            return config[key]

        if need("architectures") != ["Qwen3ForCausalLM"]:
            raise ModelError(
                f"config.json names the architecture {config['architectures']}",
                "nanovllm runs dense Qwen3 models (Qwen3ForCausalLM), 0.6B to 32B.",
            )
        for key, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("use_sliding_window", False),
        ):
            if need(key) != expected:
                raise ModelError(
                    f"config.json has {key} = {config[key]!r}; nanovllm runs {expected!r} only"
                )
        eos = generation_config.get("eos_token_id", config.get("eos_token_id"))
        return cls(
            hidden_size=need("hidden_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=need("num_attention_heads"),
            num_key_value_heads=need("num_key_value_heads"),
            head_dim=need("head_dim"),
            intermediate_size=need("intermediate_size"),
            vocab_size=need("vocab_size"),
            rms_norm_eps=need("rms_norm_eps"),
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=need("tie_word_embeddings"),
            rope=_rope_config(config, need),
            dtype=config["dtype"] if "dtype" in config else need("torch_dtype"),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )


def _rope_config(config: dict[str, Any], need: Any) -> RopeConfig:
    """transformers 5 keeps rope in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    if "rope_parameters" in config:
        if not isinstance(config["rope_parameters"], dict):
            raise ModelError(f"config.json has rope_parameters {config['rope_parameters']!r}")
        rope = dict(config["rope_parameters"])
    else:
        rope = dict(config.get("rope_scaling") or {}, rope_theta=need("rope_theta"))
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if "rope_theta" not in rope:
        raise ModelError("config.json has no rope_theta in rope_parameters")
    theta = float(rope.pop("rope_theta"))
    if rope_type == "default":
        return RopeConfig(rope_type="default", theta=theta)
    if rope_type != "yarn":
        raise ModelError(f"config.json has rope_type {rope_type!r}; known are default and yarn")
    original = rope.pop("original_max_position_embeddings", need("max_position_embeddings"))
    optional = ("attention_factor", "beta_fast", "beta_slow", "truncate")
    fields = {key: rope.pop(key) for key in optional if rope.get(key) is not None}
    factor = rope.pop("factor", None)
    unknown = [key for key, value in rope.items() if value is not None]
    if unknown or factor is None:
        what = f"unknown rope parameters {unknown}" if unknown else "yarn without a factor"
        raise ModelError(f"config.json has {what}")
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=float(factor),
        original_max_position_embeddings=original,
        **fields,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "Is the checkpoint whole?") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the engine runs. None means: chosen for machine and model at start."""

    device: Device = "auto"  # a GPU where there is one
    dtype: DType = "auto"  # bfloat16 on a GPU, float32 on a CPU
    tensor_parallel_size: int = 1  # ranks, a GPU each
    max_model_len: int | None = None  # None: what the model was made for
    max_num_seqs: int | None = None  # None: 256 on a CPU, 1024 on a GPU
    max_num_batched_tokens: int | None = None  # None: 8192 on a CPU, 16384 on a GPU
    block_size: int = 64
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no captured steps on a GPU
    attention_backend: AttentionBackendName = "auto"  # of prefills on a GPU; auto: the best
    max_window_steps: int | None = None  # decode steps a launch; None: 1 on a CPU, 32 on a GPU
    max_launches_in_flight: int | None = None  # not yet read; None: 0 on a CPU, 1 on a GPU
    num_threads: int | None = None  # on a CPU; None: one for each core
    hash_bits: int = 64  # of a prefix hash; small ones only to test collisions
    tokenizer_path: str | None = None  # a directory, for grammars; None: the checkpoint's

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("device", self.device, get_args(Device)),
            ("dtype", self.dtype, get_args(DType)),
            ("attention_backend", self.attention_backend, get_args(AttentionBackendName)),
        ):
            if value not in choices:
                raise UserError(f"{name} is {value!r}", f"Choose one of {', '.join(choices)}.")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes",
                     "max_window_steps", "num_threads", "tensor_parallel_size"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0, at "
                "most 1"
            )
        if self.block_size not in (16, 32, 64, 128, 256):
            raise UserError(f"block_size is {self.block_size}", "Choose 16, 32, 64, 128 or 256.")
