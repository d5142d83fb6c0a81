"""What the engine's process and its parent say to each other, as bytes and back.

Requests and outputs travel many to a message, little-endian: the counts, a record of fixed layout
each, then the token ids of all of them (int32), then what only some have: of a request the settings
that few rows set, as JSON; of an output its text, or its log-probabilities (int32 and float32).
What is said once (start, ready, error) is JSON. Nothing is pickled: a message can hold data and
nothing else.
"""

import json
import struct
from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import astuple, fields
from enum import IntEnum
from typing import Any, get_args

import numpy as np

from nanovllm_cli.core.request import (
    Completion,
    Failure,
    FailureCode,
    FinishReason,
    Logprobs,
    NewTokens,
    Output,
    Request,
    TokenIds,
)
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.stats import EngineStats


class Kind(IntEnum):
    """What a message is; the first three go to the engine, the others come from it."""

    START = 0  # JSON
    REQUESTS = 1
    ABORTS = 2
    READY = 3  # JSON
    OUTPUTS = 4  # with the engine's stats
    ERROR = 5  # JSON; the last message


class _OutputKind(IntEnum):
    COMPLETION = 0
    NEW_TOKENS = 1
    FAILURE = 2


_COUNTS = struct.Struct("<qq")  # records, token ids
# request_id, seed, temperature, top_p, min_p, top_k, max_tokens (0: None), min_tokens,
# number of prompt token ids, number of stop token ids, bytes of JSON, ignore_eos, reports_tokens
_REQUEST = struct.Struct("<qQdddQQQqii??xx")
_IN_RECORD = (
    "seed", "temperature", "top_p", "min_p", "top_k", "max_tokens", "min_tokens", "stop_token_ids",
    "ignore_eos",
)  # fmt: skip
_SELDOM_SET = [field for field in fields(SamplingParams) if field.name not in _IN_RECORD]
# request_id, its kind, which finish reason or failure code or whether it starts anew, number of
# token ids or bytes of text, num_prompt_tokens, num_cached_tokens; of the log-probabilities and of
# the prompt's, how many tokens have one and how many likeliest ones (-1: there are none)
_OUTPUT = struct.Struct("<qiiqqqqiqi")
_STATS = struct.Struct("<" + "".join("d" if f.type is float else "q" for f in fields(EngineStats)))

_FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_FAILURE_CODES: tuple[FailureCode, ...] = get_args(FailureCode)
_NO_LIMIT = 2**64 - 1


def encode_json(content: dict[str, Any]) -> bytes:
    """A message that is said once."""
    return json.dumps(content).encode()


def decode_json(payload: bytes) -> dict[str, Any]:
    """What `encode_json` was given, tuples as lists."""
    content: dict[str, Any] = json.loads(payload)
    return content


def to_token_ids(token_ids: Seq[int] | TokenIds) -> TokenIds:
    """As int32; raises OverflowError for one that is none."""
    if isinstance(token_ids, np.ndarray):
        return token_ids.astype(np.int32, copy=False)
    return np.frombuffer(array("i", token_ids), dtype=np.int32)


def encode_requests(requests: Seq[Request]) -> bytes:
    """Raises OverflowError for a token id that is no int32."""
    records, token_ids, texts = [], [], []
    for request in requests:
        sampling = request.sampling
        seldom = {
            field.name: value
            for field in _SELDOM_SET
            if (value := getattr(sampling, field.name)) != field.default
        }
        texts.append(json.dumps(seldom).encode() if seldom else b"")
        token_ids += [
            to_token_ids(request.prompt_token_ids),
            to_token_ids(sampling.stop_token_ids),
        ]
        records.append(
            _REQUEST.pack(
                request.request_id,
                sampling.seed,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                min(sampling.top_k or 0, _NO_LIMIT),
                min(sampling.max_tokens or 0, _NO_LIMIT),
                min(sampling.min_tokens, _NO_LIMIT),
                len(request.prompt_token_ids),
                len(sampling.stop_token_ids),
                len(texts[-1]),
                sampling.ignore_eos,
                request.reports_tokens,
            )
        )
    return _join(records, token_ids, texts)


def decode_requests(payload: bytes) -> list[Request]:
    """Each with token ids of its own: the payload is not kept for the last one to finish."""
    records, token_ids, texts = _split(payload, _REQUEST)
    requests = []
    start = text_start = 0
    for (
        request_id, seed, temperature, top_p, min_p, top_k, max_tokens, min_tokens,
        num_prompt, num_stop, num_bytes, ignore_eos, reports_tokens,
    ) in records:  # fmt: skip
        prompt_end = start + num_prompt
        text, text_start = texts[text_start : text_start + num_bytes], text_start + num_bytes
        requests.append(
            Request(
                request_id=request_id,
                prompt_token_ids=token_ids[start:prompt_end].copy(),
                sampling=SamplingParams(
                    temperature=temperature,
                    top_k=top_k or None,
                    top_p=top_p,
                    min_p=min_p,
                    seed=seed,
                    max_tokens=max_tokens or None,
                    min_tokens=min_tokens,
                    stop_token_ids=tuple(token_ids[prompt_end : prompt_end + num_stop].tolist()),
                    ignore_eos=ignore_eos,
                    **(_seldom_set(text) if text else {}),
                ),
                reports_tokens=reports_tokens,
            )
        )
        start = prompt_end + num_stop
    return requests


