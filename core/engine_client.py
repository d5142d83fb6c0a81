"""EngineClient: what a job asks of an engine, be it in this process, in another or in several."""

from typing import Protocol

from nanovllm_cli.core.request import Failure, Output, Request
from nanovllm_cli.core.stats import EngineStats


class EngineClient(Protocol):
    """Engine, EngineProcess and EngineReplicas; the tests have simpler ones."""

    @property
    def stats(self) -> EngineStats:
        """What was counted so far; always the same object."""

    @property
    def attention_backend(self) -> str:
        """The name of what attends in prefills; waits until the engine is loaded."""

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""

    def add(self, request: Request) -> Failure | None:
        """Queue a request; one that can never run comes back as its Failure, now or later."""

    def abort(self, request_id: int) -> None:
        """Drop a request; it gives no further output."""

    def step(self) -> list[Output]:
        """Return what has come of the requests, after a moment's wait if there is nothing yet."""

    def close(self) -> None:
        """End what runs."""
