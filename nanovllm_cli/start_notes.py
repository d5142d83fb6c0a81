"""What a job's first rows and flags make likely to surprise, said once before the model loads."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from .log import Level
from .options import GenerateOptions
from .prompt_options import PromptOptions
from .prompts import Prompt, to_prompt
from .refusal import shown
from .rows import BadRow, Row

_ROWS_TRIED = 100
_ENDS = ("max_tokens", "grammar")  # sampling parameters by which a completion ends soon


def start_notes(
    rows: Iterator[Row | BadRow],
    options: GenerateOptions,
    *,
    sampling: Mapping[str, Any],
    max_model_len: int,
) -> tuple[list[tuple[Level, str]], Iterator[Row | BadRow]]:
    """Return what to say, and `rows` unchanged; `sampling` is what rows get that say nothing."""
    first = list(islice(rows, _ROWS_TRIED))
    prompts = [to_prompt(row, options.prompt) for row in first if isinstance(row, Row)]
    good = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    notes: list[tuple[Level, str]] = []
    flags, template = options.prompt, options.prompt.template
    if template and good and all(part.name is None for part in flags.template_parts):
        text = f"the template {shown(template)} has no {{column}}: every row has the same prompt"
        notes.append(("warning", text))
    made = [prompt for prompt in good if prompt.messages is not None and _is_prompt(prompt, flags)]
    if flags.system is not None and not flags.chat and made:
        notes.append(("info", "--system makes a chat of each prompt, as --chat does"))
    if any(_is_endless(prompt, options, sampling) for prompt in good):
        text = (
            "raw prompts have no limit of length: a row may run up to the model's "
            f"{max_model_len:,} tokens; --max-tokens 200 limits it, --chat makes chats of prompts"
        )
        notes.append(("warning", text))
    return notes, chain(first, rows)


def _is_prompt(prompt: Prompt, flags: PromptOptions) -> bool:
    """Whether a row's messages were made of a text."""
    columns = prompt.row.columns
    return flags.template is not None or isinstance(columns.get(flags.prompt_column), str)


def _is_endless(prompt: Prompt, options: GenerateOptions, sampling: Mapping[str, Any]) -> bool:
    """Whether a raw completion ends by itself or not at all."""
    if prompt.messages is not None or prompt.is_scored:
        return False
    given = {**sampling, **prompt.sampling}
    has_end = any(given.get(name) is not None for name in _ENDS)
    return not has_end and not (prompt.settings.stop or options.stop)
