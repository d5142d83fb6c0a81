"""GPUs that are not there, for tests of what is decided by them before any engine starts."""

import pytest

from nanovllm_cli.core import cuda_driver
from nanovllm_cli.core.cuda_driver import Gpu


def stand_in_gpus(
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    capability: tuple[int, int] = (8, 0),
    memory_bytes: int = 80 << 30,
    has_triton: bool = True,
) -> None:
    """Let the driver show GPUs of these names; none for no name."""
    gpus = tuple(Gpu(name=name, memory_bytes=memory_bytes, capability=capability) for name in names)
    monkeypatch.setattr(cuda_driver, "visible_gpus", lambda: gpus)
    found = object() if has_triton else None
    monkeypatch.setattr("nanovllm_cli.core.resolved_config.find_spec", lambda name: found)
