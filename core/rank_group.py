"""RankGroup: the processes of the other ranks, started, watched and ended by rank 0's.

Rank 0 plans; every launch goes to all of them, as a message to each. The end of any is the end of
the group: rank 0 raises it, or, where it waits for the lost one in a collective, ends as well.
"""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nanovllm_cli.core.batch import Batch
from nanovllm_cli.core.batch_layout import encode_batch
from nanovllm_cli.core.channel import Channel
from nanovllm_cli.core.collectives import check_collectives, connect
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.connection_errors import connection_errors
from nanovllm_cli.core.engine_child import as_exception
from nanovllm_cli.core.engine_worker import start_message
from nanovllm_cli.core.errors import EngineDied, UserError
from nanovllm_cli.core.messages import decode_json, encode_json
from nanovllm_cli.core.processes import above_the_streams, how_it_ended
from nanovllm_cli.core.rank_worker import RankMessage
from nanovllm_cli.core.resolved_config import resolve
from nanovllm_cli.core.runner import Launch, Runner

COMMAND = (sys.executable, "-P", "-m", "nanovllm_cli.core.rank_worker")
_SEND_SECONDS = 30.0  # longer than any launch
_END_SECONDS = 0.5  # from the end of its connection to a process's own
_GRACE_SECONDS = 0.3  # for rank 0 to notice a death by itself
_GOODBYE_SECONDS = 5.0
_HINT = "The system's log (dmesg) may say why. The same command may be tried again."


@dataclass(slots=True)
class _Follower:
    """One rank's process, and this end of its connection."""

    rank: int
    process: subprocess.Popen[bytes]
    socket: socket.socket
    channel: Channel  # over `socket`; read by the watching thread, written by rank 0's
    num_meetings: int = 0
    error: UserError | None = None  # that it says it ends with


