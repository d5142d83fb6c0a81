"""The scheduler and its blocks, against an oracle that carries out every launch to the letter.

The oracle is a device without arithmetic. Its memory says of every position of every block which
tokens' KV was written there, as the prefix that ends with that token: KV depends on all of it.
Whatever a launch reads must be the KV of the reader's own prefix. The model is a pure function of a
prefix, so what every request must answer is known before anything runs.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from nanovllm_cli.core import scheduler
from nanovllm_cli.core.batch import Admission, Batch, BatchResult, DecodeBatch, PrefillBatch, Twins
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK, BlockManager
from nanovllm_cli.core.prefill_queue import PrefillQueue
from nanovllm_cli.core.request import (
    Completion,
    Failure,
    NewTokens,
    Output,
    Request,
    TokenIds,
)
from nanovllm_cli.core.running_set import RunningSet
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from nanovllm_cli.core.scheduler import Scheduler
from nanovllm_cli.core.sequence import Sequence

VOCAB_SIZE = 6
GARBAGE = -1  # what lies in memory that was never written, and in the scratch block


class OracleError(AssertionError):
    """The oracle's own; the core's assertions are no proof that the oracle sees anything."""


def check(is_good: bool, what: object) -> None:
    if not is_good:
        raise OracleError(str(what))


class Prefixes:
    """Token prefixes as small integers: two are equal exactly when their numbers are. 0: empty."""

    def __init__(self, salt: int) -> None:
        self._ids: dict[tuple[int, int], int] = {}
        self.parent = [0]
        self.token = [0]
        self.length = [0]
        self.state = [salt]  # a hash of the prefix, for the model to draw from

    def extend(self, prefix: int, token: int) -> int:
        found = self._ids.setdefault((prefix, token), len(self.parent))
        if found == len(self.parent):
            self.parent.append(prefix)
            self.token.append(token)
            self.length.append(self.length[prefix] + 1)
            self.state.append(mix(self.state[prefix] + token + 1))
        return found

    def tokens_of(self, prefix: int, num_last: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(num_last):
            tokens.append(self.token[prefix])
            prefix = self.parent[prefix]
        return tokens[::-1]


def mix(x: int) -> int:
    """A permutation of 64-bit numbers: splitmix64's."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Model:
    """The next token, a pure function of the prefix and the request's seed; None is NaN logits."""

    def __init__(self, vocab_size: int = VOCAB_SIZE, nan_permille: int = 0) -> None:
        self.vocab_size = vocab_size
        self.nan_permille = nan_permille

    def next_token(
        self, prefixes: Prefixes, prefix: int, seed: int, forbidden: Seq[int]
    ) -> int | None:
        state = prefixes.state[prefix]
        if (state >> 40) % 1000 < self.nan_permille:
            return None
        token = (mix(state + seed) >> 8) % self.vocab_size
        while token in forbidden:
            token = (token + 1) % self.vocab_size
        return token


class Ones(Model):
    """Token 1 after every prefix, but token 5 as the 11th."""

    def next_token(
        self, prefixes: Prefixes, prefix: int, seed: int, forbidden: Seq[int]
    ) -> int | None:
        return 5 if prefixes.length[prefix] == 10 and 5 not in forbidden else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    vocab_size: int = VOCAB_SIZE
    num_blocks: int = 33
    block_size: int = 4
    max_model_len: int = 40
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    max_window_steps: int = 4
    max_launches_in_flight: int = 0
    enable_prefix_caching: bool = True
    hash_bits: int = 64
    eos_token_ids: tuple[int, ...] = ()


