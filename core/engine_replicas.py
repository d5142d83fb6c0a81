"""EngineReplicas: several engines, each in a process and on GPUs of its own, fed from one queue.

It has EngineProcess's surface. A request waits here until a replica has room, so that a slow one
gets less; it goes where a prompt that begins alike went before, unless that replica has much more
to do than the least busy one. When a replica dies, the others take over what it had while it is
started again, under EngineProcess's rule, but counted here: those that were in an engine at a
death go back a few at a time, and those in engines at two deaths fail, whichever engines these
were. A replica that cannot be started again is left out; without any, it is over.

At the end, when a replica has nothing left to do, it runs what another one is late with a second
time, and the first answer counts (the backup tasks of MapReduce: Dean and Ghemawat 2004). An
answer depends on its request alone, so who gives it does not matter.
"""

import os
import select
import time
from collections import OrderedDict
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from nanovllm_cli.core import cuda_driver
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.device_shares import Spawn, device_shares
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_process import (
    MAX_DEATHS,
    MAX_SUSPECTS,
    STEP_SECONDS,
    EngineProcess,
    to_sendable,
)
from nanovllm_cli.core.errors import EngineDied, UserError
from nanovllm_cli.core.messages import to_token_ids
from nanovllm_cli.core.prefix_homes import PrefixHomes
from nanovllm_cli.core.replica import QueuedRequest, Replica
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.core.stats import EngineStats

_LOOK_AHEAD = 64  # requests: one that waits for its replica does not hold up those behind it
_EXPECTED_TOKENS = 128  # of a completion, where it may have more and may end before
_DECODE_COST = 4  # prompt tokens for the time of a generated one: 3 (8B) to 11 (0.6B) on an H200
# A replica is too busy for a prefix that it knows when it has more to do, in prompt tokens, than
# the least busy one times this, and so many times the prompt besides: a part of that is won.
_MORE_TO_DO = 1.25
_PROMPTS_MORE_TO_DO = 4
# A request is late that takes so many times as long as the slowest so far of the one that asks.
_LATE = 2.0
_LATE_SECONDS = 1.0  # at least

