"""Log-probabilities of prompts and completions: transformers', and the same bits everywhere."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Failure, Logprobs, NewTokens, Request
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.kernels.logprobs import likeliest_reference

from .gpu_tests import answers, ask, model_config, random_prompts, tiny_engine
from .row_tests import (
    VOCAB_SIZE,
    WAYS_TO_ADJUST,
    assert_equal_completions,
    assert_equal_logprobs,
)

MakeCheckpoint = Callable[..., Path]
BLOCK_BYTES = model_config().kv_bytes_per_token(4) * 16  # of tiny_engine


def asking_requests(count: int = 30) -> list[Request]:
    """In every way; every fifth row asks for nothing."""
    rng = random.Random(3)
    made = []
    for i, prompt in enumerate(random_prompts(count, seed=3)):
        asked: dict[str, Any] = {"logprobs": rng.choice((None, 0, 1, 5, 20))}
        if rng.random() < 0.6:
            start = rng.choice((1, 1, 2, len(prompt) - 1, len(prompt), 17, 40))
            asked |= {"prompt_logprobs": rng.choice((0, 3, 20)), "prompt_logprobs_start": start}
            asked["prompt_logprobs_start"] = max(start, 1)
        if i % 4 == 0:
            asked |= WAYS_TO_ADJUST[i // 4 % len(WAYS_TO_ADJUST)]
        temperature = rng.choice((0.0, 1.0))
        settings = {"temperature": temperature, **(asked if i % 5 else {})}
        made.append(ask(i, prompt, max_tokens=rng.choice((1, 7, 60)), **settings))
    return made


def test_they_are_those_of_a_transformers_forward_pass(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(vocab_size=VOCAB_SIZE, std=0.3)
    engine = Engine.from_checkpoint(path, EngineConfig(block_size=16, num_threads=1))
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    requests = asking_requests()
    completions = answers(engine, requests)
    num_compared = 0
    for request in requests:
        completion, sampling = completions[request.request_id], request.sampling
        prompt = list(request.prompt_token_ids)
        tokens = prompt + completion.token_ids.tolist()
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
        for asked, k, first, last in (
            (completion.logprobs, sampling.logprobs, len(prompt), len(tokens)),
            (
                completion.prompt_logprobs,
                sampling.prompt_logprobs,
                sampling.prompt_logprobs_start,
                len(prompt),
            ),
        ):
            assert (asked is None) == (k is None)
            if asked is None or k is None:
                continue
            positions = range(first, last)
            assert asked.values.shape == (len(positions),)
            assert asked.top_ids.shape == asked.top_values.shape == (len(positions), k)
            for i, position in enumerate(positions):
                row = expected[position - 1]
                assert abs(asked.values[i] - row[tokens[position]]) < 1e-4
                top = row.topk(k)
                assert asked.top_ids[i].tolist() == top.indices.tolist()
                assert np.abs(asked.top_values[i] - top.values.numpy()).max(initial=0) < 1e-4
                num_compared += 1
    assert num_compared > 300


@pytest.fixture(scope="module")
def expected() -> dict[int, Completion]:
    """Every row alone in an engine that knows no prefix."""
    engine = tiny_engine(max_num_seqs=1, enable_prefix_caching=False, max_window_steps=60)
    return {key: c for r in asking_requests() for key, c in answers(engine, [r]).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_window_steps": 1},
        {"max_num_seqs": 4, "max_num_batched_tokens": 17},
        {"max_num_seqs": 8, "kv_cache_bytes": 10 * BLOCK_BYTES},
        {"max_launches_in_flight": 2, "max_window_steps": 5},
        {"enable_prefix_caching": False},
        {"num_threads": 2},
    ],
    ids=str,
)
def test_they_have_the_same_bits_alone_and_in_any_batch(
    settings: dict[str, Any], expected: dict[int, Completion]
) -> None:
    engine = tiny_engine(**{"max_num_seqs": 16, **settings})
    assert_equal_completions(answers(engine, asking_requests()), expected)
    if "kv_cache_bytes" in settings:
        assert engine.stats.num_preemptions > 0
    # Again: what the first pass left in the prefix cache serves only what comes before.
    assert_equal_completions(answers(engine, asking_requests()), expected)
    assert (engine.stats.num_cached_tokens > 0) == settings.get("enable_prefix_caching", True)


def test_a_prompts_logits_are_never_there_all_at_once(
    monkeypatch: pytest.MonkeyPatch, expected: dict[int, Completion]
) -> None:
    monkeypatch.setattr("nanovllm_cli.core.token_choice._ROWS_AT_A_TIME", {"cpu": 3})
    assert_equal_completions(answers(tiny_engine(max_num_seqs=16), asking_requests()), expected)


def test_the_prefix_cache_serves_what_comes_before_the_first_token_asked_for() -> None:
    engine = tiny_engine()
    tokens = random.Random(0).choices(range(VOCAB_SIZE), k=70)
    answers(engine, [ask(0, tokens, max_tokens=1)])
    cached = {}
    for start in (1, 16, 17, 33, 48, 49, 64, 65, 200):
        asked = ask(start, tokens, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
        [completion] = answers(engine, [asked]).values()
        cached[start] = completion.num_cached_tokens
        assert completion.prompt_logprobs is not None
        assert len(completion.prompt_logprobs.values) == max(len(tokens) - start, 0)
    assert cached == {1: 0, 16: 0, 17: 16, 33: 32, 48: 32, 49: 48, 64: 48, 65: 64, 200: 64}


def test_a_row_that_asks_publishes_its_blocks_for_others() -> None:
    engine = tiny_engine()
    tokens = list(range(50))
    answers(engine, [ask(0, tokens, max_tokens=1, prompt_logprobs=2)])
    [completion] = answers(engine, [ask(1, tokens, max_tokens=1)]).values()
    assert completion.num_cached_tokens == 48


def test_what_is_reported_on_the_way_is_what_comes_at_the_end() -> None:
    sampling = SamplingParams(max_tokens=20, logprobs=2, prompt_logprobs=3)
    request = Request(
        request_id=0, prompt_token_ids=list(range(40)), sampling=sampling, reports_tokens=True
    )
    engine = tiny_engine(max_window_steps=3, max_num_batched_tokens=16)
    assert engine.add(request) is None
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    *news, completion = outputs
    assert isinstance(completion, Completion)
    assert completion.logprobs is not None
    values, num_prompts = [], 0
    for new in news:
        assert isinstance(new, NewTokens)
        assert new.logprobs is not None
        assert len(new.logprobs.values) == len(new.token_ids)
        values += new.logprobs.values.tolist()
        num_prompts += new.prompt_logprobs is not None
    assert news[0].prompt_logprobs is not None
    assert_equal_logprobs(news[0].prompt_logprobs, completion.prompt_logprobs)
    assert num_prompts == 1, "they come with the first tokens"
    assert values == completion.logprobs.values[: len(values)].tolist()
    assert len(values) > 10


def test_they_are_of_the_models_own_logits() -> None:
    prompt = [4, 5, 6]
    plain, biased, early = (
        ask(0, prompt, max_tokens=1, logprobs=20, **{"temperature": 0.0, **changes})
        for changes in (
            {},
            {"logit_bias": ((8, 100.0),), "repetition_penalty": 2.0},
            {"stop_token_ids": (1,), "min_tokens": 1, "temperature": 1.0, "top_k": 5},
        )
    )
    engine = tiny_engine()
    [expected] = answers(engine, [plain]).values()
    [changed] = answers(engine, [biased]).values()
    [without_stops] = answers(engine, [early]).values()
    assert changed.token_ids.tolist() == [8]
    for completion in (changed, without_stops):
        assert completion.logprobs is not None
        assert expected.logprobs is not None
        assert np.array_equal(completion.logprobs.top_ids, expected.logprobs.top_ids)
        assert np.array_equal(completion.logprobs.top_values, expected.logprobs.top_values)
    assert changed.logprobs is not None
    assert changed.logprobs.values[0] < changed.logprobs.top_values[0, 0]


def test_of_equally_likely_tokens_the_lower_id_comes_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = torch.tensor([1, 0])
    normalizers, ids, values = likeliest_reference(logits, rows, 2)
    assert ids.tolist() == [[0, 1], [1, 2]]
    expected = logits.log_softmax(dim=-1)
    assert torch.allclose(values, torch.stack((expected[1, :2], expected[0, 1:3])))
    assert torch.allclose(normalizers, logits.logsumexp(dim=-1)[rows])
    assert likeliest_reference(logits, rows, 0)[1].shape == (2, 0)


def test_a_row_that_fails_gives_none_and_harms_no_other() -> None:
    engine = tiny_engine()
    more = ask(0, [1, 2], logprobs=5, max_tokens=2)
    assert isinstance(engine.add(ask(1, [1, VOCAB_SIZE], logprobs=5)), Failure)
    [completion] = answers(engine, [more]).values()
    assert isinstance(completion.logprobs, Logprobs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logprobs": -1},
        {"logprobs": 21},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": 1, "prompt_logprobs_start": 0},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        SamplingParams(**wrong)
