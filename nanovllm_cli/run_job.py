"""A command's body -> its exit code: errors become messages on stderr, without a traceback."""

import signal
import traceback
from collections.abc import Callable

from nanovllm_cli.core.errors import (
    EngineDied,
    GpuFailed,
    MemoryTooSmall,
    ModelError,
    ModelFileMissing,
    ModelUnreadable,
    NotConnected,
    UserError,
)

from .exit_code import CommandError, ExitCode
from .log import Log
from .signals import Signals, Stopped, end_by


def run_job(
    job: Callable[[], ExitCode],
    *,
    debug: bool,
    log: Log | None = None,
    signals: Signals | None = None,
) -> ExitCode:
    """Run a command's body; its exceptions become messages on stderr and exit codes.

    A signal ends the process here, when what the body holds is let go of.
    """
    log = log or Log()
    with signals or Signals() as signals:
        try:
            exit_code = job()
            if signals.received != signal.SIGALRM:  # what is done by then is not too late
                signals.raise_received()
            return exit_code
        except BrokenPipeError:
            return end_for_closed_pipe()
        except BaseException as error:
            if signals.has_raised and not isinstance(error, Stopped):
                assert signals.received is not None, "that is what it has raised"
                error = Stopped(signals.received)  # a library has made something else of it
            exit_code = exit_code_of(error)
            if isinstance(error, Stopped):
                log.say("stopped", error.message, level="error", exit_code=exit_code)
                if error.number != signal.SIGALRM:
                    end_by(error.number)
                return exit_code
            if debug:
                traceback.print_exc()
            if isinstance(error, UserError):
                return report(error.message, error.hint, exit_code, log)
            message = f"internal error: {type(error).__name__}: {error}"
            return report(message, "Add --debug for the traceback.", exit_code, log)


def end_for_closed_pipe() -> ExitCode:
    """Whoever read stdout has left (`| head -1`): end as the signal would have ended us."""
    end_by(signal.SIGPIPE)
    return ExitCode.PIPE_CLOSED


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that `error` ends a command with."""
    if isinstance(error, Stopped):
        is_alarm = error.number == signal.SIGALRM
        return ExitCode.TIMED_OUT if is_alarm else ExitCode(128 + error.number)
    if isinstance(error, BrokenPipeError):
        return ExitCode.PIPE_CLOSED
    if isinstance(error, CommandError):
        return error.exit_code
    if isinstance(error, ModelFileMissing):
        return ExitCode.NOT_FOUND
    if isinstance(error, ModelUnreadable):
        return ExitCode.IO_ERROR
    if isinstance(error, ModelError):
        return ExitCode.INPUT_UNUSABLE
    if isinstance(error, MemoryTooSmall | GpuFailed | NotConnected | EngineDied):
        return ExitCode.UNAVAILABLE
    return ExitCode.USAGE if isinstance(error, UserError) else ExitCode.INTERNAL


def report(message: str, hint: str | None, exit_code: ExitCode, log: Log | None = None) -> ExitCode:
    """Say on stderr what ends the command; returns `exit_code`."""
    (log or Log()).say("error", message, level="error", hint=hint, exit_code=exit_code)
    return exit_code
