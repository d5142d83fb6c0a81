"""Row -> Prompt, or BadRow with the reason.

Pure: no file is read and nothing is printed. A Prompt is text, messages or token ids; tokenizer.py
makes token ids of the first two. A row that cannot run does not stop the job.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import orjson

from .dataset_chat import from_dataset, without_padding
from .openai_line import Endpoint, batch_of_another, is_openai_line, parse_openai_line
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
            if row.raw is None:
                columns = {**columns, "body": without_padding(columns.get("body"))}
            asked = parse_openai_line(columns, options.system)
            endpoint, model, content, settings, others = asked
        else:
            row_id = _id_of(columns, options)
            is_parquet = row.raw is None
            settings = settings_of(columns, options.named_columns, is_parquet=is_parquet)
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
    place = options.messages_column
    text, messages = columns.get(options.prompt_column), columns.get(place)
    if options.prompt_column == place:
        text = None
    elif messages is None and _is_chat(text):  # as data sets for preferences have it
        place, messages, text = options.prompt_column, text, None
    token_ids = columns.get("prompt_token_ids")
    num_found = (text is not None) + (messages is not None) + (token_ids is not None)
    if num_found != 1:
        raise _without_one_prompt(columns, options, num_found)
    if messages is not None:
        chat = from_dataset(messages, place, is_parquet=row.raw is None)
        return from_messages(chat, place, options.system)
    if token_ids is not None:
        return from_token_ids(token_ids, "prompt_token_ids")
    return _from_prompt(text, options.prompt_column, options)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _without_one_prompt(
    columns: Mapping[str, Any], options: PromptOptions, num_found: int
) -> Refused:
    """The error for a row that has none of what can be completed, or several."""
    known = [options.prompt_column, options.messages_column, "prompt_token_ids"]
    if options.pair_columns is not None:
        known.insert(0, options.pair_columns[1])
    known = list(dict.fromkeys(known))
    names = f"{', '.join(known[:-1])} and {known[-1]}"
    if num_found > 1:
        return Refused("bad_prompt", f"the row has more than one of {names}")
    empty = [name for name in known if name in columns]
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        return Refused("no_prompt", f"{' and '.join(empty)} {verb} null")
    whose = batch_of_another(columns)
    if whose is not None:
        reason = f"the row is a line of {whose} batches; only OpenAI's batch lines are known, with "
        return Refused("no_prompt", reason + "custom_id, method, url and body")
    message = f"the row has none of {names}, but {shown([*columns])}"
    misspelled = _misspelled(tuple(columns), tuple(known))
    if misspelled is not None:
        message += f"; by {shown(misspelled[0])}, did you mean {misspelled[1]}?"
    return Refused("no_prompt", message)


@lru_cache(maxsize=16)  # most rows have the columns of the row before
def _misspelled(columns: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    """A column that may be meant as one of `known`, and which of them."""
    for name in known:
        for near in difflib.get_close_matches(name, columns, n=1, cutoff=0.8):
            return near, name
    return None


def _from_prompt(value: Any, place: str, options: PromptOptions) -> Content:
    content = from_text(value, place)
    if options.makes_chats:
        return from_messages([{"role": "user", "content": value}], place, options.system)
    return content


def _fill_template(columns: Mapping[str, Any], options: PromptOptions) -> str:
    pieces = []
    for text, name, default in options.template_parts:
        pieces.append(text)
        if name is None:
            continue
        value = columns.get(name)
        if value is None and default is not None:
            pieces.append(default)
            continue
        if value is None:
            what = "is null" if name in columns else f"is not among {shown([*columns])}"
            raise Refused("template_error", f"the template's column {shown(name)} {what}")
        try:
            pieces.append(value if isinstance(value, str) else orjson.dumps(value).decode())
        except TypeError as error:
            message = f"the template's column {shown(name)} cannot be text: {error}"
            raise Refused("template_error", message) from None
    return "".join(pieces)
