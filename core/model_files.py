"""A checkpoint's small files, read whole: regular files only, of a bounded size, as JSON objects.

Whatever is wrong with one is a ModelError that names it; nothing here imports torch.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from nanovllm_cli.core.errors import ModelError, ModelFileMissing, ModelUnreadable

MAX_JSON_BYTES = 64 << 20  # the largest published index has 2 MB, the largest tokenizer.json 33 MB
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


def open_file(path: Path) -> int:
    """Open a regular file to read it, without waiting for a FIFO; raises ModelError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "Is the checkpoint whole?") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is not a regular file", "Is the checkpoint whole?")
    return descriptor


def read_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return a file's content; raises ModelError, also where it is larger than `max_bytes`."""
    with os.fdopen(open_file(path), "rb") as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    if len(content) > max_bytes:
        raise ModelError(
            f"{path} is larger than {max_bytes} bytes", "Is it a file of another kind?"
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ModelError."""
    return parse_json(path, read_file(path))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that is the content of `path`; raises ModelError."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ModelError(f"{path} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "Is the checkpoint whole?") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def unreadable(path: Path, error: OSError) -> ModelError:
    """Return the error for a file of a model that the system does not let us read."""
    reason = f"cannot read {path}: {error.strerror or error}"
    if error.errno in _MISSING:
        return ModelFileMissing(reason, "Check the path, and who may read it: ls -l shows it.")
    return ModelUnreadable(reason, "The disk may be damaged, or a network share gone.")


class Fields:
    """The values of one JSON object, each with the type and the range that it must have."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        """where: the file, and the object in it where it is not the whole of it."""
        self.where = where
        self.values = values

    def has(self, key: str) -> bool:
        """Return whether `key` is there and not null."""
        return self.values.get(key) is not None

    def need(self, key: str) -> Any:
        """Return a value of any type; raises ModelError where the key is missing."""
        if key not in self.values:
            raise ModelError(f"{self.where} has no {key!r}", "Is the checkpoint whole?")
        return self.values[key]

    def integer(self, key: str, least: int, most: int) -> int:
        """Return a whole number from `least` to `most`; raises ModelError."""
        value = self.need(key)
        # A bool is an int to Python.
        if type(value) is not int or not least <= value <= most:
            raise self.refused(key, f"a whole number, {least} to {most}")
        return value

    def number(self, key: str, above: float, most: float) -> float:
        """Return a number above `above`, at most `most`; raises ModelError."""
        value = self.need(key)
        if type(value) in (int, float) and above < value <= most and math.isfinite(value):
            return float(value)
        raise self.refused(key, f"a number above {above:g}, at most {most:g}")

    def flag(self, key: str) -> bool:
        """Return true or false; raises ModelError."""
        value = self.need(key)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return value

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        """Return one of some texts; raises ModelError."""
        value = self.need(key)
        if not isinstance(value, str) or value not in choices:
            raise self.refused(key, f"one of {', '.join(choices)}")
        return value

    def refused(self, key: str, expected: str) -> ModelError:
        """Return the error for a value that is not as `expected`."""
        return ModelError(
            f"{self.where} has {key} = {shown(self.values.get(key))}; it must be {expected}",
            "Get the file again from where the model came.",
        )


def shown(value: Any) -> str:
    """Return a value as Python writes it, shortened where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a whole number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."
