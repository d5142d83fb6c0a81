"""`nanovllm bench`: its flags -> BenchOptions -> the measurement."""

from pathlib import Path

import typer

from . import flags
from .exit_code import ExitCode
from .options import DEFAULT_MODEL
from .run_job import run_job
from .settings import option

_WORK, _RECORD = "Work", "Record"


def bench_command(
    workload: str = option(
        "nano", "--workload", "-w", panel=_WORK, metavar="NAME",
        help="nano, decode-heavy, prefill-heavy, shared-prefix, short-answers, or a file of "
        "prompts (as for generate; it needs a checkpoint, for its tokenizer).",
    ),
    repeats: int = option(
        3, "--repeats", panel=_WORK, help="Timed passes after a warm-up, each with other prompts."
    ),
    temperature: float = option(0.6, "--temperature", panel=_WORK, help="0 is greedy."),
    max_tokens: int | None = option(
        None, "--max-tokens", panel=_WORK,
        help="For each prompt of a file; a row's own comes first. Default: 128.",
    ),
    limit: int | None = option(
        None, "--limit", panel=_WORK, metavar="ROWS", help="Only the first sequences."
    ),
    compare: Path | None = option(
        None, "--compare", panel=_RECORD, metavar="FILE",
        help="An earlier record of the same work, to say what has changed.",
    ),
    fail_if_slower: float | None = option(
        None, "--fail-if-slower", panel=_RECORD, metavar="PERCENT",
        help="With --compare: exit 3 if the median of output tokens per second is this much lower.",
    ),
    profile: Path | None = option(
        None, "--profile", panel=_RECORD, metavar="DIR",
        help="One more pass: torch profiler traces of two slices, and the time of each kernel.",
    ),
    no_single: bool = option(
        False, "--no-single", panel=_RECORD,
        help="With --tp or --dp: leave out the pass of one engine alone on one GPU.",
    ),
    weak_scaling: bool = option(
        False, "--weak-scaling", panel=_WORK,
        help="With --dp: the whole workload for each engine; the one alone has one of them.",
    ),
    model: flags.Model = DEFAULT_MODEL,
    dtype: flags.DType = flags.DEFAULTS.dtype,
    max_model_len: flags.MaxModelLen = None,
    device: flags.Device = flags.DEFAULTS.device,
    tensor_parallel_size: flags.TensorParallelSize = flags.DEFAULTS.tensor_parallel_size,
    data_parallel_size: flags.DataParallelSize = 1,
    max_num_seqs: flags.MaxNumSeqs = None,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = flags.DEFAULTS.gpu_memory_utilization,
    attention_backend: flags.AttentionBackend = flags.DEFAULTS.attention_backend,
    enforce_eager: flags.EnforceEager = False,
    block_size: flags.BlockSize = flags.DEFAULTS.block_size,
    no_prefix_caching: flags.NoPrefixCaching = False,
    max_window_steps: int | None = option(
        None, "--max-window-steps", panel=flags.ENGINE,
        help="Decode steps between two looks of the host; default: 32 on a GPU, 1 on a CPU.",
    ),
    num_threads: int | None = option(
        None, "--num-threads", panel=flags.ENGINE, help="On a CPU; default: one for each core."
    ),
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Time a workload: a table on stderr, one JSON document on stdout.

    [bold]nanovllm bench --model Qwen3-0.6B[/bold]

    The table shows what share was reached of what this machine could do at
    best: its memory bandwidth and its rate of matrix products are measured in
    the same run. Without a checkpoint Qwen3-0.6B ... Qwen3-32B have random
    weights. With --tp or --dp, one GPU alone runs it as well: the speed-up.
    """

    def job() -> ExitCode:
        engine = flags.engine_config(
            dtype=dtype,
            max_model_len=max_model_len,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            attention_backend=attention_backend,
            enforce_eager=enforce_eager,
            block_size=block_size,
            enable_prefix_caching=not no_prefix_caching,
            max_window_steps=max_window_steps,
            num_threads=num_threads,
        )
        from .capacity import check_job_fits  # not for --help

        if data_parallel_size >= 1:
            check_job_fits(engine, data_parallel_size, model)
        from .bench import bench
        from .bench_options import BenchOptions

        return bench(
            BenchOptions(
                model=model,
                workload=workload,
                repeats=repeats,
                temperature=temperature,
                max_tokens=max_tokens,
                limit=limit,
                compare=compare,
                fail_if_slower=fail_if_slower,
                profile=profile,
                data_parallel_size=data_parallel_size,
                weak_scaling=weak_scaling,
                single=not no_single,
                engine=engine,
            )
        )

    raise typer.Exit(run_job(job, debug=debug))
