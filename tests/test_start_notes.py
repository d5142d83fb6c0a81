"""What is said before a job runs: completions without an end, chats that --system makes."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.rows import check_inputs, read_rows
from nanovllm_cli.start_notes import start_notes

from .cli import MODEL, call, generate, run, write_rows

ENDLESS = "raw prompts have no limit of length"
SYSTEM = "--system makes a chat of each prompt"
SAME = "every row has the same prompt"
RAW: dict[str, Any] = {"prompt": "a"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


def notes(
    tmp_path: Path, rows: list[dict[str, Any]], sampling: dict[str, Any], **more: Any
) -> list[str]:
    source = str(write_rows(tmp_path / "in.jsonl", rows))
    prompt = PromptOptions(**{k: more.pop(k) for k in ("system", "chat", "template") if k in more})
    options = GenerateOptions(inputs=[source], prompt=prompt, **more)
    sources = find_inputs([source])
    check_inputs(sources)
    told, left = start_notes(read_rows(sources), options, sampling=sampling, max_model_len=40960)
    assert len(list(left)) == len(rows)
    return [text for _, text in told]


@pytest.mark.parametrize(
    ("rows", "sampling", "more", "expected"),
    [
        ([RAW], {}, {}, [ENDLESS]),
        ([CHAT, RAW], {"temperature": 0.5}, {}, [ENDLESS]),
        ([{"prompt_token_ids": [5]}], {}, {}, [ENDLESS]),
        ([RAW], {"max_tokens": 5}, {}, []),
        ([RAW], {"grammar": "x"}, {}, []),
        ([{**RAW, "max_tokens": 5}], {}, {}, []),
        ([{**RAW, "max_tokens": 5}, RAW], {}, {}, [ENDLESS]),
        ([RAW], {}, {"stop": ("\n",)}, []),
        ([{**RAW, "stop": "\n"}], {}, {}, []),
        ([CHAT], {}, {}, []),
        ([RAW], {}, {"chat": True}, []),
        ([RAW], {}, {"system": "Be brief."}, [SYSTEM]),
        ([RAW], {}, {"system": "Be brief.", "chat": True}, []),
        ([CHAT], {}, {"system": "Be brief."}, []),
        ([RAW], {"max_tokens": 5}, {"template": "Hello"}, [SAME]),
        ([RAW], {"max_tokens": 5}, {"template": "Hello {prompt}"}, []),
        ([RAW], {}, {"template": "Hello"}, [SAME, ENDLESS]),
        ([{"text": "a"}], {}, {"template": "{text}", "system": "S"}, [SYSTEM]),
    ],
)
def test_what_may_surprise_is_said_and_nothing_else(
    rows: list[dict[str, Any]],
    sampling: dict[str, Any],
    more: dict[str, Any],
    expected: list[str],
    tmp_path: Path,
) -> None:
    found = notes(tmp_path, rows, sampling, **more)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
    assert not expected or ENDLESS not in expected or "up to the model's 40,960 tokens" in found[-1]


def test_the_command_says_it_once_and_not_with_quiet(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+1=\nA:"}] * 3)
    told = generate(
        rows, "-p", "Q: 1+1=\nA:", "-o", tmp_path / "out.jsonl", "--max-model-len", "30"
    )
    lines = [line for line in told.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    assert "the same prompt" in lines[0]
    assert "up to the model's 30 tokens" in lines[1]
    quiet = generate(rows, "-q", "--max-model-len", "30")
    assert (quiet.code, quiet.stderr) == (0, "")


# --- three flags that vLLM has


def test_the_models_sampling_can_be_left_out_or_be_anothers(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        (model / path.name).symlink_to(path)
    (model / "generation_config.json").unlink()
    own = {"do_sample": True, "temperature": 3.0, "eos_token_id": []}
    (model / "generation_config.json").write_text(json.dumps(own))
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"do_sample": false}')

    def text(*flags: str | Path) -> str:
        ended = call("generate", rows, "--model", model, "--max-tokens", "12", "-q", *flags)
        assert ended.code == 0, ended
        return str(ended.rows[0]["completion"])

    greedy = text("--temperature", "0")
    assert text() == text("--generation-config", "auto") == text("--temperature", "3") != greedy
    assert text("--generation-config", other) == greedy
    assert text("--generation-config", "vllm") == text("--temperature", "1") != text()
    for wrong, message in ((tmp_path, "without generation_config"), ("no", "is not a directory")):
        ended = generate(rows, "--generation-config", wrong)
        assert (ended.code, message in ended.stderr) == (66, True)


def test_the_name_in_openai_lines_can_be_chosen_and_is_a_setting_of_the_job(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    flags = (rows, "--format", "openai", "--max-tokens", "1", "-q", "-o", tmp_path / "out.jsonl")
    assert generate(*flags, "--served-model-name", "mine").code == 0
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line["response"]["body"]["model"] == "mine"
    assert generate(*flags, "--served-model-name", "mine").code == 0  # nothing to do
    changed = generate(*flags)
    assert changed.code == 78
    assert "served_model_name" in changed.stderr


def test_a_template_from_a_file_makes_the_chats_and_is_a_setting_of_the_job(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [CHAT])
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:")
    flags = ("--max-tokens", "4", "-q")
    chat = run("generate", rows, "--model", MODEL, *flags, "--chat-template", template)
    raw = write_rows(tmp_path / "raw.jsonl", [{"prompt": "user: a\nA:"}])
    assert chat.code == 0, chat.stderr
    names = ("completion", "usage")
    expected = run("generate", raw, "--model", MODEL, *flags).rows[0]
    assert [chat.rows[0][name] for name in names] == [expected[name] for name in names]
    output = ("-o", tmp_path / "out.jsonl")
    assert generate(rows, *flags, *output, "--chat-template", template).code == 0
    changed = generate(rows, *flags, *output)
    assert changed.code == 78
    assert "chat_template" in changed.stderr
    missing = generate(rows, "--chat-template", tmp_path / "none")
    assert (missing.code, "--chat-template: there is no file" in missing.stderr) == (66, True)
