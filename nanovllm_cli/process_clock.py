"""When this process began, so that what is told as a job's seconds is what `time` would say.

`sh -c "sleep 60 && nanovllm ..."` becomes its last command: its age is not the command's. So this
is imported early, when a command has hardly begun.
"""

import os
import time
from pathlib import Path

_MOST_IDLE_SECONDS = 10.0  # in which Python comes from a slow disk; who waited longer was a shell


def _age() -> float | None:
    """By the kernel's clock, in seconds; None where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, counted from after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _seconds_as_a_shell() -> float:
    idle = (_age() or 0.0) - time.process_time()
    return idle if idle > _MOST_IDLE_SECONDS else 0.0


_AS_A_SHELL = _seconds_as_a_shell()


def seconds_since_process_start() -> float | None:
    """Return how long this command runs, Python's own start with it; None where it is unknown."""
    age = _age()
    return None if age is None else age - _AS_A_SHELL


def process_start() -> float:
    """Return when the process began, on the clock of time.perf_counter; now, if it is not known."""
    return time.perf_counter() - (seconds_since_process_start() or 0.0)
