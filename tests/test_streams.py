"""Streams that are closed, and readers that leave: the job's code, and what is left of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .cli import (
    MODEL,
    ROOT,
    SAMPLE,
    TIMEOUT_SECONDS,
    environment,
    processes_with,
    read_rows,
    shell,
)

CODES = {
    "stdout's reader leaves": -13,
    "stdout is closed": 141,
    "stdout is closed and not needed": 3,
    "stderr is closed": 3,
    "stderr's reader leaves": 3,
}


def trials(tmp_path: Path, number: int) -> dict[str, Any]:
    """What stream_driver.py finds in so many trials of each kind."""
    lines = [
        b'{"id": %d}' % n if n % 41 == 7 else b'{"id": %d, "prompt": "row %d"}' % (n, n)
        for n in range(300)
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = [tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl", number]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.stream_driver", *map(str, arguments)],
        env=environment(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_40_closed_streams_end_a_job_as_promised_and_change_no_byte(tmp_path: Path) -> None:
    found = trials(tmp_path, 8)
    assert found == {kind: {"codes": [code] * 8, "wrong": 0} for kind, code in CODES.items()}


# How cron, a shell or a person closes them; the command's own code goes to a file.
LINES = {
    "a reader of stdout that leaves": ("{{ {generate}; echo $? > code; }} | head -1", 141),
    "stdout closed": ("{generate} >&-; echo $? > code", 141),
    "stdout closed and not needed": ("{generate} -o out.jsonl >&-; echo $? > code", 0),
    "stderr closed": ("{generate} -o out.jsonl 2>&-; echo $? > code", 0),
    "a reader of stderr that leaves": (
        "{{ {generate} -o out.jsonl 2>&3 >/dev/null; echo $? > code; }} 3>&1 | head -1", 0
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", LINES)
def test_closed_streams_of_the_real_command_leave_nothing_running(
    kind: str, tmp_path: Path
) -> None:
    line, code = LINES[kind]
    generate = f"nanovllm generate {SAMPLE / 'prompts.jsonl'} --model {MODEL} --max-tokens 4"
    output = tmp_path / "out.jsonl"
    whole = None
    for _ in range(8):
        ended = shell(line.format(generate=generate), cwd=tmp_path, env={"MARK": str(tmp_path)})
        assert "Traceback" not in ended.stderr
        assert (tmp_path / "code").read_text() == f"{code}\n"
        assert processes_with(tmp_path) == []
        if code == 0:
            assert len(read_rows(output)) == 256
            whole = whole or output.read_bytes()
            assert output.read_bytes() == whole
            output.unlink()
            output.with_name("out.jsonl.stats.json").unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["code"]
