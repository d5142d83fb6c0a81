"""The scheduler with guided rows, against the oracle of test_scheduler.py and tiny grammars.

A tiny grammar says after any tokens what may follow, by a hash of them, and so what a request must
answer is known before anything runs: with its thought, its forced tokens and its end.
"""

import random
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanovllm_cli.core import guided
from nanovllm_cli.core.batch import (
    DRAWN_LAST,
    Admission,
    Batch,
    BatchResult,
    DecodeBatch,
    ForcedTokens,
    ForwardBatch,
    Int32,
    PrefillBatch,
    SampleBatch,
)
from nanovllm_cli.core.grammar import GrammarError
from nanovllm_cli.core.guided import RowMasks
from nanovllm_cli.core.half_steps import HalfSteps
from nanovllm_cli.core.prefill_queue import PrefillQueue
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.scheduler import Scheduler
from nanovllm_cli.core.sequence import Sequence
from nanovllm_cli.core.unread_launches import UnreadLaunches

from .test_scheduler import (
    Device,
    Event,
    Model,
    Prefixes,
    Settings,
    Slot,
    Truth,
    Workload,
    World,
    _empty_result,
    check,
    mix,
    put_into_schedulers,
    random_workload,
    run_workload,
    slots_of,
)

VOCAB_SIZE = 6
EOS = 5
END_THINK = 4


class TinyMatcher:
    """Stands for core/grammar.py's Matcher."""

    def __init__(self, grammar: str) -> None:
        seed, self._kind = grammar.split()
        self._state = int(seed)
        self._has_ended = False
        self._before: list[tuple[int, bool]] = []
        self.error = ""

    @property
    def allowed(self) -> set[int]:
        state = mix(self._state)
        draw, token = (state >> 20) % 100, (state >> 40) % EOS
        if self.is_finished:
            return {EOS}
        if draw < 72 or self._kind == "forced":
            return {token}
        if draw < 84:
            return {token, (token + 1 + state % 3) % EOS}
        if draw < 92:
            return {token, EOS}
        return set(range(EOS)) if draw < 98 or self._kind == "live" else set()

    @property
    def is_finished(self) -> bool:
        return self._has_ended or (self._kind == "live" and (mix(self._state) >> 20) % 100 >= 97)

    def accept(self, token_ids: Iterable[int]) -> bool:
        for token_id in token_ids:
            check(token_id in self.allowed, f"{token_id} is not of {self.allowed}")
            self._before.append((self._state, self._has_ended))
            self._state = mix(self._state + token_id + 1)
            self._has_ended |= token_id == EOS
        return True

    def take_back(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._state, self._has_ended = self._before.pop()

    def copy(self) -> "TinyMatcher":
        copied = TinyMatcher(f"{self._state} {self._kind}")
        copied._has_ended = self._has_ended
        return copied

    @property
    def num_forced_bytes(self) -> int:
        return 5 * len(self.forced_token_ids())

    def forced_token_ids(self) -> list[int]:
        ahead, forced = self.copy(), []
        while len(ahead.allowed) == 1 and not ahead.is_finished and len(forced) < 50:
            forced += ahead.allowed
            ahead.accept(forced[-1:])
        return forced


class TinyMasks:
    """Stands for core/grammar_masks.py's Masks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._matchers: list[TinyMatcher] = []

    def add(self, matcher: TinyMatcher) -> None:
        self._matchers.append(matcher)
        check(len(self._matchers) <= self._most, "more masks than there is room for")

    def start(self) -> None:
        pass

    def result(self) -> Int32:
        return TinyGrammars().masks(self._matchers)


class TinyGrammars:
    """Stands for core/grammar.py's Grammars."""

    eos_token_ids = (EOS,)

    def matcher(self, grammar: str) -> TinyMatcher:
        if grammar == "bad":
            raise GrammarError("it is bad")
        return TinyMatcher(grammar)

    def start_masks(self, most: int) -> "TinyMasks":
        return TinyMasks(most)

    def masks(self, matchers: Seq[TinyMatcher]) -> Int32:
        words = [[sum(1 << token for token in matcher.allowed)] for matcher in matchers]
        return np.array(words, dtype=np.int32)


class GuidedScheduler(Scheduler):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, grammars=TinyGrammars(), **settings)  # type: ignore[arg-type]