def _seldom_set(text: bytes) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""

    def with_tuples(value: Any) -> Any:
        return tuple(map(with_tuples, value)) if isinstance(value, list) else value

    return {name: with_tuples(value) for name, value in decode_json(text).items()}


def encode_aborts(request_ids: Seq[int]) -> bytes:
    """Requests to drop."""
    return np.array(request_ids, dtype="<i8").tobytes()


def decode_aborts(payload: bytes) -> list[int]:
    """What `encode_aborts` was given."""
    ids: list[int] = np.frombuffer(payload, dtype="<i8").tolist()
    return ids


def encode_outputs(outputs: Seq[Output], stats: EngineStats) -> bytes:
    """What a step gave, and the engine's stats after it."""
    records, token_ids, others = [], [], []
    for output in outputs:
        detail = num_prompt = num_cached = 0
        shapes = [0, -1, 0, -1]
        if isinstance(output, Failure):
            kind, detail = _OutputKind.FAILURE, _FAILURE_CODES.index(output.code)
            others.append(output.message.encode())
            num_items = len(others[-1])
        else:
            token_ids.append(output.token_ids)
            num_items = len(output.token_ids)
            for i, logprobs in enumerate((output.logprobs, output.prompt_logprobs)):
                if logprobs is not None:
                    shapes[2 * i : 2 * i + 2] = logprobs.top_ids.shape
                    others.append(_encode_logprobs(logprobs))
            if isinstance(output, Completion):
                kind = _OutputKind.COMPLETION
                detail = _FINISH_REASONS.index(output.finish_reason)
                num_prompt, num_cached = output.num_prompt_tokens, output.num_cached_tokens
            else:
                kind, detail = _OutputKind.NEW_TOKENS, int(output.starts_anew)
        records.append(
            _OUTPUT.pack(
                output.request_id, kind, detail, num_items, num_prompt, num_cached, *shapes
            )
        )
    return _STATS.pack(*astuple(stats)) + _join(records, token_ids, others)


def decode_outputs(payload: bytes) -> tuple[list[Output], EngineStats]:
    """What `encode_outputs` was given; the token ids are views of the payload."""
    stats = EngineStats(*_STATS.unpack_from(payload))
    records, token_ids, others = _split(payload[_STATS.size :], _OUTPUT)
    outputs: list[Output] = []
    start = others_start = 0
    for request_id, kind, detail, num_items, num_prompt, num_cached, *shapes in records:
        if kind == _OutputKind.FAILURE:
            text = others[others_start : others_start + num_items]
            others_start += num_items
            code = _FAILURE_CODES[detail]
            outputs.append(Failure(request_id=request_id, code=code, message=text.decode()))
            continue
        end = start + num_items
        own, others_start = _decode_logprobs(others, others_start, *shapes[:2])
        prompt, others_start = _decode_logprobs(others, others_start, *shapes[2:])
        if kind == _OutputKind.COMPLETION:
            outputs.append(
                Completion(
                    request_id=request_id,
                    token_ids=token_ids[start:end],
                    finish_reason=_FINISH_REASONS[detail],
                    num_prompt_tokens=num_prompt,
                    num_cached_tokens=num_cached,
                    logprobs=own,
                    prompt_logprobs=prompt,
                )
            )
        else:
            outputs.append(
                NewTokens(
                    request_id=request_id,
                    token_ids=token_ids[start:end],
                    starts_anew=bool(detail),
                    logprobs=own,
                    prompt_logprobs=prompt,
                )
            )
        start = end
    return outputs, stats


def _encode_logprobs(logprobs: Logprobs) -> bytes:
    arrays = (logprobs.values, logprobs.top_ids, logprobs.top_values)
    return b"".join(a.astype(f"<{a.dtype.kind}4", copy=False).tobytes() for a in arrays)


def _decode_logprobs(payload: bytes, start: int, count: int, k: int) -> tuple[Logprobs | None, int]:
    """And where they end."""
    if k < 0:
        return None, start
    end = start + 4 * count * (1 + 2 * k)
    words = np.frombuffer(payload[start:end], dtype="<i4")
    values, top_ids, top_values = np.split(words, (count, count * (1 + k)))
    logprobs = Logprobs(
        values=values.view("<f4"),
        top_ids=top_ids.reshape(count, k),
        top_values=top_values.view("<f4").reshape(count, k),
    )
    return logprobs, end


def _join(records: Seq[bytes], token_ids: Seq[TokenIds], texts: Iterable[bytes] = ()) -> bytes:
    all_ids = np.concatenate(token_ids, dtype="<i4") if token_ids else np.empty(0, dtype="<i4")
    counts = _COUNTS.pack(len(records), len(all_ids))
    return b"".join([counts, *records, all_ids.tobytes(), *texts])


def _split(payload: bytes, record: struct.Struct) -> tuple[Iterator[Any], TokenIds, bytes]:
    num_records, num_token_ids = _COUNTS.unpack_from(payload)
    ids_start = _COUNTS.size + num_records * record.size
    records = record.iter_unpack(memoryview(payload)[_COUNTS.size : ids_start])
    token_ids = np.frombuffer(payload, dtype="<i4", count=num_token_ids, offset=ids_start)
    return records, token_ids, payload[ids_start + token_ids.nbytes :]
