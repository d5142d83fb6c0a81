"""A command's body -> its exit code: errors become messages on stderr, without a traceback."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from nanovllm_cli.core.errors import EngineDied, GpuFailed, MemoryTooSmall, ModelError, UserError

from .exit_code import CommandError, ExitCode


def run_job(job: Callable[[], ExitCode], *, debug: bool) -> ExitCode:
    """Run a command's body; its exceptions become messages on stderr and exit codes."""
    try:
        return job()
    except BrokenPipeError:
        return end_for_closed_pipe()
    except KeyboardInterrupt:
        message = "interrupted; what is done is kept, and the same line goes on from it"
        return report(message, None, ExitCode.INTERRUPTED)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return report(error.message, error.hint, exit_code_of(error))
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}"
        return report(message, "Add --debug for the traceback.", ExitCode.INTERNAL)


def end_for_closed_pipe() -> ExitCode:
    """Whoever read stdout has left (`| head -1`): end as the signal would have ended us."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return ExitCode.PIPE_CLOSED


def exit_code_of(error: UserError) -> ExitCode:
    """The exit code that `error` ends a command with."""
    if isinstance(error, CommandError):
        return error.exit_code
    if isinstance(error, ModelError):
        return ExitCode.INPUT_UNUSABLE
    is_machine = isinstance(error, MemoryTooSmall | GpuFailed | EngineDied)
    return ExitCode.UNAVAILABLE if is_machine else ExitCode.USAGE


def report(message: str, hint: str | None, exit_code: ExitCode) -> ExitCode:
    """Say on stderr what ends the command; returns `exit_code`."""
    with suppress(OSError):  # whether or not it can be read, the exit code says it too
        print(f"error: {message}", file=sys.stderr)
        if hint is not None:
            print(f"\nhint: {hint}", file=sys.stderr)
    return exit_code
