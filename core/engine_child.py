"""EngineChild: one engine process from its start to its end, which is seen whatever brings it.

The process is spawned, never forked, leads a session of its own, and shares a socket and a page of
memory with its parent, both without a name. The thread that starts it must outlive it.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

from nanovllm_cli.core.channel import Channel, Message
from nanovllm_cli.core.errors import (
    EngineDied,
    GpuFailed,
    MemoryTooSmall,
    ModelError,
    ModelFileMissing,
    ModelUnreadable,
    NotConnected,
    UserError,
)
from nanovllm_cli.core.heartbeat import NUM_BYTES, HeartbeatMonitor
from nanovllm_cli.core.messages import Kind, decode_json
from nanovllm_cli.core.processes import above_the_streams, how_it_ended

# -P: what lies in the working directory is not imported.
COMMAND = (sys.executable, "-P", "-m", "nanovllm_cli.core.engine_worker")
HANG_SECONDS = 25.0  # no launch takes so long; a hang is over within 30 s
_GOODBYE_SECONDS = 5.0
_KILL_SECONDS = 10.0
_END_SECONDS = 0.5  # from the end of its connection to its own
_POLL_SECONDS = 0.002
# Killed by the kernel, or ended by a library that got no memory, or by Python's imports.
_ENDS_FOR_MEMORY = (-signal.SIGKILL, -signal.SIGABRT, 1)
_MEMORY_HINT = "It may have got too little memory (ulimit -v, the container's limit)."
_HINT = "The system's log (dmesg) may say why. The same command may be tried again."


class EngineChild:
    """An engine process, which imports torch and waits for START.

    `environment` comes on top of this process's. `death` is what ended it, once something has.
    """

    def __init__(
        self,
        *,
        command: Seq[str] = COMMAND,
        hang_seconds: float = HANG_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ours, theirs = (above_the_streams(end) for end in socket.socketpair())
        heartbeat = os.memfd_create("heartbeat")
        try:
            os.ftruncate(heartbeat, NUM_BYTES)
            self._monitor = HeartbeatMonitor(heartbeat)
            heartbeat_fd = fcntl.fcntl(heartbeat, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(heartbeat)
        fds = (theirs.fileno(), heartbeat_fd)
        stderr = sys.__stderr__.fileno() if sys.__stderr__ is not None else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [*command, *map(str, fds), str(os.getpid())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=stderr,  # what a library prints must not get among the job's data
                stderr=stderr,
                start_new_session=True,
                # It finds the modules that this process finds.
                env={
                    **os.environ,
                    **(environment or {}),
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(heartbeat_fd)
        self._hang_seconds = hang_seconds
        self._channel = Channel(ours)
        self._error: UserError | None = None  # that the process says it ends with
        self.death: UserError | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """To poll for something to receive; negative once the process is killed or closed."""
        return self._channel.fileno()

    def send(self, kind: Kind, payload: bytes) -> None:
        """Send a message; what the process does not take at once goes with `exchange`."""
        self._channel.send(kind, payload)
        self._channel.flush()

    def exchange(self, seconds: float) -> list[Message]:
        """Send and receive what there is, waiting so long for it; sees the process's end.

        What the process wrote before its end is still returned.
        """
        self._channel.wait(seconds)
        has_ended = self._has_ended()
        messages = self._channel.receive()
        for kind, payload in messages:
            if kind == Kind.ERROR:
                self._error = as_exception(decode_json(payload))
        if has_ended or self._channel.is_closed:
            self._wait_for_end(_END_SECONDS)
            self.kill()
            self.death = self._error or self._end_as_exception()
        elif self._monitor.silent_seconds() > self._hang_seconds:
            self.kill()
            message = f"the engine gave no sign of life for {self._hang_seconds:g} s"
            self.death = EngineDied(message, _HINT)
        return messages

    def close(self) -> None:
        """End the process: politely first, which an engine with nothing to do heeds at once."""
        self._channel.close()
        self._wait_for_end(_GOODBYE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the process and all that it has started, now; its memory is free afterwards."""
        self._channel.close()
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise EngineDied(
                f"the engine's process {self._process.pid} cannot be killed",
                "It hangs in the kernel, as with a broken GPU or file system: see dmesg.",
            ) from None

    def _has_ended(self) -> bool:
        """Without reaping it: until `kill` its number, and so its group's, stays its own."""
        if self._process.returncode is not None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        except ChildProcessError:  # reaped already: SIGCHLD is ignored here
            return True

    def _wait_for_end(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while not self._has_ended() and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS)

    def _end_as_exception(self) -> EngineDied:
        code = self._process.returncode
        hint = _HINT if code not in _ENDS_FOR_MEMORY else f"{_MEMORY_HINT} {_HINT}"
        return EngineDied(f"the engine {how_it_ended(code)}", hint)


def as_exception(error: dict[str, Any]) -> UserError:
    """The user's mistakes as what they were there; the traceback is a note, for --debug."""
    of_users = (
        *(UserError, ModelError, ModelFileMissing, ModelUnreadable),
        *(GpuFailed, MemoryTooSmall, NotConnected),
    )
    kinds = {kind.__name__: kind for kind in of_users}
    exception: UserError
    if error["type"] in kinds:
        exception = kinds[error["type"]](error["message"], error["hint"])
    else:
        exception = EngineDied(f"the engine failed: {error['type']}: {error['message']}", _HINT)
    exception.add_note(error["traceback"])
    return exception
