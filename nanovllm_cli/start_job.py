"""A job's options -> the job, with its engines in processes of their own, in this one, or dry.

Imports nothing slow before the output's lock is held: whoever comes second is to hear it at once.
"""

from collections.abc import Mapping
from pathlib import Path

from nanovllm_cli.core.errors import UserError

from . import process_clock  # noqa: F401  # it looks at the clock: a lock may be waited for
from .exit_code import ExitCode
from .inputs import find_inputs
from .lock import output_locks
from .options import GenerateOptions
from .output_paths import OutputPaths, check_distinct, check_publishable
from .signals import Signals


def start_job(
    options: GenerateOptions,
    signals: Signals,
    *,
    dry_run: bool,
    single_process: bool,
    flag_files: Mapping[str, str | Path | None],
) -> ExitCode:
    """Run the job to its end; raises UserError for what ends it as a whole, and Stopped.

    flag_files: flags, and the files that they name, which were read.
    """
    _check_files(options, flag_files)
    if options.timeout is not None:
        signals.end_after(options.timeout)
    if dry_run:
        from .dry_run import dry_run as run

        return run(options)
    if single_process and options.data_parallel_size > 1:
        raise UserError(
            f"--data-parallel-size is {options.data_parallel_size}, with --single-process",
            "Leave out one of them: each engine needs a process.",
        )
    from .capacity import check_job_fits  # not for --help

    check_job_fits(options.engine, options.data_parallel_size, options.model)
    with output_locks(options):
        from .engines import EngineProcesses
        from .pipeline import generate

        if single_process:
            return generate(options, signals=signals)
        ranks = options.engine.tensor_parallel_size
        with EngineProcesses(options.data_parallel_size, ranks) as engines:
            return generate(options, load=engines.load, start=engines.start, signals=signals)


def _check_files(options: GenerateOptions, flag_files: Mapping[str, str | Path | None]) -> None:
    """Raise CommandError for inputs that are not there, and for outputs that cannot be written.

    One file under two names is such an output.
    """
    paths = OutputPaths.of(options.output, options.errors)
    metrics = None if options.metrics_file is None else Path(options.metrics_file)
    if metrics is not None:
        check_publishable(metrics, flag="--metrics-file ")
    sources = find_inputs(options.inputs, outputs=options.files_written)
    inputs = ["-" if source.path is None else source.name for source in sources]
    models = [Path(name) for name in (options.model, options.tokenizer or "") if name]
    others = [
        (f"a file of the model {directory}", file)
        for directory in models
        if directory.is_dir()
        for file in directory.iterdir()
    ]
    others += [(f"the file of {flag}", Path(name)) for flag, name in flag_files.items() if name]
    check_distinct(paths, inputs=inputs, metrics=metrics, others=others)
