"""What goes wrong as ranks meet, as an error of ours that says what NCCL and gloo need."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm_cli.core.errors import NotConnected

_SHARED_MEMORY = "/dev/shm"


@contextmanager
def connection_errors() -> Iterator[None]:
    """What torch raises of NCCL or gloo becomes NotConnected."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        is_nccl = "NCCL" in str(error)
        # NCCL's first line is where in torch it happened; the reason stands last.
        what = "; ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or type(error).__name__
        hint = _nccl_hint(_free_bytes(_SHARED_MEMORY)) if is_nccl else _GLOO_HINT
        raise NotConnected(f"the ranks cannot connect: {what}", hint) from error


_GLOO_HINT = (
    "Ranks on a CPU talk over the loopback interface, at ports that the system chooses: is lo up? "
    "GLOO_SOCKET_IFNAME names another one."
)


def _nccl_hint(free_bytes: int | None) -> str:
    """free_bytes: of shared memory; None where there is none."""
    free = "none is there" if free_bytes is None else f"{free_bytes / 2**20:.0f} MiB are free"
    return (
        f"Between GPUs that are no peers NCCL needs some 10 MiB of {_SHARED_MEMORY} for each "
        f"channel of each pair: {free}; a container gets more with --shm-size=1g or --ipc=host. "
        "NCCL_DEBUG=WARN says what failed."
    )


def _free_bytes(directory: str) -> int | None:
    return shutil.disk_usage(directory).free if os.path.isdir(directory) else None
