"""Every default and check: what the model is (ModelConfig), how the engine runs (EngineConfig).

`ModelConfig.from_hf` is the only reader of Hugging Face's config.json. It takes no silent default:
a key that changes the results and is missing is an error.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from nanovllm_cli.core.errors import ModelError, UserError
from nanovllm_cli.core.model_files import Fields, read_json, shown
from nanovllm_cli.core.quantization import quantized, refuse_quantized_files
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
AttentionBackendName = Literal["auto", "triton", "flash-attn", "flash-attn-3", "torch"]

_DTYPES = ("float32", "bfloat16", "float16")
# Far above every dense Qwen3, and low enough that no size takes the machine's memory before the
# weights, which must have these shapes, are looked at.
_MAX_LAYERS = 1024
_MAX_HEADS = 1024
_MAX_HEAD_DIM = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 22
_MAX_CONTEXT = 1 << 22  # tokens; rotary tables of so many take 4 GiB at a head_dim of 256
_MAX_ROPE_NUMBER = 1e12


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
        """Return the config of the checkpoint in `path`; raises ModelError."""
        config = read_json(path / "config.json")
        refuse_quantized_files(path)
        generation = path / "generation_config.json"
        generation_config = read_json(generation) if os.path.lexists(generation) else {}
        return cls.from_hf(config, generation_config, directory=path)

    @classmethod
    def from_hf(
        cls,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        *,
        directory: Path = Path(),
    ) -> "ModelConfig":
        """From Hugging Face's dicts, in transformers 4's spelling or 5's; raises ModelError.

        directory: where they come from, for messages.
        """
        fields = Fields(str(directory / "config.json"), config)
        if fields.need("architectures") != ["Qwen3ForCausalLM"]:
            raise ModelError(
                f"{fields.where} names the architecture {shown(config['architectures'])}",
                "nanovllm runs dense Qwen3 models (Qwen3ForCausalLM), 0.6B to 32B.",
            )
        for key in ("quantization_config", "compression_config"):
            if config.get(key):
                raise quantized(fields.where, key, config[key])
        for key, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("use_sliding_window", False),
        ):
            # A 0 is not false in JSON, though it is to Python.
            if fields.need(key) != expected or type(config[key]) is not type(expected):
                raise ModelError(
                    f"{fields.where} has {key} = {shown(config[key])}; nanovllm runs "
                    f"{expected!r} only"
                )
        num_heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
        num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{fields.where} has num_key_value_heads = {num_kv_heads}; it must divide "
                f"num_attention_heads, {num_heads}"
            )
        head_dim = fields.integer("head_dim", 2, _MAX_HEAD_DIM)
        if head_dim % 2:
            raise fields.refused("head_dim", "even: rotary embeddings turn pairs of values")
        vocab_size = fields.integer("vocab_size", 1, _MAX_VOCABULARY)
        return cls(
            hidden_size=fields.integer("hidden_size", 1, _MAX_WIDTH),
            num_hidden_layers=fields.integer("num_hidden_layers", 1, _MAX_LAYERS),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size", 1, _MAX_WIDTH),
            vocab_size=vocab_size,
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
            max_position_embeddings=fields.integer("max_position_embeddings", 1, _MAX_CONTEXT),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            rope=_rope_config(fields),
            dtype=fields.one_of("dtype" if "dtype" in config else "torch_dtype", _DTYPES),
            eos_token_ids=_eos_token_ids(
                fields, Fields(str(directory / "generation_config.json"), generation_config)
            ),
        )


def _eos_token_ids(config: Fields, generation: Fields) -> tuple[int, ...]:
    """Those of generation_config.json, else of config.json.

    One outside the vocabulary can never be drawn, so it ends nothing and is left out: checkpoints
    whose vocabulary was cut down carry such ids.
    """
    key = "eos_token_id"
    fields = generation if key in generation.values else config
    value = fields.values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise fields.refused(key, "a token id or a list of them")
    vocab_size = config.values["vocab_size"]
    known = tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))
    if len(known) > MAX_STOP_TOKEN_IDS:
        raise fields.refused(key, f"at most {MAX_STOP_TOKEN_IDS} token ids")
    return known


def _rope_config(config: Fields) -> RopeConfig:
    """transformers 5 keeps rope in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    if "rope_parameters" in config.values:
        name = "rope_parameters"
        rope = config.values[name]
    else:
        name = "rope_scaling"
        rope = config.values.get(name)
        rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise config.refused(name, "an object")
    if name == "rope_scaling":
        rope = {**rope, "rope_theta": config.need("rope_theta")}
    rope = {key: value for key, value in rope.items() if value is not None}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    fields = Fields(f"{config.where}, {name},", rope)
    rope_type = fields.values.get("rope_type", "default")
    if rope_type not in ("default", "yarn"):
        raise ModelError(
            f"{config.where} has rope_type {shown(rope_type)}; known are default and yarn"
        )
    # Above 1: YaRN divides by its logarithm.
    theta = fields.number("rope_theta", 1.0, _MAX_ROPE_NUMBER)
    if rope_type == "default":
        return RopeConfig(rope_type="default", theta=theta)
    if not fields.has("factor"):
        raise ModelError(f"{config.where} has yarn without a factor")
    known = ("rope_theta", "type", *RopeConfig.__dataclass_fields__)
    if unknown := [key for key in rope if key not in known or key == "theta"]:
        raise ModelError(f"{config.where} has unknown rope parameters {shown(unknown)}")
    original = "original_max_position_embeddings"
    has_own = fields.has(original)
    optional: dict[str, Any] = {
        key: fields.number(key, 0.0, _MAX_ROPE_NUMBER)
        for key in ("attention_factor", "beta_fast", "beta_slow")
        if fields.has(key)
    }
    if fields.has("truncate"):
        optional["truncate"] = fields.flag("truncate")
    yarn = RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=fields.number("factor", 0.0, _MAX_CONTEXT),
        original_max_position_embeddings=fields.integer(original, 1, _MAX_CONTEXT)
        if has_own
        else config.integer("max_position_embeddings", 1, _MAX_CONTEXT),
        **optional,
    )
    if yarn.factor * yarn.original_max_position_embeddings > _MAX_CONTEXT:
        raise fields.refused("factor", f"such that {original} times it is at most {_MAX_CONTEXT}")
    return yarn


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
