"""What the tool says: no name and no row in it reaches a terminal as anything but text."""

import json
import unicodedata
from pathlib import Path

import pytest

from nanovllm_cli.files import printable, printable_json
from nanovllm_cli.log import Log

from .cli import generate

EVIL = "\x1b]0;x\x07\r\n\t\x00\x7f\x9b31m\u202eeliw\u202c\u2066\u2028\udce9"


def is_safe(text: str) -> bool:
    """Whether a terminal shows all of it as text; newlines are looked at by themselves."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text
    )


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert is_safe(printable(EVIL))
    assert printable(EVIL) == (
        "\\x1b]0;x\\x07\\r\\n\\t\\x00\\x7f\\x9b31m\\u202eeliw\\u202c\\u2066\\u2028\\udce9"
    )
    text = "na\u00efve \u4f60\u597d \u05e9\u05dc\u05d5\u05dd \\n {a:b}"
    assert printable(text) == text
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        assert is_safe(printable(chr(code)))


def test_a_row_on_stderr_means_the_same_and_is_safe() -> None:
    row = {"id": "a\x1b\x7f\x9b31m\u202e\u2066\u2028\u4f60"}
    line = json.dumps(row, ensure_ascii=False).encode()
    assert json.loads(printable_json(line)) == row
    assert is_safe(printable_json(line).decode())


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_line_of_the_log_is_one_line_and_safe(
    format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Log(format).say("x", f"cannot read {EVIL}", level="error", hint=f"Did you mean {EVIL}?")
    said = capsys.readouterr().err
    lines = said.split("\n")
    assert len(lines) == (4 if format == "text" else 2)  # message, blank, hint; what ends them
    assert all(map(is_safe, lines))
    if format == "json":
        assert is_safe(json.loads(lines[0])["message"])


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_row_and_a_name_in_a_message_are_safe(format: str, tmp_path: Path) -> None:
    source = tmp_path / "es\x1b[31mc\u202e.jsonl"
    source.write_bytes('"\u009b31m\u202eEVIL\u202c\u0090+q\u009c\u007f"\n'.encode())
    ended = generate(source, "-o", tmp_path / "out.jsonl", "--log-format", format)
    assert ended.code == 65
    assert all(map(is_safe, ended.stderr.split("\n")))
    assert "EVIL" in ended.stderr
