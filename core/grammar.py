"""Grammars: which tokens may come next, for completions that must be JSON of a schema, or the like.

llguidance's (https://github.com/guidance-ai/llguidance), which walks the vocabulary as a trie of
bytes, so that a mask is exact: a token is allowed where its bytes can be continued to something
that the grammar accepts. It runs on the host and holds no tensor. Without the package, grammars are
refused; everything else runs.
"""

import json
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import lru_cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nanovllm_cli.core.batch import Int32
from nanovllm_cli.core.grammar_masks import Masks, MaskThreads

if TYPE_CHECKING:
    import llguidance

NEEDS_LLGUIDANCE = "a grammar needs llguidance, which is not installed: pip install llguidance"
_MAX_COMPILED = 1024  # grammars kept; a JSON schema of 20 properties takes about 20 KB
# Sequences in a grammar compiled once share its lexer, and threads wait for its lock. So it is
# compiled for each that runs, where that takes no longer than so in all: 1 ms for most schemas.
_MAX_LEXERS = 256
_COMPILE_SECONDS = 0.5
# Tokens that stand inside a JSON string, by their length: where a string has room for all of a
# slice, its part of the mask is known. llguidance's own have none below 10 characters, and every
# string near its maxLength goes through the whole vocabulary: these take a fifth off such masks.
_TEXT = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_TEXT}{{1,{length}}}" for length in (3, 5, 7, 10, 15, 20, 30)),
    f"{_TEXT}+",
]
_lexer_numbers = count()


class GrammarError(ValueError):
    """Why a grammar, or the vocabulary it is for, cannot be used."""


