"""One launch's plan, frozen: a packed prefill, or a decode window of several steps.

A decode step may also come in two halves, for rows whose masks the host works out while the device
computes their logits: a ForwardBatch, and the SampleBatch that draws from what it left. What only
some rows ask for (RowNeeds, PromptTargets) is None in launches where no row does.

This is all that scheduler and runner share. A plan holds what is new since the last launch, in
int32 and float32 arrays of fixed layout: new tokens and new block-table entries, never whole
sequences. The runner keeps each running sequence's state in a slot of its device-side table.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nanovllm_cli.core.request import Logprobs

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adjustment:
    """How a sequence's logits are changed before a token is chosen, and its tokens so far.

    The meanings are SamplingParams'. From `thinking_end` tokens on, prompt included, only
    `end_think_token_id` may be drawn, until it is; None: there is no budget, or it has come.
    """

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    bad_words: tuple[tuple[int, ...], ...]
    thinking_end: int | None
    end_think_token_id: int | None
    prompt_token_ids: Int32
    completion_token_ids: Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A sequence entering a slot: its sampling parameters, and where it must and may stop.

    One for a slot that its sequence holds already lets it go on, with what the admission says.
    """

    slot: int
    seed: int
    temperature: float
    top_k: int  # vocab_size where every token may be drawn
    top_p: float
    min_p: float
    min_length: int  # tokens, prompt included, before a stop token may be drawn
    max_length: int  # tokens, prompt included, at which the sequence ends
    stop_token_ids: tuple[int, ...]
    adjustment: Adjustment | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTableUpdate:
    """`block_ids[i]` becomes entry `indices[i]` of slot `slots[i]`'s block table; all [num]."""

    slots: Int32
    indices: Int32
    block_ids: Int32


def no_rows() -> Int32:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMasks:
    """The tokens that some rows of a launch may draw. rows: [num_masks], at least one.

    words: [num_masks, ceil(vocab_size / 32)]; bit i of word w is token 32 * w + i, 1 is allowed. Of
    several ranks only the first has them, and the others take its tokens: their words are [.., 0].
    """

    rows: Int32
    words: Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class RowNeeds:
    """What some rows of a launch ask beyond a token; rows are indices of its slots, ascending."""

    adjusted_rows: Int32 = field(default_factory=no_rows)  # their admissions have said how
    logprob_rows: Int32 = field(
        default_factory=no_rows
    )  # the log-probability of their token comes back
    num_logprobs: int = 0  # and of so many likeliest ones: the most that one of them asks for
    masks: TokenMasks | None = None  # for each step of the launch


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTargets:
    """Prompt tokens whose log-probabilities a prefill gives.

    hidden_rows: [num_targets], which of the launch's tokens a target comes after.
    """

    hidden_rows: Int32
    token_ids: Int32  # [num_targets]
    num_logprobs: int  # the likeliest ones beside each


@dataclass(frozen=True, kw_only=True, slots=True)
class Twins:
    """Sequences with the prompt of one that ends its prompt in the same prefill, its leader.

    They compute nothing: they draw from their leader's logits, and their block tables share its
    full blocks. Block `sources[i]` is copied to `targets[i]` when the leaders' KV is stored.
    """

    slots: Int32  # [num_twins]
    leaders: Int32  # [num_twins], indices of the launch's sequences
    sources: Int32  # [num_copies]
    targets: Int32  # [num_copies]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """Whole prompts, or chunks of them, packed one after the other.

    A row of its result for each of the sequences, then one for each of their twins.
    """

    admissions: tuple[Admission, ...]
    block_table_update: BlockTableUpdate
    slots: Int32  # [num_seqs]
    token_ids: Int32  # [num_tokens]
    start_positions: Int32  # [num_seqs], of each sequence's first token here
    query_lens: Int32  # [num_seqs], tokens of each sequence here
    is_last_chunk: Bool  # [num_seqs]; only then a token is sampled
    twins: Twins | None = None
    needs: RowNeeds | None = None  # of rows whose chunk is the last
    prompt_targets: PromptTargets | None = None

    @property
    def row_slots(self) -> Int32:
        """Of each row of the result: its slot."""
        return self.slots if self.twins is None else np.append(self.slots, self.twins.slots)

    @property
    def row_sequences(self) -> Int32:
        """Of each row of the result: the sequence that it is drawn after."""
        own = np.arange(len(self.slots), dtype=np.int32)
        return own if self.twins is None else np.append(own, self.twins.leaders)


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
    needs: RowNeeds | None = None


MAX_FORCED_TOKENS = 32  # of a slot in a launch
DRAWN_LAST = -1  # stands for the token that a slot has drawn last, which only the device may know


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcedTokens:
    """What the slots of a step go on with, where some have tokens that nobody draws.

    token_ids: [num_tokens], slot after slot: a slot's forced tokens, or DRAWN_LAST alone.
    """

    token_ids: Int32
    start_positions: Int32  # [num_seqs], of each slot's first token here
    query_lens: Int32  # [num_seqs], tokens of each slot here

    @property
    def rows(self) -> Int32:
        """Which slots have forced ones: ascending indices."""
        first_tokens = np.cumsum(self.query_lens) - self.query_lens
        return np.flatnonzero(self.token_ids[first_tokens] != DRAWN_LAST).astype(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """The first half of a decode step: the logits after each slot's tokens.

    They stay on the device for the SampleBatch that is the next launch; nothing comes back. What a
    slot with forced tokens has drawn before is of no use.
    """

    block_table_update: BlockTableUpdate
    slots: Int32  # [num_seqs]
    forced: ForcedTokens | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBatch:
    """The second half of a decode step: a token of each slot of the ForwardBatch before."""

    slots: Int32  # [num_seqs], in the same order
    needs: RowNeeds | None = None


Batch = PrefillBatch | DecodeBatch | ForwardBatch | SampleBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLogprobs:
    """Log-probabilities of what a launch sampled, for the rows that ask: RowNeeds.logprob_rows.

    Of a row as many steps count as it has tokens.
    """

    rows: Int32  # [num_rows]
    values: npt.NDArray[np.float32]  # [num_rows, num_steps], of the tokens sampled
    top_ids: Int32  # [num_rows, num_steps, num_logprobs]
    top_values: npt.NDArray[np.float32]  # likewise


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
    logprobs: RowLogprobs | None = None
    prompt_logprobs: Logprobs | None = None  # of all prompt_targets, in their order
