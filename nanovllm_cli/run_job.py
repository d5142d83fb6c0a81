"""A command's body -> its exit code: errors become messages on stderr, without a traceback."""

import errno
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

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

from .exit_code import CommandError, ExitCode, code_of_os_error
from .files import printable
from .log import Log
from .signals import Signals, Stopped, end_by

# What libraries say where the system gives no more: of threads, Rust's and Python's; of memory,
# the dynamic linker's, torch's and Arrow's.
_NO_THREADS = re.compile(r"can't start new thread|ThreadPoolBuildError|thread pool")
_NO_MEMORY = re.compile(
    r"failed to map segment|cannot allocate memory|can't allocate memory|not enough memory"
    r"|bad_alloc|out of memory",
    re.IGNORECASE,
)
_MEMORY_HINT = (
    "Give it more memory (ulimit -v, the container's limit), or run less at once. "
    "The same line goes on where this run stopped."
)
_PROCESSES_HINT = (
    "Raise the limit (ulimit -u, the container's pids limit), or set --num-threads 1. "
    "The same line goes on where this run stopped."
)
_FILES_HINT = "Raise the limit (ulimit -n). The same line goes on where this run stopped."


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
    try:
        return _run_job(job, signals or Signals(), debug=debug, log=log)
    except Stopped as stopped:  # a signal in the moment before the body, or in the one after it
        return _end_stopped(stopped, log)


def _run_job(job: Callable[[], ExitCode], signals: Signals, *, debug: bool, log: Log) -> ExitCode:
    with signals:
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
            if isinstance(error, Stopped):
                return _end_stopped(error, log)
            if debug:
                show_traceback(error)
            return report_error(error, log)


def _end_stopped(stopped: Stopped, log: Log) -> ExitCode:
    exit_code = exit_code_of(stopped)
    log.say("stopped", stopped.message, level="error", exit_code=exit_code)
    if stopped.number != signal.SIGALRM:
        end_by(stopped.number)
    return exit_code


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
    if (of_system := _of_system(error)) is not None:
        return of_system.exit_code
    if isinstance(error, ModelError):
        return ExitCode.INPUT_UNUSABLE
    if isinstance(error, MemoryTooSmall | GpuFailed | NotConnected | EngineDied):
        return ExitCode.UNAVAILABLE
    return ExitCode.USAGE if isinstance(error, UserError) else ExitCode.INTERNAL


def show_traceback(error: BaseException) -> None:
    """Print where an error comes from on stderr, a line at a time."""
    text = "".join(traceback.format_exception(error))
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write("".join(f"{printable(line)}\n" for line in text.splitlines()))


def report_error(error: BaseException, log: Log | None = None) -> ExitCode:
    """Say on stderr what ends the command; returns the exit code of `error`."""
    exit_code = exit_code_of(error)
    told = error if isinstance(error, UserError) else _of_system(error)
    if told is not None:
        return report(told.message, told.hint, exit_code, log)
    message = f"internal error: {type(error).__name__}: {error}"
    return report(message, "Add --debug for the traceback.", exit_code, log)


def _of_system(error: BaseException) -> CommandError | None:
    """What the system refused, as an error for people; None for a mistake of our own."""
    text, unavailable = str(error), ExitCode.UNAVAILABLE
    # Rust's panics come as no Exception; the class has no public name.
    is_panic = type(error).__name__ == "PanicException"
    if (isinstance(error, RuntimeError) or is_panic) and _NO_THREADS.search(text):
        message = "the system starts no further thread for this process"
        return CommandError(message, _PROCESSES_HINT, exit_code=unavailable)
    is_of_memory = isinstance(error, RuntimeError | ImportError | OSError) or is_panic
    if isinstance(error, MemoryError) or (is_of_memory and _NO_MEMORY.search(text)):
        message = "there is too little memory for this process" + (f": {text}" if text else "")
        return CommandError(message, _MEMORY_HINT, exit_code=unavailable)
    if not isinstance(error, OSError):
        return None
    exit_code = code_of_os_error(error, is_read=True)
    if exit_code is None:
        return None
    hint = "The same line goes on where this run stopped."
    if error.errno == errno.EAGAIN:
        message = "the system starts no further process for this one"
        return CommandError(message, _PROCESSES_HINT, exit_code=exit_code)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return CommandError("too many files are open", _FILES_HINT, exit_code=exit_code)
    what = f"cannot use {error.filename}" if error.filename else "the system refused a file"
    return CommandError(
        f"{what}: {error.strerror or error}",
        "Let this user read it." if exit_code == ExitCode.NOT_FOUND else hint,
        exit_code=exit_code,
    )


def report(message: str, hint: str | None, exit_code: ExitCode, log: Log | None = None) -> ExitCode:
    """Say on stderr what ends the command; returns `exit_code`."""
    (log or Log()).say("error", message, level="error", hint=hint, exit_code=exit_code)
    return exit_code
