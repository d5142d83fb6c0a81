"""Templates and grammars that never end, take all memory, or want out: each is its own error."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli import sandbox as sandbox_module
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.sandbox import Sandbox, SandboxError, Task
from nanovllm_cli.sandbox_worker import Kind

GOOD = "{{ messages[0]['content'] }}"
LOOPS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
OVER_TIME = {
    "loops": LOOPS,
    "a huge power": "{% set n = 9 ** 9 %}{{ 9 ** n ** 2 }}",
    "a macro with loops": "{% macro m() %}" + LOOPS + "{{ m() }}{% endmacro %}{{ m() }}",
}  # fmt: skip
OVER_MEMORY = {
    "a long string": "{{ messages[0]['content'] * 3000000000 }}",
    "a centred string": "{{ 'a' | center(2000000000) }}",
    "a string that doubles": (
        "{% set ns = namespace(s=messages[0]['content']) %}{% for i in range(60) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "more text than a prompt can be": "{{ messages[0]['content'] * 100000000 }}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{{ dict.__base__ }}",
    "{{ namespace.__init__.__globals__['os'] }}", "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ self._TemplateReference__context.environment }}", "{{ lipsum.__globals__['os'] }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}", "{{ tojson.__code__ }}",
    "{{ messages.append(messages[0]) }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.name }}", "{{ (1).__class__.__bases__ }}",
]  # fmt: skip


def chat(template: str, **variables: Any) -> Task:
    seen = {"messages": [{"role": "user", "content": "hi"}], "tools": None, **variables}
    return Task(Kind.RENDER, {"template": template, "variables": seen})


def grammar(kind: str, text: str) -> Task:
    return Task(Kind.GRAMMAR, {"kind": kind, "text": text})


@pytest.fixture(scope="module")
def quick() -> Iterator[Sandbox]:
    """One that loses patience soon."""
    made = Sandbox(seconds=0.3, num_bytes=1 << 30)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def with_patience(quick: Sandbox) -> None:
    quick._num_over_limit = 0


@pytest.mark.parametrize("template", OVER_TIME.values(), ids=OVER_TIME)
def test_a_template_that_does_not_end_is_its_rows_error(template: str, quick: Sandbox) -> None:
    before, after = chat(GOOD), chat(f"{GOOD}!")
    start = time.process_time()
    first, error, last = quick.run([before, chat(template), after])
    assert (first, last) == ("hi", "hi!")
    assert str(error) == "takes over 0.3 s to run"
    assert time.process_time() - start < 0.3, "this process only waits"


@pytest.mark.parametrize("template", OVER_MEMORY.values(), ids=OVER_MEMORY)
def test_a_template_that_takes_all_memory_is_its_rows_error(template: str) -> None:
    sandbox = Sandbox(num_bytes=1 << 30)
    try:
        first, error, last = sandbox.run([chat(GOOD), chat(template), chat(GOOD)])
    finally:
        sandbox.close()
    assert (first, last) == ("hi", "hi")
    assert str(error) in ("needs too much memory", "makes more than 64 MiB of text")


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(
    template: str, quick: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [result] = quick.run([chat(template)])
    assert isinstance(result, SandboxError) or result in ("", "None")
    assert not list(tmp_path.iterdir())


def test_a_bad_template_is_an_error_with_its_reason(quick: Sandbox) -> None:
    results = quick.run(
        [
            chat("{{ raise_exception('No tools, please.') }}"),
            chat("{% for %}"),
            chat("{{ messages[3].content }}"),
            chat("{{ tools | length }}"),
        ]
    )
    assert all(isinstance(result, SandboxError) for result in results)
    assert str(results[0]) == "No tools, please."
    assert "list object has no element 3" in str(results[2])


def test_grammars_that_cost_too_much_are_their_rows_error(quick: Sandbox) -> None:
    choices = json.dumps([f"choice number {n}" for n in range(100_000)])
    deep = "(" * 100_000 + "a" + ")" * 100_000
    results = quick.run(
        [grammar("choice", choices), grammar("regex", deep), grammar("regex", "(a"),
         grammar("json", '{"type": "object"' * 5000), grammar("regex", "[ab]+")]
    )  # fmt: skip
    assert [type(result) for result in results] == [SandboxError] * 4 + [str]


def test_after_many_such_rows_the_job_ends(quick: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "MAX_OVER_LIMIT", 3)
    with pytest.raises(CommandError, match="that makes 3 rows") as caught:
        quick.run([chat(LOOPS)] * 5)
    assert caught.value.exit_code == ExitCode.INPUT_UNUSABLE


def pid_of(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


def test_a_process_that_is_killed_is_started_again_and_costs_no_row() -> None:
    sandbox = Sandbox()
    assert sandbox.run([chat(GOOD)]) == ["hi"]
    first = pid_of(sandbox)
    os.kill(first, signal.SIGKILL)
    assert sandbox.run([chat(GOOD)] * 300) == ["hi"] * 300
    assert pid_of(sandbox) != first
    sandbox.close()
    sandbox.close()
    assert sandbox.run([chat(GOOD)]) == ["hi"]
    sandbox.close()


def test_a_process_that_stops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "_SILENT_SECONDS", 1.0)
    sandbox = Sandbox()
    assert sandbox.run([chat(GOOD)]) == ["hi"]
    os.kill(pid_of(sandbox), signal.SIGSTOP)
    assert sandbox.run([chat(GOOD)] * 2) == ["hi"] * 2
    sandbox.close()


def test_many_and_large_chats_go_both_ways_at_once(quick: Sandbox) -> None:
    text = "word " * 20_000
    tasks = [chat("{{ n }}{{ text }}", n=n, text=text) for n in range(200)]
    assert quick.run(tasks) == [f"{n}{text}" for n in range(200)]


def test_text_that_no_file_can_hold_comes_back_as_it_is(quick: Sandbox) -> None:
    text = "\ud800 \x00 \u2028 \U0001f600"
    assert quick.run([chat("{{ text }}", text=text)]) == [text]
