"""The engine on a GPU, in fp32: the CPU's answers, and a row's answer whatever runs beside it."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Request

from .gpu_tests import (
    WAYS_TO_DRAW,
    answers,
    ask,
    differing,
    model_config,
    random_prompts,
    tiny_engine,
)

SAMPLE = Path(__file__).parent.parent / "sample_data"
ON_CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_BYTES = model_config().kv_bytes_per_token(4) * 16  # of tiny_engine

SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 1},
    {"max_num_seqs": 5, "max_window_steps": 1},
    {"max_num_batched_tokens": 17, "max_num_seqs": 8},
    {"enable_prefix_caching": False, "max_window_steps": 7},
    {"block_size": 64, "max_launches_in_flight": 3},
    {"kv_cache_bytes": 12 * BLOCK_BYTES, "max_num_seqs": 8},
    {"enforce_eager": True},
    {"sizes": {"num_key_value_heads": 1}},
    {"sizes": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128}},
]


def requests_of_every_kind() -> list[Request]:
    rng = random.Random(1)
    return [
        ask(i, prompt, max_tokens=rng.randint(5, 24), **WAYS_TO_DRAW[i % len(WAYS_TO_DRAW)])
        for i, prompt in enumerate(random_prompts(28, seed=1))
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_the_answers_are_the_cpus(device: str, settings: dict[str, Any]) -> None:
    cpu_settings = {"sizes": settings.get("sizes")}
    expected = answers(tiny_engine(device="cpu", **cpu_settings), requests_of_every_kind())
    defaults = {"device": device, "max_num_seqs": 32, "kv_cache_bytes": 200 * BLOCK_BYTES}
    actual = answers(tiny_engine(**{**defaults, **settings}), requests_of_every_kind())
    assert differing(actual, expected) == []


# A long run


@dataclass(frozen=True, kw_only=True)
class Soak:
    device: str
    num_requests: int
    num_prompts: int
    max_num_seqs: int
    num_blocks: int


@pytest.mark.parametrize(
    "soak",
    [
        pytest.param(
            Soak(device="cpu", num_requests=200, num_prompts=40, max_num_seqs=16, num_blocks=24),
            id="small-cpu",
        ),
        pytest.param(
            Soak(
                device="cuda",
                num_requests=20_000,
                num_prompts=2_000,
                max_num_seqs=256,
                num_blocks=500,
            ),
            id="20000-gpu",
            marks=pytest.mark.gpu,
        ),
    ],
)
def test_every_row_of_a_long_crowded_run_is_answered_as_it_is_alone(soak: Soak) -> None:
    prompts = random_prompts(soak.num_prompts)
    rng = random.Random(2)
    stops = [(), (), (9, 80, 81), tuple(range(40, 56))]
    kinds = [
        {"max_tokens": rng.choice((5, 60)), "stop_token_ids": rng.choice(stops), "temperature": 0.0}
        for _ in prompts
    ]
    alone = answers(
        tiny_engine(
            device=soak.device,
            max_num_seqs=1,
            enable_prefix_caching=False,
            max_window_steps=60,
            kv_cache_bytes=12 * BLOCK_BYTES,
        ),
        [ask(i, prompt, **kinds[i]) for i, prompt in enumerate(prompts)],
    )
    engine = tiny_engine(
        device=soak.device,
        max_num_seqs=soak.max_num_seqs,
        kv_cache_bytes=soak.num_blocks * BLOCK_BYTES,
    )
    drawn = [rng.randrange(soak.num_prompts) for _ in range(soak.num_requests)]
    together = answers(engine, [ask(i, prompts[n], **kinds[n]) for i, n in enumerate(drawn)])
    wrong = differing(together, {i: alone[n] for i, n in enumerate(drawn)})
    stats = engine.stats
    reasons = Counter(completion.finish_reason for completion in together.values())
    print(
        f"\n{len(wrong)} of {len(together)} rows differ; {stats.num_preemptions} preemptions, "
        f"{stats.num_cached_tokens} of {stats.num_prompt_tokens} prompt tokens cached, {reasons}"
    )
    assert wrong == []
    assert stats.num_preemptions > soak.num_requests // 200
    assert stats.num_cached_tokens > stats.num_prompt_tokens // 20
    assert min(reasons["stop"], reasons["length"]) > soak.num_requests // 20


# The sample model


def sample_requests(count: int) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "model")
    requests = []
    lines = (SAMPLE / "prompts.jsonl").read_text().splitlines()[:count]
    for i, row in enumerate(map(json.loads, lines)):
        if "messages" in row:
            tokens = tokenizer.apply_chat_template(
                row["messages"], add_generation_prompt=True, return_dict=False
            )
        else:
            tokens = row.get("prompt_token_ids") or tokenizer(row["prompt"])["input_ids"]
        requests.append(ask(i, tokens, temperature=0.0, max_tokens=48))
    return requests


def sample_answers(device: Any, requests: list[Request], **config: Any) -> dict[int, Completion]:
    settings = EngineConfig(device=device, dtype="float32", max_model_len=1024, **config)
    return answers(Engine.from_checkpoint(SAMPLE / "model", settings), requests)


@pytest.mark.parametrize(
    ("device", "count"), [("cpu", 24), pytest.param("cuda", 256, marks=pytest.mark.gpu)]
)
def test_the_sample_models_answers_are_the_cpus(device: str, count: int) -> None:
    requests = sample_requests(count)
    expected = sample_answers("cpu", requests)
    assert sum(completion.finish_reason == "stop" for completion in expected.values()) > count // 2
    actual = sample_answers(device, requests, max_num_seqs=64)
    assert differing(actual, expected) == []
