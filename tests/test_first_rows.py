"""first_rows.py: what is wrong with all of the first rows ends the job, and whose fault it is."""

from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.first_rows import try_first_rows
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.rows import BadRow, Row

GOOD = {"id": 1, "prompt": "x"}
BROKEN = BadRow(index=0, source="s", line=1, id=None, code="invalid_json", message="not JSON")


def rows_of(*columns: dict[str, Any]) -> list[Row | BadRow]:
    return [
        Row(index=at, source="s", line=at + 1, raw=None, columns=of)
        for at, of in enumerate(columns)
    ]


def refusal(rows: list[Row | BadRow], **options: Any) -> CommandError:
    with pytest.raises(CommandError) as caught:
        try_first_rows(iter(rows), PromptOptions(**options))
    return caught.value


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--prompt-column", {"prompt_column": "txt"}),
        ("--messages-column", {"messages_column": "txt"}),
        ("--id-column", {"id_column": "txt"}),
        ("--template", {"template": "{id}: {txt}"}),
    ],
)
def test_a_named_column_that_no_row_has_is_a_mistake_of_the_command(
    flag: str, options: dict[str, str]
) -> None:
    error = refusal(rows_of({"id": 1, "text": "x"}, {"id": 2, "label": "y"}), **options)
    assert error.exit_code == ExitCode.USAGE
    assert error.message == f"{flag} names the column 'txt', which none of the first 2 rows has"
    assert error.hint == "Did you mean 'text'?"


def test_without_a_similar_column_all_are_named() -> None:
    error = refusal(rows_of(GOOD), id_column="zzz")
    assert error.hint == "The rows have ['id', 'prompt']."


def test_good_rows_do_not_excuse_a_column_that_is_not_there() -> None:
    assert refusal(rows_of(GOOD, GOOD), messages_column="chat").exit_code == ExitCode.USAGE


def test_one_row_with_the_column_is_enough_even_if_it_is_null() -> None:
    rows = rows_of(GOOD, {"text": None, "prompt": "x"})
    assert list(try_first_rows(iter(rows), PromptOptions(messages_column="text"))) == rows
    assert refusal(rows[1:], prompt_column="text").exit_code == ExitCode.INPUT_UNUSABLE


def test_only_the_first_hundred_rows_are_looked_at() -> None:
    rows = rows_of(*[GOOD] * 100, {"text": "x"})
    assert refusal(rows, prompt_column="text").exit_code == ExitCode.USAGE
    rows = rows_of(*[GOOD] * 99, {"text": "x"})
    assert list(try_first_rows(iter(rows), PromptOptions(prompt_column="text"))) == rows


@pytest.mark.parametrize("rows", [rows_of({"id": 1}), rows_of({"prompt": ""}), [BROKEN]])
@pytest.mark.parametrize("options", [{}, {"messages_column": "messages"}])
def test_rows_that_are_bad_for_another_reason_are_a_fault_of_the_input(
    rows: list[Row | BadRow], options: dict[str, str]
) -> None:
    error = refusal(rows, **options)
    assert error.exit_code == ExitCode.INPUT_UNUSABLE
    assert error.message.startswith("s:1: ")


def test_lines_that_are_no_rows_do_not_blame_the_flag() -> None:
    assert refusal([BROKEN], prompt_column="text").exit_code == ExitCode.INPUT_UNUSABLE
    assert refusal([BROKEN, *rows_of(GOOD)], prompt_column="text").exit_code == ExitCode.USAGE


def test_a_file_that_is_no_json_lines_is_told_what_they_are() -> None:
    array = BadRow(index=0, source="s", line=1, id=None, code="not_an_object", message="a list")
    assert "one JSON object a line" in str(refusal([array, BROKEN]).hint)
    assert "one JSON object a line" not in str(refusal([array, *rows_of({"id": 1})]).hint)


def test_no_row_is_lost_and_none_is_read_too_early() -> None:
    taken = 0

    def rows() -> Iterator[Row | BadRow]:
        nonlocal taken
        for row in rows_of(*[GOOD] * 250):
            taken += 1
            yield row

    tried = try_first_rows(rows(), PromptOptions())
    assert taken == 100
    assert [row.index for row in tried] == [*range(250)]
    assert list(try_first_rows(iter([]), PromptOptions(prompt_column="x"))) == []


def test_a_template_s_column_with_a_default_may_be_missing() -> None:
    template = "{prompt}{input|}"
    assert list(try_first_rows(iter(rows_of(GOOD)), PromptOptions(template=template)))
    refused = refusal(rows_of(GOOD), template="{prompt}{input|}{inptu}")
    assert refused.message.startswith("--template names the column 'inptu'")
