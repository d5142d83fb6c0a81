"""Tensor parallelism on two GPUs: the answers of one, captured or not, and the end of a rank."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm_cli.core import gpu_runner
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.request import Request

from .cli import MODEL
from .gpu_tests import QWEN3_0_6B, ask, model_config
from .test_tensor_parallel import children_of, finish, until_gone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def answers(
    source: Path | ModelConfig, size: int, requests: list[Request], **more: Any
) -> tuple[dict[int, list[int]], str | None]:
    """The tokens of every request, and how sums were made."""
    engine = Engine.load(source, EngineConfig(tensor_parallel_size=size, device="cuda", **more))
    try:
        return finish(engine, requests), engine.all_reduce
    finally:
        engine.close()


def requests(count: int, max_tokens: int, **more: Any) -> list[Request]:
    """Half of them greedy, half drawn."""
    rng = random.Random(3)
    return [
        ask(
            i,
            [rng.randrange(1000) for _ in range(rng.randint(1, 90))],
            temperature=i % 2 * 0.8,
            max_tokens=max_tokens,
            **more,
        )
        for i in range(count)
    ]


def test_two_gpus_give_the_sample_models_answers_of_one() -> None:
    asked = requests(48, 40)
    more: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64}
    expected, _ = answers(MODEL, 1, asked, **more)
    tokens, all_reduce = answers(MODEL, 2, asked, **more)
    assert all_reduce in ("fused with residual and norm", "nccl")
    assert tokens == expected


def test_captured_steps_are_the_eager_ones_on_two_gpus() -> None:
    sizes = model_config(**{**QWEN3_0_6B, "num_hidden_layers": 6})
    asked = requests(37, 70, ignore_eos=True)
    more: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 48}
    captured, _ = answers(sizes, 2, asked, **more)
    assert answers(sizes, 2, asked, enforce_eager=True, **more)[0] == captured


def test_log_probabilities_of_two_gpus_are_near_those_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = gpu_runner.sample
    seen: list[Tensor] = []

    def recording_sample(logits: Tensor, *rest: Any, **columns: Any) -> Any:
        seen.append(logits.float().log_softmax(dim=-1).cpu())
        return sample(logits, *rest, **columns)

    sizes = model_config(**QWEN3_0_6B)
    asked = requests(64, 1)
    rows = []
    for size in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(gpu_runner, "sample", recording_sample)
            answers(sizes, size, asked, max_model_len=512, max_num_seqs=64, enforce_eager=True)
        rows.append(seen[-1])  # one prefill of all of them, after those that warm up
        seen.clear()
    one, two = rows
    assert one.shape == two.shape == (64, sizes.vocab_size)
    assert one.std() > 0.3, "logits this flat would hide a mistake"
    difference = (one - two).abs()
    print(f"differences: mean {difference.mean():.4f}, largest {difference.max():.4f}")
    assert difference.mean() < 0.01
    assert difference.max() < 0.15


def test_the_engine_ends_with_a_rank_and_starts_again() -> None:
    config = EngineConfig(
        tensor_parallel_size=2, device="cuda", dtype="float32", max_model_len=4096, max_num_seqs=64
    )
    asked = requests(16, 3000, ignore_eos=True)
    engine = EngineProcess(MODEL, config)
    try:
        engine.wait_until_ready()
        for request in asked:
            assert engine.add(request) is None
        while engine.stats.num_decode_steps < 100:
            assert not engine.step()
        [rank] = children_of(engine.pid)
        pids = [engine.pid, rank]
        os.kill(rank, signal.SIGKILL)
        until_gone(pids, 5.0)  # a context with much memory is not taken apart in a second
        after = finish(engine)
        assert engine.num_restarts == 1
        assert after == finish(engine, asked)
    finally:
        engine.close()
