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
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanovllm_cli.core.errors import ModelError

from .prompts import Prompt
from .token_texts import TokenTexts

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # for internal use, says Unicode

_TEMPLATE_END = 4  # tokens, where some templates open, or close, a thought


class TemplateError(ValueError):
    """The chat template refused a row's messages."""


class PromptTokenizer:
    """The tokenizer and the chat template of the checkpoint in `path`; raises ModelError."""

    def __init__(
        self, path: Path, *, parse_special: bool = False, chat_template: str | None = None
    ) -> None:
        file = path / "tokenizer.json"
        if not file.exists():
            raise ModelError(f"{path} holds no tokenizer.json", "Is the checkpoint whole?")
        try:
            content = json.loads(file.read_bytes())
            added_tokens = content["added_tokens"]
            # Reads config.json too, to know the tokenizer's class.
            self._hugging_face: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            message = f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {error}"
            raise ModelError(message, "Is the checkpoint whole?") from None
        for token in added_tokens:
            if token["lstrip"] or token["rstrip"] or token["normalized"] or token["single_word"]:
                raise ModelError(f"{file}: {token['content']!r} takes its neighbours with it")
        self._full = Tokenizer.from_file(str(file))
        self._full.no_truncation()  # a file may ask for either, and transformers ignores it too
        self._full.no_padding()
        self.token_texts = TokenTexts(self._full)
        self._added = {token["content"]: token["id"] for token in added_tokens}
        self._plain = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
        self._plain.no_truncation()
        self._plain.no_padding()
        if chat_template is not None:
            self._hugging_face.chat_template = chat_template
        # Whether the template takes an assistant's thought apart from its answer, as Qwen3's does.
        template = str(self._hugging_face.chat_template)
        self._knows_reasoning = "reasoning_content" in template
        self._knows_tools = "tools" in template
        self._parse_special = parse_special
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self._think, self._end_think = self._added.get("<think>"), self._added.get("</think>")

    @property
    def first_token_id(self) -> int | None:
        """What begins a text: the token for it or, where there is none, that which ends one."""
        first: int | None = self._hugging_face.bos_token_id
        return first if first is not None else self._hugging_face.eos_token_id

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int] | TemplateError]:
        """The token ids of each prompt, or why its chat cannot be rendered."""
        pieces = [self._pieces(prompt) for prompt in prompts]
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
        if not self._knows_reasoning or self._end_think in prompt_token_ids[-_TEMPLATE_END:]:
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

    def _pieces(self, prompt: Prompt) -> list[str | int] | TemplateError:
        """Control tokens as their ids, and the text between them."""
        if prompt.token_ids is not None:
            return list(prompt.token_ids)
        if prompt.text is not None:
            return self._text_pieces(prompt.text)
        try:
            return self._render(prompt)
        except Exception as error:  # whatever a template raises is this row's error alone
            return TemplateError(f"the chat template failed: {error}")

    def _text_pieces(self, text: str) -> list[str | int]:
        if self._parse_special:
            return self._split(text, re.compile(f"({self._control.pattern})"))
        return [text]

    def _render(self, prompt: Prompt) -> list[str | int]:
        messages = prompt.messages or []
        if self._knows_reasoning:
            messages = [_with_reasoning_apart(message) for message in messages]
        tools = prompt.settings.tools
        if tools is not None and not self._knows_tools:
            raise ValueError("it takes no tools")
        strings = "\0".join(_strings_in([messages, tools]))
        start, end, *_ = (char for char in _NONCHARACTERS if char not in strings)
        arguments: dict[str, Any] = {}
        if prompt.enable_thinking is not None:
            arguments["enable_thinking"] = prompt.enable_thinking
        marks = f"{start}\\g<0>{end}"
        if tools is not None:
            arguments["tools"] = _mark(tools, self._control, marks)
        text = self._hugging_face.apply_chat_template(
            _mark(messages, self._control, marks),
            tokenize=False,
            add_generation_prompt=not prompt.is_scored,
            **arguments,
        )
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