class Matcher:
    """Where one sequence stands in its grammar; only Grammars makes one."""

    __slots__ = ("_compiled", "_inner", "_lexer")

    def __init__(self, compiled: "_Compiled") -> None:
        self._compiled = compiled
        self._lexer: _Lexer | None = None
        self._inner: llguidance.LLMatcher | None = None

    def __del__(self) -> None:
        if self._lexer is not None:
            self._lexer.num_matchers -= 1

    @property
    def inner(self) -> "llguidance.LLMatcher":
        """llguidance's own, there from its first use on: what only waits holds no lexer."""
        if self._inner is None:
            self._lexer = self._compiled.lexer()
            self._lexer.num_matchers += 1
            self._inner = self._lexer.start.deep_copy()
        return self._inner

    @property
    def lexer_number(self) -> int:
        """The same of those that share a lexer."""
        return -1 if self._lexer is None else self._lexer.number

    def accept(self, token_ids: Iterable[int]) -> bool:
        """Move on by tokens that were drawn under the masks; False where they do not fit."""
        return self.inner.consume_tokens(list(token_ids))

    def take_back(self, num_tokens: int) -> None:
        """Go back by that many of the tokens last accepted."""
        self.inner.rollback(num_tokens)

    @property
    def num_forced_bytes(self) -> int:
        """How many must come next; without any there are no `forced_token_ids`, which take longer.

        1 to 7 us, and 10 to 50.
        """
        return len(self.inner.compute_ff_bytes())

    def forced_token_ids(self) -> list[int]:
        """The tokens that must come next, as far as the grammar and the tokenizer leave no choice.

        A token is among them only where no other tokenization of the forced text may go on.
        """
        return self.inner.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole, though more may follow."""
        return self.inner.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self.inner.is_stopped() and self.inner.is_accepting()

    @property
    def error(self) -> str:
        """Why llguidance cannot go on, as with a grammar that has become too large; else empty."""
        return _message_of(self.inner)


class _Vocabulary(NamedTuple):
    tokenizer: "llguidance.LLTokenizer"
    eos_token_ids: tuple[int, ...]
    threads: MaskThreads


class _Lexer:
    """A grammar compiled once; and how many sequences stand in it."""

    def __init__(self, start: "llguidance.LLMatcher") -> None:
        self.start = start
        self.num_matchers = 0
        self.number = next(_lexer_numbers)


class _Compiled:
    """A grammar, compiled again while sequences stand in it at once and that is soon done."""

    def __init__(self, compiled: Callable[[], "llguidance.LLMatcher"]) -> None:
        """Compiles it a first time; raises GrammarError."""
        self._compiled = compiled
        start = time.perf_counter()
        self._lexers = [_Lexer(compiled())]
        seconds = time.perf_counter() - start
        self._max_lexers = min(_MAX_LEXERS, 1 + int(_COMPILE_SECONDS / seconds))
        if message := _message_of(self._lexers[0].start):
            raise GrammarError(message)

    def lexer(self) -> _Lexer:
        """The one with the fewest sequences: with none, if that can be."""
        lexer = min(self._lexers, key=lambda lexer: lexer.num_matchers)
        if lexer.num_matchers and len(self._lexers) < self._max_lexers:
            lexer = _Lexer(self._compiled())
            self._lexers.append(lexer)
        return lexer


class Grammars:
    """The grammars for one tokenizer, compiled when first asked for; nothing is loaded before.

    tokenizer_path: the directory with tokenizer.json, None where there is no tokenizer;
    eos_token_ids: those that may end a text, () for the tokenizer's own.
    """

    def __init__(
        self, tokenizer_path: Path | None, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._given_eos_token_ids = [i for i in eos_token_ids if 0 <= i < vocab_size]
        self._vocabulary = lru_cache(maxsize=1)(self._load_vocabulary)
        self._compiled = lru_cache(maxsize=_MAX_COMPILED)(self._compile)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that may end a text; there once a matcher is."""
        return self._loaded().eos_token_ids

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of `grammar`, llguidance's text of one; raises GrammarError."""
        compiled = self._compiled(grammar)
        if isinstance(compiled, GrammarError):
            raise compiled
        return Matcher(compiled)

    def start_masks(self, most: int) -> Masks:
        """For at most so many matchers, which are still to be named; there is one already."""
        return Masks(self._loaded().threads, most)

    def masks(self, matchers: Seq[Matcher]) -> Int32:
        """The tokens that may come next, as `Masks.result` gives them."""
        masks = self.start_masks(len(matchers))
        for matcher in matchers:
            masks.add(matcher)
        return masks.result()

    def _loaded(self) -> _Vocabulary:
        vocabulary = self._vocabulary()
        assert not isinstance(vocabulary, GrammarError), "there is no matcher without a vocabulary"
        return vocabulary

    def _load_vocabulary(self) -> _Vocabulary | GrammarError:
        """Half a second for Qwen3's 151,669 tokens."""
        if find_spec("llguidance") is None:
            return GrammarError(NEEDS_LLGUIDANCE)
        import llguidance  # late: a job without grammars needs none of it

        if self._tokenizer_path is None:
            return GrammarError("a grammar needs a tokenizer, and this model has none")
        file = self._tokenizer_path / "tokenizer.json"
        try:
            # A file may ask for either of these, which would change how forced text is tokenized.
            content = {**json.loads(file.read_bytes()), "truncation": None, "padding": None}
            tokenizer = llguidance.LLTokenizer(
                json.dumps(content),
                n_vocab=self._vocab_size,
                eos_token=self._given_eos_token_ids or None,
                slices=_SLICES,
            )
        except (OSError, ValueError) as error:
            return GrammarError(f"{file} cannot be used for grammars: {error}")
        eos_token_ids = tuple(tokenizer.eos_tokens)
        return _Vocabulary(tokenizer, eos_token_ids, MaskThreads(eos_token_ids, self._vocab_size))

    def _compile(self, grammar: str) -> _Compiled | GrammarError:
        """Errors are kept as well: ten thousand rows may have the same bad grammar."""
        vocabulary = self._vocabulary()
        if isinstance(vocabulary, GrammarError):
            return vocabulary
        import llguidance

        limits = llguidance.LLParserLimits(verbose_errors=False)

        def compiled() -> "llguidance.LLMatcher":
            return llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)

        try:
            return _Compiled(compiled)
        except GrammarError as error:
            return error


def _message_of(matcher: "llguidance.LLMatcher") -> str:
    return matcher.get_error().removesuffix("<non-verbose/>").strip()
