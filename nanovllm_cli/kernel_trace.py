"""A profiler's trace -> what ran, for how long, and when nothing did. Pure: no file, no torch.

The events are those of Chrome's trace format, times in microseconds. Where the trace has a GPU's
kernels they count; else a CPU's operations, each less the ones it calls.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_NAME_WIDTH = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """All calls of one kernel, or of one operation of a CPU."""

    name: str
    calls: int
    microseconds: float
    share: float  # of the time of all kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSummary:
    """One trace, the most expensive kernel first."""

    seconds: float  # from the first kernel's start to the last one's end
    gpu_idle_share: float | None  # of those seconds; None on a CPU
    kernels: list[KernelTime]


def summarize(events: Iterable[Event]) -> TraceSummary:
    """What a trace's events say."""
    complete = [event for event in events if event.get("ph") == "X"]
    counted = [event for event in complete if event.get("cat") in _ON_GPU]
    is_gpu = bool(counted)
    if not is_gpu:
        counted = [event for event in complete if event.get("cat") == "cpu_op"]
    first = min((event["ts"] for event in counted), default=0.0)
    last = max((event["ts"] + event["dur"] for event in counted), default=0.0)
    idle_share = None
    if is_gpu:
        idle_share = 1 - _busy_microseconds(counted) / (last - first)
    times: dict[str, list[float]] = defaultdict(list)
    for event, microseconds in zip(counted, _own_microseconds(counted, is_gpu), strict=True):
        times[event["name"]].append(microseconds)
    total = sum(sum(own) for own in times.values())
    kernels = [
        KernelTime(name=name, calls=len(own), microseconds=sum(own), share=sum(own) / total)
        for name, own in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.microseconds)
    return TraceSummary(seconds=(last - first) / 1e6, gpu_idle_share=idle_share, kernels=kernels)


def kernel_table(kernels: Iterable[KernelTime]) -> str:
    """A line a kernel: share, total, calls, name."""
    lines = [f"{'share':>7} {'total us':>12} {'calls':>8}  kernel"]
    for kernel in kernels:
        name = kernel.name
        if len(name) > _NAME_WIDTH:
            name = name[: _NAME_WIDTH - 3] + "..."
        lines.append(f"{kernel.share:7.2%} {kernel.microseconds:12.1f} {kernel.calls:8}  {name}")
    return "\n".join(lines) + "\n"


def _busy_microseconds(events: Iterable[Event]) -> float:
    """The time in which at least one of `events` was under way."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _own_microseconds(events: list[Event], is_gpu: bool) -> list[float]:
    """Each event's time; on a CPU less that of the events directly within it."""
    own = [float(event["dur"]) for event in events]
    if is_gpu:
        return own
    threads: dict[Any, list[int]] = defaultdict(list)
    for i, event in enumerate(events):
        threads[event["tid"]].append(i)
    for thread in threads.values():
        thread.sort(key=lambda i: (events[i]["ts"], -events[i]["dur"]))
        around: list[int] = []  # the events that the next one may lie in, outermost first
        for i in thread:
            start = events[i]["ts"]
            while around and events[around[-1]]["ts"] + events[around[-1]]["dur"] <= start:
                around.pop()
            if around:
                own[around[-1]] -= events[i]["dur"]
            around.append(i)
    return [max(microseconds, 0.0) for microseconds in own]
