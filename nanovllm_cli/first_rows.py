"""The first rows of a job, tried before the model is loaded.

What is wrong with all of them is wrong with the command, or with the inputs as a whole.
"""

import difflib
from collections.abc import Iterator
from itertools import chain, islice

from .exit_code import CommandError, ExitCode
from .foreign_input import foreign_input
from .openai_line import is_openai_line
from .output_columns import OutputColumns
from .prompt_options import PromptOptions
from .prompts import to_prompt
from .refusal import shown
from .rows import BadRow, Row

_ROWS_TRIED = 100
_DEFAULT_NAMES = {
    f"--{name}-column": name for name in ("prompt", "messages", "context", "continuation")
}
# Columns that often hold what is to be completed.
_TEXTS = ("text", "instruction", "question", "query", "input", "content", "prompt_text")
_NO_ROW = ("invalid_json", "not_an_object")  # the codes of lines that are not JSON lines at all


def try_first_rows(
    rows: Iterator[Row | BadRow],
    options: PromptOptions,
    columns: OutputColumns | None = None,
) -> Iterator[Row | BadRow]:
    """`rows` unchanged, after a look at the first.

    Raises CommandError: USAGE for a column that a flag names and none of them has, INPUT_UNUSABLE
    where all of them are bad.
    """
    first = list(islice(rows, _ROWS_TRIED))
    good = [row for row in first if isinstance(row, Row)]
    _check_named_columns(good, options)
    if columns is not None and columns.chosen:
        _check_output_columns(good, columns)
    tried = (to_prompt(row, options) if isinstance(row, Row) else row for row in first)
    bad = [row for row in tried if isinstance(row, BadRow)]
    if bad and len(bad) == len(first):
        need = (
            "A row needs a prompt, messages or prompt_token_ids; --prompt-column, "
            "--messages-column and --template name others."
        )
        if options.is_score:
            need = (
                "A row needs a context and a continuation, a prompt, messages or "
                "prompt_token_ids; --context-column and --continuation-column name others."
            )
        elif text := next((name for name in _columns_of(good) if name in _TEXTS), None):
            need = f"If {shown(text)} is the prompt, add -p '{{{text}}}'. {need}"
        if all(row.code in _NO_ROW for row in bad):
            need = (
                "Inputs are Parquet, or one JSON object a line: jq -c '.[]' makes them of a list."
            )
            foreign = foreign_input(bad[0].source)
            if foreign is not None:
                need = (
                    f"Inputs are Parquet, or one JSON object a line, and this seems to be "
                    f"{foreign.what}. To make JSON lines of it: {foreign.command}"
                )
        raise CommandError(
            f"{bad[0].source}:{bad[0].line}: {bad[0].message}",
            f"None of the first {len(bad)} rows is usable. {need}",
            exit_code=ExitCode.INPUT_UNUSABLE,
        )
    return chain(first, rows)


def _check_named_columns(rows: list[Row], options: PromptOptions) -> None:
    columns = _columns_of(rows)
    for name, flag in options.named_columns.items():
        if not rows or name in columns or _DEFAULT_NAMES.get(flag) == name:
            continue
        if flag == "--template" and name in options.optional_columns:
            continue
        raise _no_such_column(flag, name, columns, len(rows))


def _check_output_columns(rows: list[Row], columns: OutputColumns) -> None:
    if any(is_openai_line(row.columns) for row in rows):
        raise CommandError(
            "--output-columns cannot choose from OpenAI batch lines, which come out as such",
            "Leave it out.",
        )
    known = [*_columns_of(rows), *columns.results]
    for name in columns.chosen:
        if rows and name not in known:
            raise _no_such_column("--output-columns", name, known, len(rows))


def _columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.columns))


def _no_such_column(flag: str, name: str, columns: list[str], num_rows: int) -> CommandError:
    near = difflib.get_close_matches(name, columns, n=1)
    return CommandError(
        f"{flag} names the column {shown(name)}, which none of the first {num_rows} rows has",
        f"Did you mean {shown(near[0])}?" if near else f"The rows have {shown(columns)}.",
    )
