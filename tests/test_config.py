"""What config.json means, in both of its spellings, and which settings an engine takes."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Qwen3Config

from nanovllm_cli.core.config import Device, EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.errors import ModelError, UserError
from nanovllm_cli.core.resolved_config import resolve
from nanovllm_cli.core.sampling_params import SamplingParams

from .stand_in_gpus import stand_in_gpus

MakeCheckpoint = Callable[..., Path]

# As Qwen3-0.6B's config.json has it.
OLD_SPELLING: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
NEW_SPELLING: dict[str, Any] = {
    **{k: v for k, v in OLD_SPELLING.items() if not k.startswith(("rope", "torch"))},
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "dtype": "bfloat16",
    "transformers_version": "5.23.0",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


# ModelConfig


def test_both_spellings_mean_the_same() -> None:
    old, new = (ModelConfig.from_hf(config, {}) for config in (OLD_SPELLING, NEW_SPELLING))
    assert old == new
    assert old.rope == RopeConfig(rope_type="default", theta=1000000.0)
    assert (old.dtype, old.tie_word_embeddings, old.head_dim) == ("bfloat16", True, 128)


@pytest.mark.parametrize("config", [OLD_SPELLING, NEW_SPELLING], ids=["old", "new"])
def test_every_field_is_what_transformers_reads(config: dict[str, Any]) -> None:
    ours, theirs = ModelConfig.from_hf(config, {}), Qwen3Config(**config)
    for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings",
        "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.rope_type == theirs.rope_parameters["rope_type"]


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        without(YARN, "original_max_position_embeddings"),
        {**YARN, "attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "attention_factor": None, "beta_fast": None, "mscale": None},
    ],
    ids=str,
)
def test_yarn_is_read_in_both_spellings(scaling: dict[str, Any]) -> None:
    old = ModelConfig.from_hf({**OLD_SPELLING, "rope_scaling": scaling}, {}).rope
    new = ModelConfig.from_hf(
        {**NEW_SPELLING, "rope_parameters": {**scaling, "rope_theta": 1000000}}, {}
    ).rope
    typed = {"type": "yarn", **without(scaling, "rope_type")}  # older still
    older = ModelConfig.from_hf({**OLD_SPELLING, "rope_scaling": typed}, {}).rope
    assert old == new == older
    expected = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
    expected |= {key: value for key, value in scaling.items() if value is not None}
    expected.setdefault("original_max_position_embeddings", 40960)
    assert old == RopeConfig(theta=1000000.0, **expected)


def test_what_transformers_saves_is_what_we_read(make_checkpoint: MakeCheckpoint) -> None:
    rope = {**YARN, "rope_theta": 5000.0, "original_max_position_embeddings": 100}
    path = make_checkpoint(rope_parameters=rope, max_position_embeddings=400, dtype="bfloat16")
    config = ModelConfig.from_directory(path)
    assert config.rope == RopeConfig(
        rope_type="yarn", theta=5000.0, factor=4.0, original_max_position_embeddings=100
    )
    assert (config.hidden_size, config.head_dim, config.dtype) == (64, 32, "bfloat16")


# A key that changes the results has no default of ours.
NEEDED = [
    "architectures", "attention_bias", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "use_sliding_window",
    "vocab_size",
]  # fmt: skip


@pytest.mark.parametrize("key", [*NEEDED, "rope_theta", "torch_dtype"])
def test_a_key_missing_from_the_old_spelling_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"no '{key}'"):
        ModelConfig.from_hf(without(OLD_SPELLING, key), {})


@pytest.mark.parametrize("key", NEEDED)
def test_a_key_missing_from_the_new_spelling_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"no '{key}'"):
        ModelConfig.from_hf(without(NEW_SPELLING, key), {})


def test_rope_parameters_without_a_theta_are_an_error() -> None:
    config = {**NEW_SPELLING, "rope_parameters": {"rope_type": "default"}}
    with pytest.raises(ModelError, match="rope_theta"):
        ModelConfig.from_hf(config, {})


def test_rope_parameters_of_null_are_an_error() -> None:
    with pytest.raises(ModelError, match="rope"):
        ModelConfig.from_hf({**NEW_SPELLING, "rope_parameters": None}, {})


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "longrope", "llama3", "Yarn"])
def test_an_unknown_rope_type_is_named(rope_type: str) -> None:
    scaling = {"rope_type": rope_type, "factor": 2.0}
    for config in (
        {**OLD_SPELLING, "rope_scaling": scaling},
        {**NEW_SPELLING, "rope_parameters": {**scaling, "rope_theta": 1.0}},
    ):
        with pytest.raises(ModelError, match=f"'{rope_type}'"):
            ModelConfig.from_hf(config, {})


def test_yarn_without_a_factor_or_with_an_unknown_parameter_is_an_error() -> None:
    for scaling, words in (
        (without(YARN, "factor"), "without a factor"),
        ({**YARN, "factor": None}, "without a factor"),
        ({**YARN, "mscale": 0.7}, "'mscale'"),
        ({**YARN, "wavelength": 3}, "'wavelength'"),
    ):
        with pytest.raises(ModelError, match=words):
            ModelConfig.from_hf({**OLD_SPELLING, "rope_scaling": scaling}, {})


@pytest.mark.parametrize(
    "architectures", [["Qwen2ForCausalLM"], ["Qwen3MoeForCausalLM"], [], None, "Qwen3ForCausalLM"]
)
def test_another_architecture_is_named(architectures: object) -> None:
    with pytest.raises(ModelError, match=re.escape(str(architectures))) as caught:
        ModelConfig.from_hf({**OLD_SPELLING, "architectures": architectures}, {})
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("attention_bias", True), ("use_sliding_window", True)],
)
def test_what_we_do_not_compute_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"{key} = {value!r}"):
        ModelConfig.from_hf({**OLD_SPELLING, key: value}, {})


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ({"eos_token_id": [151645, 151643]}, 151645, (151645, 151643)),
        ({"eos_token_id": 7}, 151645, (7,)),
        ({}, 151645, (151645,)),
        ({}, [5, 6], (5, 6)),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": [3]}, None, (3,)),
        ({"eos_token_id": None}, None, ()),
        ({}, None, ()),
    ],
)
def test_eos_comes_from_the_generation_config_and_else_from_the_config(
    generation: dict[str, Any], own: object, expected: tuple[int, ...]
) -> None:
    config = {**OLD_SPELLING, "eos_token_id": own}
    assert ModelConfig.from_hf(config, generation).eos_token_ids == expected
    if own is None:
        config = without(config, "eos_token_id")
        assert ModelConfig.from_hf(config, generation).eos_token_ids == expected


def test_eos_ids_outside_the_vocabulary_end_nothing_and_are_left_out() -> None:
    config = {**OLD_SPELLING, "eos_token_id": [151936, 5, -1, 10**30, 151935, 5]}
    assert ModelConfig.from_hf(config, {}).eos_token_ids == (5, 151935)


@pytest.mark.parametrize("eos", [True, 1.0, "5", [5, None], [[5]], {"a": 5}, list(range(17))])
def test_eos_ids_that_are_none_are_named_with_their_file(eos: object) -> None:
    for given, file in (
        (({**OLD_SPELLING, "eos_token_id": eos}, {}), "config.json"),
        ((OLD_SPELLING, {"eos_token_id": eos}), "generation_config.json"),
    ):
        with pytest.raises(ModelError, match=f"{file} has eos_token_id"):
            ModelConfig.from_hf(*given, directory=Path("/m"))


SIZES = [
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size",
]  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [None, True, 0, -1, 2.0, "2", [2], 10**9, 10**30, float("nan")])
def test_a_size_of_a_wrong_type_or_range_is_named_with_what_is_expected(
    key: str, value: object
) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf({**OLD_SPELLING, key: value}, {}, directory=Path("/m"))
    for part in ("/m/config.json", key, str(value), "whole number"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rms_norm_eps", "1e-6", "a number"),
        ("rms_norm_eps", -1e-6, "a number"),
        ("rms_norm_eps", 0, "a number"),
        ("rms_norm_eps", float("nan"), "a number"),
        ("rms_norm_eps", True, "a number"),
        ("tie_word_embeddings", "false", "true or false"),
        ("tie_word_embeddings", None, "true or false"),
        ("attention_bias", 0, "False only"),
        ("torch_dtype", None, "one of float32"),
        ("torch_dtype", "float8_e4m3fn", "one of float32"),
        ("torch_dtype", ["bfloat16"], "one of float32"),
        ("head_dim", 127, "even"),
        ("num_key_value_heads", 3, "must divide num_attention_heads, 16"),
        ("num_key_value_heads", 32, "1 to 16"),
        ("rope_theta", 0, "a number above 1"),
        ("rope_theta", float("inf"), "a number above 1"),
        ("rope_theta", 10**400, "a number above 1"),
        ("rope_theta", "1e6", "a number above 1"),
        ("rope_scaling", False, "an object"),
        ("rope_scaling", [], "an object"),
        ("rope_scaling", {"rope_type": {}}, "rope_type"),
        ("rope_scaling", {**YARN, "factor": "4"}, "a number"),
        ("rope_scaling", {**YARN, "factor": -4}, "a number"),
        ("rope_scaling", {**YARN, "factor": 1e5}, "at most"),
        ("rope_scaling", {**YARN, "beta_fast": 0}, "a number"),
        ("rope_scaling", {**YARN, "truncate": 1}, "true or false"),
        ("rope_scaling", {**YARN, "original_max_position_embeddings": 2.5}, "whole number"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named_with_what_is_expected(
    key: str, value: object, words: str
) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf({**OLD_SPELLING, key: value}, {})
    assert words in caught.value.message
    assert "config.json" in caught.value.message
    assert len(caught.value.message) < 300


def test_a_directory_is_read_with_and_without_a_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_SPELLING))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (1, 2)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_a_config_that_is_no_json_object_is_named(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_SPELLING))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / name))):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "config.json"))):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_num_parameters_is_what_the_checkpoint_holds(
    is_tied: bool, layers: int, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(
        tie_word_embeddings=is_tied,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        hidden_size=48,
        intermediate_size=100,
    )
    tensors = load_file(path / "model.safetensors")
    config = ModelConfig.from_directory(path)
    assert config.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert config.kv_bytes_per_token(2) == layers * 2 * 1 * 64 * 2


def test_num_parameters_of_qwen3_0_6b_is_the_published_number() -> None:
    config = ModelConfig.from_hf(OLD_SPELLING, {})
    assert config.num_parameters == 596_049_920
    assert config.kv_bytes_per_token(2) == 114_688


# max_model_len


def test_max_model_len_is_at_most_what_the_model_was_made_for() -> None:
    config = ModelConfig.from_hf(OLD_SPELLING, {})
    assert resolve(EngineConfig(), config).max_model_len == 40960
    assert resolve(EngineConfig(max_model_len=100), config).max_model_len == 100
    assert resolve(EngineConfig(max_model_len=40960), config).max_model_len == 40960
    with pytest.raises(UserError, match=r"40961.*40960"):
        resolve(EngineConfig(max_model_len=40961), config)


def test_yarn_lengthens_the_model_by_its_factor() -> None:
    # Qwen3's own instructions add rope_scaling and leave max_position_embeddings at 40960.
    config = ModelConfig.from_hf({**OLD_SPELLING, "rope_scaling": YARN}, {})
    assert resolve(EngineConfig(max_model_len=100_000), config).max_model_len == 100_000
    with pytest.raises(UserError, match=r"131073.*131072"):
        resolve(EngineConfig(max_model_len=131_073), config)


# The machine


def test_a_machine_without_a_gpu_runs_on_its_cpu_and_refuses_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_gpus(monkeypatch)
    config = ModelConfig.from_hf(OLD_SPELLING, {})
    resolved = resolve(EngineConfig(), config)
    assert (resolved.device, resolved.dtype) == ("cpu", "float32")
    assert resolved.attention_backend is None
    with pytest.raises(UserError, match="no CUDA GPU"):
        resolve(EngineConfig(device="cuda"), config)


def test_a_gpu_is_taken_with_what_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch, "Stand-in")
    resolved = resolve(EngineConfig(), ModelConfig.from_hf(OLD_SPELLING, {}))
    assert (resolved.device, resolved.dtype) == ("cuda", "bfloat16")
    assert resolved.attention_backend == "triton"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_is_too_old_is_named_with_what_runs(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_gpus(monkeypatch, "Stand-in", capability=(7, 5))
    with pytest.raises(UserError, match=r"Stand-in is sm_75.*sm_80") as caught:
        resolve(EngineConfig(device=device), ModelConfig.from_hf(OLD_SPELLING, {}))
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch, "Stand-in", has_triton=False)
    with pytest.raises(UserError, match="no Triton") as caught:
        resolve(EngineConfig(device="cuda"), ModelConfig.from_hf(OLD_SPELLING, {}))
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint


def test_a_forced_attention_backend_is_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf(OLD_SPELLING, {})
    with pytest.raises(UserError, match=r"'triton'.*CPU"):
        resolve(EngineConfig(device="cpu", attention_backend="triton"), config)
    stand_in_gpus(monkeypatch, "Stand-in")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    with pytest.raises(UserError, match="not installed"):
        resolve(EngineConfig(attention_backend="flash-attn"), config)


# EngineConfig and SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int8"),
        ("dtype", "fp16"),
        ("attention_backend", "flash_attn"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", -1),
        ("block_size", 0),
        ("block_size", 24),
        ("block_size", 512),
        ("kv_cache_bytes", 0),
        ("max_window_steps", 0),
        ("num_threads", 0),
    ],
)
def test_a_setting_outside_its_range_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name) as caught:
        EngineConfig(**{name: value})
    assert str(value) in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_model_len": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_window_steps": 1},
        *({"block_size": size} for size in (16, 32, 64, 128, 256)),
        {"dtype": "float16", "device": "cpu"},
        *({"attention_backend": n} for n in ("triton", "flash-attn", "flash-attn-3", "torch")),
    ],
    ids=str,
)
def test_a_setting_within_its_range_is_taken(config: dict[str, Any]) -> None:
    EngineConfig(**config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
    ],
)
def test_a_sampling_parameter_outside_its_range_is_named_with_its_value(
    name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(str(value))}; it must be "):
        SamplingParams(**{name: value})


def test_min_tokens_is_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    SamplingParams(min_tokens=5)
    with pytest.raises(ValueError, match="min_tokens is 6"):
        SamplingParams(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 100.0, "top_k": 1, "top_p": 1e-9, "min_p": 1.0, "seed": 2**64 - 1},
        {"top_k": 10**9},
        {"max_tokens": 1, "min_tokens": 1},
    ],
    ids=str,
)
def test_a_sampling_parameter_within_its_range_is_taken(sampling: dict[str, Any]) -> None:
    SamplingParams(**sampling)