class GuidedTruth(Truth):
    """Thinks freely, where it thinks; then one token after the other, each of what is allowed."""

    def __init__(
        self, request: Request, settings: Settings, prefixes: Prefixes, model: Model
    ) -> None:
        sampling = request.sampling
        if sampling.grammar is None:
            super().__init__(request, settings, prefixes, model)
            return
        self.grammar_after = sampling.grammar_after_token_id
        stops = (*sampling.stop_token_ids, EOS)
        if self.grammar_after is not None:
            thinking = replace(
                sampling,
                grammar=None,
                ignore_eos=True,
                stop_token_ids=tuple({*stops, self.grammar_after}),
            )
            request_of_thought = replace(request, sampling=thinking)
            super().__init__(request_of_thought, settings, prefixes, model)
            is_over = self.finish_reason == "stop"
            if not is_over or self.tokens[-1] in sampling.stop_token_ids:
                self.request, self.stops = request, {*stops}
                return
            self.tokens[-1] = self.grammar_after
            before = self.nodes[-2]
            self.nodes[-1] = prefixes.extend(before, self.grammar_after)
        else:
            nothing = replace(sampling, grammar=None, max_tokens=1, min_tokens=0)
            super().__init__(replace(request, sampling=nothing), settings, prefixes, model)
            del self.tokens[len(self.prompt) :], self.nodes[len(self.prompt) :]
            self.min_length = len(self.prompt) + sampling.min_tokens
            self.max_length = settings.max_model_len
            if sampling.max_tokens is not None:
                self.max_length = min(self.max_length, len(self.prompt) + sampling.max_tokens)
        self.request, self.stops = request, {*stops}
        self.finish_reason = "length"
        self._follow(TinyMatcher(sampling.grammar), prefixes, model)

    def _follow(self, matcher: TinyMatcher, prefixes: Prefixes, model: Model) -> None:
        sampling = self.request.sampling
        while len(self.tokens) < self.max_length:
            allowed = matcher.allowed
            if len(self.tokens) < self.min_length:
                allowed = allowed - self.stops
            if not allowed:
                self.finish_reason = "dead end"
                return
            forbidden = tuple(set(range(VOCAB_SIZE)) - allowed)
            token = model.next_token(prefixes, self.nodes[-1], sampling.seed, forbidden)
            assert token is not None
            matcher.accept([token])
            self._add(token, prefixes)
            if token in self.stops:
                self.finish_reason = "stop"
                return
            if matcher.is_finished and len(self.tokens) < self.max_length:
                self._add(EOS, prefixes)
                self.finish_reason = "stop"
                return

    def _add(self, token: int, prefixes: Prefixes) -> None:
        self.tokens.append(token)
        self.nodes.append(prefixes.extend(self.nodes[-1], token))


class GuidedDevice(Device):
    """Knows half steps and masks, too."""

    def __init__(self, settings: Settings, prefixes: Prefixes, model: Model) -> None:
        super().__init__(settings, prefixes, model)
        self._masks: dict[int, int] = {}  # of the launch, by row
        self._forwarded: list[int] | None = None
        self.half_steps = self.forced_steps = 0

    def launch(self, batch: Batch, owners: dict[int, Truth]) -> BatchResult | None:
        needs = None if isinstance(batch, ForwardBatch) else batch.needs
        masks = None if needs is None else needs.masks
        self._masks = {}
        if masks is not None:
            self._masks = dict(zip(masks.rows.tolist(), masks.words[:, 0].tolist(), strict=True))
        if isinstance(batch, ForwardBatch):
            self.half_steps += 1
            self._forward(batch)
            return None
        if isinstance(batch, SampleBatch):
            return self._sample(batch)
        if isinstance(batch, DecodeBatch):
            check(not self._masks, "a window with masks")
        return self.run(batch, owners)

    def _forward(self, batch: ForwardBatch) -> None:
        update = batch.block_table_update
        columns = (update.slots.tolist(), update.indices.tolist(), update.block_ids.tolist())
        for slot_id, index, block_id in zip(*columns, strict=True):
            self.slots[slot_id].table[index] = block_id
        self._forwarded = batch.slots.tolist()
        if batch.forced is not None:
            self._force(batch.forced, [self.slots[i] for i in self._forwarded])
        live = [slot for i in self._forwarded if not (slot := self.slots[i]).is_finished]
        for slot in live:
            self._store(slot, slot.length - 1, slot.prefix)
        for slot in live:
            self._read(slot, slot.length)

    def _force(self, forced: ForcedTokens, slots: list[Slot]) -> None:
        """Let slots go on with tokens that were not drawn; all but the last are stored here."""
        self.forced_steps += 1
        ends = np.cumsum(forced.query_lens)
        parts = np.split(forced.token_ids, ends[:-1])
        check(ends[-1] == len(forced.token_ids), "tokens of no slot")
        for slot, part, start in zip(slots, parts, forced.start_positions.tolist(), strict=True):
            if part.tolist() == [DRAWN_LAST]:
                check(slot.is_finished or start == slot.length - 1, "another token than the last")
                continue
            end = start + len(part)
            check(part.tolist() == slot.truth.tokens[start:end], "other tokens are forced")
            for position in range(start, end - 1):
                self._store(slot, position, slot.truth.nodes[position])
            slot.length, slot.is_finished = end, False
            slot.prefix = slot.truth.nodes[end - 1]

    def _sample(self, batch: SampleBatch) -> BatchResult:
        check(self._forwarded == batch.slots.tolist(), "other rows than those of the first half")
        self._forwarded = None
        result = _empty_result(len(batch.slots), 1)
        for row, slot_id in enumerate(batch.slots.tolist()):
            if not self.slots[slot_id].is_finished:
                self._advance(self.slots[slot_id], result, row, 0)
        return result

    def _admit(self, admission: Admission, truth: Truth) -> None:
        stops = set(admission.stop_token_ids)
        sampling = truth.request.sampling
        if sampling.grammar is not None and sampling.grammar_after_token_id in stops:
            stops = {*truth.stops}  # while it thinks
        super()._admit(replace(admission, stop_token_ids=tuple(stops)), truth)
        self.slots[admission.slot].stops = admission.stop_token_ids

    def _advance(self, slot: Slot, result: BatchResult, row: int, step: int) -> None:
        mask = self._masks.get(row)
        if mask is None:
            super()._advance(slot, result, row, step)
            return
        banned = {token for token in range(VOCAB_SIZE) if not mask >> token & 1}
        if slot.length < slot.min_length:
            banned |= set(slot.stops)
        if len(banned) == VOCAB_SIZE:
            result.num_tokens[row], result.is_nan[row], slot.is_finished = 1, True, True
            return
        free, slot.min_length = slot.min_length, 0
        stops, slot.stops = slot.stops, tuple(banned)
        slot.min_length = slot.length + 1  # what is banned is what stops, before it may
        super()._advance(slot, result, row, step)
        slot.min_length, slot.stops = free, stops
        is_stopped = slot.last_token in stops
        result.is_stopped[row] = is_stopped
        slot.is_finished = is_stopped or slot.length >= slot.max_length


