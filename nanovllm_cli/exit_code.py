"""How a command ends: the exit codes that scripts may rely on, and the error that carries one."""

from enum import IntEnum

from nanovllm_cli.core.errors import UserError


class ExitCode(IntEnum):
    """Exit codes; 64 to 78 mean what sysexits.h says, 129 and above are 128 + the signal.

    Worth trying again unchanged: UNAVAILABLE, IO_ERROR, LOCKED, TIMED_OUT, HANGUP, INTERRUPTED,
    TERMINATED.
    """

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SOME_ROWS_FAILED = 3
    TOO_SLOW = 3  # of `bench --fail-if-slower`
    INPUT_UNUSABLE = 65
    NOT_FOUND = 66
    UNAVAILABLE = 69
    OUTPUT_EXISTS = 73
    IO_ERROR = 74
    LOCKED = 75
    TIMED_OUT = 75  # sysexits.h's "temporary failure": the same line goes on where this run stopped
    CONFIG_MISMATCH = 78
    HANGUP = 129
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


class CommandError(UserError):
    """A UserError that ends the command with `exit_code`."""

    def __init__(
        self, message: str, hint: str | None = None, *, exit_code: ExitCode = ExitCode.USAGE
    ) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
