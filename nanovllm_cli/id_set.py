"""Which ids were seen, in 8 bytes each: millions of rows fit in little memory."""

import numpy as np
import numpy.typing as npt
import xxhash


class IdSet:
    """A set of ids kept as sorted runs of 64-bit hashes, the runs growing geometrically.

    Two different ids among ten million have the same hash with a probability of 3e-6.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, ids: list[str | int | None]) -> list[bool]:
        """Add `ids` in order; says of each whether it was there before. None never was."""
        is_known = [False] * len(ids)
        first_at: dict[int, int] = {}
        for i, value in enumerate(ids):
            if value is None:
                continue
            key = xxhash.xxh3_64_intdigest(f"{type(value).__name__} {value}".encode())
            is_known[i] = key in first_at
            first_at.setdefault(key, i)
        new = np.fromiter(first_at, dtype=np.uint64, count=len(first_at))
        places = list(first_at.values())
        found = np.zeros(len(new), dtype=np.bool_)
        for run in self._runs:
            index = np.minimum(np.searchsorted(run, new), len(run) - 1)
            found |= run[index] == new
        for place in np.flatnonzero(found):
            is_known[places[place]] = True
        self._insert(np.sort(new[~found]))
        return is_known

    def _insert(self, run: npt.NDArray[np.uint64]) -> None:
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate((self._runs.pop(), run)))
        if len(run):
            self._runs.append(run)
