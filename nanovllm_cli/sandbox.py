"""Sandbox: chat templates and grammars, run in a process of their own that has limits.

A checkpoint's template and a row's grammar are other people's programs. One that never ends, or
takes all memory, costs its row an error and this process a moment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.errors import MemoryTooSmall
from nanovllm_cli.core.processes import above_the_streams, how_it_ended

from .exit_code import CommandError, ExitCode
from .sandbox_worker import Kind

SECONDS = 5.0  # of processor time a task: a template takes a millisecond, a big schema a tenth
NUM_BYTES = 1 << 30  # of address space
MAX_OVER_LIMIT = 20  # tasks; so many of them have cost minutes, and the next ones would as well
_SILENT_SECONDS = 60.0  # without an answer: stopped, or the machine is
_WAIT_SECONDS = 0.5
_KILL_SECONDS = 10.0


class Task(NamedTuple):
    """What the process is asked."""

    kind: Kind
    content: dict[str, Any]


class SandboxError(ValueError):
    """Why a task has no result."""


class Sandbox:
    """Runs tasks in their order; the process starts with the first one, and again after its death.

    Safe to use from several threads. Ends with this process.
    """

    def __init__(self, *, seconds: float = SECONDS, num_bytes: int = NUM_BYTES) -> None:
        self._seconds = seconds
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._is_ready = False
        self._num_over_limit = 0

    def run(self, tasks: Sequence[Task]) -> list[str | SandboxError]:
        """Return each task's text, or why there is none.

        Raises CommandError INPUT_UNUSABLE once MAX_OVER_LIMIT tasks have run into a limit.
        """
        with self._lock:
            results: list[str | SandboxError] = []
            num_deaths = 0  # of the process with the first task that has no result
            while len(results) < len(tasks):
                came, death = self._run_until_death(tasks[len(results) :])
                results += came
                num_deaths = 1 if came else num_deaths + 1
                if death is None:
                    break
                if death == -signal.SIGPROF:
                    results.append(self._over_limit(f"takes over {self._seconds:g} s to run"))
                elif num_deaths > 1:
                    results.append(
                        self._over_limit(f"ends its process, which {how_it_ended(death)}")
                    )
                else:
                    continue
                num_deaths = 0
            return results

    def close(self) -> None:
        """End the process; the next task starts another one."""
        if self._process is None or self._channel is None:
            return
        self._channel.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(_KILL_SECONDS)
        self._process = self._channel = None
        self._is_ready = False

    def _run_until_death(
        self, tasks: Sequence[Task]
    ) -> tuple[list[str | SandboxError], int | None]:
        """The results of the first tasks, and the exit code of the process if it ended early."""
        channel = self._started()
        for task in tasks:
            channel.send(task.kind, json.dumps(task.content).encode())
        results: list[str | SandboxError] = []
        last_answer = time.monotonic()
        while len(results) < len(tasks):
            channel.wait(_WAIT_SECONDS)
            messages = channel.receive()
            for kind, payload in messages:
                if kind == Kind.READY:
                    self._is_ready = True
                    continue
                text = payload.decode("utf-8", "surrogatepass")
                if kind == Kind.LIMIT:
                    results.append(self._over_limit(text))
                else:
                    results.append(text if kind == Kind.TEXT else SandboxError(text))
            now = time.monotonic()
            if messages:
                last_answer = now
            elif channel.is_closed or now - last_answer > _SILENT_SECONDS:
                return results, self._end()
        return results, None

    def _over_limit(self, what: str) -> SandboxError:
        self._num_over_limit += 1
        if self._num_over_limit >= MAX_OVER_LIMIT:
            raise CommandError(
                f"a chat template or grammar {what}; that makes {MAX_OVER_LIMIT} rows whose "
                "template or grammar ran into its limit",
                "The chat template is the model's, a grammar is the row's or a flag's: mend it.",
                exit_code=ExitCode.INPUT_UNUSABLE,
            )
        return SandboxError(what)

    def _started(self) -> Channel:
        if self._channel is not None:
            return self._channel
        ours, theirs = (above_the_streams(end) for end in socket.socketpair())
        limits = (self._seconds, self._num_bytes)
        command = [sys.executable, "-P", "-m", "nanovllm_cli.sandbox_worker"]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), *map(str, limits)],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # a library that panics says so to itself
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours)
        return self._channel

    def _end(self) -> int:
        """Reap the process, which has ended or is silent; returns its exit code.

        Raises MemoryTooSmall if it ended before it could take a task.
        """
        assert self._process is not None, "it has just been asked"
        process, was_ready = self._process, self._is_ready
        with suppress(subprocess.TimeoutExpired):
            process.wait(_WAIT_SECONDS)
        self.close()
        assert process.returncode is not None, "it was waited for"
        if not was_ready:
            raise MemoryTooSmall(
                "the process for chat templates and grammars cannot start: it "
                f"{how_it_ended(process.returncode)}",
                "It needs 100 MiB of memory and a process; see ulimit -a.",
            )
        return process.returncode


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """Return the process's own one."""
    return Sandbox()
