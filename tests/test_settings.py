"""settings.py: the values of a flag that may be repeated, from a variable and from a file."""

from pathlib import Path

import pytest

from nanovllm_cli.options import GenerateOptions

from .cli import Run, call


def begin(*flags: str | Path, variable: str | None = None) -> Run:
    env = {} if variable is None else {"NANOVLLM_STOP": variable}
    return call("generate", "x.jsonl", *flags, env=env)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("a", ("a",)),
        ("The end.", ("The end.",)),
        ("  two  blanks ", ("  two  blanks ",)),
        ("\n\n", ("\n\n",)),
        (" ", (" ",)),
        ('["a b", "\\n"]', ("a b", "\n")),
        ('["one"]', ("one",)),
        ("[]", ()),
        ("", ()),  # as good as not set, for every flag
        ("[INST]", ("[INST]",)),
        ('["a", 1]', ('["a", 1]',)),
        ('"a"', ('"a"',)),
        ("7", ("7",)),
    ],
)
def test_a_variable_is_one_text_unless_it_is_a_json_list_of_them(
    variable: str, expected: tuple[str, ...], chosen: list[GenerateOptions]
) -> None:
    assert begin(variable=variable).code == 0
    assert chosen[0].stop == expected


def test_the_command_line_comes_first_and_is_never_split(chosen: list[GenerateOptions]) -> None:
    assert begin("--stop", "a b", "--stop", '["c"]', variable="not this").code == 0
    assert chosen[0].stop == ("a b", '["c"]')


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ('stop = ["a b", "\\n"]', ("a b", "\n")),
        ('stop = "a b"', ("a b",)),
        ("stop = []", ()),
        ("stop = '[\"a\"]'", ('["a"]',)),
    ],
)
def test_a_file_has_a_string_or_a_list_of_them(
    toml: str, expected: tuple[str, ...], chosen: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(toml)
    assert begin("--config", tmp_path / "job.toml").code == 0
    assert chosen[0].stop == expected


@pytest.mark.parametrize("variable", ['[""]', '["a", ""]'])
def test_an_empty_text_is_refused(variable: str, chosen: list[GenerateOptions]) -> None:
    for ended in (begin(variable=variable), begin("--stop", "a", "--stop", "")):
        assert (ended.code, ended.stdout) == (2, b"")
        assert ended.stderr.startswith("error: --stop is ''; it must be a text that is not empty")
    assert chosen == []
