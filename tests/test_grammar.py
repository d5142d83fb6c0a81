"""core/grammar.py: masks, forced tokens and their ends, with the sample model's tokens."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nanovllm_cli.core import grammar as grammar_module
from nanovllm_cli.core.grammar import GrammarError, Grammars, Matcher
from nanovllm_cli.structured_output import grammar_text

from .schemas import (
    EOS,
    MODEL,
    VOCAB_SIZE,
    allowed,
    check_json,
    grammar_of_schema,
    random_schema,
    sample_grammars,
)

GRAMMARS = sample_grammars()
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
NUM_TEXT_TOKENS = 1000  # the added ones come after them


def walk(
    matcher: Matcher, rng: random.Random, *, end_soon_after: int, forces: bool = False
) -> list[int]:
    """Random tokens under the masks to the end; from some length on the first one allowed.

    forces: take forced tokens as they are told, at once.
    """
    token_ids: list[int] = []
    while not matcher.is_finished:
        forced = matcher.forced_token_ids() if forces else []
        if not forced:
            ids = allowed(GRAMMARS.masks([matcher])[0])
            assert ids, f"a dead end after {token_ids}"
            ends = [i for i in ids if i in EOS]
            if ends and (len(ids) == len(ends) or rng.random() < 0.3):
                return token_ids
            others = [i for i in ids if i not in EOS]
            is_late = len(token_ids) >= end_soon_after
            forced = [shortest_way_out(others) if is_late else rng.choice(others)]
        assert matcher.accept(forced)
        token_ids += forced
    return token_ids


def shortest_way_out(ids: list[int]) -> int:
    """Of tokens that may come next, one that closes what is open where there is one."""
    closing = [i for i in ids if TOKENIZER.decode([i]).startswith(('"', "}", "]"))]
    return min(closing or ids)


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("seed", range(60))
def test_every_way_through_the_masks_gives_json_of_the_schema(seed: int) -> None:
    schema = random_schema(seed)
    matcher = GRAMMARS.matcher(grammar_of_schema(schema))
    check_json(text_of(walk(matcher, random.Random(seed), end_soon_after=60)), schema)


@pytest.mark.parametrize("seed", range(20))
def test_forced_tokens_are_those_that_the_masks_leave(seed: int) -> None:
    grammar = grammar_of_schema(random_schema(seed))
    matcher = GRAMMARS.matcher(grammar)
    walked = walk(matcher, random.Random(seed), end_soon_after=40, forces=True)
    stepped, position, num_forced = GRAMMARS.matcher(grammar), 0, 0
    while position < len(walked):
        forced = stepped.forced_token_ids()
        for token_id in forced or walked[position : position + 1]:
            ids = allowed(GRAMMARS.masks([stepped])[0])
            assert ids == [token_id] if forced else token_id in ids
            assert walked[position] == token_id
            assert stepped.accept([token_id])
            position += 1
        num_forced += len(forced)
    assert num_forced > 0
    assert stepped.is_complete


def test_of_one_text_every_token_is_forced() -> None:
    text = "Sunday the twelfth, half past nine"
    matcher = GRAMMARS.matcher(grammar_text("choice", [text]))
    forced = matcher.forced_token_ids()
    assert text.startswith(text_of(forced))
    assert len(forced) > 4
    assert text_of(walk(matcher, random.Random(0), end_soon_after=99)) == text


def test_a_finished_grammar_allows_exactly_the_models_eos_tokens() -> None:
    matcher = GRAMMARS.matcher(grammar_text("regex", "ab"))
    assert not matcher.is_complete
    assert matcher.accept(TOKENIZER.encode("ab").ids)
    assert matcher.is_finished
    assert allowed(GRAMMARS.masks([matcher])[0]) == sorted(EOS)


def test_a_whole_text_that_may_go_on_is_complete_and_not_finished() -> None:
    matcher = GRAMMARS.matcher(grammar_text("regex", "ab+"))
    assert matcher.accept(TOKENIZER.encode("ab").ids)
    assert matcher.is_complete
    assert not matcher.is_finished
    ids = allowed(GRAMMARS.masks([matcher])[0])
    assert set(EOS) < set(ids)
    assert [text_of([i]) for i in ids if i not in EOS] == ["b"]


def test_neither_control_tokens_nor_the_padding_of_the_vocabulary_are_allowed() -> None:
    matcher = GRAMMARS.matcher(grammar_text("regex", r"(?s:.)*"))
    ids = allowed(GRAMMARS.masks([matcher])[0])
    assert len(ids) > 900
    assert [i for i in ids if i >= NUM_TEXT_TOKENS] == sorted(EOS)


def test_a_token_that_ends_the_text_is_not_allowed_inside_it() -> None:
    """llguidance knows control tokens by name; the model's own end would end the row half way."""
    matcher = GRAMMARS.matcher(grammar_text("grammar", 'start: "a" <|im_end|> "b"'))
    assert matcher.accept(TOKENIZER.encode("a").ids)
    assert not GRAMMARS.masks([matcher]).any()