class Truth:
    """What a request must answer, worked out without any scheduler."""

    def __init__(
        self, request: Request, settings: Settings, prefixes: Prefixes, model: Model
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.prompt = [int(token) for token in request.prompt_token_ids]
        self.tokens = list(self.prompt)
        eos = () if sampling.ignore_eos else settings.eos_token_ids
        self.stops = {*eos, *sampling.stop_token_ids}
        self.min_length = len(self.prompt) + sampling.min_tokens
        self.max_length = settings.max_model_len
        if sampling.max_tokens is not None:
            self.max_length = min(self.max_length, len(self.prompt) + sampling.max_tokens)
        self.finish_reason = "length"
        self.nodes: list[int] = []  # nodes[i]: the prefix of tokens 0 .. i
        prefix = 0
        for token in self.prompt:
            prefix = prefixes.extend(prefix, token)
            self.nodes.append(prefix)
        while len(self.tokens) < self.max_length:
            forbidden = self.stops if len(self.tokens) < self.min_length else ()
            token_or_nan = model.next_token(prefixes, prefix, sampling.seed, tuple(forbidden))
            if token_or_nan is None:
                self.finish_reason = "nan"
                break
            self.tokens.append(token_or_nan)
            prefix = prefixes.extend(prefix, token_or_nan)
            self.nodes.append(prefix)
            if token_or_nan in self.stops:
                self.finish_reason = "stop"
                break

    @property
    def completion(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


@dataclass(slots=True)
class Slot:
    """A row of the device's slot table, and whose it is (which a real device does not know)."""

    table: list[int]
    truth: Truth
    length: int = 0
    last_token: int = 0
    min_length: int = 0
    max_length: int = 0
    seed: int = 0
    stops: tuple[int, ...] = ()
    is_finished: bool = False
    prefix: int = 0  # of all its `length` tokens


class Device:
    """Does with every Batch what core/runner.py does, on prefixes instead of numbers."""

    def __init__(self, settings: Settings, prefixes: Prefixes, model: Model) -> None:
        self._block_size = settings.block_size
        self._num_entries = -(-settings.max_model_len // settings.block_size)
        self._prefixes = prefixes
        self._model = model
        self.memory = [[GARBAGE] * settings.block_size for _ in range(settings.num_blocks)]
        self.num_writes = [0] * settings.num_blocks
        self.slots: dict[int, Slot] = {}

    def run(self, batch: Batch, owners: dict[int, Truth]) -> BatchResult:
        """`owners` names the requests that the batch's admissions put into their slots."""
        if isinstance(batch, PrefillBatch):
            for admission in batch.admissions:
                self._admit(admission, owners[admission.slot])
        update = batch.block_table_update
        for slot, index, block_id in zip(
            update.slots.tolist(), update.indices.tolist(), update.block_ids.tolist(), strict=True
        ):
            check(block_id != SCRATCH_BLOCK, "the scratch block is in a block table")
            check(index < self._num_entries, "a block table is longer than max_model_len")
            self.slots[slot].table[index] = block_id
        slots = slots_of(batch)
        check(len(set(slots)) == len(slots), "a slot is twice in a launch")
        return self._prefill(batch) if isinstance(batch, PrefillBatch) else self._decode(batch)

    def _admit(self, admission: Admission, truth: Truth) -> None:
        old = self.slots.get(admission.slot)
        sampling = truth.request.sampling
        check(admission.temperature == sampling.temperature, "an admission of other parameters")
        check(admission.min_length == truth.min_length, "min_length")
        check(admission.max_length == truth.max_length, "max_length")
        check(set(admission.stop_token_ids) == truth.stops, "stop_token_ids")
        self.slots[admission.slot] = Slot(
            # Old entries stay, as in the real table.
            table=old.table if old else [SCRATCH_BLOCK] * self._num_entries,
            truth=truth,
            min_length=admission.min_length,
            max_length=admission.max_length,
            seed=admission.seed,
            stops=admission.stop_token_ids,
        )

    def _prefill(self, batch: PrefillBatch) -> BatchResult:
        result = _empty_result(len(batch.row_slots), 1)
        parts = []
        first = 0
        for slot_id, start, num_tokens in zip(
            batch.slots.tolist(),
            batch.start_positions.tolist(),
            batch.query_lens.tolist(),
            strict=True,
        ):
            slot, end = self.slots[slot_id], start + num_tokens
            token_ids = batch.token_ids[first : first + num_tokens].tolist()
            first += num_tokens
            check(num_tokens > 0, "a sequence with nothing to compute")
            check(token_ids == slot.truth.tokens[start:end], "a prefill of other tokens")
            parts.append((slot, end))
            for position in range(start, end):
                self._store(slot, position, slot.truth.nodes[position])
        check(first == len(batch.token_ids), "tokens of no sequence")
        if batch.twins is not None:
            self._copy_for(batch.twins, batch.is_last_chunk.tolist())
        for i, sequence in enumerate(batch.row_sequences.tolist()):
            slot, end = self.slots[int(batch.row_slots[i])], parts[sequence][1]
            self._read(slot, end)
            slot.length = end
            slot.prefix = slot.truth.nodes[end - 1]
            if batch.is_last_chunk[sequence]:
                self._advance(slot, result, i, 0)
        return result

    def _copy_for(self, twins: Twins, is_last_chunk: list[bool]) -> None:
        for source, target in zip(twins.sources.tolist(), twins.targets.tolist(), strict=True):
            check(target != SCRATCH_BLOCK, "a copy to the scratch block")
            self.memory[target] = list(self.memory[source])
            self.num_writes[target] += 1
        for leader in twins.leaders.tolist():
            check(is_last_chunk[leader], "a twin of a prompt that is not done")

    def _decode(self, batch: DecodeBatch) -> BatchResult:
        result = _empty_result(len(batch.slots), batch.num_steps)
        slots = [self.slots[slot_id] for slot_id in batch.slots.tolist()]
        for step in range(batch.num_steps):
            live = [(i, slot) for i, slot in enumerate(slots) if not slot.is_finished]
            if len(live) < len(slots):
                self.memory[SCRATCH_BLOCK] = [GARBAGE] * self._block_size
            for _, slot in live:
                self._store(slot, slot.length - 1, slot.prefix)
            for i, slot in live:
                self._read(slot, slot.length)
                self._advance(slot, result, i, step)
        return result

    def _store(self, slot: Slot, position: int, prefix: int) -> None:
        block_id = slot.table[position // self._block_size]
        check(block_id != SCRATCH_BLOCK, "a live row writes to the scratch block")
        self.memory[block_id][position % self._block_size] = prefix
        self.num_writes[block_id] += 1

    def _read(self, slot: Slot, length: int) -> None:
        read: list[int] = []
        for block_id in slot.table[: -(-length // self._block_size)]:
            read += self.memory[block_id]
        check(read[:length] == slot.truth.nodes[:length], "a row reads KV that is not its own")

    def _advance(self, slot: Slot, result: BatchResult, row: int, step: int) -> None:
        forbidden = slot.stops if slot.length < slot.min_length else ()
        token = self._model.next_token(self._prefixes, slot.prefix, slot.seed, forbidden)
        result.num_tokens[row] += 1
        result.is_nan[row] = token is None
        result.is_stopped[row] = token in slot.stops
        slot.last_token = 0 if token is None else token
        result.token_ids[row, step] = slot.last_token
        slot.length += 1
        slot.prefix = self._prefixes.extend(slot.prefix, slot.last_token)
        slot.is_finished = token is None or token in slot.stops or slot.length >= slot.max_length


def slots_of(batch: Batch) -> list[int]:
    """Of each row of a launch's result."""
    slots = batch.row_slots if isinstance(batch, PrefillBatch) else batch.slots
    return [int(slot) for slot in slots]


def _empty_result(num_rows: int, num_steps: int) -> BatchResult:
    return BatchResult(
        token_ids=np.zeros((num_rows, num_steps), dtype=np.int32),
        num_tokens=np.zeros(num_rows, dtype=np.int32),
        is_stopped=np.zeros(num_rows, dtype=np.bool_),
        is_nan=np.zeros(num_rows, dtype=np.bool_),
    )


class World:
    """A scheduler, a device and every check there is; steps as core/engine.py does."""

    truth_class = Truth
    device_class = Device

    def __init__(
        self,
        settings: Settings,
        model: Model | None = None,
        *,
        salt: int = 0,
        block_manager_class: type[BlockManager] = BlockManager,
        scheduler_class: type[Scheduler] = Scheduler,
    ) -> None:
        self.settings = settings
        self.model = model or Model()
        self.prefixes = Prefixes(salt)
        self.device = self.device_class(settings, self.prefixes, self.model)
        self.blocks = block_manager_class(
            settings.num_blocks,
            settings.block_size,
            enable_prefix_caching=settings.enable_prefix_caching,
            hash_bits=settings.hash_bits,
        )
        self.scheduler = scheduler_class(
            self.blocks,
            vocab_size=settings.vocab_size,
            eos_token_ids=settings.eos_token_ids,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_window_steps=settings.max_window_steps,
        )
        self.truths: dict[int, Truth] = {}  # of the requests that have not ended
        self.outputs: dict[int, Completion | Failure] = {}
        self.batches: list[Batch] = []
        self.num_aborts_in_flight = 0
        self._num_steps_left = 10
        self._results: deque[BatchResult] = deque()
        self._new_tokens: dict[int, list[int]] = {}
        self._checked: dict[int, tuple[int, int]] = {}  # block id -> content id, writes
        self._last_nodes = {0: 0}  # content id -> the prefix that ends with it

    # What the scheduler knows; the only looks at its private parts.

    @property
    def running(self) -> list[Sequence]:
        return self.scheduler._running.sequences

    @property
    def free_slots(self) -> list[int]:
        return self.scheduler._running._free_slots

    @property
    def launched(self) -> list[Sequence | None]:
        """The sequences of the newest launch, some of which may hold no slot any more."""
        return self.scheduler._unread.newest.sequences

    @property
    def waiting_ids(self) -> list[int]:
        return [sequence.request.request_id for sequence in self.scheduler._prefills._waiting]

    @property
    def running_ids(self) -> list[int]:
        return [sequence.request.request_id for sequence in self.running]

    def table_of(self, request_id: int) -> list[int]:
        (table,) = [s.block_table for s in self.running if s.request.request_id == request_id]
        return table

    # What can be done to it.

    def ask(self, request_id: int, prompt: Seq[int], **sampling: Any) -> Failure | None:
        return self.add(
            Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=SamplingParams(**sampling),
            )
        )

    def add(self, request: Request) -> Failure | None:
        failure = self.scheduler.add(request)
        length = len(request.prompt_token_ids)
        is_bad = any(
            not 0 <= token < self.settings.vocab_size for token in request.prompt_token_ids
        )
        must_fail = is_bad or not 0 < length < self.settings.max_model_len
        check((failure is not None) == must_fail, f"{request} gives {failure}")
        if failure is not None:
            self.outputs[request.request_id] = failure
            return failure
        truth = self.truth_class(request, self.settings, self.prefixes, self.model)
        self.truths[request.request_id] = truth
        self._new_tokens[request.request_id] = []
        num_chunks = -(-len(truth.tokens) // self.settings.max_num_batched_tokens)
        self._num_steps_left += 3 * (len(truth.completion) + 1) * (num_chunks + 2)
        return None

    def abort(self, request_id: int) -> None:
        self.num_aborts_in_flight += bool(self._results) and request_id in self.running_ids
        self.scheduler.abort(request_id)
        self.truths.pop(request_id, None)

    def step(self) -> list[Output]:
        """As Engine.step, then every invariant."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._check_batch(batch)
            self.batches.append(batch)
            self._launch(batch)
        outputs: list[Output] = []
        if self._results and (
            batch is None or len(self._results) > self.settings.max_launches_in_flight
        ):
            outputs = self.scheduler.update(self._results.popleft())
            for output in outputs:
                self._check_output(output)
        else:
            check(batch is not None or not self.scheduler.has_work, "no progress")
        self.check_invariants()
        return outputs

    def _launch(self, batch: Batch) -> None:
        owners = {}
        for sequence, slot in zip(self.launched, slots_of(batch), strict=True):
            truth = self.truths.get(sequence.request.request_id)
            check(truth is not None, "a sequence runs that has ended")
            assert truth is not None
            check(slot not in owners, "two sequences share a slot")
            owners[slot] = truth
        self._results.append(self.device.run(batch, owners))

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.scheduler.has_work:
            self._num_steps_left -= 1
            check(self._num_steps_left > 0, "livelock")
            self.step()

    def finish(self) -> None:
        """Run to the end, read what is still in flight, and look whether all is given back."""
        self.run()
        while self._results:
            check(self.scheduler.update(self._results.popleft()) == [], "output after the end")
        check(not self.truths, f"requests without an end: {self.truths.keys()}")
        check(self.blocks.num_free_blocks == self.settings.num_blocks - 1, "blocks are lost")
        check(len(self.free_slots) == self.settings.max_num_seqs, "slots are lost")
        self.check_invariants()

    # What must hold.

    def _check_batch(self, batch: Batch) -> None:
        check(0 < len(slots_of(batch)) <= self.settings.max_num_seqs, "slots in a launch")
        if isinstance(batch, PrefillBatch):
            num_tokens = len(batch.token_ids)
            check(0 < num_tokens <= self.settings.max_num_batched_tokens, "tokens in a prefill")
        else:
            check(0 < batch.num_steps <= self.settings.max_window_steps, "steps in a window")

    def _check_output(self, output: Output) -> None:
        truth = self.truths.get(output.request_id)
        check(truth is not None, f"{output} of a request that has ended")
        assert truth is not None
        reported = self._new_tokens[output.request_id]
        if isinstance(output, NewTokens):
            check(truth.request.reports_tokens, "tokens nobody asked for")
            check(len(output.token_ids) > 0, "no new tokens")
            reported += output.token_ids.tolist()
            check(reported == truth.completion[: len(reported)], "wrong tokens reported")
            return
        del self.truths[output.request_id]
        self.outputs[output.request_id] = output
        if isinstance(output, Failure):
            check(output.code == "nan_logits", output)
            check(truth.finish_reason == "nan", f"{output}, though the model gives {truth.tokens}")
            return
        token_ids = output.token_ids.tolist()
        check(token_ids == truth.completion, f"{token_ids} instead of {truth.completion}")
        check(output.finish_reason == truth.finish_reason, output.finish_reason)
        check(output.num_prompt_tokens == len(truth.prompt), "num_prompt_tokens")
        check(0 <= output.num_cached_tokens < len(truth.prompt), "num_cached_tokens")
        check(output.num_cached_tokens % self.settings.block_size == 0, "num_cached_tokens")
        check(reported == token_ids[: len(reported)], "other tokens reported than returned")

    def check_invariants(self) -> None:
        settings, blocks = self.settings, self.blocks
        check(len(self.running) <= settings.max_num_seqs, "more run than max_num_seqs")
        slots = [s.slot for s in self.running if s.slot is not None]
        check(len(slots) == len(self.running), "a running sequence without a slot")
        check(len(set(slots)) == len(slots), "a slot is held twice")
        every_slot = sorted([*slots, *self.free_slots])
        check(every_slot == list(range(settings.max_num_seqs)), "a slot is lost")
        held: Counter[int] = Counter()
        for sequence in self.running:
            check(len(set(sequence.block_table)) == len(sequence.block_table), "a block twice")
            held.update(sequence.block_table)
        check(SCRATCH_BLOCK not in held, "the scratch block is held")
        for block_id in range(settings.num_blocks):
            count = blocks._reference_counts[block_id]
            check(count == held[block_id], f"block {block_id}: {count} is not {held[block_id]}")
        free = set(blocks._free)
        check(len(free) == blocks.num_free_blocks, "a block is free twice")
        check(not free & held.keys(), "a block is free and held")
        check(len(free) + len(held) == settings.num_blocks - 1, "a block is neither free nor held")
        self._check_published()

    def _check_published(self) -> None:
        """What is published is what lies in memory, and equal ids mean equal prefixes."""
        contents = self.blocks._contents
        for block_hash, block_id in self.blocks._block_of_hash.items():
            content = contents[block_id]
            check(content is not None, f"block {block_id} keeps a hash and has no content")
            assert content is not None
            check(content.hash == block_hash, f"block {block_id} is found by an old hash")
        published = [(c, block_id) for block_id, c in enumerate(contents) if c is not None]
        for content, block_id in sorted(published, key=lambda item: item[0].id):
            state = (content.id, self.device.num_writes[block_id])
            if self._checked.get(block_id) == state:
                continue
            nodes = self.device.memory[block_id]
            check(GARBAGE not in nodes, f"block {block_id} is published before it is written")
            last = nodes[-1]
            tokens = self.prefixes.tokens_of(last, len(nodes))
            check(np.array(tokens, dtype=np.int32).tobytes() == content.tokens, "wrong tokens")
            node = last
            for expected in reversed(nodes):
                check(node == expected, f"block {block_id} holds KV of several prefixes")
                node = self.prefixes.parent[node]
            check(node == self._last_nodes[content.parent_id], "computed after another content")
            check(self._last_nodes.setdefault(content.id, last) == last, "one id, two contents")
            self._checked[block_id] = state


# Random workloads


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Before step `step`: add a request, or abort one (and perhaps ask for it again)."""

    step: int
    request: Request | None = None
    abort_id: int | None = None
    is_asked_again: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    settings: Settings
    model: Model
    salt: int
    events: tuple[Event, ...]


def random_workload(seed: int) -> Workload:
    rng = random.Random(seed)
    block_size = rng.choice((2, 3, 4, 5, 8))
    num_blocks = rng.choice((6, 7, 8, 10, 14, 20, 40))
    # Half of the workloads answer at length in a small cache and so preempt one another.
    is_long = rng.random() < 0.5
    longest = min((num_blocks - 1) * block_size, 60)
    settings = Settings(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=longest if is_long else rng.randint(3, longest),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice((1, 2, 3, 5, 8, 13, 16, 32, 64)),
        max_window_steps=rng.choice((1, 2, 3, 4, 7, 16)),
        max_launches_in_flight=rng.randint(0, 3),
        enable_prefix_caching=rng.random() < 0.85,
        hash_bits=rng.choice((2, 8, 64, 64)),
        eos_token_ids=() if is_long else rng.choice(((), (1,), (1, 3))),
    )
    num_tokens_drawn = rng.choice((1, 2, 4))  # few, so that prefixes coincide
    stems = [
        [rng.randrange(num_tokens_drawn) for _ in range(settings.max_model_len)]
        for _ in range(rng.randint(1, 3))
    ]
    events = []
    prompt: list[int] = []
    for request_id in range(rng.randint(1, 16)):
        if not prompt or rng.random() > 0.2:  # else the one before, once more
            length = rng.randint(1, max(settings.max_model_len // (4 if is_long else 1), 1))
            if rng.random() < 0.4:
                length = max(length // block_size, 1) * block_size
            prompt = rng.choice(stems)[:length]
            prompt += [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
        bad = rng.choice((VOCAB_SIZE, -1, 2**31)) if rng.random() < 0.03 else None
        max_tokens = rng.choice((None, None, None, 30) if is_long else (None, None, 1, 2, 5, 17))
        min_tokens = rng.choice((0, 0, 0, 1, 4))
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt if bad is None else [*prompt, bad],
            sampling=SamplingParams(
                temperature=rng.choice((0.0, 1.0)),
                seed=rng.choice((0, 0, 1, 2**63 + 7)),
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens or min_tokens),
                stop_token_ids=(2, 5) if rng.random() < (0.1 if is_long else 0.4) else (),
                ignore_eos=rng.random() < 0.2,
            ),
            reports_tokens=rng.random() < 0.3,
        )
        step = 0 if rng.random() < 0.6 else rng.randint(0, 30)
        events.append(Event(step=step, request=request))
        if rng.random() < 0.15:
            events.append(
                Event(
                    step=step + rng.randint(0, 12),
                    abort_id=request_id,
                    is_asked_again=rng.random() < 0.3,
                )
            )
    return Workload(
        settings=settings,
        model=Model(nan_permille=rng.choice((0, 0, 2, 30))),
        salt=seed,
        events=tuple(sorted(events, key=lambda event: event.step)),
    )


def run_workload(
    workload: Workload,
    *,
    block_manager_class: type[BlockManager] = BlockManager,
    scheduler_class: type[Scheduler] = Scheduler,
    world_class: type[World] = World,
) -> World:
    world = world_class(
        workload.settings,
        workload.model,
        salt=workload.salt,
        block_manager_class=block_manager_class,
        scheduler_class=scheduler_class,
    )
    requests = {
        event.request.request_id: event.request for event in workload.events if event.request
    }
    expected = set(requests)
    events = deque(workload.events)
    step = 0
    while events:
        if not world.scheduler.has_work:
            step = max(step, events[0].step)
        while events and events[0].step <= step:
            event = events.popleft()
            if event.request:
                world.add(event.request)
            elif event.abort_id is not None and event.abort_id not in world.outputs:
                world.abort(event.abort_id)
                expected.discard(event.abort_id)
                if event.is_asked_again:
                    world.add(requests[event.abort_id])
                    expected.add(event.abort_id)
        step += 1
        world.step()
    world.finish()
    check(world.outputs.keys() == expected, "not every request ended exactly once")
    return world


@dataclass(slots=True)
class Coverage:
    """What a set of workloads has been through, so that a generator gone dull is seen."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, world: World) -> None:
        stats, settings = world.scheduler.stats, world.settings
        prefills = [b for b in world.batches if isinstance(b, PrefillBatch)]
        windows = [b for b in world.batches if isinstance(b, DecodeBatch)]
        self.counts.update(
            preemptions=stats.num_preemptions,
            cached_tokens=stats.num_cached_tokens,
            chunks=sum(not b.is_last_chunk.all() for b in prefills),
            shared_launches=sum(len(b.slots) > 1 for b in prefills),
            long_windows=sum(b.num_steps > 4 for b in windows),
            aborts_in_flight=world.num_aborts_in_flight,
            in_flight=settings.max_launches_in_flight > 0,
            nan=sum(
                isinstance(o, Failure) and o.code == "nan_logits" for o in world.outputs.values()
            ),
            refused=sum(
                isinstance(o, Failure) and o.code != "nan_logits" for o in world.outputs.values()
            ),
            stopped=sum(
                isinstance(o, Completion) and o.finish_reason == "stop"
                for o in world.outputs.values()
            ),
        )


def run_workloads(seeds: range) -> Coverage:
    coverage = Coverage()
    for seed in seeds:
        try:
            coverage.add(run_workload(random_workload(seed)))
        except Exception as error:
            error.add_note(f"with run_workload(random_workload({seed}))")
            raise
    return coverage


@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_random_workloads_answer_as_the_model_alone_and_keep_every_invariant(first: int) -> None:
    coverage = run_workloads(range(first, first + 250))
    assert len(coverage.counts) == 10
    assert min(coverage.counts.values()) >= 20, coverage.counts


@pytest.mark.long
@pytest.mark.parametrize("first", range(2000, 22000, 1000))
def test_20000_random_workloads_answer_as_the_model_alone(first: int) -> None:
    run_workloads(range(first, first + 1000))


# Mistakes made on purpose: the oracle must see each of them


class PublishesOneBlockTooEarly(BlockManager):
    def publish(
        self, block_table: list[int], token_ids: TokenIds, hashes: list[int], first: int, end: int
    ) -> None:
        end = min(end + 1, len(hashes), len(block_table))
        super().publish(block_table, token_ids, hashes, first, end)


class KeepsTheContentOfAReusedBlock(BlockManager):
    def allocate(self, num_blocks: int) -> list[int]:
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
        return block_ids


class KeepsTheHashOfAReusedBlock(BlockManager):
    def allocate(self, num_blocks: int) -> list[int]:
        kept = dict(self._block_of_hash)
        block_ids = super().allocate(num_blocks)
        self._block_of_hash.update(kept)
        return block_ids


class TrustsTheHash(BlockManager):
    def find_prefix(self, token_ids: TokenIds, hashes: list[int]) -> list[int]:
        found = []
        for block_hash in hashes[: (len(token_ids) - 1) // self.block_size]:
            if block_hash not in self._block_of_hash:
                break
            found.append(self._block_of_hash[block_hash])
        return found


class TrustsTheTokensWhateverCameBefore(BlockManager):
    def find_prefix(self, token_ids: TokenIds, hashes: list[int]) -> list[int]:
        found = TrustsTheHash.find_prefix(self, token_ids, hashes)  # type: ignore[arg-type]
        for index, block_id in enumerate(found):
            content = self._contents[block_id]
            if content is None or content.tokens != self._tokens_of(token_ids, index):
                return found[:index]
        return found


class ReleasesSharedBlocksTwice(BlockManager):
    def release(self, block_ids: list[int]) -> None:
        super().release(block_ids)
        super().release([b for b in block_ids if self._reference_counts[b] > 0])


class MayCacheEveryToken(BlockManager):
    def find_prefix(self, token_ids: TokenIds, hashes: list[int]) -> list[int]:
        return super().find_prefix(np.append(token_ids, 0).astype(np.int32), hashes)


class PublishesWhatIsOnlyPlanned(RunningSet):
    def publish(self, sequence: Sequence) -> None:
        computed, sequence.num_computed_tokens = sequence.num_computed_tokens, sequence.num_tokens
        super().publish(sequence)
        sequence.num_computed_tokens = computed


class LosesTheLastTokenOfAPreempted(PrefillQueue):
    def preempt(self, sequence: Sequence) -> None:
        super().preempt(sequence)
        sequence.num_tokens -= 1


class CopiesNothingForTwins(PrefillQueue):
    def _plan_twins(self, leaders: list[Sequence], twins: list[tuple[Sequence, int]]) -> Twins:
        nothing = np.zeros(0, dtype=np.int32)
        return replace(super()._plan_twins(leaders, twins), sources=nothing, targets=nothing)


class SharesTheLastBlockOfTwins(PrefillQueue):
    def _admit_twin_of(self, leader: Sequence) -> Sequence | None:
        twin = super()._admit_twin_of(leader)
        if twin is not None and leader.num_tokens % self._block_manager.block_size:
            new_blocks = self._running._new_blocks
            [own] = new_blocks[-1:]
            new_blocks[-1] = (own[0], own[1], leader.block_table[-1])
        return twin


BLOCK_MANAGER_MISTAKES: list[tuple[type[BlockManager], int]] = [
    (PublishesOneBlockTooEarly, 64),
    (KeepsTheContentOfAReusedBlock, 64),
    (KeepsTheHashOfAReusedBlock, 64),
    (TrustsTheHash, 2),
    (TrustsTheTokensWhateverCameBefore, 2),
    (ReleasesSharedBlocksTwice, 64),
    (MayCacheEveryToken, 64),
]


def put_into_schedulers(mistake: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers are made with a mistaken part, instead of the one it is derived from."""
    monkeypatch.setattr(scheduler, mistake.__bases__[0].__name__, mistake)


def assert_the_oracle_sees(mistake: str, hash_bits: int, **classes: Any) -> None:
    for seed in range(200):
        workload = random_workload(seed)
        settings = replace(workload.settings, hash_bits=hash_bits, enable_prefix_caching=True)
        try:
            run_workload(replace(workload, settings=settings), **classes)
        except OracleError:
            return
        except (AssertionError, IndexError, KeyError, ValueError):
            continue  # the core tripped over it before the oracle could look
    pytest.fail(f"200 workloads do not tell {mistake} from the real one")


@pytest.mark.parametrize(("mistake", "hash_bits"), BLOCK_MANAGER_MISTAKES)
def test_the_oracle_sees_every_mistake_of_a_block_manager(
    mistake: type[BlockManager], hash_bits: int
) -> None:
    assert_the_oracle_sees(mistake.__name__, hash_bits, block_manager_class=mistake)


@pytest.mark.parametrize(
    "mistake",
    [
        PublishesWhatIsOnlyPlanned,
        LosesTheLastTokenOfAPreempted,
        CopiesNothingForTwins,
        SharesTheLastBlockOfTwins,
    ],
)
def test_the_oracle_sees_every_mistake_of_a_scheduler(
    mistake: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_schedulers(mistake, monkeypatch)
    assert_the_oracle_sees(mistake.__name__, 64)


# One by one


def prefill_sizes(world: World) -> list[int]:
    return [len(batch.token_ids) for batch in world.batches if isinstance(batch, PrefillBatch)]


def window_sizes(world: World) -> list[int]:
    return [batch.num_steps for batch in world.batches if isinstance(batch, DecodeBatch)]


def num_blocks_found(world: World, prompt: list[int]) -> int:
    token_ids, hashes = np.array(prompt, dtype=np.int32), list[int]()
    world.blocks.hash_blocks(token_ids, hashes)
    return len(world.blocks.find_prefix(token_ids, hashes))


def test_a_cached_prompt_of_whole_blocks_still_computes_its_last_block() -> None:
    for num_blocks in (1, 2, 5):
        world = World(Settings(block_size=4))
        prompt = [0, 1, 2, 3] * num_blocks
        world.ask(0, prompt, max_tokens=1)
        world.run()
        world.ask(1, prompt, max_tokens=1)
        world.finish()
        assert prefill_sizes(world) == [4 * num_blocks, 4]
        completion = world.outputs[1]
        assert isinstance(completion, Completion)
        assert completion.num_cached_tokens == 4 * (num_blocks - 1)


def test_a_block_is_found_only_after_a_launch_has_written_it() -> None:
    world = World(Settings(block_size=4, max_num_batched_tokens=4))
    prompt = [0, 1, 2, 3, 4] * 3
    world.ask(0, prompt)
    assert num_blocks_found(world, prompt) == 0
    for num_chunks in (1, 2, 3):
        world.step()
        assert num_blocks_found(world, prompt) == num_chunks


def test_a_block_of_generated_tokens_is_found_only_after_its_last_kv_is_written() -> None:
    world = World(Settings(block_size=4, max_window_steps=1))
    world.ask(0, [0, 0, 0])
    generated = Truth(
        Request(request_id=0, prompt_token_ids=[0, 0, 0], sampling=SamplingParams()),
        world.settings,
        world.prefixes,
        world.model,
    ).tokens
    world.step()
    assert num_blocks_found(world, generated) == 0  # 4 tokens are known, the KV of 3 is written
    world.step()
    assert num_blocks_found(world, generated) == 1


def test_a_reused_block_is_not_found_by_what_it_held_before() -> None:
    world = World(Settings(num_blocks=6, block_size=4, max_model_len=20))
    world.ask(0, [0] * 18, max_tokens=1)
    world.run()
    assert num_blocks_found(world, [0] * 18) == 4
    world.ask(1, [1] * 18, max_tokens=1)
    world.run()
    assert num_blocks_found(world, [0] * 18) == 0
    assert num_blocks_found(world, [1] * 18) == 4
    world.ask(2, [0] * 18, max_tokens=1)
    world.finish()
    assert prefill_sizes(world) == [18, 18, 18]


@pytest.mark.parametrize("num_prompts", [2, 3, 8])
def test_a_prefix_shared_within_a_launch_is_computed_once(num_prompts: int) -> None:
    world = World(Settings(block_size=4, max_num_seqs=8))
    for i in range(num_prompts):
        world.ask(i, [0, 1, 2, 3, 3, 2, 1, 0, i % VOCAB_SIZE], max_tokens=2)
    world.finish()
    assert prefill_sizes(world) == [9 + num_prompts - 1]


@pytest.mark.parametrize(("length", "num_copies"), [(8, 0), (7, 2), (3, 2)])
def test_equal_prompts_within_a_launch_are_computed_once(length: int, num_copies: int) -> None:
    world = World(Settings(block_size=4, max_num_seqs=3))
    for i in range(3):
        world.ask(i, [0, 1, 2, 3, 3, 2, 1, 0][:length], max_tokens=2)
    world.finish()
    assert prefill_sizes(world) == [length]
    [twins] = [b.twins for b in world.batches if isinstance(b, PrefillBatch)]
    assert twins is not None
    assert twins.leaders.tolist() == [0, 0]
    assert len(twins.targets) == num_copies
    cached = [o.num_cached_tokens for o in world.outputs.values() if isinstance(o, Completion)]
    found = (length - 1) // 4 * 4
    assert cached == [0, found, found], "as if they had come later"


def test_twins_wait_until_a_chunked_prompt_is_done() -> None:
    world = World(Settings(block_size=4, max_num_seqs=3, max_num_batched_tokens=5))
    for i in range(3):
        world.ask(i, [0, 1, 2, 3, 3, 2, 1], max_tokens=2)
    world.finish()
    assert prefill_sizes(world) == [5, 2]


def test_without_prefix_caching_nothing_is_shared_and_nothing_is_found() -> None:
    world = World(Settings(block_size=4, enable_prefix_caching=False))
    for i in range(2):
        world.ask(i, [0] * 9, max_tokens=2)
    world.finish()
    assert prefill_sizes(world) == [18]
    assert world.scheduler.stats.num_cached_tokens == 0


def test_a_chunk_is_cut_from_what_the_cache_leaves_over() -> None:
    world = World(Settings(block_size=4, max_num_batched_tokens=6))
    world.ask(0, [0] * 9, max_tokens=1)
    world.run()
    world.ask(1, [0] * 8 + [1] * 10, max_tokens=1)
    world.finish()
    starts = [b.start_positions.tolist() for b in world.batches if isinstance(b, PrefillBatch)]
    assert prefill_sizes(world) == [6, 3, 6, 4]
    assert starts == [[0], [6], [8], [14]]


def test_a_prompt_is_chunked_where_the_launch_is_full_and_goes_on_first_in_the_next() -> None:
    world = World(Settings(max_num_batched_tokens=10, enable_prefix_caching=False))
    for i, length in enumerate((7, 8, 9)):
        world.ask(i, [i] * length, max_tokens=1)
    world.finish()
    prefills = [b for b in world.batches if isinstance(b, PrefillBatch)]
    assert [b.query_lens.tolist() for b in prefills] == [[7, 3], [5, 5], [4]]
    assert [b.is_last_chunk.tolist() for b in prefills] == [[True, False], [True, False], [True]]


def crowd(**changes: Any) -> World:
    """Two that fit together only for a while, and one that waits."""
    settings = Settings(
        num_blocks=7, block_size=2, max_model_len=12, max_num_seqs=2, max_window_steps=1
    )
    world = World(replace(settings, **changes), Ones())
    for i in range(3):
        world.ask(i, [i, i], max_tokens=10)
    return world


def test_a_preempted_sequence_is_prefilled_again_with_every_token_it_has() -> None:
    world = crowd(enable_prefix_caching=False)
    while world.scheduler.stats.num_preemptions == 0:
        world.step()
    again = len(prefill_sizes(world))
    world.finish()
    assert prefill_sizes(world)[:again] == [2 + 2]
    assert prefill_sizes(world)[again] > 2  # its prompt and what it had generated


def test_the_sequence_admitted_last_is_preempted_and_goes_to_the_front_of_the_queue() -> None:
    world = crowd()
    world.step()
    assert (world.running_ids, world.waiting_ids) == ([0, 1], [2])
    while world.scheduler.stats.num_preemptions == 0:
        world.step()
    assert (world.running_ids, world.waiting_ids) == ([0], [1, 2])
    world.finish()
    assert list(world.outputs) == [0, 1, 2]


def test_a_preempted_sequence_counts_its_prompt_and_its_cached_tokens_once() -> None:
    world = crowd()
    world.finish()
    stats = world.scheduler.stats
    assert stats.num_preemptions > 0
    assert stats.num_prompt_tokens == 3 * 2
    assert stats.num_cached_tokens == 0
    assert stats.num_completion_tokens == 3 * 10


def test_nobody_is_preempted_while_tokens_are_in_flight() -> None:
    # World.step checks what is lost; here it is enough that it happens with launches unread.
    world = crowd(max_launches_in_flight=3)
    world.finish()
    assert world.scheduler.stats.num_preemptions > 0


def test_a_lone_sequence_fills_the_whole_cache_and_never_preempts_itself() -> None:
    world = World(Settings(num_blocks=6, block_size=2, max_model_len=10, max_num_seqs=4))
    world.ask(0, [0])
    world.finish()
    completion = world.outputs[0]
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 9
    assert world.scheduler.stats.num_preemptions == 0


def test_a_prompt_that_can_never_fit_is_a_failure_and_the_others_run() -> None:
    world = World(Settings(num_blocks=6, block_size=4, max_model_len=20))
    world.ask(0, [0] * 5)
    failure = world.ask(1, [0] * 20)
    world.ask(2, [0] * 19)
    world.finish()
    assert failure == Failure(
        request_id=1,
        code="prompt_too_long",
        message="the prompt has 20 tokens; at most 19 leave room for one more",
    )
    assert isinstance(world.outputs[0], Completion)
    assert isinstance(world.outputs[2], Completion)


def test_max_num_seqs_bounds_all_that_run_and_not_one_prefill() -> None:
    world = World(Settings(max_num_seqs=3, num_blocks=200))
    for i in range(10):
        world.ask(i, [i % VOCAB_SIZE] * 3, max_tokens=10)
    most = 0
    while world.scheduler.has_work:
        world.step()
        most = max(most, world.scheduler.num_running)
    assert most == 3
    assert max(len(batch.slots) for batch in world.batches) == 3


def test_a_window_ends_at_the_next_certain_finish() -> None:
    world = World(Settings(max_window_steps=16), Ones())
    world.ask(0, [0], max_tokens=4)
    world.ask(1, [1], max_tokens=9)
    world.finish()
    assert window_sizes(world) == [3, 5]


def test_a_window_is_halved_until_its_blocks_are_free() -> None:
    world = World(
        Settings(num_blocks=7, block_size=2, max_model_len=12, max_window_steps=8), Ones()
    )
    for i in range(2):
        world.ask(i, [i, i])
    world.step()
    assert world.blocks.num_free_blocks == 4
    world.step()
    assert window_sizes(world) == [4]
    assert world.blocks.num_free_blocks == 0
    world.finish()


@pytest.mark.parametrize("max_launches_in_flight", [0, 1, 3])
def test_what_comes_after_a_stop_seen_one_window_late_is_dropped(
    max_launches_in_flight: int,
) -> None:
    world = World(Settings(max_launches_in_flight=max_launches_in_flight), Ones())
    world.ask(0, [0] * 8, stop_token_ids=(5,))
    world.ask(1, [2] * 8, max_tokens=20)
    world.finish()
    first, second = world.outputs[0], world.outputs[1]
    assert isinstance(first, Completion)
    assert isinstance(second, Completion)
    assert (first.token_ids.tolist(), first.finish_reason) == ([1, 1, 5], "stop")
    assert second.token_ids.tolist() == [1, 1, 5] + [1] * 17
    num_windows = sum(isinstance(b, DecodeBatch) and len(b.slots) == 2 for b in world.batches)
    assert num_windows == 1 + max_launches_in_flight


def test_a_stop_at_the_very_limit_is_a_stop() -> None:
    world = World(Settings(), Ones())
    world.ask(0, [0] * 8, stop_token_ids=(5,), max_tokens=3)
    world.finish()
    completion = world.outputs[0]
    assert isinstance(completion, Completion)
    assert completion.finish_reason == "stop"


def test_new_tokens_are_reported_as_they_come_and_only_to_who_asked() -> None:
    world = World(Settings(), Ones())
    for i, reports_tokens in enumerate((True, False)):
        world.add(
            Request(
                request_id=i,
                prompt_token_ids=[i],
                sampling=SamplingParams(max_tokens=6),
                reports_tokens=reports_tokens,
            )
        )
    reported = []
    while world.scheduler.has_work:
        reported += [o for o in world.step() if isinstance(o, NewTokens)]
    assert {output.request_id for output in reported} == {0}
    assert [len(output.token_ids) for output in reported] == [1, 4]  # the 6th: in the Completion


def test_an_aborted_request_gives_no_output_and_gives_back_what_it_held() -> None:
    world = World(Settings(max_num_seqs=2, max_launches_in_flight=2), Ones())
    for i in range(3):
        world.ask(i, [i] * 5, max_tokens=20)
    for _ in range(2):
        world.step()
    world.abort(0)  # runs, with launches in flight
    world.abort(2)  # waits
    world.abort(2)
    world.abort(77)
    world.finish()
    assert list(world.outputs) == [1]


def test_a_request_id_may_be_used_again_while_launches_of_its_aborted_holder_are_in_flight() -> (
    None
):
    world = World(Settings(max_launches_in_flight=3), Ones())
    world.ask(0, [0] * 5, max_tokens=20)
    for _ in range(3):
        world.step()
    world.abort(0)
    world.ask(0, [2] * 3, max_tokens=2)
    world.finish()
    completion = world.outputs[0]
    assert isinstance(completion, Completion)
    assert completion.num_prompt_tokens == 3
    assert completion.token_ids.tolist() == [1, 1]


def test_aborting_a_half_prefilled_prompt_lets_the_next_one_in() -> None:
    world = World(Settings(max_num_batched_tokens=4))
    world.ask(0, [0] * 12)
    world.ask(1, [1] * 3, max_tokens=1)
    world.step()
    world.abort(0)
    world.finish()
    assert list(world.outputs) == [1]


def test_a_row_of_nan_fails_alone() -> None:
    class NanAfterThree(Ones):
        def next_token(
            self, prefixes: Prefixes, prefix: int, seed: int, forbidden: Seq[int]
        ) -> int | None:
            return None if 3 in prefixes.tokens_of(prefix, prefixes.length[prefix]) else 1

    world = World(Settings(), NanAfterThree())
    for i in range(5):
        world.ask(i, [i] * 6, max_tokens=6)
    world.finish()
    failed = [i for i, output in world.outputs.items() if isinstance(output, Failure)]
    assert failed == [3]
    failure = world.outputs[3]
    assert isinstance(failure, Failure)
    assert failure.message == "the logits after 6 tokens are not finite"


def test_a_failure_names_the_length_at_which_the_logits_went_bad() -> None:
    class NanAtTen(Ones):
        def next_token(
            self, prefixes: Prefixes, prefix: int, seed: int, forbidden: Seq[int]
        ) -> int | None:
            return None if prefixes.length[prefix] == 10 else 1

    for max_window_steps in (1, 4, 16):
        world = World(Settings(max_window_steps=max_window_steps), NanAtTen())
        world.ask(0, [0] * 6)
        world.finish()
        failure = world.outputs[0]
        assert isinstance(failure, Failure)
        assert failure.message == "the logits after 10 tokens are not finite"


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "words"),
    [
        ([], {}, "bad_token_ids", "no tokens"),
        ([0, 30], {}, "bad_token_ids", "token id 30"),
        ([0, -1], {}, "bad_token_ids", "token id -1"),
        ([0, 2**40], {}, "bad_token_ids", "token id 1099511627776"),
        ([0, 2**70], {}, "bad_token_ids", "token id 1180591620717411303424"),
        ([0] * 40, {}, "prompt_too_long", "40 tokens"),
        ([0], {"stop_token_ids": tuple(range(17))}, "bad_parameters", "17 stop token ids"),
    ],
)
def test_a_request_that_can_never_run_comes_back_as_a_failure(
    prompt: list[int], sampling: dict[str, Any], code: str, words: str
) -> None:
    world = World(Settings(vocab_size=30))
    failure = world.scheduler.add(
        Request(request_id=7, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))
    )
    assert failure is not None
    assert (failure.request_id, failure.code) == (7, code)
    assert words in failure.message
    assert not world.scheduler.has_work


def test_stop_token_ids_that_are_eos_already_count_once() -> None:
    world = World(Settings(vocab_size=30, eos_token_ids=(1, 2)))
    ids = (2, 1, 1, *range(3, 3 + MAX_STOP_TOKEN_IDS - 2))
    assert world.ask(0, [0], stop_token_ids=ids) is None


def test_nothing_to_do_is_no_launch() -> None:
    world = World(Settings())
    assert not world.scheduler.has_work
    assert world.scheduler.schedule() is None
    assert world.step() == []
