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


def from_ranges(text: str, *, most: int | None = None) -> RowNumbers:
    """The numbers again, each below `most`; raises ValueError."""
    ranges = []
    end = 0
    for part in text.split(",") if text else []:
        first, last = (part.split("-") * 2)[:2]
        if int(first) < end or int(last) < int(first) or (most is not None and int(last) >= most):
            raise ValueError(f"{part} is not a range above those before it")
        end = int(last) + 1
        ranges.append(np.arange(int(first), end, dtype=np.int64))
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
