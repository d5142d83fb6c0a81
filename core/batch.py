"""One launch's plan, frozen: a packed prefill, or a decode window of several steps.

This is all that scheduler and runner share. A plan holds what is new since the last launch, in
int32 and float32 arrays of fixed layout: new tokens and new block-table entries, never whole
sequences. The runner keeps each running sequence's state in a slot of its device-side table.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A sequence entering a slot: its sampling parameters, and where it must and may stop."""

    slot: int
    seed: int
    temperature: float
    top_k: int  # vocab_size where every token may be drawn
    top_p: float
    min_p: float
    min_length: int  # tokens, prompt included, before a stop token may be drawn
    max_length: int  # tokens, prompt included, at which the sequence ends
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTableUpdate:
    """`block_ids[i]` becomes entry `indices[i]` of slot `slots[i]`'s block table; all [num]."""

    slots: Int32
    indices: Int32
    block_ids: Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """Whole prompts, or chunks of them, packed one after the other."""

    admissions: tuple[Admission, ...]
    block_table_update: BlockTableUpdate
    slots: Int32  # [num_seqs]
    token_ids: Int32  # [num_tokens]
    start_positions: Int32  # [num_seqs], of each sequence's first token here
    query_lens: Int32  # [num_seqs], tokens of each sequence here
    is_last_chunk: Bool  # [num_seqs]; only then a token is sampled


def packed_positions(
    query_lens: Int32, start_positions: Int32
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of tokens packed one sequence after the other: each one's sequence, and its position there.

    query_lens, start_positions: [num_seqs], a sequence's tokens here and its first one's position.
    """
    sequences = np.repeat(np.arange(len(query_lens)), query_lens)
    first_rows = np.cumsum(query_lens) - query_lens
    positions = np.arange(len(sequences)) + (start_positions - first_rows)[sequences]
    return sequences, positions


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBatch:
    """`num_steps` steps of one token for each slot, with no look at the tokens in between."""

    block_table_update: BlockTableUpdate
    slots: Int32  # [num_seqs]
    num_steps: int


Batch = PrefillBatch | DecodeBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """What a launch sampled, a row for each slot of the batch (a prefill has one step).

    Of row i the first `num_tokens[i]` tokens count: 0 for a chunk that is not the last, fewer than
    the steps where the sequence stopped on the way.
    """

    token_ids: Int32  # [num_seqs, num_steps]
    num_tokens: Int32  # [num_seqs]
    is_stopped: Bool  # [num_seqs], the last token that counts is a stop token
    is_nan: Bool  # [num_seqs], the logits were not finite: the row has failed
