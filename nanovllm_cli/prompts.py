"""Row -> Prompt, or BadRow with the reason.

Pure: no file is read and nothing is printed. A Prompt is text, messages or token ids; tokenizer.py
makes token ids of the first two. A row that cannot run does not stop the job.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from .dataset_chat import from_dataset
from .openai_line import Endpoint, is_openai_line, parse_openai_line
from .prompt_content import Content, Messages, from_messages, from_text, from_token_ids, with_prefix
from .prompt_options import PromptOptions
from .refusal import Refused, checked_text, shown
from .row_settings import RowSettings, settings_of
from .rows import BadRow, Row
from .score_prompt import pair_of


@dataclass(kw_only=True, slots=True)  # not frozen, which takes thrice the time, for every row
class Prompt:
    """What to complete; exactly one of `text`, `messages` and `token_ids` is there."""

    row: Row
    id: str | int | None
    text: str | None
    messages: Messages | None
    token_ids: list[int] | None
    settings: RowSettings  # the row's own
    enable_thinking: bool | None
    endpoint: Endpoint | None  # of an OpenAI batch line
    model: str | None  # what an OpenAI batch line asks for
    is_scored: bool = False  # and not completed
    context: str | None = None  # of a pair, which is in `text`: its part that is not scored
    others: "tuple[Prompt, ...]" = ()  # where the row has several: an OpenAI completion's
    position: int = 0  # among them all

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The row's own fields of SamplingParams; the next two are its own, too."""
        return self.settings.sampling

    @property
    def n(self) -> int | None:
        return self.settings.n

    @property
    def stop(self) -> tuple[str, ...]:
        return self.settings.stop

    @property
    def index(self) -> int:
        """The row's, as are the next two."""
        return self.row.index

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def line(self) -> int:
        return self.row.line


def to_prompt(row: Row, options: PromptOptions) -> Prompt | BadRow:
    """The prompt of a row, whose kind is seen from its columns.

    What makes chats of prompts leaves token ids and OpenAI's completions as they are.
    """
    columns = row.columns
    row_id: str | int | None = None
    endpoint: Endpoint | None = None
    model: str | None = None
    context: str | None = None
    others: list[Content] = []
    is_openai = is_openai_line(columns)
    try:
        if options.is_score:
            row_id = _id_of(columns, options)
            content, context = _scored_content_of(row, options)
            settings = RowSettings()
        elif is_openai:
            row_id = checked_text("custom_id", columns["custom_id"], "bad_openai_line")
            asked = parse_openai_line(columns, options.system)
            endpoint, model, content, settings, others = asked
        else:
            row_id = _id_of(columns, options)
            settings = settings_of(columns, options.named_columns)
            content = _content_of(row, options)
        text, messages, token_ids = with_prefix(content, options.prefix)
        others = [with_prefix(other, options.prefix) for other in others]
        enable_thinking = settings.enable_thinking
        if messages is None and settings.for_chats is not None:
            raise Refused("bad_parameters", f"{settings.for_chats} needs messages, not a prompt")
        if messages is not None and enable_thinking is None:
            enable_thinking = options.enable_thinking
    except Refused as refused:
        return row.failed(row_id, refused.code, refused.message, is_openai_line=is_openai)
    prompt = Prompt(
        row=row,
        id=row_id,
        text=text,
        messages=messages,
        token_ids=token_ids,
        settings=settings,
        enable_thinking=enable_thinking,
        endpoint=endpoint,
        model=model,
        is_scored=options.is_score,
        context=context,
    )
    if others:
        prompt.others = tuple(
            replace(prompt, text=other.text, token_ids=other.token_ids, position=position)
            for position, other in enumerate(others, 1)
        )
    return prompt


def _id_of(columns: Mapping[str, Any], options: PromptOptions) -> str | int | None:
    if options.id_column is not None:
        value = columns.get(options.id_column)
        if value is None:
            raise Refused("bad_id", f"the row has no {shown(options.id_column)} to be its id")
    else:
        value = columns.get("id")
        if value is None:
            value = columns.get("custom_id")
    if value is None or type(value) is str or type(value) is int:
        return value
    limit = "a string, or an integer of at most 64 bits"
    raise Refused("bad_id", f"the id is {shown(value)}; it must be {limit}")


def _scored_content_of(row: Row, options: PromptOptions) -> tuple[Content, str | None]:
    """What is scored has no settings: all other columns are data."""
    if is_openai_line(row.columns):
        raise Refused("bad_openai_line", "an OpenAI batch line is completed, and never scored")
    pair = pair_of(row.columns, options)
    if pair is None:
        return _content_of(row, options), None
    return Content(text=pair.text), pair.context


def _content_of(row: Row, options: PromptOptions) -> Content:
    columns = row.columns
    if options.template is not None:
        return _from_prompt(_fill_template(columns, options), "the prompt", options)
    text = columns.get(options.prompt_column)
    messages = columns.get(options.messages_column)
    token_ids = columns.get("prompt_token_ids")
    num_found = (text is not None) + (messages is not None) + (token_ids is not None)
    if num_found != 1:
        names = f"{options.prompt_column}, {options.messages_column} and prompt_token_ids"
        if options.pair_columns is not None:
            names = f"{options.pair_columns[1]}, {names}"
        if num_found > 1:
            raise Refused("bad_prompt", f"the row has more than one of {names}")
        raise Refused("no_prompt", f"the row has none of {names}, but {shown([*columns])}")
    if messages is not None:
        place = options.messages_column
        chat = from_dataset(messages, place, is_parquet=row.raw is None)
        return from_messages(chat, place, options.system)
    if token_ids is not None:
        return from_token_ids(token_ids, "prompt_token_ids")
    return _from_prompt(text, options.prompt_column, options)


def _from_prompt(value: Any, place: str, options: PromptOptions) -> Content:
    content = from_text(value, place)
    if options.makes_chats:
        return from_messages([{"role": "user", "content": value}], place, options.system)
    return content


def _fill_template(columns: Mapping[str, Any], options: PromptOptions) -> str:
    pieces = []
    for text, name in options.template_parts:
        pieces.append(text)
        if name is None:
            continue
        value = columns.get(name)
        if value is None:
            what = "is null" if name in columns else f"is not among {shown([*columns])}"
            raise Refused("template_error", f"the template's column {shown(name)} {what}")
        try:
            pieces.append(value if isinstance(value, str) else orjson.dumps(value).decode())
        except TypeError as error:
            message = f"the template's column {shown(name)} cannot be text: {error}"
            raise Refused("template_error", message) from None
    return "".join(pieces)
