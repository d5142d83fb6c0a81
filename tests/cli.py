"""Runs the nanovllm command for the tests: as a process, or in this one where a start costs more.

A start takes seconds (torch, transformers), so the many small cases go through `call`, which runs
the same `main` with the same arguments and only the process is missing.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from nanovllm_cli import app

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_data"
MODEL = SAMPLE / "model"
COMMAND = Path(sys.executable).with_name("nanovllm")
TIMEOUT_SECONDS = 300  # only a hanging process ever waits so long


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a command ended; below 0 the code is the signal's, as subprocess has it."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines on stdout."""
        return [json.loads(line) for line in self.stdout.splitlines()]


def environment(**more: str) -> dict[str, str]:
    """What a cron job has, and no more; nothing of the shell that runs the tests."""
    return {
        "PATH": f"{COMMAND.parent}:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",  # the tests leave nothing in the checkout
        **more,
    }


def run(
    *arguments: str | Path,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run the real command, without a hub; `env` adds to the clean environment."""
    ended = subprocess.run(
        [COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**{"HF_HUB_OFFLINE": "1", **(env or {})}),
        timeout=TIMEOUT_SECONDS,
    )
    return Run(code=ended.returncode, stdout=ended.stdout, stderr=ended.stderr.decode())


def shell(line: str, *, cwd: Path, env: Mapping[str, str] | None = None) -> Run:
    """Run a line of shell as cron does: `sh -c`, an almost empty environment, nothing on stdin."""
    ended = subprocess.run(
        ["/bin/sh", "-c", line],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=cwd,
        env=environment(**(env or {})),
        timeout=TIMEOUT_SECONDS,
    )
    return Run(code=ended.returncode, stdout=ended.stdout, stderr=ended.stderr.decode())


def call(*arguments: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Run:
    """What `run` does, in this process, the engine too."""
    stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    alone = {"NANOVLLM_SINGLE_PROCESS": "1"}
    clean = {name: value for name, value in os.environ.items() if "NANOVLLM" not in name}
    with (
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        mock.patch.object(sys, "argv", ["nanovllm", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        mock.patch.dict(
            os.environ, {**clean, **alone, "COLUMNS": "200", **(env or {})}, clear=True
        ),
    ):
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            app.main()
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGINT, interrupt)
    stdout.flush()
    stderr.flush()
    assert isinstance(stdout.buffer, io.BytesIO)
    assert isinstance(stderr.buffer, io.BytesIO)
    return Run(
        code=code if isinstance(code, int) else 0,
        stdout=stdout.buffer.getvalue(),
        stderr=stderr.buffer.getvalue().decode(),
    )


def generate(
    *arguments: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> Run:
    """`nanovllm generate` with the sample model, in this process."""
    return call("generate", *arguments, "--model", MODEL, stdin=stdin, env=env)


def processes_with(mark: Path) -> list[int]:
    """Those that run and have `mark` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if bytes(mark) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