def test_where_nothing_can_follow_nothing_is_allowed() -> None:
    matcher = GRAMMARS.matcher(grammar_text("grammar", "start: A\nA: /a/ & /b/"))
    assert not GRAMMARS.masks([matcher]).any()
    assert not matcher.is_finished


def test_a_token_that_does_not_fit_is_not_accepted_and_ends_it() -> None:
    matcher = GRAMMARS.matcher(grammar_text("regex", "ab"))
    assert not matcher.accept(TOKENIZER.encode("x").ids)
    assert "doesn't satisfy the grammar" in matcher.error
    assert not matcher.is_finished
    assert not GRAMMARS.masks([matcher]).any()


def test_masks_of_many_rows_are_those_of_each_alone() -> None:
    rng = random.Random(1)
    matchers = []
    for seed in range(40):
        matcher = GRAMMARS.matcher(grammar_of_schema(random_schema(seed)))
        for _ in range(rng.randrange(12)):
            ids = [i for i in allowed(GRAMMARS.masks([matcher])[0]) if i not in EOS]
            if ids:
                matcher.accept([rng.choice(ids)])
        matchers.append(matcher)
    masks = GRAMMARS.masks(matchers)
    assert masks.shape == (40, VOCAB_SIZE // 32)
    for row, matcher in zip(masks, matchers, strict=True):
        assert (row == GRAMMARS.masks([matcher])[0]).all()


@pytest.mark.parametrize("text", ["a", "ab", "Sunday the twelfth"])
def test_what_was_accepted_can_be_taken_back_even_at_the_end(text: str) -> None:
    matcher = GRAMMARS.matcher(grammar_text("choice", [text, "other"]))
    ids = TOKENIZER.encode(text).ids
    masks = []
    for token_id in ids:
        masks.append(GRAMMARS.masks([matcher])[0].tolist())
        assert matcher.accept([token_id])
    assert matcher.is_finished
    for mask, token_id in zip(reversed(masks), reversed(ids), strict=True):
        matcher.take_back(1)
        assert not matcher.is_finished
        assert GRAMMARS.masks([matcher])[0].tolist() == mask
        assert token_id in allowed(GRAMMARS.masks([matcher])[0])


def test_text_too_short_to_be_forced_tokens_has_few_bytes() -> None:
    matcher = GRAMMARS.matcher(grammar_text("regex", "[ab] and then [cd]"))
    assert matcher.num_forced_bytes == 0
    assert not matcher.forced_token_ids()
    assert matcher.accept(TOKENIZER.encode("a").ids)
    assert matcher.num_forced_bytes == len(" and then ")
    assert matcher.forced_token_ids()


def test_masks_begun_in_the_background_are_those_of_one_call() -> None:
    matchers = [GRAMMARS.matcher(grammar_of_schema(random_schema(i % 5))) for i in range(24)]
    expected = GRAMMARS.masks(matchers).tolist()
    masks = GRAMMARS.start_masks(99)
    for i, matcher in enumerate(matchers):
        masks.add(matcher)
        if i % 7 == 3:
            masks.start()
    masks.start()
    masks.start()
    assert masks.result().tolist() == expected


def test_running_sequences_share_no_lexer_and_ended_ones_leave_theirs() -> None:
    grammars = sample_grammars()
    grammar = grammar_text("regex", "a+b")
    waiting = [grammars.matcher(grammar) for _ in range(9)]
    assert {matcher.lexer_number for matcher in waiting} == {-1}, "one that waits needs none"
    grammars.masks(waiting[:5])
    numbers = {matcher.lexer_number for matcher in waiting[:5]}
    assert len(numbers) == 5
    del waiting[:5]
    grammars.masks(waiting)
    assert {matcher.lexer_number for matcher in waiting} < numbers


def test_a_grammar_that_takes_long_to_compile_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "_COMPILE_SECONDS", 0.0)
    grammars = sample_grammars()
    matchers = [grammars.matcher(grammar_text("regex", "[ab]{3,5}")) for _ in range(6)]
    alone = [grammars.masks([matcher])[0].tolist() for matcher in matchers]
    assert len({matcher.lexer_number for matcher in matchers}) == 1
    assert grammars.masks(matchers).tolist() == alone


