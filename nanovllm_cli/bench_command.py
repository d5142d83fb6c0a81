"""`nanovllm bench`: its flags -> BenchOptions -> the measurement."""

import typer

from nanovllm_cli.core.config import EngineConfig

from . import flags
from .exit_code import ExitCode
from .options import GenerateOptions
from .run_job import run_job
from .settings import option


def bench_command(
    model: flags.Model = GenerateOptions.model,
    workload: str = option(
        "nano", "--workload", panel=flags.RUN,
        metavar="NAME",
        help="nano, decode-heavy, prefill-heavy, shared-prefix or short-answers.",
    ),
    repeats: int = option(3, "--repeats", panel=flags.RUN, help="Timed passes after a warm-up."),
    temperature: float = option(0.6, "--temperature", panel=flags.RUN, help="0 is greedy."),
    limit: int | None = option(
        None, "--limit", panel=flags.RUN, metavar="ROWS", min=1, help="Only the first sequences."
    ),
    device: flags.Device = flags.DEFAULTS.device,
    max_num_seqs: flags.MaxNumSeqs = None,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    enforce_eager: flags.EnforceEager = False,
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Time a fixed workload: a table on stderr, one JSON document on stdout.

    [bold]nanovllm bench --model Qwen3-0.6B[/bold]
    """

    def job() -> ExitCode:
        from .bench import BenchOptions, bench

        engine = EngineConfig(
            device=device,  # type: ignore[arg-type]  # checked by EngineConfig
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=enforce_eager,
        )
        return bench(
            BenchOptions(
                model=model,
                workload=workload,
                repeats=repeats,
                temperature=temperature,
                limit=limit,
                engine=engine,
            )
        )

    raise typer.Exit(run_job(job, debug=debug))
