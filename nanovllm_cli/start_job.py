"""A job's options -> the job, with its engines in processes of their own, in this one, or dry.

Imports nothing slow before the output's lock is held: whoever comes second is to hear it at once.
"""

from nanovllm_cli.core.errors import UserError

from .exit_code import ExitCode
from .inputs import find_inputs
from .lock import output_locks
from .options import GenerateOptions
from .signals import Signals


def start_job(
    options: GenerateOptions, signals: Signals, *, dry_run: bool, single_process: bool
) -> ExitCode:
    """Run the job to its end; raises UserError for what ends it as a whole, and Stopped."""
    if options.timeout is not None:
        signals.end_after(options.timeout)
    find_inputs(options.inputs)  # a name that is mistyped is told at once
    if dry_run:
        from .dry_run import dry_run as run

        return run(options)
    if single_process and options.data_parallel_size > 1:
        raise UserError(
            f"--data-parallel-size is {options.data_parallel_size}, with --single-process",
            "Leave out one of them: each engine needs a process.",
        )
    with output_locks(options):
        from .pipeline import EngineProcesses, generate

        if single_process:
            return generate(options, signals=signals)
        ranks = options.engine.tensor_parallel_size
        with EngineProcesses(options.data_parallel_size, ranks) as engines:
            return generate(options, load=engines.load, start=engines.start, signals=signals)
