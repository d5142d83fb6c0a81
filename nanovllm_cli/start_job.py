"""A job's options -> the job, with its engines in processes of their own, in this one, or dry.

Imports nothing slow before the output's lock is held: whoever comes second is to hear it at once.
"""

from nanovllm_cli.core.errors import UserError

from .exit_code import ExitCode
from .lock import output_locks
from .options import GenerateOptions
from .signals import Signals


def start_job(
    options: GenerateOptions, signals: Signals, *, dry_run: bool, single_process: bool
) -> ExitCode:
    """Run the job to its end; raises UserError for what ends it as a whole, and Stopped."""
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
        if single_process:
            from .pipeline import generate

            return generate(options, signals=signals)
        from nanovllm_cli.core.device_shares import start_children  # imports numpy

        # They import torch while this process imports what it needs.
        children = start_children(options.data_parallel_size, options.engine.tensor_parallel_size)
        try:
            from .pipeline import generate_supervised

            return generate_supervised(options, children, signals)
        finally:
            for child in children:
                child.kill()  # nothing is left to kill where the job has closed it