class GuidedWorld(World):
    truth_class = GuidedTruth
    device_class = GuidedDevice

    def _launch(self, batch: Batch) -> None:
        assert isinstance(self.device, GuidedDevice)
        owners: dict[int, Truth] = {}
        if not isinstance(batch, ForwardBatch):
            for sequence, slot in zip(self.launched, slots_of(batch), strict=True):
                if sequence is not None:
                    owners[slot] = self.truths[sequence.request.request_id]
        result = self.device.launch(batch, owners)
        if result is not None:
            self._results.append(result)

    def _check_batch(self, batch: Batch) -> None:
        if not isinstance(batch, ForwardBatch | SampleBatch):
            super()._check_batch(batch)

    def _check_output(self, output: Output) -> None:
        truth = self.truths.get(output.request_id)
        check(truth is not None, f"{output} of a request that has ended")
        assert truth is not None
        if isinstance(output, NewTokens) or truth.request.sampling.grammar is None:
            super()._check_output(output)
        elif isinstance(output, Failure):
            check(output.code == "grammar_dead_end", output)
            check(truth.finish_reason == "dead end", f"{output} {truth.tokens}")
            check(output.message.endswith(f"first {len(truth.completion)}"), output.message)
            del self.truths[output.request_id]
            self.outputs[output.request_id] = output
        else:
            if output.num_cached_tokens % self.settings.block_size:  # cut to the prompt
                check(output.num_cached_tokens == len(truth.prompt), "num_cached_tokens")
                output = replace(output, num_cached_tokens=0)
            if output.num_cached_tokens == len(truth.prompt):
                output = replace(output, num_cached_tokens=0)
            super()._check_output(output)


def guided_workload(seed: int) -> Workload:
    """A random workload of which most requests have a grammar, some after a thought."""
    workload, rng = random_workload(seed), random.Random(-seed)
    share = rng.choice((0.4, 0.8, 1.0))

    def guide(event: Event) -> Event:
        if event.request is None or rng.random() > share:
            return event
        kind = rng.choice(("live", "live", "any", "forced"))
        sampling = replace(
            event.request.sampling,
            grammar=f"{rng.randrange(4)} {kind}",
            grammar_after_token_id=END_THINK if rng.random() < 0.4 else None,
        )
        return replace(event, request=replace(event.request, sampling=sampling))

    return replace(
        workload,
        settings=replace(workload.settings, eos_token_ids=(EOS,)),
        model=Model(),
        events=tuple(guide(event) for event in workload.events),
    )


