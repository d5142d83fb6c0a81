"""When this process began, so that what is told as a job's seconds is what `time` would say."""

import os
import time
from pathlib import Path


def seconds_since_process_start() -> float | None:
    """By the kernel's clock, so that Python's own start counts; None where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, counted from after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def process_start() -> float:
    """Return when the process began, on the clock of time.perf_counter; now, if it is not known."""
    return time.perf_counter() - (seconds_since_process_start() or 0.0)
