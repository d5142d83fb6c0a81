"""A Batch as bytes and back: what rank 0 sends to the other ranks at every launch.

A header, the lengths of the int32 arrays that follow, a record of fixed layout for each admission,
the arrays one after the other, and what admissions have beyond numbers as JSON. A decode window of
1024 sequences is 4 KiB, a prefill 4 bytes a token.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nanovllm_cli.core.batch import (
    Adjustment,
    Admission,
    Batch,
    BlockTableUpdate,
    Bool,
    DecodeBatch,
    ForcedTokens,
    ForwardBatch,
    Int32,
    PrefillBatch,
    PromptTargets,
    RowNeeds,
    SampleBatch,
    TokenMasks,
    Twins,
)

_KINDS = (PrefillBatch, DecodeBatch, ForwardBatch, SampleBatch)
# Kind, steps, arrays, admissions, has forced tokens, has twins, has needs, their logprobs, has
# masks, has targets, their logprobs
_HEADER = struct.Struct("<11i")
# slot, top_k, min_length, max_length, bytes of JSON, seed, temperature, top_p, min_p
_ADMISSION = struct.Struct("<5iQ3d")
_ADJUSTMENT_FIELDS = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words",
    "thinking_end", "end_think_token_id",
)  # fmt: skip


def encode_batch(batch: Batch) -> bytes:
    """In the byte order of this machine: it goes to another process, not to a file."""
    arrays: list[Int32 | Bool] = [batch.slots]
    num_steps = 0
    admissions: tuple[Admission, ...] = ()
    forced, twins, needs, targets = None, None, None, None
    if not isinstance(batch, SampleBatch):
        update = batch.block_table_update
        arrays += [update.slots, update.indices, update.block_ids]
    if isinstance(batch, PrefillBatch):
        arrays += [batch.start_positions, batch.query_lens, batch.is_last_chunk, batch.token_ids]
        twins, targets, admissions = batch.twins, batch.prompt_targets, batch.admissions
    if isinstance(batch, DecodeBatch):
        num_steps = batch.num_steps
    if isinstance(batch, ForwardBatch):
        forced = batch.forced
    else:
        needs = batch.needs
    if forced is not None:
        arrays += [forced.token_ids, forced.start_positions, forced.query_lens]
    if twins is not None:
        arrays += [twins.slots, twins.leaders, twins.sources, twins.targets]
    if needs is not None:
        arrays += [needs.adjusted_rows, needs.logprob_rows]
        if needs.masks is not None:
            arrays.append(needs.masks.rows)  # the words, 19 KB a row, stay with rank 0
    if targets is not None:
        arrays += [targets.hidden_rows, targets.token_ids]
    records, texts = [], []
    for a in admissions:
        arrays.append(np.array(a.stop_token_ids, dtype=np.int32))
        text = b""
        if a.adjustment is not None:
            arrays += [a.adjustment.prompt_token_ids, a.adjustment.completion_token_ids]
            values = {name: getattr(a.adjustment, name) for name in _ADJUSTMENT_FIELDS}
            text = json.dumps(values).encode()
        texts.append(text)
        records.append(
            _ADMISSION.pack(
                a.slot,
                a.top_k,
                a.min_length,
                a.max_length,
                len(text),
                a.seed,
                a.temperature,
                a.top_p,
                a.min_p,
            )
        )
    header = _HEADER.pack(
        _KINDS.index(type(batch)),
        num_steps,
        len(arrays),
        len(records),
        forced is not None,
        twins is not None,
        needs is not None,
        0 if needs is None else needs.num_logprobs,
        needs is not None and needs.masks is not None,
        targets is not None,
        0 if targets is None else targets.num_logprobs,
    )
    lengths = np.array([len(array) for array in arrays], dtype=np.int32)
    joined = np.concatenate(arrays, dtype=np.int32)
    return b"".join([header, lengths.tobytes(), *records, joined.tobytes(), *texts])


def decode_batch(payload: bytes) -> Batch:
    """What `encode_batch` was given, but for the words of masks."""
    (
        kind, num_steps, num_arrays, num_admissions, has_forced, has_twins,
        has_needs, num_logprobs, has_masks, has_targets, num_prompt_logprobs,
    ) = _HEADER.unpack_from(payload)  # fmt: skip
    lengths = np.frombuffer(payload, dtype=np.int32, offset=_HEADER.size, count=num_arrays)
    records_start = _HEADER.size + lengths.nbytes
    records_end = records_start + num_admissions * _ADMISSION.size
    joined = np.frombuffer(payload, np.int32, int(lengths.sum()), records_end).copy()
    bounds = [0, *np.cumsum(lengths).tolist()]
    arrays = iter([joined[start:end] for start, end in pairwise(bounds)])
    slots = next(arrays)
    fields: dict[str, Any] = {"slots": slots}
    batch_type = _KINDS[kind]
    if batch_type is not SampleBatch:
        fields["block_table_update"] = BlockTableUpdate(
            slots=next(arrays), indices=next(arrays), block_ids=next(arrays)
        )
    if batch_type is PrefillBatch:
        fields["start_positions"], fields["query_lens"] = next(arrays), next(arrays)
        fields["is_last_chunk"], fields["token_ids"] = next(arrays) != 0, next(arrays)
    if batch_type is DecodeBatch:
        fields["num_steps"] = num_steps
    if has_forced:
        fields["forced"] = ForcedTokens(
            token_ids=next(arrays), start_positions=next(arrays), query_lens=next(arrays)
        )
    if has_twins:
        fields["twins"] = Twins(
            slots=next(arrays), leaders=next(arrays), sources=next(arrays), targets=next(arrays)
        )
    if has_needs:
        fields["needs"] = RowNeeds(
            adjusted_rows=next(arrays),
            logprob_rows=next(arrays),
            num_logprobs=num_logprobs,
            masks=_masks(next(arrays)) if has_masks else None,
        )
    if has_targets:
        fields["prompt_targets"] = PromptTargets(
            hidden_rows=next(arrays), token_ids=next(arrays), num_logprobs=num_prompt_logprobs
        )
    if batch_type is PrefillBatch:
        records = _ADMISSION.iter_unpack(memoryview(payload)[records_start:records_end])
        texts = payload[records_end + joined.nbytes :]
        fields["admissions"] = tuple(_admissions(records, arrays, texts))
    return batch_type(**fields)


def _masks(rows: Int32) -> TokenMasks:
    return TokenMasks(rows=rows, words=np.zeros((len(rows), 0), dtype=np.int32))


def _admissions(
    records: Iterator[Sequence[Any]], arrays: Iterator[Int32], texts: bytes
) -> Iterator[Admission]:
    start = 0
    for (
        slot, top_k, min_length, max_length, num_bytes, seed, temperature, top_p, min_p,
    ) in records:  # fmt: skip
        stop_token_ids = tuple(next(arrays).tolist())
        text, start = texts[start : start + num_bytes], start + num_bytes
        yield Admission(
            slot=slot,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            min_length=min_length,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            adjustment=_adjustment(json.loads(text), arrays) if text else None,
        )


def _adjustment(values: dict[str, Any], arrays: Iterator[Int32]) -> Adjustment:
    for name in ("logit_bias", "bad_words"):
        values[name] = tuple(map(tuple, values[name]))
    return Adjustment(**values, prompt_token_ids=next(arrays), completion_token_ids=next(arrays))