def test_a_grammar_is_compiled_once_for_all_its_rows() -> None:
    class Counting(Grammars):
        num_compiled = 0

        def _compile(self, grammar: str) -> object:  # type: ignore[override]
            self.num_compiled += 1
            return super()._compile(grammar)

    grammars = Counting(MODEL, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    texts = [grammar_of_schema(random_schema(seed)) for seed in range(20)]
    first = [grammars.matcher(text) for text in texts]
    for text in texts * 10:
        grammars.matcher(text)
    with pytest.raises(GrammarError):
        grammars.matcher("bad")
    with pytest.raises(GrammarError):
        grammars.matcher("bad")
    assert grammars.num_compiled == 21
    assert first[0].accept(first[0].forced_token_ids()[:1])  # and each row stands by itself
    fresh = grammars.matcher(texts[0])
    assert (grammars.masks([fresh]) == grammars.masks([grammars.matcher(texts[0])])).all()
    assert (grammars.masks([fresh]) != grammars.masks([first[0]])).any()


def test_a_bad_grammar_is_named_with_llguidances_reason() -> None:
    with pytest.raises(GrammarError, match="unclosed group"):
        GRAMMARS.matcher('{"grammars":[{"lark_grammar":"start: /(a/"}]}')


def test_without_the_package_a_grammar_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(GrammarError, match="pip install llguidance"):
        sample_grammars().matcher(grammar_text("regex", "a"))


def test_a_vocabulary_that_cannot_be_used_is_the_grammars_error(tmp_path: Path) -> None:
    grammar = grammar_text("regex", "a")
    for path, vocab_size, reason in (
        (None, VOCAB_SIZE, "no tokenizer|has none"),
        (tmp_path, VOCAB_SIZE, "No such file"),
        (MODEL, 100, "vocab size too small"),
    ):
        with pytest.raises(GrammarError, match=reason):
            Grammars(path, vocab_size=vocab_size, eos_token_ids=EOS).matcher(grammar)


def test_truncation_and_padding_of_a_tokenizers_file_have_no_effect(tmp_path: Path) -> None:
    content = json.loads((MODEL / "tokenizer.json").read_bytes())
    content["truncation"] = {
        **{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    cut = Grammars(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    grammar = grammar_text("choice", ["a long text without another choice"])
    forced = cut.matcher(grammar).forced_token_ids()
    assert forced == GRAMMARS.matcher(grammar).forced_token_ids()
    assert len(forced) > 2


def test_a_model_without_eos_tokens_ends_with_the_tokenizers() -> None:
    grammars = Grammars(MODEL, vocab_size=VOCAB_SIZE, eos_token_ids=())
    matcher = grammars.matcher(grammar_text("regex", "a*"))
    [eos] = grammars.eos_token_ids
    assert eos in allowed(grammars.masks([matcher])[0])
