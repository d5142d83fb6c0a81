"""A new measurement beside an earlier record: is it slower?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from .exit_code import CommandError, ExitCode

Record = dict[str, Any]
# Two records are of the same thing where these are equal; settings may differ, they are what one
# compares. A record of an older version may lack some.
_SAME = ("model", "workload", "num_requests", "total_num_tokens", "device", "dtype")


@dataclass(frozen=True, slots=True)
class OldRecord:
    """What an earlier `nanovllm bench` wrote to stdout."""

    path: Path
    content: Record

    @classmethod
    def read(cls, path: Path) -> "OldRecord":
        """Raises CommandError, NOT_FOUND where there is no such file."""
        try:
            content = orjson.loads(path.read_bytes())
            if not _speed(content) > 0:
                raise ValueError("it has no output tokens per second")
        except FileNotFoundError:
            raise CommandError(f"there is no record {path}", exit_code=ExitCode.NOT_FOUND) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(
                f"{path} is no record of nanovllm bench: {type(error).__name__}: {error}",
                "A record is what the command writes to stdout.",
            ) from None
        return cls(path, content)

    def check(self, identity: Record) -> None:
        """Raise CommandError where this is no record of what `identity` says."""
        for key in _SAME:
            was, is_now = self.content.get(key), identity[key]
            if key in ("model", "workload") and was is not None:  # a path, however it is written
                was, is_now = Path(was).name, Path(is_now).name
            if was is not None and was != is_now:
                raise CommandError(
                    f"{self.path} is a record of another {key.replace('_', ' ')}: "
                    f"{was}, not {is_now}",
                    "Only records of the same work on the same device can be compared.",
                )

    def compare(self, new: Record, allowed_percent: float | None) -> Record:
        """How the medians of output tokens per second compare."""
        percent = (_speed(new) / _speed(self.content) - 1) * 100
        return {
            "with": str(self.path),
            "old_output_tokens_per_second": _speed(self.content),
            "change_percent": percent,
            "allowed_percent": allowed_percent,
            "is_too_slow": allowed_percent is not None and percent < -allowed_percent,
        }


def _speed(record: Record) -> float:
    speed: float = record["over_repeats"]["output_tokens_per_second"]["median"]
    return speed
