"""A Batch as bytes and back: what rank 0 sends to the other ranks at every launch.

int32 arrays one after the other, their lengths before them, and a record of fixed layout for each
admission. A decode window of 1024 sequences is 4 KiB, a prefill 4 bytes a token.
"""

import struct

import numpy as np

from nanovllm_cli.core.batch import (
    Admission,
    Batch,
    BlockTableUpdate,
    Bool,
    DecodeBatch,
    Int32,
    PrefillBatch,
)

# Block-table entries, sequences, steps (0: a prefill), tokens, admissions.
_COUNTS = struct.Struct("<5i")
# slot, top_k, min_length, max_length, number of stop tokens, seed, temperature, top_p, min_p
_ADMISSION = struct.Struct("<5i4xQ3d")


def encode_batch(batch: Batch) -> bytes:
    """In the byte order of this machine: it goes to another process, not to a file."""
    update = batch.block_table_update
    arrays: list[Int32 | Bool] = [update.slots, update.indices, update.block_ids, batch.slots]
    if isinstance(batch, DecodeBatch):
        counts = (len(update.slots), len(batch.slots), batch.num_steps, 0, 0)
        return _join(counts, arrays, [])
    arrays += [batch.start_positions, batch.query_lens, batch.is_last_chunk, batch.token_ids]
    arrays += [np.array(a.stop_token_ids, dtype=np.int32) for a in batch.admissions]
    records = [
        _ADMISSION.pack(
            a.slot,
            a.top_k,
            a.min_length,
            a.max_length,
            len(a.stop_token_ids),
            a.seed,
            a.temperature,
            a.top_p,
            a.min_p,
        )
        for a in batch.admissions
    ]
    num_tokens = len(batch.token_ids)
    counts = (len(update.slots), len(batch.slots), 0, num_tokens, len(records))
    return _join(counts, arrays, records)


def decode_batch(payload: bytes) -> Batch:
    """What `encode_batch` was given."""
    num_entries, num_seqs, num_steps, num_tokens, num_admissions = _COUNTS.unpack_from(payload)
    records_end = _COUNTS.size + num_admissions * _ADMISSION.size
    rest = np.frombuffer(payload, dtype=np.int32, offset=records_end).copy()

    def take(length: int) -> Int32:
        nonlocal rest
        taken, rest = rest[:length], rest[length:]
        return taken

    update = BlockTableUpdate(
        slots=take(num_entries), indices=take(num_entries), block_ids=take(num_entries)
    )
    slots = take(num_seqs)
    if num_steps:
        return DecodeBatch(block_table_update=update, slots=slots, num_steps=num_steps)
    start_positions, query_lens = take(num_seqs), take(num_seqs)
    is_last_chunk, token_ids = take(num_seqs) != 0, take(num_tokens)
    records = _ADMISSION.iter_unpack(memoryview(payload)[_COUNTS.size : records_end])
    return PrefillBatch(
        admissions=tuple(
            Admission(
                slot=slot,
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                min_length=min_length,
                max_length=max_length,
                stop_token_ids=tuple(take(num_stops).tolist()),
            )
            for slot, top_k, min_length, max_length, num_stops, seed, temperature, top_p, min_p
            in records
        ),
        block_table_update=update,
        slots=slots,
        token_ids=token_ids,
        start_positions=start_positions,
        query_lens=query_lens,
        is_last_chunk=is_last_chunk,
    )  # fmt: skip


def _join(counts: tuple[int, ...], arrays: list[Int32 | Bool], records: list[bytes]) -> bytes:
    return b"".join(
        [_COUNTS.pack(*counts), *records, np.concatenate(arrays, dtype=np.int32).tobytes()]
    )
