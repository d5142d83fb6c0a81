"""What crosses the border between two processes comes out as it went in."""

from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_cli.core.messages import (
    decode_aborts,
    decode_outputs,
    decode_requests,
    encode_aborts,
    encode_outputs,
    encode_requests,
)
from nanovllm_cli.core.request import (
    Completion,
    Failure,
    FailureCode,
    FinishReason,
    Logprobs,
    NewTokens,
    Output,
    Request,
)
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.stats import EngineStats

int32 = st.integers(-(2**31), 2**31 - 1)
request_id = st.integers(0, 2**63 - 1)
count = st.integers(1, 2**64 - 1)
token_ids = st.lists(int32, max_size=30).map(lambda ids: np.array(ids, dtype=np.int32))

sampling_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.none() | count,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.none() | count,
    stop_token_ids=st.lists(int32, max_size=16).map(tuple),
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(int32, st.floats(-100, 100), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    bad_words=st.lists(st.lists(int32, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    thinking_budget=st.none() | st.integers(0, 2**70),
    end_think_token_id=st.integers(0, 2**31 - 1),
    grammar=st.none() | st.text(),
    grammar_after_token_id=st.none() | int32,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs_start=st.integers(1, 2**70),
)


@st.composite
def logprobs(draw: st.DrawFn) -> Logprobs:
    count, k = draw(st.integers(0, 4)), draw(st.integers(0, 3))

    def floats(size: int) -> list[float]:
        return draw(st.lists(st.floats(-1e4, 0, width=32), min_size=size, max_size=size))

    ids = draw(st.lists(int32, min_size=count * k, max_size=count * k))
    return Logprobs(
        values=np.array(floats(count), dtype=np.float32),
        top_ids=np.array(ids, dtype=np.int32).reshape(count, k),
        top_values=np.array(floats(count * k), dtype=np.float32).reshape(count, k),
    )


requests = st.builds(
    Request,
    request_id=request_id,
    prompt_token_ids=token_ids | st.lists(int32, max_size=30),
    sampling=sampling_params,
    reports_tokens=st.booleans(),
)
outputs: st.SearchStrategy[Output] = st.one_of(
    st.builds(
        Completion,
        request_id=request_id,
        token_ids=token_ids,
        finish_reason=st.sampled_from(get_args(FinishReason)),
        num_prompt_tokens=st.integers(0, 2**40),
        num_cached_tokens=st.integers(0, 2**40),
        logprobs=st.none() | logprobs(),
        prompt_logprobs=st.none() | logprobs(),
    ),
    st.builds(
        NewTokens,
        request_id=request_id,
        token_ids=token_ids,
        starts_anew=st.booleans(),
        logprobs=st.none() | logprobs(),
        prompt_logprobs=st.none() | logprobs(),
    ),
    st.builds(
        Failure,
        request_id=request_id,
        code=st.sampled_from(get_args(FailureCode)),
        message=st.text(st.characters(codec="utf-8")),
    ),
)
stats = st.builds(
    EngineStats,
    num_prompt_tokens=st.integers(0, 2**62),
    num_preemptions=st.integers(0, 2**62),
    prefill_seconds=st.floats(0, 1e9),
    decode_seconds=st.floats(0, 1e9),
)


def plain(value: Any) -> dict[str, Any]:
    """Its fields, arrays as lists, so that == compares them."""
    content = {field.name: getattr(value, field.name) for field in fields(value)}

    def plain_field(value: Any) -> Any:
        if isinstance(value, Logprobs):
            arrays = (value.values, value.top_ids, value.top_values)
            return {**plain(value), "dtypes": [(a.dtype.name, a.shape) for a in arrays]}
        return value.tolist() if isinstance(value, np.ndarray) else value

    return {"": type(value).__name__, **{k: plain_field(v) for k, v in content.items()}}


@given(st.lists(requests, max_size=8))
def test_requests_come_out_as_they_went_in(given: list[Request]) -> None:
    decoded = decode_requests(encode_requests(given))
    assert [plain(request) for request in decoded] == [plain(request) for request in given]


@given(st.lists(outputs, max_size=8), stats)
def test_outputs_and_stats_come_out_as_they_went_in(
    given: list[Output], given_stats: EngineStats
) -> None:
    decoded, decoded_stats = decode_outputs(encode_outputs(given, given_stats))
    assert [plain(output) for output in decoded] == [plain(output) for output in given]
    assert decoded_stats == given_stats


@given(st.lists(request_id, max_size=20))
def test_aborts_come_out_as_they_went_in(given: list[int]) -> None:
    assert decode_aborts(encode_aborts(given)) == given


def test_no_field_is_forgotten_on_the_way() -> None:
    # A field added to one of these needs a place in its record: the default must not come instead.
    values: dict[str, Any] = {
        "temperature": 0.3, "top_k": 5, "top_p": 0.4, "min_p": 0.1, "seed": 2**64 - 1,
        "max_tokens": 9, "min_tokens": 3, "stop_token_ids": (4, 5), "ignore_eos": True,
        "logit_bias": ((3, -1.5),), "bad_words": ((1,), (2, 3)), "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "thinking_budget": 0,
        "end_think_token_id": 8, "grammar": "root ::= 1", "grammar_after_token_id": 6,
        "logprobs": 0, "prompt_logprobs": 2, "prompt_logprobs_start": 4,
    }  # fmt: skip
    assert values.keys() == {field.name for field in fields(SamplingParams)}
    assert all(values[field.name] != field.default for field in fields(SamplingParams))
    request = Request(
        request_id=7,
        prompt_token_ids=[1, 2],
        sampling=SamplingParams(**values),
        reports_tokens=True,
    )
    [decoded] = decode_requests(encode_requests([request]))
    assert plain(decoded) == plain(request)
    assert len(fields(Request)) == 4

    numbered = EngineStats(**{f.name: f.type(i + 1) for i, f in enumerate(fields(EngineStats))})  # type: ignore[operator]
    assert decode_outputs(encode_outputs([], numbered)) == ([], numbered)


def test_settings_beyond_64_bits_mean_no_limit_as_they_do_in_the_engine() -> None:
    sampling = SamplingParams(max_tokens=10**30, min_tokens=10**29, top_k=10**25)
    request = Request(request_id=0, prompt_token_ids=[1], sampling=sampling)
    [decoded] = decode_requests(encode_requests([request]))
    assert decoded.sampling.max_tokens == decoded.sampling.top_k == 2**64 - 1


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, 2**70])
def test_a_token_id_that_is_no_int32_is_refused(wrong: int) -> None:
    request = Request(request_id=0, prompt_token_ids=[1, wrong], sampling=SamplingParams())
    with pytest.raises(OverflowError):
        encode_requests([request])


def test_a_decoded_request_does_not_hold_the_message_it_came_in() -> None:
    many = [
        Request(request_id=i, prompt_token_ids=[i] * 100, sampling=SamplingParams())
        for i in range(100)
    ]
    for request in decode_requests(encode_requests(many)):
        assert isinstance(request.prompt_token_ids, np.ndarray)
        assert request.prompt_token_ids.base is None
