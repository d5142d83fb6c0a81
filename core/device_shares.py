"""Which GPUs each replica of the engine sees, and the replicas' processes, started ahead.

Nothing here asks for the GPUs there are: a process is started before torch is imported here.
"""

import os
from collections.abc import Callable, Mapping

from nanovllm_cli.core.engine_child import EngineChild

_VISIBLE = "CUDA_VISIBLE_DEVICES"

Spawn = Callable[..., EngineChild]  # with EngineChild's `environment`


def device_shares(
    num_replicas: int, num_gpus_each: int, environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """Each replica's environment: the next `num_gpus_each` of the GPUs that this process sees.

    Those may be numbers or UUIDs. Where there are too few, what a share names is not to be used.
    """
    if num_replicas == 1:
        return [{}]
    num_needed = num_replicas * num_gpus_each
    visible = list(map(str, range(num_needed)))
    if _VISIBLE in environment:
        visible = [name.strip() for name in environment[_VISIBLE].split(",")]
    return [
        {_VISIBLE: ",".join(visible[start : start + num_gpus_each])}
        for start in range(0, num_needed, num_gpus_each)
    ]


def start_children(
    num_replicas: int, num_gpus_each: int, spawn: Spawn = EngineChild
) -> list[EngineChild]:
    """The replicas' processes, which import torch and wait; all of them or none."""
    children: list[EngineChild] = []
    try:
        for share in device_shares(num_replicas, num_gpus_each):
            children.append(spawn(environment=share))
    except BaseException:
        for child in children:
            child.kill()
        raise
    return children
