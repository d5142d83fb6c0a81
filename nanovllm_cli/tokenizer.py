"""Prompt -> token ids, and token ids -> text.

Text in a row can never become a control token. Content goes through a second tokenizer that knows
no added tokens at all, so that `<|im_end|>` in a row is ten plain characters. In a chat the
template's own control tokens must count and the content's must not: before rendering, every
control token in the content is put between two marks that occur nowhere in it, and after rendering
only an unmarked one is a token. (transformers 5.23 marks in the same way, but encodes between the
marks piece by piece; here text keeps its tokenization wherever it stands.)
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from nanovllm_cli.core.errors import ModelError

from .chat_template import ChatTemplate
from .prompts import Prompt
from .sandbox import Task
from .token_texts import TokenTexts
from .tokenizer_files import TokenizerFiles

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # for internal use, says Unicode

_TEMPLATE_END = 4  # tokens, where some templates open, or close, a thought


class TemplateError(ValueError):
    """The chat template refused a row's messages."""


class _Rendering(NamedTuple):
    """A chat on its way through the template."""

    task: Task
    start: str  # the marks round the row's own control tokens
    end: str


class PromptTokenizer:
    """The tokenizer and the chat template of the checkpoint in `path`; raises ModelError.

    chat_template: the text of one to use instead of the checkpoint's.
    """

    def __init__(
        self, path: Path, *, parse_special: bool = False, chat_template: str | None = None
    ) -> None:
        files = TokenizerFiles.read(path)
        self._full = _tokenizer_of(files, files.content)
        self._plain = _tokenizer_of(files, {**files.content, "added_tokens": []})
        self.token_texts = TokenTexts(self._full)
        self._added = files.added_tokens
        self._special = files.special_tokens
        templates = files.chat_templates
        if chat_template is not None:
            templates = {"default": chat_template}
        self._template = ChatTemplate(templates, files.special_tokens)
        self._parse_special = parse_special
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self._think, self._end_think = self._added.get("<think>"), self._added.get("</think>")

    @property
    def first_token_id(self) -> int | None:
        """What begins a text: the token for it or, where there is none, that which ends one."""
        ids = (
            self._full.token_to_id(self._special[name])
            for name in ("bos_token", "eos_token")
            if name in self._special
        )
        return next((token_id for token_id in ids if token_id is not None), None)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int] | TemplateError]:
        """The token ids of each prompt, or why its chat cannot be rendered."""
        pieces: list[list[str | int] | TemplateError] = [self._pieces(p) for p in prompts]
        chats = [at for at, prompt in enumerate(prompts) if prompt.messages is not None]
        for at, rendered in zip(chats, self._rendered([prompts[at] for at in chats]), strict=True):
            pieces[at] = rendered
        encoded = iter(self._encode([p for p in pieces if not isinstance(p, TemplateError)]))
        return [p if isinstance(p, TemplateError) else next(encoded) for p in pieces]

    def num_context_tokens(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """How many tokens each prompt's context has alone; None where it has no context."""
        contexts = list(dict.fromkeys(p.context for p in prompts if p.context is not None))
        encoded = self._encode([self._text_pieces(context) for context in contexts])
        lengths = {context: len(ids) for context, ids in zip(contexts, encoded, strict=True)}
        return [None if p.context is None else lengths[p.context] for p in prompts]

    def _encode(self, pieces: list[list[str | int]]) -> list[list[int]]:
        texts = [part for parts in pieces for part in parts if isinstance(part, str)]
        encoded = iter(self._plain.encode_batch_fast(texts, add_special_tokens=False))
        results = []
        for parts in pieces:
            ids: list[int] = []
            for part in parts:
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids += next(encoded).ids
            results.append(ids)
        return results

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids of each word: as it begins a text, and as it follows a blank.

        vLLM's two forms; but vLLM leaves out the second where it has another length.
        """
        found: list[tuple[int, ...]] = []
        for word in words:
            first, spaced = (
                tuple(self._full.encode(text, add_special_tokens=False).ids)
                for text in (word.lstrip(), f" {word.lstrip()}")
            )
            found.append(first)
            if spaced[-len(first) :] != first:  # else the blank is a token of its own
                found.append(spaced)
        return tuple(found)

    def end_think_of(self, prompt_token_ids: Sequence[int]) -> int | None:
        """The token that ends the thought with which a chat's answer begins, if it has one."""
        knows_reasoning = self._template.takes_reasoning(has_tools=False)
        if not knows_reasoning or self._end_think in prompt_token_ids[-_TEMPLATE_END:]:
            return None
        return self._end_think

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, without the special tokens."""
        return self._full.decode(token_ids, skip_special_tokens=True)

    def decode_completion(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        cut: Callable[[str], str] | None = None,
    ) -> tuple[str, str | None]:
        """The completion's text, and the reasoning where the model thought before it answered.

        `cut` shortens a text that holds a stop string.
        """

        def text_of(ids: Sequence[int]) -> str:
            return self.decode(ids) if cut is None else cut(self.decode(ids))

        template_end = prompt_token_ids[-_TEMPLATE_END:]
        if self._end_think is not None and self._end_think in token_ids:
            end = token_ids.index(self._end_think)
            reasoning, answer = token_ids[:end], token_ids[end + 1 :]
        elif self._think in token_ids[:1] or (
            self._think in template_end and self._end_think not in template_end
        ):
            reasoning, answer = token_ids, []  # it ended while it thought
        else:
            return text_of(token_ids), None
        if reasoning and reasoning[0] == self._think:
            reasoning = reasoning[1:]
        return text_of(answer).strip("\n"), text_of(reasoning).strip("\n")

    def _pieces(self, prompt: Prompt) -> list[str | int]:
        """Control tokens as their ids, and the text between them; nothing yet of a chat."""
        if prompt.token_ids is not None:
            return list(prompt.token_ids)
        return [] if prompt.text is None else self._text_pieces(prompt.text)

    def _rendered(self, chats: Sequence[Prompt]) -> list[list[str | int] | TemplateError]:
        """The same of chats."""
        results: list[list[str | int] | TemplateError] = []
        renderings = [self._rendering(chat) for chat in chats]
        texts = iter(
            self._template.render([r.task for r in renderings if isinstance(r, _Rendering)])
        )
        for rendering in renderings:
            text = next(texts) if isinstance(rendering, _Rendering) else rendering
            if isinstance(text, ValueError):
                results.append(TemplateError(f"the chat template failed: {text}"))
            else:
                assert isinstance(rendering, _Rendering), "only a chat's template gives text"
                results.append(self._split_marked(text, rendering.start, rendering.end))
        return results

    def _text_pieces(self, text: str) -> list[str | int]:
        if self._parse_special:
            return self._split(text, re.compile(f"({self._control.pattern})"))
        return [text]

    def _rendering(self, prompt: Prompt) -> "_Rendering | ValueError":
        messages, tools = prompt.messages or [], prompt.settings.tools
        if tools is not None and not self._template.takes_tools():
            return ValueError("it takes no tools")
        if self._template.takes_reasoning(has_tools=tools is not None):
            messages = [_with_reasoning_apart(message) for message in messages]
        strings = "\0".join(_strings_in([messages, tools]))
        unused = [char for char in _NONCHARACTERS if char not in strings]
        if len(unused) < 2:
            return ValueError("the messages hold every noncharacter that could mark their text")
        start, end = unused[:2]
        marks = f"{start}\\g<0>{end}"
        variables: dict[str, Any] = {"add_generation_prompt": not prompt.is_scored}
        if prompt.enable_thinking is not None:
            variables["enable_thinking"] = prompt.enable_thinking
        if tools is not None:
            variables["tools"] = _mark(tools, self._control, marks)
        try:
            task = self._template.task(_mark(messages, self._control, marks), **variables)
        except ValueError as error:
            return error
        return _Rendering(task, start, end)

    def _split_marked(self, text: str, start: str, end: str) -> list[str | int]:
        """Split at the control tokens that the template wrote: the row's are between marks."""
        marked = f"{start}(?:{self._control.pattern}){end}"
        pieces = self._split(text, re.compile(f"{marked}|({self._control.pattern})"))
        return [
            piece.replace(start, "").replace(end, "") if isinstance(piece, str) else piece
            for piece in pieces
        ]

    def _split(self, text: str, pattern: re.Pattern[str]) -> list[str | int]:
        """Split at what `pattern` catches in its group: there a control token is meant."""
        pieces: list[str | int] = []
        position = 0
        for match in pattern.finditer(text):
            if match.group(1) is None:
                continue
            if match.start() > position:
                pieces.append(text[position : match.start()])
            pieces.append(self._added[match.group(1)])
            position = match.end()
        if position < len(text):
            pieces.append(text[position:])
        return pieces


def _tokenizer_of(files: TokenizerFiles, content: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # Rust's, which is not an Exception
        if isinstance(error, MemoryError) or not (is_panic or isinstance(error, Exception)):
            raise
        message = f"{files.path} cannot be loaded: {str(error) or type(error).__name__:.200}"
        raise ModelError(message, "Is the checkpoint whole?") from None
    tokenizer.no_truncation()  # a file may ask for either, and transformers ignores it too
    tokenizer.no_padding()
    return tokenizer


def _with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """A thought in the content becomes `reasoning_content`, as Qwen3's template does it.

    There, marks round the tags would keep the line breaks beside them from being stripped.
    """
    content = message["content"]
    if (
        message["role"] != "assistant"
        or "reasoning_content" in message
        or "</think>" not in content
    ):
        return message
    before, *_, answer = content.split("</think>")
    thought = before.rstrip("\n").split("<think>")[-1].lstrip("\n")
    return {**message, "reasoning_content": thought, "content": answer.lstrip("\n")}


def _strings_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings_in(item)


def _mark(value: Any, control: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, str):
        return control.sub(replacement, value)
    if isinstance(value, dict):
        return {
            _mark(key, control, replacement): _mark(item, control, replacement)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mark(item, control, replacement) for item in value]
    return value
