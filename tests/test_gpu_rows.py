"""What rows ask of their tokens on a GPU: the CPU's answers, and what each of it costs.

test_half_steps.py drives a GPU's runner as it does a CPU's.
"""

import time
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm_cli.core.batch import RowNeeds
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.loader import load_random_weights
from nanovllm_cli.core.parallel import ALONE
from nanovllm_cli.core.request import Completion, Request
from nanovllm_cli.core.row_needs import adjustment_of
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.core.token_choice import DeviceNeeds, TokenChoice, unpack

from .gpu_tests import QWEN3_0_6B, answers, ask, differing, model_config, tiny_engine
from .row_tests import WAYS_TO_ADJUST, adjusted_reference, adjusted_requests
from .test_half_steps import admit, ints
from .test_logprobs import asking_requests

ON_CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_BYTES = model_config().kv_bytes_per_token(4) * 16  # of tiny_engine


def requests_of_every_kind() -> list[Request]:
    adjusted = adjusted_requests()
    return [*adjusted, *(ask_again(r, len(adjusted)) for r in asking_requests())]


def ask_again(request: Request, offset: int) -> Request:
    return Request(
        request_id=request.request_id + offset,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
    )


def assert_near(actual: dict[int, Completion], expected: dict[int, Completion]) -> None:
    """Equal tokens; log-probabilities within rounding."""
    assert differing(actual, expected) == []
    for key, completion in expected.items():
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(actual[key], name), getattr(completion, name)
            assert (ours is None) == (theirs is None)
            if theirs is None:
                continue
            assert ours.top_ids.shape == theirs.top_ids.shape
            assert np.abs(ours.values - theirs.values).max(initial=0) < 1e-3
            assert np.abs(ours.top_values - theirs.top_values).max(initial=0) < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_window_steps": 1},
        {"enforce_eager": True, "max_window_steps": 7},
        {"max_num_batched_tokens": 17, "max_num_seqs": 8},
        {"max_num_seqs": 8, "kv_cache_bytes": 10 * BLOCK_BYTES},
        {"max_launches_in_flight": 3, "enable_prefix_caching": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_the_answers_are_the_cpus(device: str, settings: dict[str, Any]) -> None:
    expected = answers(tiny_engine(device="cpu"), requests_of_every_kind())
    defaults = {"device": device, "max_num_seqs": 32, "kv_cache_bytes": 200 * BLOCK_BYTES}
    engine = tiny_engine(**{**defaults, **settings})
    assert_near(answers(engine, requests_of_every_kind()), expected)
    # Once more, in slots that have been used and with graphs that are there.
    assert_near(answers(engine, requests_of_every_kind()), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_size", [160, 151936])
@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_logits_are_adjusted_in_fp32_whatever_their_dtype(
    device: str, vocab_size: int, dtype: str
) -> None:
    if device == "cpu" and vocab_size > 160:
        pytest.skip("slow, and no other code")
    table = SlotTable(32, 4, torch.device(device))
    table.is_finished[:] = False
    choice = TokenChoice(table, vocab_size, ALONE)
    sequences = []
    for slot, way in enumerate(WAYS_TO_ADJUST):
        sequence = Sequence(ask(slot, [slot, 3, 7, 8, 40, vocab_size - 1], **way), 200, ())
        sequence.append(ints([7, 7, 8, 99, 40, vocab_size - 2][: slot % 7]))
        sequences.append(sequence)
        table.length[slot] = sequence.num_tokens
    count = len(sequences)
    choice.admit(
        tuple(admit(i, adjustment=adjustment_of(sequence)) for i, sequence in enumerate(sequences))
    )
    rows = ints(list(range(1, count + 1)))  # row 0 asks for nothing
    needs = DeviceNeeds.of(
        RowNeeds(adjusted_rows=rows, logprob_rows=ints([0, 2]), num_logprobs=5), table
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count + 1, vocab_size, generator=generator).mul(4)
    logits = logits.to(getattr(torch, dtype))
    slots = torch.arange(-1, count, device=device).to(table.length.dtype) % 32
    seen = []

    def draw(adjusted: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(adjusted.cpu())
        return adjusted.argmax(dim=-1).int(), torch.zeros(len(adjusted), dtype=torch.bool)

    tokens, _, packed = choice.choose(logits.to(device), slots, needs, draw)
    [adjusted] = seen
    assert adjusted.dtype == torch.float32
    assert torch.equal(adjusted[0], logits[0].float())
    for row, sequence in enumerate(sequences, start=1):
        prompt = sequence.token_ids[: sequence.num_prompt_tokens].tolist()
        completion = sequence.completion_token_ids.tolist()
        sampling = sequence.request.sampling
        expected = adjusted_reference(logits[row], prompt, completion, sampling)
        assert torch.equal(adjusted[row].isinf(), expected.isinf()), sampling
        finite = expected.isfinite()
        assert (adjusted[row][finite] - expected[finite]).abs().max() < 1e-4, sampling
    assert packed is not None
    logprobs = unpack(packed.cpu().numpy())
    wide = logits.double().log_softmax(dim=-1)
    for i, row in enumerate((0, 2)):
        assert abs(logprobs.values[i] - wide[row, tokens[row]]) < 1e-4
        top = wide[row].topk(5)
        assert np.abs(logprobs.top_values[i] - top.values.numpy()).max() < 1e-4
        assert np.abs(wide[row, logprobs.top_ids[i]].numpy() - top.values.numpy()).max() < 1e-4


@pytest.mark.gpu
def test_rows_that_ask_for_nothing_replay_the_steps_they_always_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no row asks for anything")

    engine = tiny_engine(device="cuda", kv_cache_bytes=200 * BLOCK_BYTES)
    plain = [ask(i, [i, 2, 3], max_tokens=20) for i in range(20)]
    expected = answers(engine, plain)
    answers(engine, requests_of_every_kind())
    monkeypatch.setattr("nanovllm_cli.core.token_choice.TokenChoice.choose", refuse)
    monkeypatch.setattr("nanovllm_cli.core.gpu_runner.GpuRunner._forward", refuse)
    assert differing(answers(engine, plain), expected) == []


# What it costs

COSTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "bias and bad words": {
        "logit_bias": tuple((i, 1.0) for i in range(150)),
        "bad_words": tuple((i, i + 1, i + 2) for i in range(64)),
    },
    "thinking budget": {"thinking_budget": 1000, "end_think_token_id": 5},
    "logprobs 0": {"logprobs": 0},
    "logprobs 20": {"logprobs": 20},
    "all of it": {
        "repetition_penalty": 1.1, "logit_bias": ((1, 1.0),), "bad_words": ((1, 2),),
        "thinking_budget": 1000, "end_think_token_id": 5, "logprobs": 20,
    },
}  # fmt: skip


def seconds_for(engine: Engine, batch_size: int, num_tokens: int, **asked: Any) -> float:
    requests = [
        ask(i, [i, *range(100)], max_tokens=num_tokens, ignore_eos=True, **asked)
        for i in range(batch_size)
    ]
    start = time.perf_counter()
    answers(engine, requests)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("device", "batch_size", "num_tokens"),
    [("cpu", 4, 3), pytest.param("cuda", 256, 256, marks=pytest.mark.gpu)],
)
def test_what_decode_windows_cost(device: str, batch_size: int, num_tokens: int) -> None:
    is_gpu = device == "cuda"
    sizes = model_config(**(QWEN3_0_6B if is_gpu else {}))
    config = EngineConfig(
        device=device,  # type: ignore[arg-type]
        dtype="bfloat16" if is_gpu else "float32",
        max_model_len=1024 if is_gpu else 256,
        max_num_seqs=batch_size,
    )
    model = build_model(sizes, config)
    load_random_weights(model)
    engine = Engine(model, config)
    print()
    plain = 0.0
    for name, asked in {**COSTS, "nothing again": {}}.items():
        seconds_for(engine, batch_size, 40 if is_gpu else 1, **asked)  # captures and compiles
        seconds = min(seconds_for(engine, batch_size, num_tokens, **asked) for _ in range(2))
        plain = plain or seconds
        rate = batch_size * num_tokens / seconds
        print(f"{name:20} {rate:9.0f} tokens/s, {seconds / plain - 1:+7.1%}")
    for k in (0, 20):
        start = time.perf_counter()
        prompts = [
            ask(i, [i, *range(100)] * 2, max_tokens=1, prompt_logprobs=k) for i in range(batch_size)
        ]
        answers(engine, prompts)
        rate = batch_size * 202 / (time.perf_counter() - start)
        print(f"prompt_logprobs {k:<4} {rate:9.0f} prompt tokens/s")
