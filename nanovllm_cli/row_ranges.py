"""Row numbers as text for the stats file: "0-2,7" is the rows 0, 1, 2 and 7."""

import numpy as np
import numpy.typing as npt

RowNumbers = npt.NDArray[np.int64]


def to_ranges(rows: RowNumbers) -> str:
    """Ascending row numbers as text."""
    starts_at = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    starts = rows[starts_at].tolist()
    ends = rows[np.append(starts_at[1:], len(rows)) - 1].tolist() if len(rows) else []
    return ",".join(
        f"{start}" if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )


def from_ranges(text: str) -> RowNumbers:
    """The numbers again; raises ValueError."""
    parts = [part.split("-") for part in text.split(",") if part]
    ranges = [np.arange(int(part[0]), int(part[-1]) + 1, dtype=np.int64) for part in parts]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
