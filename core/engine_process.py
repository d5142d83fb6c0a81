"""EngineProcess: an Engine in a process of its own, which outlives that process's deaths.

It has Engine's surface. The process loads, and works, while this one does something else. When it
dies or hangs it is started once more, and the requests in flight are queued again in their order: a
request draws by its seed and position alone, so it draws again what it drew before. One request may
be what kills it, and nobody knows which. So requests that were in flight at a death go back a few
at a time, and those in flight at a second one fail; when even that gives no completion, it is over.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_worker import start_message
from nanovllm_cli.core.errors import EngineDied, UserError
from nanovllm_cli.core.messages import (
    Kind,
    decode_json,
    decode_outputs,
    encode_aborts,
    encode_json,
    encode_requests,
    to_token_ids,
)
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.stats import EngineStats

STEP_SECONDS = 0.02  # the caller may have more requests by then
_MESSAGE_TOKEN_IDS = 1 << 16  # a message ends with the request that reaches so many
MAX_DEATHS = 2  # of the engine for one request, after which the request fails
_MAX_DEATHS_IN_A_ROW = 3  # without a completion between
MAX_SUSPECTS = 64  # in the engine at once: as many fail where one of them kills it


@dataclass(slots=True)
class _InFlight:
    """A request that is not finished."""

    request: Request
    is_sent: bool = False  # to the engine there is now
    num_deaths: int = 0  # of the engine while it had the request
    has_reported: bool = False


class EngineProcess:
    """The engine of a checkpoint, or of random weights in `source`'s sizes, in its own process.

    The constructor has the process load, in `child` where one was started ahead, and does not wait;
    what only the loaded engine knows waits. Every call may raise what loading a checkpoint raises,
    and EngineDied. A request id may be used again once its Completion or Failure has come, but not
    after an abort. The process ends with the thread that starts it.
    """

    def __init__(
        self,
        source: Path | ModelConfig,
        config: EngineConfig,
        *,
        child: EngineChild | None = None,
        spawn: Callable[[], EngineChild] = EngineChild,
    ) -> None:
        self._start_message = encode_json(start_message(source, config))
        self._spawn = spawn
        self._in_flight: dict[int, _InFlight] = {}  # in order of arrival
        self._unsent: deque[int] = deque()  # of those, the ones that the engine has yet to get
        self._suspects: set[int] = set()  # of those it has, the ones that it has died with
        self._num_deaths_in_a_row = 0
        self.num_restarts = 0
        self.last_death: str | None = None  # in words, for whoever tells the user of a restart
        self.stats = EngineStats()  # work done again after a restart counts again
        self._start(child or spawn())

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._in_flight)

    @property
    def device(self) -> str:
        device: str = self._facts()["device"]
        return device

    @property
    def attention_backend(self) -> str:
        attention_backend: str = self._facts()["attention_backend"]
        return attention_backend

    @property
    def num_blocks(self) -> int:
        num_blocks: int = self._facts()["num_blocks"]
        return num_blocks

    @property
    def max_model_len(self) -> int:
        max_model_len: int = self._facts()["max_model_len"]
        return max_model_len

    @property
    def max_num_seqs(self) -> int:
        max_num_seqs: int = self._facts()["max_num_seqs"]
        return max_num_seqs

    @property
    def is_ready(self) -> bool:
        """Whether the engine is loaded, so that nothing that it knows waits."""
        return self._known is not None

    @property
    def pid(self) -> int:
        """The engine process's."""
        return self._child.pid

    def fileno(self) -> int:
        """To poll for something that `step` would take in; negative after the engine's end."""
        return self._child.fileno()

    def wait_until_ready(self) -> None:
        """Until the engine is loaded; requests may be added before."""
        self._facts()

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure, now or from `step`."""
        request_id = request.request_id
        assert request_id not in self._in_flight, f"request {request_id} runs already"
        checked = to_sendable(request)
        if isinstance(checked, Failure):
            return checked
        self._in_flight[request_id] = _InFlight(checked)
        self._unsent.append(request_id)
        return None

    def abort(self, request_id: int) -> None:
        """Drop a request; it gives no further output."""
        entry = self._in_flight.get(request_id)
        if entry is None:
            return
        self._forget(request_id)
        if entry.is_sent and self._child.death is None:
            self._child.send(Kind.ABORTS, encode_aborts([request_id]))

    def withdraw(self) -> dict[int, bool]:
        """Drop every request, after a death; of each, whether the engine had it as it died."""
        withdrawn = {i: e.is_sent or e.num_deaths > 0 for i, e in self._in_flight.items()}
        self._in_flight.clear()
        self._unsent.clear()
        self._suspects.clear()
        return withdrawn

    def step(self, seconds: float = STEP_SECONDS) -> list[Output]:
        """What has come from the engine; waits so long for it, where something is to come."""
        if self._child.death is not None:
            return self._recover(self._child.death)
        self._send_requests()
        return self._exchange(seconds if self._in_flight else 0.0)

    def close(self) -> None:
        """End the process. With requests in flight, or still loading, it holds nothing to save."""
        if self._in_flight or self._known is None:
            self._child.kill()
        else:
            self._child.close()

    def _start(self, child: EngineChild) -> None:
        self._known: dict[str, Any] | None = None  # what the engine said when it was ready
        self._stats_before = self.stats.copy()
        self._child = child
        child.send(Kind.START, self._start_message)

    def _facts(self) -> dict[str, Any]:
        while self._known is None:
            if self._child.death is not None:
                self._recover(self._child.death)  # no request is there yet to come of it
            self._exchange(STEP_SECONDS)
        return self._known

    def _send_requests(self) -> None:
        """Hand over what the engine may have, in order of arrival."""
        if self._known is None:
            return
        requests: list[Request] = []
        num_token_ids = 0
        while self._unsent:
            entry = self._in_flight.get(self._unsent[0])
            if entry is None:
                self._unsent.popleft()  # aborted
                continue
            if entry.num_deaths:
                if len(self._suspects) == MAX_SUSPECTS:
                    break
                self._suspects.add(self._unsent[0])
            self._unsent.popleft()
            entry.is_sent = True
            requests.append(entry.request)
            num_token_ids += len(entry.request.prompt_token_ids)
            if num_token_ids >= _MESSAGE_TOKEN_IDS:
                self._child.send(Kind.REQUESTS, encode_requests(requests))
                requests, num_token_ids = [], 0
        if requests:
            self._child.send(Kind.REQUESTS, encode_requests(requests))

    def _exchange(self, seconds: float) -> list[Output]:
        outputs: list[Output] = []
        for kind, payload in self._child.exchange(seconds):
            if kind == Kind.READY:
                self._known = decode_json(payload)
            elif kind == Kind.OUTPUTS:
                came, stats = decode_outputs(payload)
                self._set_stats(stats)
                outputs += [output for output in came if self._take(output)]
        return outputs

    def _take(self, output: Output) -> bool:
        """Whether the output is of interest; what was on its way before an abort is not."""
        entry = self._in_flight.get(output.request_id)
        if entry is None:
            return False
        if isinstance(output, NewTokens):
            entry.has_reported = True
            return True
        self._forget(output.request_id)
        if isinstance(output, Completion):
            self._num_deaths_in_a_row = 0
        return True

    def _forget(self, request_id: int) -> None:
        del self._in_flight[request_id]
        self._suspects.discard(request_id)

    def _set_stats(self, stats: EngineStats) -> None:
        """In place: whoever shows the progress holds them."""
        for field, before, since in zip(
            fields(stats), astuple(self._stats_before), astuple(stats), strict=True
        ):
            setattr(self.stats, field.name, before + since)

    def _recover(self, death: UserError) -> list[Output]:
        """Start the engine once more; what comes of those in flight, or raises where it is over."""
        self._num_deaths_in_a_row += 1
        self.last_death = death.message
        if self._known is None and not isinstance(death, EngineDied):
            raise death  # it said why, and would say so again
        if self._num_deaths_in_a_row >= _MAX_DEATHS_IN_A_ROW:
            raise EngineDied(
                f"{death.message}; that makes {_MAX_DEATHS_IN_A_ROW} deaths without a completion "
                "between",
                death.hint,
            ) from death
        outputs: list[Output] = []
        for request_id, entry in list(self._in_flight.items()):
            if not entry.is_sent:
                continue
            entry.is_sent = False
            entry.num_deaths += 1
            if entry.num_deaths == MAX_DEATHS:
                del self._in_flight[request_id]
                message = f"in the engine at {MAX_DEATHS} of its deaths; then {death.message}"
                outputs.append(Failure(request_id=request_id, code="engine_died", message=message))
            elif entry.has_reported:
                entry.has_reported = False
                none = np.empty(0, dtype=np.int32)
                outputs.append(NewTokens(request_id=request_id, token_ids=none, starts_anew=True))
        self._unsent = deque(self._in_flight)
        self._suspects.clear()
        self.num_restarts += 1
        self._start(self._spawn())
        return outputs


def to_sendable(request: Request) -> Request | Failure:
    """The request with its token ids as int32, or why it can never run."""
    try:
        to_token_ids(request.sampling.stop_token_ids)
        token_ids = to_token_ids(request.prompt_token_ids)
    except OverflowError:
        message = "a token id is outside every vocabulary"
        return Failure(request_id=request.request_id, code="bad_token_ids", message=message)
    return replace(request, prompt_token_ids=token_ids)
