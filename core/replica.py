"""Replica: one of several engines, and which of the requests in EngineReplicas' queue it has."""

import time
from dataclasses import dataclass, field

from nanovllm_cli.core.engine_process import MAX_SUSPECTS, EngineProcess
from nanovllm_cli.core.request import Request

_SUPPLY = 1.5  # requests at a replica for each that it can run at a time


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that is not finished, and the replicas that have it: none while it waits."""

    request: Request
    prefixes: tuple[int, ...]
    num_tokens: int  # to compute, about; a generated one counts as several of a prompt
    replicas: list["Replica"] = field(default_factory=list)
    num_deaths: int = 0  # of replicas while they had it


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, and what it has to do."""

    index: int
    process: EngineProcess
    given: dict[int, float] = field(default_factory=dict)  # request id -> when
    at_risk: set[int] = field(default_factory=set)  # of those: as many fail with the one that kills
    num_tokens: int = 0  # of all those together
    num_restarts: int = 0  # that are dealt with
    has_been_ready: bool = False
    longest_seconds: float | None = None  # from giving it a request to its completion

    @property
    def is_full(self) -> bool:
        """Whether it has all that it can run at a time."""
        return len(self.given) >= self.process.max_num_seqs

    def has_room(self, *, is_at_risk: bool) -> bool:
        """For half more than runs at a time: the next prefill must not wait for this process."""
        if not self.process.is_ready or (is_at_risk and len(self.at_risk) >= MAX_SUSPECTS):
            return False
        return len(self.given) < self.process.max_num_seqs * _SUPPLY

    def give(self, entry: QueuedRequest, *, is_at_risk: bool) -> None:
        """Have the engine run a request; is_at_risk: what another replica may have died of."""
        request_id = entry.request.request_id
        failure = self.process.add(entry.request)
        assert failure is None, "it was checked when it came"
        self.given[request_id] = time.monotonic()
        self.num_tokens += entry.num_tokens
        if is_at_risk:
            self.at_risk.add(request_id)
        entry.replicas.append(self)

    def drop(self, entry: QueuedRequest) -> None:
        """Have the engine run a request no longer."""
        request_id = entry.request.request_id
        self.process.abort(request_id)  # nothing where it has ended there
        del self.given[request_id]
        self.at_risk.discard(request_id)
        self.num_tokens -= entry.num_tokens
        entry.replicas.remove(self)
