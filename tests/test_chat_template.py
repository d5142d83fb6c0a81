"""Chat templates as transformers renders them: 1,000 conversations under nine templates."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm_cli.chat_template import ChatTemplate
from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.sandbox import SandboxError
from nanovllm_cli.tokenizer_files import TokenizerFiles

from .cli import MODEL

Chat = list[dict[str, Any]]

_BODY = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}"
    "{%- if m.tool_calls %}{{ m.tool_calls | tojson(indent=2) }}{% endif %}<|im_end|>\n{% endfor %}"
)
TEMPLATES: dict[str, str | list[dict[str, str]] | None] = {
    "Qwen3": None,
    "ChatML": _BODY + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{% for m in messages %}"
        "[{{ loop.index0 }}/{{ loop.length }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    ),
    "loop controls and namespaces": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}"
        "{% if ns.n > 3 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}{{ ns.n }}{{ ns.last }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{% set x = m.content %}{{ x }}{{ loop.index }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}\n{% endfor %}{{ x is defined }}"
    ),
    "refuses": (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no ' ~ m.role) }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    ),
    "macros and dicts": (
        "{% macro part(m, sep=' ') %}{{ m.role }}{{ sep }}{{ m.content }}{% endmacro %}"
        "{% set d = dict(a=1, b=[1, 2]) %}{{ d.items() | list | tojson }}{% for m in messages %}"
        "{{ part(m, sep='-') }}\n{% endfor %}{{ messages | map(attribute='role') | join(',') }}"
    ),
    "every field": (
        "{% for m in messages %}{{ m | tojson(ensure_ascii=True, sort_keys=True) }}"
        "{{ m.thinking }}{{ m.get('reasoning') }}{% endfor %}{{ tools | tojson }}{{ documents }}"
        "{{ enable_thinking is defined }}{{ add_generation_prompt }}"
    ),
    "named": [
        {"name": "default", "template": _BODY},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + _BODY},
    ],
}
_TEXTS = [
    "", "Hi", " two  blanks ", "\n\nlines\n", "\u4f60\u597d", "caf\u00e9 e\u0301", "<b>&amp;</b>",
    '"quoted" \\ back', "{{ not a template }}", "{% if %}", "\U0001f600\u200d", "\x00\x7f", "0",
]  # fmt: skip


def conversations(count: int, seed: int) -> list[tuple[Chat, list[dict[str, Any]] | None]]:
    """Random chats, a third of them with tools."""
    rng = random.Random(seed)
    function = {"name": "look", "description": "x", "parameters": {"type": "object"}}
    found = []
    for _ in range(count):
        chat: Chat = []
        if rng.random() < 0.4:
            chat.append({"role": "system", "content": rng.choice(_TEXTS)})
        for _ in range(rng.randint(1, 4)):
            chat.append({"role": "user", "content": rng.choice(_TEXTS) + rng.choice(_TEXTS)})
            answer: dict[str, Any] = {"role": "assistant", "content": rng.choice(_TEXTS)}
            if rng.random() < 0.3:
                name = rng.choice(("reasoning_content", "thinking", "reasoning"))
                answer[name] = rng.choice(_TEXTS)
            if rng.random() < 0.3:
                arguments: Any = {"at": rng.choice(_TEXTS), "n": [1, 2.5, None, True]}
                if rng.random() < 0.5:
                    arguments = json.dumps(arguments)
                call = {"name": "look", "arguments": arguments}
                answer["tool_calls"] = [{"type": "function", "function": call}]
                if rng.random() < 0.5:
                    answer["content"] = ""
                chat += [answer, {"role": "tool", "content": rng.choice(_TEXTS)}]
            elif rng.random() < 0.9:
                chat.append(answer)
        tools = [{"type": "function", "function": function}] * rng.randint(1, 2)
        found.append((chat, tools if rng.random() < 0.33 else None))
    return found


def checkpoint(folder: Path, template: str | list[dict[str, str]] | None) -> Path:
    path = folder / "model"
    shutil.copytree(MODEL, path)
    config = json.loads((path / "tokenizer_config.json").read_bytes())
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, TEMPLATES[name])
    theirs: Any = AutoTokenizer.from_pretrained(path)
    files = TokenizerFiles.read(path)
    ours = ChatTemplate(files.chat_templates, files.special_tokens)
    rng = random.Random(1)
    tasks, expected = [], []
    for chat, tools in conversations(1000, seed=0):
        more: dict[str, Any] = {"add_generation_prompt": rng.random() < 0.5}
        if rng.random() < 0.5:
            more["enable_thinking"] = rng.random() < 0.5
        tasks.append(ours.task(chat, tools=tools, **more))
        try:
            text = theirs.apply_chat_template(chat, tools=tools, tokenize=False, **more)
        except Exception as error:
            text = error
        expected.append(text)
    num_texts = 0
    for got, wanted in zip(ours.render(tasks), expected, strict=True):
        if isinstance(wanted, Exception):
            assert isinstance(got, SandboxError)
            assert str(got) == str(wanted)
        else:
            assert got == wanted
            num_texts += 1
    assert num_texts > 300


def test_templates_in_files_of_their_own_come_first(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "in the config")
    (path / "chat_template.jinja").write_text("in a file")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    theirs: Any = AutoTokenizer.from_pretrained(path)
    files = TokenizerFiles.read(path)
    assert files.chat_templates == theirs.chat_template
    assert files.chat_templates == {"default": "in a file", "tool_use": "with tools"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chat_template": 5}, "chat_template must be text"),
        ({"chat_template": [{"name": "default"}]}, "chat_template must be text"),
        ({"chat_template": ["x"]}, "chat_template must be text"),
        ({"eos_token": 7}, "the eos_token is 7; it must be text"),
        ({"bos_token": {"content": []}}, "the bos_token is"),
    ],
)
def test_a_tokenizer_config_of_wrong_types_is_a_broken_model(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, None)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))
    with pytest.raises(ModelError, match=reason):
        TokenizerFiles.read(path)


def test_a_model_without_a_template_refuses_chats_alone() -> None:
    with pytest.raises(ValueError, match="the model has none"):
        ChatTemplate({}, {}).task([{"role": "user", "content": "Hi"}])
