"""Our Qwen3 against transformers': teacher-forced at every position, and greedy."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.loader import load_weights
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.request import Completion, Failure, Request
from nanovllm_cli.core.sampling_params import SamplingParams

MakeCheckpoint = Callable[..., Path]
RunEngine = Callable[[Engine, Iterable[Request]], dict[int, Completion | Failure]]

SHAPES: list[dict[str, Any]] = [
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 80},
    {"num_hidden_layers": 1, "rms_norm_eps": 1e-2},
    {"num_hidden_layers": 4, "tie_word_embeddings": False},
    {"tie_word_embeddings": False, "max_shard_size": "30KB"},
    {"tie_word_embeddings": True, "max_shard_size": "30KB", "intermediate_size": 200},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: list[dict[str, Any]] = [
    YARN,
    {**YARN, "factor": 1.0},
    {**YARN, "factor": 2.5, "rope_theta": 1000000.0},
    {**YARN, "truncate": False},
    {**YARN, "attention_factor": 0.7},
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
    {**YARN, "truncate": False, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5},
    {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"},
]


def load(path: Path, **config: Any) -> tuple[Engine, Qwen3]:
    """An engine on one thread, and its model."""
    engine_config = EngineConfig(num_threads=1, **{"block_size": 16, **config})
    model = build_model(ModelConfig.from_directory(path), engine_config)
    load_weights(model, path)
    return Engine(model, engine_config), model


def our_logits(path: Path, prompts: Tensor, run_engine: RunEngine, **config: Any) -> Tensor:
    """Of every position, through the scheduler and the pages: [num_prompts, length, vocab]."""
    engine, model = load(path, **config)
    hidden: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        hidden.append(output.clone())

    with model.register_forward_hook(keep), torch.inference_mode():
        run_engine(
            engine,
            [
                Request(request_id=i, prompt_token_ids=p, sampling=SamplingParams(max_tokens=1))
                for i, p in enumerate(prompts.tolist())
            ],
        )
        packed = model.logits(torch.cat(hidden))
    return packed.view(*prompts.shape, -1)


def their_model(path: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def random_prompts(num_prompts: int, length: int, vocab_size: int = 160) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (num_prompts, length), generator=generator)


def assert_same_log_probabilities(
    path: Path, prompts: Tensor, run_engine: RunEngine, **config: Any
) -> None:
    """At every position, and the largest difference is at most the contract's."""
    with torch.inference_mode():
        theirs = their_model(path)(prompts).logits.log_softmax(dim=-1)
    ours = our_logits(path, prompts, run_engine, enable_prefix_caching=False, **config)
    assert theirs.std() > 0.3, "logits this flat would hide a mistake"
    assert (ours.log_softmax(dim=-1) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_position_has_the_log_probabilities_of_transformers(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    path = make_checkpoint(**shape)
    assert_same_log_probabilities(path, random_prompts(6, 40), run_engine)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_yarn_is_the_yarn_of_transformers(
    rope: dict[str, Any], make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    path = make_checkpoint(rope_parameters=rope, max_position_embeddings=256)
    assert_same_log_probabilities(path, random_prompts(2, 250), run_engine)


def test_64_sequences_of_64_tokens_have_the_log_probabilities_of_transformers(
    make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    path = make_checkpoint(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=1024,
    )
    assert_same_log_probabilities(path, random_prompts(64, 64, 1024), run_engine, block_size=64)


def test_a_prefill_in_chunks_has_the_log_probabilities_of_transformers(
    make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    prompts = random_prompts(5, 60)
    assert_same_log_probabilities(make_checkpoint(), prompts, run_engine, max_num_batched_tokens=17)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 1},
        {"rope_parameters": YARN, "max_position_embeddings": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_num_batched_tokens", [8192, 23])
def test_greedy_tokens_are_those_of_transformers_generate(
    shape: dict[str, Any],
    max_num_batched_tokens: int,
    make_checkpoint: MakeCheckpoint,
    run_engine: RunEngine,
) -> None:
    path = make_checkpoint(std=0.2, **shape)
    lengths = (1, 2, 15, 16, 17, 40, 64)
    prompts = [random_prompts(1, length)[0] for length in lengths]
    engine, _ = load(path, max_num_batched_tokens=max_num_batched_tokens)
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    outputs = run_engine(
        engine,
        [
            Request(request_id=i, prompt_token_ids=p.tolist(), sampling=greedy)
            for i, p in enumerate(prompts)
        ],
    )
    theirs = their_model(path)
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            generated = theirs.generate(
                prompt[None],
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=40,
            )
        output = outputs[i]
        assert isinstance(output, Completion)
        assert output.token_ids.tolist() == generated[0, len(prompt) :].tolist()


def test_greedy_stops_where_transformers_stops(
    make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    eos = [3, 17, 40, 41, 99, 120, 121, 122, 123, 159]
    path = make_checkpoint(std=0.2, eos=eos, tie_word_embeddings=False)
    prompts = random_prompts(12, 9)
    engine, _ = load(path)
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    outputs = run_engine(
        engine,
        [
            Request(request_id=i, prompt_token_ids=p.tolist(), sampling=greedy)
            for i, p in enumerate(prompts)
        ],
    )
    theirs = their_model(path)
    reasons = set()
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            generated = theirs.generate(
                prompt[None],
                attention_mask=torch.ones(1, 9, dtype=torch.int64),
                do_sample=False,
                max_new_tokens=40,
                pad_token_id=0,
            )
        output = outputs[i]
        assert isinstance(output, Completion)
        assert output.token_ids.tolist() == generated[0, 9:].tolist()
        reasons.add(output.finish_reason)
    assert "stop" in reasons


def test_half_precision_is_near_single(
    make_checkpoint: MakeCheckpoint, run_engine: RunEngine
) -> None:
    path = make_checkpoint()
    prompts = random_prompts(4, 40)
    single = our_logits(path, prompts, run_engine).log_softmax(dim=-1)
    for dtype, limit in (("bfloat16", 0.15), ("float16", 0.02)):
        half = our_logits(path, prompts, run_engine, dtype=dtype)
        assert half.dtype == getattr(torch, dtype)
        assert (half.float().log_softmax(dim=-1) - single).abs().max() < limit


def test_the_rotary_tables_reach_as_far_as_max_model_len(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(max_position_embeddings=300)
    for max_model_len, rows in ((None, 300), (33, 33)):
        _, model = load(path, max_model_len=max_model_len)
        assert model.rotary.cos.shape == model.rotary.sin.shape == (rows, 16)
        assert model.rotary.cos.dtype == torch.float32
