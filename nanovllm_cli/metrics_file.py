"""The file of --metrics-file: a job's totals in Prometheus' text format.

It is replaced by a rename, so that whoever collects it (node_exporter's textfile collector) never
reads half of it. Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import os
from collections.abc import Mapping
from pathlib import Path

from nanovllm_cli import __version__

from .exit_code import CommandError, ExitCode
from .files import appearing, io_errors, printable, read_own
from .output_paths import check_publishable
from .totals import Totals

_MODE = 0o644  # collectors run as users of their own
_START = b"# HELP nanovllm_"

Sample = tuple[Mapping[str, str], float]  # labels, value


class MetricsFile:
    """The file at `path`; `labels` are on every sample, so that jobs can be told apart.

    Raises CommandError for a file that is there and is not such a one.
    """

    def __init__(self, path: Path, labels: Mapping[str, str]) -> None:
        self.path = path
        self._labels = labels
        check_publishable(path, flag="--metrics-file ")
        content = read_own(path) or b""
        if content[: len(_START)] not in (b"", _START):
            raise CommandError(
                f"--metrics-file {path} exists already, and holds no metrics of this tool",
                "Name another file.",
                exit_code=ExitCode.OUTPUT_EXISTS,
            )

    def write(self, totals: Totals, exit_code: ExitCode | None) -> None:
        """Replace the file; `exit_code` is None while the job runs. Raises CommandError."""
        text = self._exposition(totals, exit_code)
        with io_errors(self.path), appearing(self.path, private=False) as file:
            os.fchmod(file.fileno(), _MODE)
            file.write(text.encode())

    def _exposition(self, totals: Totals, exit_code: ExitCode | None) -> str:
        stats = totals.as_dict()
        tokens, rates, engine = stats["tokens"], stats["throughput"], stats["engine"]
        families: list[tuple[str, str, str, list[Sample]]] = [
            (
                "rows_total", "counter", "Rows that are done, with those of earlier runs.",
                [({"status": s}, stats["rows"][s]) for s in ("completed", "failed")],
            ),
            (
                "rows_expected", "gauge", "Rows of the input; absent where it cannot be counted.",
                [({}, n) for n in [totals.num_expected_rows] if n is not None],
            ),
            (
                "tokens_total", "counter", "Tokens of this run.",
                [({"kind": k}, tokens[k]) for k in ("prompt", "completion")],
            ),
            (
                "prefix_cache_hit_tokens_total", "counter",
                "Prompt tokens of this run that were not computed again.",
                [({}, tokens["cached"])],
            ),
            (
                "tokens_per_second", "gauge", "Mean of this run, without loading.",
                [({"kind": k}, rates[f"{k}_tokens_per_second"]) for k in ("prompt", "completion")],
            ),
            (
                "engine_restarts_total", "counter", "Starts of the engine after it died or hung.",
                [({}, engine["restarts"])],
            ),
            ("elapsed_seconds", "gauge", "Since the job began.", [({}, stats["elapsed_seconds"])]),
            (
                "phase_seconds", "gauge", "How long each part of the job took, or takes so far.",
                [({"phase": name}, n) for name, n in stats["phases_seconds"].items()],
            ),
            (
                "exit_code", "gauge", "How the job ended; absent while it runs.",
                [({}, code) for code in [exit_code] if code is not None],
            ),
            ("build_info", "gauge", "Always 1.", [({"version": __version__}, 1)]),
        ]  # fmt: skip
        lines = []
        for name, kind, help, samples in families:
            lines += [f"# HELP nanovllm_{name} {help}", f"# TYPE nanovllm_{name} {kind}"]
            for labels, value in samples:
                named = {**self._labels, **labels}.items()
                pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in named)
                lines.append(f"nanovllm_{name}{{{pairs}}} {float(value)!r}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """A label's value; of what a terminal would obey, the format can say a newline alone."""
    lines = [printable(line) for line in text.split("\n")]
    return r"\n".join(line.replace("\\", r"\\").replace('"', r"\"") for line in lines)
