"""A new measurement beside an earlier record: is it slower?"""

from pathlib import Path
from typing import Any

import orjson

from .exit_code import CommandError, ExitCode

Record = dict[str, Any]
# Two records are of the same thing where these are equal; settings may differ, they are what one
# compares. A record of an older version may lack some.
_SAME = ("model", "workload", "num_requests", "total_num_tokens", "device", "dtype")
_SPEED = ("over_repeats", "output_tokens_per_second", "median")


def read_record(path: Path) -> Record:
    """What an earlier `nanovllm bench` wrote to stdout; raises CommandError."""
    try:
        record = orjson.loads(path.read_bytes())
        speed = record
        for key in _SPEED:
            speed = speed[key]
        if not speed > 0:
            raise ValueError(f"{'.'.join(_SPEED)} is {speed}")
    except FileNotFoundError:
        raise CommandError(f"there is no record {path}", exit_code=ExitCode.NOT_FOUND) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{path} is no record of nanovllm bench: {type(error).__name__}: {error}",
            "A record is what the command writes to stdout.",
        ) from None
    return dict(record)


def check_comparable(old: Record, new: Record, path: Path) -> None:
    """Raise CommandError where the records are not of the same thing."""
    for key in _SAME:
        was, is_now = old.get(key), new[key]
        if key in ("model", "workload") and was is not None:  # a path, however it is written
            was, is_now = Path(was).name, Path(is_now).name
        if was is not None and was != is_now:
            raise CommandError(
                f"{path} is a record of another {key.replace('_', ' ')}: {was}, not {is_now}",
                "Only records of the same work on the same device can be compared.",
            )


def comparison(old: Record, new: Record, path: Path, allowed_percent: float | None) -> Record:
    """The record's part: how the medians of output tokens per second compare."""
    before = old["over_repeats"]["output_tokens_per_second"]["median"]
    after = new["over_repeats"]["output_tokens_per_second"]["median"]
    percent = (after / before - 1) * 100
    return {
        "with": str(path),
        "old_output_tokens_per_second": before,
        "change_percent": percent,
        "allowed_percent": allowed_percent,
        "is_too_slow": allowed_percent is not None and percent < -allowed_percent,
    }