_Queue = OrderedDict[int, QueuedRequest]  # by request id


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What only loaded engines know."""

    device: str
    attention_backend: str
    num_blocks: int
    max_model_len: int


class EngineReplicas:
    """`num_replicas` engines of a checkpoint, or of random weights in `source`'s sizes.

    The constructor has the processes load, in `children` where they were started ahead (with
    device_shares' start_children), and does not wait; what only loaded engines know waits.
    Calls raise what EngineProcess's raise, EngineDied only when no replica is left. It takes the
    children over even where it raises UserError, for there being too few GPUs. The processes end
    with the thread that starts them.
    """

    def __init__(
        self,
        source: Path | ModelConfig,
        config: EngineConfig,
        *,
        num_replicas: int,
        children: Seq[EngineChild] = (),
        spawn: Spawn = EngineChild,
    ) -> None:
        self.num_restarts = 0
        self.last_death: str | None = None  # in words, for whoever tells the user
        self.stats = EngineStats()  # of all together; work done again counts again
        self._entries: dict[int, QueuedRequest] = {}
        self._waiting: _Queue = OrderedDict()  # of those, in order of arrival
        self._suspects: _Queue = OrderedDict()  # likewise, those that an engine has died with
        self._outputs: list[Output] = []  # not yet returned
        self._caches_prefixes = config.enable_prefix_caching
        self._homes = PrefixHomes(config.block_size)
        self._replicas: list[Replica] = []
        try:
            config = share_machine(config, num_replicas)
            shares = device_shares(num_replicas, config.tensor_parallel_size)
            for index, share in enumerate(shares):
                child = children[index] if children else None
                process = EngineProcess(
                    source, config, child=child, spawn=partial(spawn, environment=share)
                )
                self._replicas.append(Replica(index, process))
        except BaseException:
            for child in children:
                child.kill()
            self.close()
            raise
        self._live = list(self._replicas)
        self._known: _Facts | None = None

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._entries or self._outputs)

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has."""
        return len(self._waiting) + len(self._suspects)

    @property
    def stats_by_replica(self) -> list[EngineStats]:
        """Those left out with what they had done."""
        return [replica.process.stats for replica in self._replicas]

    @property
    def num_replicas(self) -> int:
        """Those left out do not count."""
        return len(self._live)

    @property
    def pids(self) -> list[int]:
        """The processes' of the replicas that are not left out."""
        return [replica.process.pid for replica in self._live]

    @property
    def device(self) -> str:
        return self._facts().device

    @property
    def attention_backend(self) -> str:
        return self._facts().attention_backend

    @property
    def num_blocks(self) -> int:
        """Of all replicas together."""
        return self._facts().num_blocks

    @property
    def max_model_len(self) -> int:
        """The smallest of any replica."""
        return self._facts().max_model_len

    def wait_until_ready(self) -> None:
        """Until every replica is loaded; requests may be added before."""
        while not all(replica.process.is_ready for replica in self._live):
            self._exchange()
            self._wait()

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure, now or from `step`."""
        request_id = request.request_id
        assert request_id not in self._entries, f"request {request_id} runs already"
        request_or_failure = to_sendable(request)
        if isinstance(request_or_failure, Failure):
            return request_or_failure
        prompt = to_token_ids(request_or_failure.prompt_token_ids)
        entry = QueuedRequest(
            request_or_failure,
            self._homes.prefixes_of(prompt) if self._caches_prefixes else (),
            len(prompt) + _DECODE_COST * _expected_tokens(request.sampling),
        )
        self._entries[request_id] = self._waiting[request_id] = entry
        return None

    def abort(self, request_id: int) -> None:
        """Drop a request; it gives no further output."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._forget(entry)

    def step(self) -> list[Output]:
        """What has come from the replicas; waits for it a moment, where something is to come.

        It does not wait where it has handed out requests: the caller may have more.
        """
        num_waiting = self.num_waiting
        self._hand_out()
        self._exchange()
        if not self._outputs and self._entries and self.num_waiting >= num_waiting:
            self._wait()
            self._exchange()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """End the processes, side by side: one may take seconds."""
        with ThreadPoolExecutor(max(len(self._replicas), 1)) as pool:
            list(pool.map(lambda replica: replica.process.close(), self._replicas))

    def _facts(self) -> _Facts:
        if self._known is None:
            self.wait_until_ready()
            engines = [replica.process for replica in self._live]
            self._known = _Facts(
                device=engines[0].device,
                attention_backend=engines[0].attention_backend,
                num_blocks=sum(engine.num_blocks for engine in engines),
                max_model_len=min(engine.max_model_len for engine in engines),
            )
        return self._known

    def _hand_out(self) -> None:
        """Give the replicas what they have room for."""
        for queue in (self._suspects, self._waiting):
            is_at_risk = queue is self._suspects
            placed = True
            while placed:  # the queue has moved up: there are others to look at
                placed = False
                for request_id, entry in list(islice(queue.items(), _LOOK_AHEAD)):
                    replicas = [r for r in self._live if r.has_room(is_at_risk=is_at_risk)]
                    if not replicas:
                        break
                    replica = self._choose(entry, replicas)
                    if replica is not None:
                        placed = True
                        del queue[request_id]
                        self._homes.add(entry.prefixes, replica.index)
                        replica.give(entry, is_at_risk=is_at_risk)
        if not self._waiting and not self._suspects:
            self._back_up()

    def _choose(self, entry: QueuedRequest, replicas: Seq[Replica]) -> Replica | None:
        """Who gets a request, of those with room; None: it waits for one that has its prefix."""
        least_busy = min(replicas, key=lambda replica: replica.num_tokens)
        known_to = self._homes.find(entry.prefixes)
        homes = [r for r in self._live if r.index in known_to and r.process.is_ready]
        if not homes:
            return least_busy
        home = min(homes, key=lambda replica: replica.num_tokens)
        prompt_tokens = len(entry.request.prompt_token_ids)
        most = _MORE_TO_DO * least_busy.num_tokens + _PROMPTS_MORE_TO_DO * prompt_tokens
        if home.num_tokens > most:
            return least_busy
        if home in replicas:
            return home
        return None if least_busy.is_full else least_busy

    def _back_up(self) -> None:
        """Run what is late a second time, where a replica has nothing else to do."""
        now = time.monotonic()
        for replica in self._live:
            if not replica.process.is_ready or replica.given or replica.longest_seconds is None:
                continue
            late = max(_LATE * replica.longest_seconds, _LATE_SECONDS)
            entries = [
                self._entries[request_id]
                for other in self._live
                for request_id, since in other.given.items()
                if now - since > late
            ]
            # Tokens reported twice would have to be told apart.
            once = (e for e in entries if len(e.replicas) == 1 and not e.request.reports_tokens)
            for entry in islice(once, MAX_SUSPECTS):
                replica.give(entry, is_at_risk=True)

    def _wait(self) -> None:
        """Until a replica says something, but not for long."""
        poll = select.poll()
        for replica in self._live:
            if replica.process.fileno() < 0:
                return  # its end is still to be dealt with
            poll.register(replica.process, select.POLLIN)
        poll.poll(STEP_SECONDS * 1000)

    def _exchange(self) -> None:
        """Send and receive what there is, and deal with deaths."""
        for replica in list(self._live):
            process = replica.process
            try:
                outputs = process.step(0.0)
            except UserError as error:
                self._leave_out(replica, error)
                continue
            for output in outputs:
                self._take(output, replica)
            replica.has_been_ready |= process.is_ready
            if process.num_restarts > replica.num_restarts:
                replica.num_restarts = process.num_restarts
                self.num_restarts += 1
                self.last_death = f"replica {replica.index}: {process.last_death}"
                self._take_back(replica)
        self._add_up_stats()

    def _take(self, output: Output, replica: Replica) -> None:
        self._outputs.append(output)
        if isinstance(output, NewTokens):
            return
        entry = self._entries[output.request_id]
        if isinstance(output, Completion):
            seconds = time.monotonic() - replica.given[output.request_id]
            replica.longest_seconds = max(replica.longest_seconds or 0.0, seconds)
        self._forget(entry)

    def _forget(self, entry: QueuedRequest) -> None:
        """It is answered or unwanted: nobody goes on with it."""
        for replica in list(entry.replicas):
            replica.drop(entry)
        request_id = entry.request.request_id
        del self._entries[request_id]
        self._waiting.pop(request_id, None)
        self._suspects.pop(request_id, None)

    def _leave_out(self, replica: Replica, error: UserError) -> None:
        """Go on without a replica; raises `error` where that does not help."""
        is_wrong_from_the_start = not (replica.has_been_ready or isinstance(error, EngineDied))
        if is_wrong_from_the_start or len(self._live) == 1:
            raise error
        self._live.remove(replica)
        others = f"the job goes on with {len(self._live)} of {len(self._replicas)} replicas"
        self.last_death = f"replica {replica.index}: {error.message}; {others}"
        for request_id in replica.given:
            if self._entries[request_id].request.reports_tokens:
                none = np.empty(0, dtype=np.int32)
                anew = NewTokens(request_id=request_id, token_ids=none, starts_anew=True)
                self._outputs.append(anew)
        self._take_back(replica)

    def _take_back(self, replica: Replica) -> None:
        """Queue again what a replica had when it died, or fail it."""
        self._homes.forget(replica.index)
        again = []
        for request_id, was_in_engine in replica.process.withdraw().items():
            entry = self._entries[request_id]
            replica.drop(entry)
            entry.num_deaths += was_in_engine
            if entry.num_deaths == MAX_DEATHS:
                self._forget(entry)
                message = f"in an engine at {MAX_DEATHS} deaths; the last: {self.last_death}"
                failure = Failure(request_id=request_id, code="engine_died", message=message)
                self._outputs.append(failure)
            elif not entry.replicas:
                again.append(entry)
        for entry in reversed(again):
            queue = self._suspects if entry.num_deaths else self._waiting
            queue[entry.request.request_id] = entry
            queue.move_to_end(entry.request.request_id, last=False)

    def _add_up_stats(self) -> None:
        """In place: whoever shows the progress holds them."""
        counts = zip(*map(astuple, self.stats_by_replica), strict=True)
        for stats_field, values in zip(fields(self.stats), counts, strict=True):
            setattr(self.stats, stats_field.name, sum(values))


def _expected_tokens(sampling: SamplingParams) -> int:
    """Of a completion, as far as one can know."""
    most = sampling.max_tokens or _EXPECTED_TOKENS
    return most if sampling.ignore_eos else min(most, _EXPECTED_TOKENS)


def share_machine(config: EngineConfig, num_replicas: int) -> EngineConfig:
    """What each replica is told; raises UserError where there are too few GPUs for all."""
    if num_replicas == 1:
        return config
    num_gpus = len(cuda_driver.visible_gpus()) if config.device != "cpu" else 0
    if config.device == "cuda" or num_gpus > 0:
        num_needed = num_replicas * config.tensor_parallel_size
        if num_needed > num_gpus:
            raise UserError(
                f"{num_replicas} replicas of {config.tensor_parallel_size} GPUs each need "
                f"{num_needed} GPUs, and this job sees {num_gpus}",
                "Lower --data-parallel-size or --tensor-parallel-size; CUDA_VISIBLE_DEVICES may "
                "hide some.",
            )
        return config
    if config.num_threads is not None:
        return config
    return replace(config, num_threads=max(1, len(os.sched_getaffinity(0)) // num_replicas))