class RankGroup:
    """Ranks 1 and up, as far as having met rank 0 when the constructor returns.

    `parallel` is rank 0's. Raises UserError where machine or model cannot have so many ranks, and
    what a rank's process ends with. Takes the thread that makes it to be there as long as it is.
    """

    def __init__(
        self, source: Path | ModelConfig, sizes: ModelConfig, config: EngineConfig
    ) -> None:
        # Their errors are the user's, so before any process starts.
        check_collectives(resolve(config, sizes))
        self.death: UserError | None = None
        self._is_raised = False
        self._is_closing = False
        self._may_hang = False  # rank 0, in a collective that a rank is lost to
        self._num_meetings = 0
        self._changed = threading.Condition()
        # Never closed: torch looks into it by its number as late as at its own end.
        self._store_fd = os.memfd_create("ranks")
        self._followers: list[_Follower] = []
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        try:
            for rank in range(1, config.tensor_parallel_size):
                self._followers.append(_start(rank, self._store_fd))
            self._watcher.start()
            for follower in self._followers:
                message = {**start_message(source, config), "rank": follower.rank}
                follower.channel.send(RankMessage.START, encode_json(message))
                follower.channel.flush_all(_SEND_SECONDS)
            with connection_errors(), self._collectives():
                self.parallel = connect(0, self._store_fd, config, sizes, meet=self._meet)
        except BaseException:
            self._end_followers()
            raise
        self._may_hang = False  # rank 0 loads, and has errors of its own to tell

    def runner(self, make: Callable[[], Runner]) -> Runner:
        """Rank 0's, made when all have loaded; its launches are everyone's."""
        try:
            self._meet()
            with self._collectives():
                return _LeadingRunner(make(), self)
        except BaseException:
            self._end_followers()  # what graphs there are still hold collectives
            raise

    def launch(self, batch: Batch, own: Runner) -> Launch | None:
        """The same launch on every rank."""
        if self.death is not None:
            self._raise_death()
        payload = encode_batch(batch)
        for follower in self._followers:
            follower.channel.send(RankMessage.BATCH, payload)
            follower.channel.flush_all(_SEND_SECONDS)
        with self._collectives():
            return own.launch(batch)

    def close(self) -> None:
        """End the processes; no graph on this GPU may hold a collective any more.

        A second call does nothing.
        """
        if self._is_closing:
            return
        self._end_followers()
        if self.parallel.collectives is not None:
            self.parallel.collectives.close()

    def _end_followers(self) -> None:
        """Politely first: one with nothing to do ends as soon as the connection does."""
        self._is_closing = True
        for follower in self._followers:
            _shut_down(follower.socket)
        give_up = time.monotonic() + (_GOODBYE_SECONDS if self.death is None else 0.0)
        for follower in self._followers:
            try:
                follower.process.wait(max(give_up - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
        if self._watcher.is_alive():
            self._watcher.join()
        for follower in self._followers:
            follower.channel.close()

    def _meet(self) -> None:
        """Wait until every other rank has come as far, or raise what one has ended with."""
        self._num_meetings += 1
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.death is not None
                    or all(f.num_meetings >= self._num_meetings for f in self._followers)
                )
            )
        if self.death is not None:
            self._raise_death()

    @contextmanager
    def _collectives(self) -> Iterator[None]:
        """A collective that fails is the death of the rank that is gone, where one is."""
        self._may_hang = True
        try:
            yield
        except RuntimeError:
            with self._changed:
                self._changed.wait_for(lambda: self.death is not None, 2 * _END_SECONDS)
            if self.death is not None:
                self._raise_death()
            raise

    def _raise_death(self) -> None:
        self._is_raised = True
        assert self.death is not None, "no rank has died"
        raise self.death

    def _watch(self) -> None:
        poll = select.poll()
        by_fd = {follower.socket.fileno(): follower for follower in self._followers}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while by_fd:
            for fd, _ in poll.poll():
                follower = by_fd[fd]
                self._receive(follower)
                if follower.channel.is_closed:
                    poll.unregister(fd)
                    del by_fd[fd]
                    self._on_end(follower)

    def _receive(self, follower: _Follower) -> None:
        """Take in what it says."""
        for kind, payload in follower.channel.receive():
            if kind == RankMessage.ERROR:
                follower.error = as_exception(decode_json(payload))
            else:
                with self._changed:
                    follower.num_meetings += 1
                    self._changed.notify_all()

    def _on_end(self, follower: _Follower) -> None:
        if self._is_closing or self.death is not None:
            return
        try:
            follower.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            follower.process.kill()
            follower.process.wait()
        how = how_it_ended(follower.process.returncode)
        with self._changed:
            self.death = follower.error or EngineDied(f"rank {follower.rank} {how}", _HINT)
            self._changed.notify_all()
        while True:
            time.sleep(_GRACE_SECONDS)
            if self._is_raised or self._is_closing:
                return
            if self._may_hang:
                # Nothing can wake a thread that waits in a collective for a rank that is gone.
                print(f"error: {self.death.message}", file=sys.stderr, flush=True)
                os._exit(1)


class _LeadingRunner:
    """Rank 0's runner, whose launches the other ranks make as well."""

    def __init__(self, own: Runner, ranks: RankGroup) -> None:
        self._own = own
        self._ranks = ranks
        self.num_blocks = own.num_blocks

    def launch(self, batch: Batch) -> Launch | None:
        return self._ranks.launch(batch, self._own)


def start_ranks(
    source: Path | ModelConfig, sizes: ModelConfig, config: EngineConfig
) -> RankGroup | None:
    """The other ranks of an engine that has some."""
    return RankGroup(source, sizes, config) if config.tensor_parallel_size > 1 else None


def _start(rank: int, store_fd: int, command: Sequence[str] = COMMAND) -> _Follower:
    """Spawned, in the process group of rank 0: what kills that group leaves none of it."""
    ours, theirs = (above_the_streams(end) for end in socket.socketpair())
    fds = (theirs.fileno(), store_fd)
    stderr = sys.__stderr__.fileno() if sys.__stderr__ is not None else subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            [*command, *map(str, fds), str(os.getpid())],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Follower(rank, process, ours, Channel(ours))


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):  # the other end may be gone
        connected.shutdown(socket.SHUT_WR)
