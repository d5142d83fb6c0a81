"""What a profiler's trace is read as: time by kernel, and the time in which nothing ran."""

from typing import Any

import pytest

from nanovllm_cli.kernel_trace import kernel_table, summarize


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}


def test_kernels_that_overlap_are_busy_once() -> None:
    summary = summarize(
        [
            event("a", 100, 10),
            event("b", 105, 10),  # until 115
            event("a", 106, 2),  # within b
            event("copy", 135, 5, cat="gpu_memcpy"),
            event("host", 0, 1000, cat="cuda_runtime"),
            event("op", 0, 1000, cat="cpu_op"),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert summary.seconds == pytest.approx(40e-6)
    assert summary.gpu_idle_share == pytest.approx(20 / 40)
    assert [(k.name, k.calls, k.microseconds) for k in summary.kernels] == [
        ("a", 2, 12),
        ("b", 1, 10),
        ("copy", 1, 5),
    ]
    assert [k.share for k in summary.kernels] == pytest.approx([12 / 27, 10 / 27, 5 / 27])


def test_an_operation_of_a_cpu_counts_without_those_it_calls() -> None:
    summary = summarize(
        [
            event("inner", 2, 3, cat="cpu_op"),
            event("outer", 0, 10, cat="cpu_op"),
            event("innermost", 2, 1, cat="cpu_op"),
            event("inner", 5, 4, cat="cpu_op"),
            event("next", 10, 5, cat="cpu_op"),
            event("outer", 1, 20, cat="cpu_op", tid=8),  # another thread
        ]
    )
    assert summary.gpu_idle_share is None
    times = {k.name: (k.calls, k.microseconds) for k in summary.kernels}
    assert times == {"outer": (2, 23), "inner": (2, 6), "innermost": (1, 1), "next": (1, 5)}
    assert sum(k.share for k in summary.kernels) == pytest.approx(1)


def test_a_trace_of_nothing_is_empty() -> None:
    summary = summarize([])
    assert (summary.seconds, summary.gpu_idle_share, summary.kernels) == (0, None, [])


def test_the_table_has_a_line_a_kernel_and_cuts_long_names() -> None:
    summary = summarize([event("k" * 300, 0, 3), event("short", 3, 1)])
    title, first, second = kernel_table(summary.kernels).splitlines()
    assert title.split() == ["share", "total", "us", "calls", "kernel"]
    assert first.split() == ["75.00%", "3.0", "1", "k" * 97 + "..."]
    assert second.split() == ["25.00%", "1.0", "1", "short"]
