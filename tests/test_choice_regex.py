"""Many choices as one expression: it matches each of them and nothing else."""

import random
import re

import pytest
from tokenizers import Tokenizer

from nanovllm_cli.choice_regex import choice_regex
from nanovllm_cli.structured_output import BadGrammar, grammar_text

from .cli import MODEL
from .schemas import sample_grammars

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

ALPHABET = [*"abcAB01 .*+?()[]{}|\\^$-/#&~\"'\n\t\x00\x7f", "\u00e9", "\u4f60", "\U0001f600"]


def test_it_matches_the_choices_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(300):
        choices = {"".join(rng.choices(ALPHABET, k=rng.randint(1, 6))) for _ in range(12)}
        choices |= {text[: rng.randint(1, len(text))] for text in list(choices)[:4]}
        expression = re.compile(choice_regex(choices))
        for text in choices:
            assert expression.fullmatch(text)
            for other in (text[:-1], text + rng.choice(ALPHABET), text[1:], text[::-1]):
                assert bool(expression.fullmatch(other)) == (other in choices)


def test_texts_that_begin_with_one_another_are_matched_or_refused() -> None:
    choices = ["x" * length for length in range(1, 2000)]
    assert re.fullmatch(choice_regex(choices[:50]), "x" * 50)
    with pytest.raises(BadGrammar, match="hundreds of the texts"):
        grammar_text("choice", choices)


def test_a_hundred_thousand_choices_can_be_drawn_from() -> None:
    grammars = sample_grammars()
    for count in (1001, 100_000):
        choices = [f"choice number {n}" for n in range(count)]
        matcher = grammars.matcher(grammar_text("choice", choices))
        text = choices[-1]
        for byte in text.encode():
            allowed = grammars.masks([matcher])
            assert allowed.any()
            assert matcher.accept([_token_of(byte)])
        assert matcher.is_complete


def _token_of(byte: int) -> int:
    [token_id] = TOKENIZER.encode(chr(byte), add_special_tokens=False).ids
    return int(token_id)
