"""Rows -> tokenized prompts, in the background and a bounded number ahead of the engine."""

import io
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .id_set import IdSet
from .prompt_options import PromptOptions
from .prompts import Prompt, to_prompt
from .refusal import Refused
from .rows import BadRow, Row
from .score_prompt import tokens_to_score
from .tokenizer import PromptTokenizer, TemplateError

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 20  # of rows; their tokens take a few times as many
_WAIT_SECONDS = 0.2
_CLOSE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPrompt:
    """A prompt and its token ids."""

    prompt: Prompt
    token_ids: list[int]
    first_scored: int | None = None  # a position; None: the prompt is completed, and not scored
    others: "Sequence[TokenizedPrompt]" = ()  # the row's, where it has several


Fed = TokenizedPrompt | BadRow


def to_prompts(
    rows: Iterator[Row | BadRow], options: PromptOptions
) -> Iterator[list[Prompt | BadRow]]:
    """Parse rows in chunks; an id that came before makes a bad row of the later one."""
    ids = IdSet()
    for chunk in _chunks(rows):
        prompts = [to_prompt(row, options) if isinstance(row, Row) else row for row in chunk]
        known = ids.add([p.id if isinstance(p, Prompt) else None for p in prompts])
        yield [
            bad_row(prompt, "duplicate_id", f"id {prompt.id!r} was there before")
            if is_known and isinstance(prompt, Prompt)
            else prompt
            for prompt, is_known in zip(prompts, known, strict=True)
        ]


def _chunks(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """A bounded number of rows at a time, of large ones fewer."""
    chunk: list[Row | BadRow] = []
    num_bytes = 0
    for row in rows:
        chunk.append(row)
        num_bytes += row.num_bytes if isinstance(row, Row) else 0
        if len(chunk) == _ROWS_AT_ONCE or num_bytes >= _BYTES_AT_ONCE:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def tokenize(
    chunk: list[Prompt | BadRow], tokenizer: PromptTokenizer, max_text_bytes: int | None = None
) -> list[Fed]:
    """A chunk's prompts with their token ids; bad rows stay as they are.

    A text of more than `max_text_bytes` is too long for the model, and is not tokenized.
    """
    if max_text_bytes is not None:
        chunk = [
            _too_long(prompt, max_text_bytes)
            if isinstance(prompt, Prompt) and _is_too_long(prompt, max_text_bytes)
            else prompt
            for prompt in chunk
        ]
    prompts = [p for p in chunk if isinstance(p, Prompt)]
    encoded = iter(tokenizer.encode(prompts))
    contexts = iter(tokenizer.num_context_tokens(prompts))
    fed: list[Fed] = []
    for prompt in chunk:
        if isinstance(prompt, BadRow):
            fed.append(prompt)
            continue
        token_ids, num_context_tokens = next(encoded), next(contexts)
        if isinstance(token_ids, TemplateError):
            fed.append(bad_row(prompt, "template_error", str(token_ids)))
        elif prompt.is_scored:
            fed.append(_scored(prompt, token_ids, num_context_tokens, tokenizer.first_token_id))
        else:
            others = _others_of(prompt, tokenizer) if prompt.others else ()
            fed.append(TokenizedPrompt(prompt=prompt, token_ids=token_ids, others=others))
    return fed


def _is_too_long(prompt: Prompt, max_text_bytes: int) -> bool:
    text = prompt.text
    if text is None or prompt.settings.truncate_prompt_tokens is not None:
        return False
    if 4 * len(text) <= max_text_bytes:  # of a character are at most 4 bytes
        return False
    return len(text) > max_text_bytes or len(text.encode()) > max_text_bytes


def _too_long(prompt: Prompt, max_text_bytes: int) -> BadRow:
    return bad_row(
        prompt,
        "prompt_too_long",
        f"the prompt has more than {max_text_bytes} bytes, which is more than the tokens within "
        "the model's limit can hold",
    )


def _others_of(prompt: Prompt, tokenizer: PromptTokenizer) -> list[TokenizedPrompt]:
    others = []
    for other, token_ids in zip(prompt.others, tokenizer.encode(prompt.others), strict=True):
        assert not isinstance(token_ids, TemplateError), "only chats go through a template"
        others.append(TokenizedPrompt(prompt=other, token_ids=token_ids))
    return others


def _scored(
    prompt: Prompt, token_ids: list[int], num_context_tokens: int | None, first_token_id: int | None
) -> Fed:
    try:
        token_ids, first = tokens_to_score(token_ids, num_context_tokens, first_token_id)
    except Refused as refused:
        return bad_row(prompt, refused.code, refused.message)
    return TokenizedPrompt(prompt=prompt, token_ids=token_ids, first_scored=first)


def bad_row(prompt: Prompt, code: str, message: str) -> BadRow:
    """The row of `prompt`, failed."""
    is_openai_line = prompt.endpoint is not None
    return prompt.row.failed(prompt.id, code, message, is_openai_line=is_openai_line)


class Feeder:
    """Tokenizes in a thread of its own; at most `max_ahead` rows wait to be taken.

    What the thread raises is raised by `get`.
    """

    def __init__(
        self,
        prompts: Iterator[list[Prompt | BadRow]],
        tokenizer: PromptTokenizer,
        max_ahead: int,
        *,
        max_text_bytes: int | None = None,
    ) -> None:
        chunks_ahead = max(1, max_ahead // _ROWS_AT_ONCE)
        self._queue: queue.Queue[list[Fed] | BaseException | None] = queue.Queue(chunks_ahead)
        self._taken: list[Fed] = []
        self._is_done = False
        self._is_closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(prompts, tokenizer, max_text_bytes), name="feeder", daemon=True
        )
        self._thread.start()

    def get(self, *, wait: bool) -> Fed | None:
        """The next row in input order; None at the end, or if none is ready, now or in a moment."""
        while not self._taken and not self._is_done:
            try:
                chunk = self._queue.get(block=wait, timeout=_WAIT_SECONDS)
            except queue.Empty:
                return None
            if isinstance(chunk, BaseException):
                raise chunk
            self._is_done = chunk is None
            self._taken = list(reversed(chunk or []))
        return self._taken.pop() if self._taken else None

    @property
    def is_done(self) -> bool:
        """Whether every row was taken."""
        return self._is_done and not self._taken

    def close(self) -> None:
        """Stop the thread; rows not yet taken are dropped.

        A thread that waits for stdin cannot be woken; it is left to end with the process.
        """
        self._is_closed.set()
        give_up = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < give_up:
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.01)
        if self._thread.is_alive() and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.detach()  # or Python, at its end, aborts over the lock that the thread holds

    def _run(
        self,
        prompts: Iterator[list[Prompt | BadRow]],
        tokenizer: PromptTokenizer,
        max_text_bytes: int | None,
    ) -> None:
        try:
            for chunk in prompts:
                self._queue.put(tokenize(chunk, tokenizer, max_text_bytes))
                if self._is_closed.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)
