"""What is neither JSON lines nor Parquet is named, with a command that makes JSON lines of it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import xxhash

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.first_rows import try_first_rows
from nanovllm_cli.foreign_input import foreign_input
from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.row_key import row_key
from nanovllm_cli.rows import BadRow, read_rows

ROWS = [{"id": "007", "prompt": "a, b"}, {"id": "12e3", "prompt": "c;\td"}]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hint_for(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CommandError) as caught:
        list(try_first_rows(read_rows(find_inputs([name])), PromptOptions()))
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE
    return str(caught.value.hint)


def csv_text(delimiter: str, bom: str = "") -> str:
    rows = [("id", "prompt"), *(tuple(row.values()) for row in ROWS)]
    quoted = (delimiter.join(f'"{value}"' for value in row) for row in rows)
    return bom + "\r\n".join(quoted) + "\r\n"


JQ = pytest.mark.skipif(shutil.which("jq") is None, reason="the command is jq")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.csv", csv_text(","), "CSV"),
        ("a file's.CSV", csv_text(";", "\ufeff"), "CSV"),
        ("x.tsv", csv_text("\t"), "tab-separated text"),
        ("export", csv_text(","), "CSV"),
        pytest.param("x.json", json.dumps(ROWS), "a JSON array", marks=JQ),
        pytest.param("x.jsonl", json.dumps(ROWS, indent=1), "a JSON array", marks=JQ),
        pytest.param(
            "x.ndjson",
            "".join(json.dumps(row, indent=2) + "\n" for row in ROWS),
            "JSON over several lines",
            marks=JQ,
        ),
    ],
)
def test_the_command_makes_the_rows_of_it(name: str, content: str, what: str) -> None:
    hint = hint_for(name, content)
    assert f"this seems to be {what}. To make JSON lines of it: " in hint
    command = hint.rpartition("To make JSON lines of it: ")[2]
    given = Path(name).read_bytes()
    subprocess.run(["sh", "-c", command], check=True)
    assert Path(name).read_bytes() == given
    (made,) = [path for path in Path().iterdir() if path.name != name]
    assert [json.loads(line) for line in made.read_text().splitlines()] == ROWS


@JQ
def test_prompts_a_line_become_rows() -> None:
    hint = hint_for("my prompts.txt", 'Once upon\na "time"\n')
    assert "this seems to be plain text" in hint
    subprocess.run(["sh", "-c", hint.rpartition("lines of it: ")[2]], check=True)
    made = Path("my prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in made] == [{"prompt": "Once upon"}, {"prompt": 'a "time"'}]


def test_what_cannot_be_converted_by_a_command_is_named() -> None:
    assert "this seems to be YAML" in hint_for("x.yaml", "- prompt: x\n- prompt: y\n")
    Path("x.xlsx").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(CommandError, match="is a spreadsheet") as caught:
        list(read_rows(find_inputs(["x.xlsx"])))
    assert str(caught.value.hint).startswith("Save it as CSV")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "{'prompt': 'x'}\n"),
        ("x.jsonl", '["a"]\n["b"]\n'),
        ("x.log", "a b\n"),
        ("x", ""),
    ],
)
def test_nothing_is_said_of_what_is_not_known(name: str, content: str) -> None:
    Path(name).write_text(content)
    assert foreign_input(name) is None
    assert foreign_input("missing") is foreign_input("<stdin>") is None


@pytest.mark.parametrize("column", ["text", "instruction", "question"])
def test_a_column_that_may_be_the_prompt_is_offered_as_a_template(column: str) -> None:
    hint = hint_for("in.jsonl", json.dumps({"id": 1, column: "x"}) + "\n")
    assert f"add -p '{{{column}}}'" in hint


def test_a_byte_that_is_not_utf8_has_a_place() -> None:
    Path("in.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (row,) = read_rows(find_inputs(["in.jsonl"]))
    assert isinstance(row, BadRow)
    assert row.message == "not UTF-8 at byte 16 of the line, which is 0xe9"
    # Journals of earlier versions know the row by what was said of it then.
    told = "not valid JSON at line 1 column 1: str is not valid UTF-8: surrogates not allowed"
    content = repr((None, "invalid_json", told)).encode()
    assert row_key(row) == xxhash.xxh3_128_intdigest(content)
