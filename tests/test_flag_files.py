"""--template-file and --prefix-file: what is read, what is refused, and what comes of it."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from transformers import AutoTokenizer

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.flag_files import read_prefix, read_template
from nanovllm_cli.prompt_options import PromptOptions

from .cli import MODEL, call, generate, write_rows
from .job_folder import JobFolder, good_rows
from .parsing import USER, bad, chat_line, good, text_line

SHOT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def written(path: Path, content: object) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else orjson.dumps(content))
    return path


# --- the files


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"a {x}\n", "a {x}"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"a\r\nb", "a\r\nb")],
)
def test_a_template_is_the_file_without_its_last_newline(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    assert read_template(written(tmp_path / "t.txt", content)) == expected


def test_a_prefix_is_the_text_of_a_file_or_the_messages_of_a_json_file(tmp_path: Path) -> None:
    assert read_prefix(written(tmp_path / "p.txt", b"[1]\r\n\n")) == "[1]\r\n\n"
    assert read_prefix(written(tmp_path / "p.JSON", SHOT)) == SHOT


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("p.json", b"[", "is not JSON"),
        ("p.json", b"[]", "list of messages"),
        ("p.json", b'{"role": "user", "content": "x"}', "list of messages"),
        ("p.json", b'[{"role": "human", "content": "x"}]', "p.json[0].role is 'human'"),
        ("p.json", b'[{"role": "user"}]', "p.json[0].content is null"),
        ("p.json", [SYSTEM, *SHOT], "holds a system message"),
    ],
)
def test_a_prefix_that_cannot_be_used_is_a_mistake_of_the_command(
    name: str, content: object, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CommandError) as caught:
        read_prefix(written(tmp_path / name, content))
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--prefix-file" in caught.value.message
    assert words in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", good_rows(1))
    for flag in ("--template-file", "--prefix-file"):
        ended = generate(rows, flag, tmp_path / "no.txt")
        assert ended.code == ExitCode.NOT_FOUND
        assert f"{flag}: there is no file" in ended.stderr
        assert generate(rows, flag, tmp_path).code == ExitCode.USAGE


def test_only_one_of_the_two_templates_is_taken(tmp_path: Path) -> None:
    file = written(tmp_path / "t.txt", b"{prompt}")
    ended = generate("x.jsonl", "-p", "{prompt}", "--template-file", file)
    assert ended.code == ExitCode.USAGE
    assert "--template and --template-file" in ended.stderr


def test_a_long_template_with_a_fault_is_not_shown_in_full(tmp_path: Path) -> None:
    file = written(tmp_path / "t.txt", b"x" * 500 + b"{")
    ended = generate("x.jsonl", "--template-file", file)
    assert ended.code == ExitCode.USAGE
    assert len(ended.stderr) < 300


def test_text_does_not_go_before_chats_by_flag(tmp_path: Path) -> None:
    file = written(tmp_path / "p.txt", b"x")
    for flags in (["--chat"], ["--system", "s"]):
        ended = call("generate", "x.jsonl", "--prefix-file", file, *flags)
        assert ended.code == ExitCode.USAGE
        assert f"--prefix-file is text, and {flags[0]} makes chats" in ended.stderr
        assert ".json" in ended.stderr


# --- rows


def test_text_goes_before_every_text() -> None:
    assert good({"prompt": "b"}, prefix="a\n").text == "a\nb"
    assert good({"x": "b"}, prefix="a", template="{x}!").text == "ab!"
    assert good(text_line(prompt="b"), prefix="a").text == "ab"
    bad("empty_prompt", {"prompt": ""}, prefix="a")


def test_messages_go_behind_the_system_message_and_before_the_rows() -> None:
    assert good({"messages": [USER]}, prefix=SHOT).messages == [*SHOT, USER]
    assert good({"messages": [SYSTEM, USER]}, prefix=SHOT).messages == [SYSTEM, *SHOT, USER]
    options: dict[str, Any] = {"prefix": SHOT, "system": SYSTEM["content"]}
    assert good({"prompt": "Hello"}, **options).messages == [SYSTEM, *SHOT, USER]
    assert good(chat_line(), **options).messages == [SYSTEM, *SHOT, USER]


def test_messages_before_a_prompt_make_it_a_chat() -> None:
    assert good({"prompt": "Hello"}, prefix=SHOT).messages == [*SHOT, USER]
    assert good({"x": "Hello"}, template="{x}", prefix=SHOT).messages == [*SHOT, USER]


@pytest.mark.parametrize(
    ("columns", "prefix", "words"),
    [
        ({"messages": [USER]}, "a", "holds text, and cannot go before messages"),
        (chat_line(), "a", "holds text, and cannot go before messages"),
        ({"prompt_token_ids": [1]}, "a", "holds text, and cannot go before token ids"),
        ({"prompt_token_ids": [1]}, SHOT, "holds messages, and cannot go before token ids"),
        (text_line(prompt="b"), SHOT, "holds messages, and cannot go before text"),
    ],
)
def test_a_row_that_a_prefix_cannot_go_before_is_bad(
    columns: dict[str, Any], prefix: Any, words: str
) -> None:
    bad("bad_prompt", columns, words, prefix=prefix)


def test_the_prefix_of_one_row_is_not_anothers_to_change() -> None:
    options = PromptOptions(prefix=[*SHOT])
    messages = good({"prompt": "a"}, prefix=options.prefix).messages
    assert messages is not None
    messages.append(USER)
    assert options.prefix == SHOT


# --- the job


def test_a_prefix_is_computed_once_for_all_rows(tmp_path: Path, hugging_face: Any) -> None:
    shots = "".join(f"Q: {a}+4=\nA: {a + 4}\n" for a in range(40))
    rows = [{"a": a} for a in range(6)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    prefix = written(tmp_path / "shots.txt", shots.encode())
    template = written(tmp_path / "question.txt", b"Q: {a}+4=\nA:\n")
    output = tmp_path / "out.jsonl"
    flags = ("--prefix-file", prefix, "--template-file", template, "--max-tokens", "2", "-q")
    assert generate(source, "-o", output, *flags).code == 0
    usages = [json.loads(line)["usage"] for line in output.read_bytes().splitlines()]
    lengths = [len(hugging_face.encode(f"{shots}Q: {row['a']}+4=\nA:")) for row in rows]
    assert [usage["prompt_tokens"] for usage in usages] == lengths
    stats = json.loads((tmp_path / "out.jsonl.stats.json").read_bytes())
    shared = len(hugging_face.encode(shots)) // 64 * 64
    assert shared >= 64
    assert stats["tokens"]["cached"] >= 5 * shared
    assert generate(source, "-o", output, *flags).code == 0
    prefix.write_text(shots.replace("10", "11"))
    ended = generate(source, "-o", output, *flags)
    assert ended.code == ExitCode.CONFIG_MISMATCH
    assert "prefix: " in ended.stderr


def test_messages_of_a_file_are_rendered_with_the_rows_own(
    tmp_path: Path, hugging_face: Any
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hello"}, {"messages": [SYSTEM, USER]}])
    prefix = written(tmp_path / "shots.json", SHOT)
    flags = ("--prefix-file", prefix, "--chat", "--no-thinking", "--max-tokens", "1", "-q")
    ended = generate(source, *flags)
    chats = [[*SHOT, USER], [SYSTEM, *SHOT, USER]]
    lengths = [
        len(
            hugging_face.apply_chat_template(
                chat, add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
        )
        for chat in chats
    ]
    assert [row["usage"]["prompt_tokens"] for row in ended.rows] == lengths


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("prefix", "a", "b"),
        ("prefix", "x" * 200 + "a", "x" * 200 + "b"),
        ("prefix", SHOT, [*SHOT, *SHOT]),
        ("template", "a {prompt}", "b {prompt}"),
    ],
)
def test_a_file_edited_between_two_runs_is_named_and_refused(
    name: str, old: Any, new: Any, tmp_path: Path
) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(40))
    folder.stop_after(2, prompt=PromptOptions(**{name: old}))
    for prompt in (PromptOptions(**{name: new}), PromptOptions()):
        error = folder.refused(prompt=prompt)
        assert error.exit_code == ExitCode.CONFIG_MISMATCH
        assert f"{name}: " in error.message
    assert folder.run(prompt=PromptOptions(**{name: old}))[0] == 0
