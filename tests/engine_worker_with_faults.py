"""An engine process that goes wrong when told to, for test_engine_process.py; run as a script.

Arguments before engine_worker's own: `real` or `fake`, and a directory for what must outlive a
death. The real engine is the production one. The fake answers at once, from the request alone:
the prompt backwards, each token plus the seed. Both obey a request's first token: see FAULTS.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm_cli.core import engine_worker
from nanovllm_cli.core.errors import GpuFailed, MemoryTooSmall
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.stats import EngineStats


def fail() -> None:
    raise RuntimeError("the device is lost")


def fail_as_a_gpu() -> None:
    raise GpuFailed("the GPU failed: CUDA error: unspecified launch failure")


def hang() -> None:
    time.sleep(3600)


def spin() -> None:
    while True:
        pass


def spin_a_while() -> None:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        pass


FAULTS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit 0": lambda: os._exit(0),
    "exception": fail,
    "GpuFailed": fail_as_a_gpu,
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": hang,
    "spin": spin,
    "spin a while": spin_a_while,
}


class WithFaults:
    """An engine, and what befalls it: request FIRST_FAULT + i in a step brings the i-th fault.

    With ONCE added, not another time; the directory remembers.
    """

    FIRST_FAULT = 1_000_000
    ONCE = 1000

    def __init__(self, engine: engine_worker.AnyEngine, directory: Path) -> None:
        self._engine = engine
        self._directory = directory
        self._faults: dict[int, int] = {}  # by request id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, request: Request) -> Failure | None:
        if request.request_id >= self.FIRST_FAULT:
            self._faults[request.request_id] = request.request_id - self.FIRST_FAULT
        return self._engine.add(request)

    def abort(self, request_id: int) -> None:
        self._engine.abort(request_id)

    def step(self) -> list[Output]:
        outputs = self._engine.step()  # before: something is in flight, on a device too
        for request_id in list(self._faults):
            once, fault = divmod(self._faults.pop(request_id), self.ONCE)
            mark = self._directory / f"{request_id}"
            if once and mark.exists():
                continue
            mark.touch()
            list(FAULTS.values())[fault]()
        return outputs


class FakeEngine:
    """Four requests a step, in order of arrival; one of seed 0 never ends.

    A request that reports its tokens does so once before it completes.
    """

    attention_backend = "none"
    num_blocks = 7
    max_model_len = 1 << 20
    max_num_seqs = 8

    def __init__(self, device: str) -> None:
        self.device = device
        self.stats = EngineStats()
        self._requests: list[Request] = []
        self._reported: set[int] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> Failure | None:
        if len(request.prompt_token_ids) == 0:
            return Failure(request_id=request.request_id, code="bad_token_ids", message="none")
        self._requests.append(request)
        return None

    def abort(self, request_id: int) -> None:
        self._requests = [r for r in self._requests if r.request_id != request_id]

    def step(self) -> list[Output]:
        time.sleep(0.001)
        outputs: list[Output] = []
        self.stats.num_decode_steps += 1
        for request in [r for r in self._requests if r.sampling.seed][:4]:
            token_ids = np.asarray(request.prompt_token_ids, dtype=np.int32)[::-1]
            token_ids = token_ids + np.int32(request.sampling.seed)
            if request.reports_tokens and request.request_id not in self._reported:
                self._reported.add(request.request_id)
                half = token_ids[: len(token_ids) // 2]
                outputs.append(NewTokens(request_id=request.request_id, token_ids=half))
                continue
            self._requests.remove(request)
            self.stats.num_completion_tokens += len(token_ids)
            outputs.append(
                Completion(
                    request_id=request.request_id,
                    token_ids=token_ids,
                    finish_reason="length",
                    num_prompt_tokens=len(token_ids),
                    num_cached_tokens=0,
                )
            )
        return outputs


def main() -> None:
    kind, directory = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]

    def make_fake(message: dict[str, Any]) -> engine_worker.AnyEngine:
        print("a library prints this")
        while (directory / "load slowly").exists():
            time.sleep(0.01)
        if (directory / "die while loading").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (directory / "fail while loading").exists():
            fail()
        if (directory / "too little memory").exists():
            raise MemoryTooSmall("7 bytes are free; 8 are needed", "Buy one more.")
        device = "cuda" if message["engine"]["device"] == "cuda" else "cpu"
        return WithFaults(FakeEngine(device), directory)

    def import_real() -> engine_worker.MakeEngine:
        make_engine = engine_worker.import_engine()
        return lambda message: WithFaults(make_engine(message), directory)

    engine_worker.main(import_real if kind == "real" else lambda: make_fake)


if __name__ == "__main__":
    main()
