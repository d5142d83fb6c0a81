"""How a command ends: the exit codes that scripts may rely on, and the error that carries one."""

import errno
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


_TOO_LITTLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_OF_DISKS = (
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ENXIO),
    *(errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODEV, errno.ENOLCK),
)
_OF_NAMES = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    errno.ENAMETOOLONG,
)


def code_of_os_error(error: OSError, *, is_read: bool = False) -> ExitCode | None:
    """Return what a refusal of the system ends a command with; None for one that tells nothing.

    is_read: a name that cannot be opened is then NOT_FOUND, and not IO_ERROR.
    """
    if error.errno in _TOO_LITTLE:
        return ExitCode.UNAVAILABLE
    if error.errno in _OF_NAMES:
        return ExitCode.NOT_FOUND if is_read else ExitCode.IO_ERROR
    return ExitCode.IO_ERROR if error.errno in _OF_DISKS else None
