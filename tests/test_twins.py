"""Several samples of one prompt: it is computed once, and each is what it is alone."""

from typing import Any

import numpy as np
import pytest

from nanovllm_cli.core.batch import Batch, PrefillBatch
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Request

from .gpu_tests import answers, ask, differing, model_config, random_prompts, tiny_engine
from .row_tests import WAYS_TO_ADJUST, assert_equal_completions

ON_CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_BYTES = model_config().kv_bytes_per_token(4) * 16  # of tiny_engine
NUM_SAMPLES = 5


def samples(num_prompts: int = 9) -> list[Request]:
    """Several rows of each prompt, of every length about a block's; each asks what it will."""
    made: list[Request] = []
    for i, prompt in enumerate(random_prompts(num_prompts, seed=7)):
        for _ in range(NUM_SAMPLES):
            number = len(made)
            asked: dict[str, Any] = {}
            if number % 3 == 1:
                asked = WAYS_TO_ADJUST[number // 3 % len(WAYS_TO_ADJUST)]
            elif number % 3 == 2:
                asked = {"logprobs": 3}
            if number % 10 == 9:
                asked = {**asked, "prompt_logprobs": 2}
            made.append(ask(number, prompt, max_tokens=1 if i == 0 else 12 + number % 20, **asked))
    return made


@pytest.fixture(scope="module")
def expected() -> dict[int, Completion]:
    engine = tiny_engine(device="cpu", max_num_seqs=1, enable_prefix_caching=False)
    return {key: c for r in samples() for key, c in answers(engine, [r]).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 17, "max_window_steps": 3},
        {"max_num_seqs": 3},
        {"kv_cache_bytes": 10 * BLOCK_BYTES, "max_num_seqs": 8},
        {"max_launches_in_flight": 3},
    ],
    ids=str,
)
def test_a_sample_is_what_it_is_alone(
    settings: dict[str, Any], expected: dict[int, Completion]
) -> None:
    engine = tiny_engine(device="cpu", **{"max_num_seqs": 16, **settings})
    assert_equal_completions(answers(engine, samples()), expected)


@pytest.mark.parametrize("device", ON_CPU_AND_GPU)
def test_the_tokens_are_the_cpus(device: str, expected: dict[int, Completion]) -> None:
    engine = tiny_engine(device=device, max_num_seqs=16, kv_cache_bytes=200 * BLOCK_BYTES)
    assert differing(answers(engine, samples()), expected) == []


def prefilled_tokens(engine: Engine, requests: list[Request]) -> list[int]:
    """Tokens of each prefill that their answers take."""
    sizes: list[int] = []
    launch = engine._runner.launch

    def counting_launch(batch: Batch) -> Any:
        if isinstance(batch, PrefillBatch):
            sizes.append(len(batch.token_ids))
        return launch(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "launch", counting_launch)
        answers(engine, requests)
    return sizes


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64])
def test_a_prompt_is_computed_once_for_all_its_samples(length: int) -> None:
    prompt = np.random.default_rng(0).integers(0, 160, length).tolist()
    many = [ask(i, prompt, max_tokens=3) for i in range(8)]
    assert prefilled_tokens(tiny_engine(max_num_seqs=8), many) == [length]
    off = tiny_engine(max_num_seqs=8, enable_prefix_caching=False)
    assert prefilled_tokens(off, many) == [8 * length]
