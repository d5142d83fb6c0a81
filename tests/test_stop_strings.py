"""Stop strings are found at the same token however a sequence's tokens arrive, and cut cleanly."""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from nanovllm_cli.stop_strings import StopStrings
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL

TEXTS = (
    "one two three\n\nfour",
    "Stop here. STOP there; stop-stop-stopped",
    "caf\u00e9 \u4f60\u597d \U0001f600\U0001f600 na\u00efve \u043c\u0438\u0440",
    "ababababac aabaab \n\n\n .. ...",
)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(MODEL)


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def pieces(rng: random.Random, ids: Sequence[int]) -> list[Sequence[int]]:
    cuts = sorted(rng.choices(range(len(ids) + 1), k=rng.randrange(len(ids) + 1)))
    return [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)])]


def first_match(
    tokenizer: PromptTokenizer, ids: Sequence[int], stop: tuple[str, ...]
) -> int | None:
    """By the meaning: the fewest tokens whose text holds a stop string."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if any(one in text for one in stop):
            return end
    return None


def found_in(updates: list[Sequence[int]], watcher: StopStrings) -> bool:
    """Whether it says so at last; all updates are given to it."""
    answers = [watcher.add(update) for update in updates]
    assert answers == sorted(answers), "a match is not taken back"
    return answers[-1]


def test_the_answer_is_the_same_however_the_tokens_are_cut_into_updates(
    tokenizer: PromptTokenizer, hugging_face: Any
) -> None:
    rng = random.Random(0)
    num_found = 0
    for number in range(300):
        text = rng.choice(TEXTS)
        if number % 2:  # as one would write it, or byte by byte
            ids = hugging_face.encode(text, add_special_tokens=False)
        else:
            alphabet = hugging_face.encode(text, add_special_tokens=False) + list(range(0, 256, 5))
            ids = rng.choices(alphabet, k=40)
        # Special tokens have no text, but they count as tokens.
        for _ in range(rng.choice((0, 0, 3, 30))):
            ids.insert(rng.randrange(len(ids) + 1), rng.choice((1000, 1002)))
        begin = rng.randrange(len(text))
        stop = tuple({text[begin : begin + rng.choice((1, 2, 5, 9))], "zzz", rng.choice("aot. ")})
        expected = first_match(tokenizer, ids, stop)
        num_found += expected is not None
        updates = [[ids], [[token_id] for token_id in ids], *(pieces(rng, ids) for _ in range(4))]
        for update in updates:
            watcher = StopStrings(stop, tokenizer.decode)
            assert found_in(update, watcher) == (expected is not None), (stop, update)
            if expected is not None:
                assert watcher.matched_token_ids == list(ids[:expected]), (stop, update)
    assert 100 < num_found < 300


def test_special_tokens_within_a_stop_string_do_not_hide_it(tokenizer: PromptTokenizer) -> None:
    ids = [87, *[1002] * 50, 88]
    stop = (tokenizer.decode([87, 88]),)
    watcher = StopStrings(stop, tokenizer.decode)
    assert [watcher.add([token_id]) for token_id in ids] == [False] * 51 + [True]
    assert watcher.matched_token_ids == ids


def test_the_text_ends_before_the_first_stop_string(tokenizer: PromptTokenizer) -> None:
    watcher = StopStrings(("STOP", "two"), tokenizer.decode)
    assert watcher.cut("one two STOP two") == "one "
    assert watcher.cut("STOP") == ""
    assert watcher.cut("nothing of it") == "nothing of it"


def test_tokens_after_the_match_are_not_looked_at(hugging_face: Any) -> None:
    seen = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return str(hugging_face.decode(ids))

    watcher = StopStrings(("four",), decode)
    assert found_in([hugging_face.encode("one four"), *[[87]] * 50], watcher)
    assert len(seen) < 40
    assert len(watcher.token_ids) == len(hugging_face.encode("one four")) + 50


def test_the_cost_of_an_update_does_not_grow_with_the_text(hugging_face: Any) -> None:
    num_decoded = []

    def decode(ids: Sequence[int]) -> str:
        num_decoded.append(len(ids))
        return str(hugging_face.decode(ids))

    watcher = StopStrings(("zzz",), decode)
    for _ in range(2000):
        watcher.add([87, 88])
    assert max(num_decoded) < 20


def metaspace_tokenizer() -> Tokenizer:
    """As Llama's and T5's: a blank is U+2581 in a token's name, and the first one is no text."""
    names = ["<unk>", "\u2581", "\u2581a", "\u2581b", "a", "b", "c", "\u2581c", "</s>"]
    model = models.Unigram([(name, -1.0 - at) for at, name in enumerate(names)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_stop_strings_with_blanks_are_seen_where_a_first_blank_is_left_out() -> None:
    made = metaspace_tokenizer()
    assert made.decode([1]) == ""
    rng = random.Random(1)
    num_found = 0
    for _ in range(300):
        ids = [2, *rng.choices(range(1, 9), k=30)]
        text = made.decode(ids)
        begin = rng.randrange(1, len(text))
        stop = (text[begin : begin + rng.choice((2, 3, 5))],)
        ends = (end for end in range(1, len(ids) + 1) if stop[0] in made.decode(ids[:end]))
        expected = next(ends, None)
        num_found += expected is not None
        for update in ([[token_id] for token_id in ids], pieces(rng, ids), [ids]):
            watcher = StopStrings(stop, made.decode)
            assert found_in(update, watcher) == (expected is not None), (stop, ids)
            if expected is not None:
                assert watcher.matched_token_ids == ids[:expected]
    assert num_found == 300
