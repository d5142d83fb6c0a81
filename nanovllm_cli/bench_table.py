"""What `nanovllm bench` tells people, on stderr."""

import io
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 120


def say(line: str) -> None:
    """One line to stderr, which may be full or closed: no measurement is lost for it."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def say_record(record: dict[str, Any]) -> None:
    """The record, in short."""
    say(
        f"\n{record['model']} ({record['weights']} weights, {record['dtype']}), "
        f"{record['workload']}: {record['num_requests']} sequences, {record['device']}"
    )
    spreads = _table("", "min", "median", "max")
    for name, spread in record["over_repeats"].items():
        spreads.add_row(name.replace("_", " "), *(f"{value:,.2f}" for value in spread.values()))
    _say_table(spreads)
    facts = _table("", "")
    least, rates = record["bound"], record["machine"]
    facts.add_row(
        "bound of this machine",
        f"{least['output_tokens_per_second']:,.0f} output tok/s, {least['seconds']:.2f} s; "
        f"{least['share_reached']:.1%} of it reached",
    )
    facts.add_row(
        "memory", f"{rates['bytes_per_second'] / 1e9:,.0f} GB/s: {rates['bytes_measured_by']}"
    )
    facts.add_row(
        "products", f"{rates['flops_per_second'] / 1e9:,.0f} GFLOP/s: {rates['flops_measured_by']}"
    )
    if (single := record["single"]) is not None:
        facts.add_row(
            "one alone",
            f"{single['output_tokens_per_second']:,.0f} output tok/s; "
            f"{record['speedup']:.2f} times as fast with "
            f"{record['tensor_parallel_size'] * record['data_parallel_size']} "
            f"(tp {record['tensor_parallel_size']}, dp {record['data_parallel_size']}), "
            f"efficiency {record['efficiency']:.1%}",
        )
    phases = ", ".join(
        f"{name.replace('_', ' ')} {seconds:.2f}"
        for name, seconds in record["phases_seconds"].items()
        if seconds is not None
    )
    facts.add_row("seconds", phases)
    facts.add_row(
        "steps",
        f"{record['prefill_launches']} prefills, {record['decode_steps']} decode steps of "
        f"{record['mean_batch']:.1f} sequences, {record['preemptions']} preemptions",
    )
    if record["data_parallel_size"] > 1:
        replicas = zip(record["replica_output_tokens"], record["replica_busy_share"], strict=True)
        each = "; ".join(f"{num_tokens:,} tokens, {busy:.1%} busy" for num_tokens, busy in replicas)
        facts.add_row("engines", each)
    facts.add_row("prefix hits", f"{record['prefix_hit_rate']:.1%} of the prompt tokens")
    if record["peak_gpu_bytes"] is not None:
        facts.add_row("peak GPU memory", f"{record['peak_gpu_bytes'] / 2**30:.1f} GiB")
    facts.add_row("peak memory", f"{record['peak_host_bytes'] / 2**30:.2f} GiB")
    if record["joules_per_output_token"] is not None:
        facts.add_row("energy", f"{record['joules_per_output_token']:.4f} J per output token")
    if record["gpu_idle_share"] is not None:
        facts.add_row("GPU idle", f"{record['gpu_idle_share']:.1%} of the decode slice profiled")
    if (compared := record["comparison"]) is not None:
        facts.add_row(
            f"against {compared['with']}",
            f"{compared['change_percent']:+.1f} % output tok/s"
            + (", too slow" if compared["is_too_slow"] else ""),
        )
    _say_table(facts)


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(titles))
    for at, title in enumerate(titles):
        table.add_column(title, justify="right" if title else "left", no_wrap=at == 0)
    return table


def _say_table(table: Table) -> None:
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table, highlight=False, markup=False)
    say("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