def run_guided(seed: int) -> World:
    try:
        return run_workload(
            guided_workload(seed), scheduler_class=GuidedScheduler, world_class=GuidedWorld
        )
    except Exception as error:
        error.add_note(f"with run_guided({seed})")
        raise


def coverage_of(seeds: Iterable[int]) -> Counter[str]:
    """What the workloads have been through, so that a generator gone dull is seen."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        world = run_guided(seed)
        stats = world.scheduler.stats
        ended = world.outputs.values()
        completions = [o for o in ended if isinstance(o, Completion)]
        assert isinstance(world.device, GuidedDevice)
        counts.update(
            forced=stats.num_forced_tokens,
            preemptions=stats.num_preemptions,
            cached_tokens=stats.num_cached_tokens,
            half_steps=world.device.half_steps,
            forced_steps=world.device.forced_steps,
            windows_beside=sum(isinstance(b, DecodeBatch) for b in world.batches)
            * (world.device.half_steps > 0),
            dead_ends=sum(isinstance(o, Failure) and "dead_end" in o.code for o in ended),
            stopped=sum(o.finish_reason == "stop" for o in completions),
            cut=sum(o.finish_reason == "length" for o in completions),
            aborts_in_flight=world.num_aborts_in_flight,
            onto_running_slots=_prefills_onto_running_slots(world.batches),
        )
    return counts


def _prefills_onto_running_slots(batches: Seq[Batch]) -> int:
    """Slots of admissions that go on at a place where no chunk and no cached prefix ends."""
    last: dict[int, int] = {}
    count = 0
    for batch in batches:
        if isinstance(batch, PrefillBatch):
            admitted = {admission.slot for admission in batch.admissions}
            for slot, start in zip(
                batch.slots.tolist(), batch.start_positions.tolist(), strict=True
            ):
                count += slot in admitted and start >= last.get(slot, 1 << 30) > 0
                last[slot] = start
    return count


@pytest.mark.parametrize("first", range(0, 1200, 200))
def test_random_guided_workloads_answer_as_each_request_alone(first: int) -> None:
    counts = coverage_of(range(first, first + 200))
    assert len(counts) == 11
    assert min(counts.values()) >= 10, counts


@pytest.mark.long
@pytest.mark.parametrize("first", range(2000, 12000, 1000))
def test_10000_random_guided_workloads_answer_as_each_request_alone(first: int) -> None:
    coverage_of(range(first, first + 1000))


# Mistakes made on purpose: the oracle must see each of them


class DrawsBeforeItReads(HalfSteps):
    waits_for_tokens = False  # type: ignore[assignment]


class ResumesWithoutAnAdmission(PrefillQueue):
    def _next_resumed(self) -> Sequence | None:
        sequence = super()._next_resumed()
        if sequence is not None:
            self._running._new_admissions.pop()
        return sequence


class StopsAtTheEndOfTheThought(PrefillQueue):
    def resume(self, sequence: Sequence, num_stored_tokens: int) -> None:
        super().resume(sequence, num_stored_tokens)
        sequence.grammar_after = sequence.request.sampling.grammar_after_token_id


class DrawsAfterTheThoughtAsWell(UnreadLaunches):
    def drop(self, sequence: Sequence) -> None:
        sequence.num_in_flight_tokens = 0


class DrawsForcedTokensAsWell(HalfSteps):
    def _force(self, rows: list[Sequence | None], masks: RowMasks) -> None:
        super()._force([*rows], masks)


@pytest.mark.parametrize(
    "mistake",
    [
        DrawsBeforeItReads,
        ResumesWithoutAnAdmission,
        StopsAtTheEndOfTheThought,
        DrawsAfterTheThoughtAsWell,
        DrawsForcedTokensAsWell,
    ],
)
def test_the_oracle_sees_a_scheduler_that(mistake: type, monkeypatch: pytest.MonkeyPatch) -> None:
    put_into_schedulers(mistake, monkeypatch)
    with pytest.raises(AssertionError):  # an OracleError is one
        run_some()


def run_some() -> None:
    for seed in range(300):
        workload = guided_workload(seed)
        run_workload(workload, scheduler_class=GuidedScheduler, world_class=GuidedWorld)


def test_the_oracle_sees_tokens_counted_as_stored_that_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sequence, "set_stored", lambda sequence, num_stored_tokens: None)
    with pytest.raises((AssertionError, IndexError)):
        run_some()


@pytest.mark.parametrize("least", [0, 10**9])
def test_how_many_tokens_are_forced_changes_no_answer(
    least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "LEAST_FORCED_PER_ROW", least)
    if least:
        monkeypatch.setattr(guided, "forced_token_ids", lambda sequence: [])
    assert (coverage_of(range(150))["forced"] > 0) == (least == 0)
