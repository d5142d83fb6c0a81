"""What the tests on a GPU share: random models made on the device, requests, and engines' answers.

Most of these tests run on a CPU too, in a small size that shows that the test itself is right; what
is marked `gpu` runs with: pytest -m gpu.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm_cli.core.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.request import Completion, Output, Request
from nanovllm_cli.core.sampling_params import SamplingParams

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 96,
    "vocab_size": 160,
    "max_position_embeddings": 512,
}
QWEN3_0_6B: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def model_config(**sizes: Any) -> ModelConfig:
    """Those of TINY where nothing else is said."""
    defaults = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope": RopeConfig(rope_type="default", theta=10000.0),
        "dtype": "bfloat16",
    }
    return ModelConfig(**{**TINY, **defaults, **sizes})


def random_model(sizes: ModelConfig, config: EngineConfig, *, std: float = 0.3) -> Qwen3:
    """Random weights, the same on every device."""
    model = build_model(sizes, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, dtype=torch.float32, generator=generator) * std
        parameter.copy_(values + 1.0 if name.endswith("norm.weight") else values)
    return model


def tiny_engine(*, sizes: dict[str, Any] | None = None, **config: Any) -> Engine:
    """An engine of a tiny random model, in fp32 and with blocks of 16 if nothing else is said."""
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": 16, "num_threads": 1}
    engine_config = EngineConfig(**{**defaults, **config})
    return Engine(random_model(model_config(**(sizes or {})), engine_config), engine_config)


class HiddenStates:
    """The last hidden states that a model gave for each number of rows.

    A captured step writes them anew at every replay: into the tensor that its capture gave.
    """

    def __init__(self, model: Qwen3) -> None:
        self.by_rows: dict[int, Tensor] = {}
        model.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: object, output: Tensor) -> None:
        self.by_rows[len(output)] = output


WAYS_TO_DRAW: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.5},
    {"temperature": 3.0, "min_p": 0.1},
    {"temperature": 0.0, "stop_token_ids": (9, 80, 81)},
    {"temperature": 2.0, "stop_token_ids": tuple(range(12)), "min_tokens": 5},
]


def random_prompts(count: int, *, seed: int = 0, longest: int = 70) -> list[list[int]]:
    """Of 1 to `longest` tokens, many with one of three beginnings."""
    rng = random.Random(seed)
    stems = [[rng.randrange(160) for _ in range(longest - 6)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        length = rng.choice((1, 2, 15, 16, 17, 32, 33, 48, rng.randint(1, longest - 6)))
        tail = [rng.randrange(160) for _ in range(rng.choice((0, 1, 6)))]
        prompts.append(rng.choice(stems)[:length] + tail)
    return prompts


def answers(engine: Engine, requests: Iterable[Request]) -> dict[int, Completion]:
    """Every request's completion; none may fail."""
    for request in requests:
        failure = engine.add(request)
        assert failure is None, failure
    ended: dict[int, Completion] = {}
    while engine.has_work:
        for output in engine.step():
            _take(output, ended)
    return ended


def _take(output: Output, ended: dict[int, Completion]) -> None:
    assert isinstance(output, Completion), output
    assert output.request_id not in ended, "it ended twice"
    ended[output.request_id] = output


def ask(request_id: int, prompt: Sequence[int], **sampling: Any) -> Request:
    """A request with its id for a seed."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"seed": request_id, **sampling}),
    )


def differing(
    actual: dict[int, Completion], expected: dict[int, Completion]
) -> list[tuple[int, list[int], list[int]]]:
    """(request id, its tokens, those expected) of every request that is answered otherwise."""
    assert actual.keys() == expected.keys()
    return [
        (key, completion.token_ids.tolist(), expected[key].token_ids.tolist())
        for key, completion in actual.items()
        if completion.token_ids.tolist() != expected[key].token_ids.tolist()
        or completion.finish_reason != expected[key].finish_reason
    ]
