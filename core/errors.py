"""What the user can mend, as exceptions: a message that names the place, and a hint what to do."""


class UserError(Exception):
    """A mistake the user can mend; the command line prints it without a traceback."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelError(UserError):
    """The model's files cannot be used: unknown architecture, missing or misshapen tensors."""


class ModelFileMissing(ModelError):
    """A file of the model is not there, or this user may not read it."""


class ModelUnreadable(ModelError):
    """The disk or the network does not give a file of the model."""


class GpuFailed(UserError):
    """The GPU failed, or ran out of memory, in the middle of a job; what is finished is kept."""


class MemoryTooSmall(UserError):
    """The machine has too little memory for the model and one sequence's KV cache."""


class NotConnected(UserError):
    """The ranks of an engine cannot reach each other; no model is loaded yet."""


class EngineDied(UserError):
    """The engine's process has ended or hangs, and to start it again has not helped."""
