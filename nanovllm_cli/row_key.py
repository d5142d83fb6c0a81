"""What a row is known by when a job goes on: its number over all inputs, and its content's hash."""

import numpy as np
import numpy.typing as npt
import xxhash

from .rows import BadRow, Row

Keys = npt.NDArray[np.uint64]
_MAX_MARKS = 64


def row_key(row: Row | BadRow) -> int:
    """xxh3_128 of the row as it was read; of a row of Parquet, of its values as Python shows them.

    What is no row has its error for a content: equal errors give equal lines.
    """
    return xxhash.xxh3_128_intdigest(_content_of(row))


def content_id(row: Row | BadRow) -> str:
    """The same as text: what ids in outputs are made of."""
    return xxhash.xxh3_128_hexdigest(_content_of(row))


def low_half(key: int) -> int:
    """The 64 bits of a key that are kept in memory, and compared."""
    return key & 0xFFFF_FFFF_FFFF_FFFF


def rows_per_mark(num_keys: int) -> int:
    """After how many keys `marks_of` sets a mark."""
    every = 1
    while num_keys > every * _MAX_MARKS:
        every *= 2
    return every


def num_marks(num_keys: int) -> int:
    """How many marks `marks_of` sets."""
    return -(-num_keys // rows_per_mark(num_keys))


def marks_of(keys: Keys) -> list[str]:
    """A running hash over low halves of keys: at most 64 marks, the last one over all of them.

    Few bytes say whether millions of rows are what they were and, if not, about where they differ.
    """
    every = rows_per_mark(len(keys))
    digest = xxhash.xxh3_64()
    marks = []
    for start in range(0, len(keys), every):
        digest.update(keys[start : start + every].tobytes())
        marks.append(digest.hexdigest())
    return marks


def _content_of(row: Row | BadRow) -> bytes:
    if isinstance(row, BadRow):
        return repr((row.id, row.code, row.message)).encode(errors="surrogatepass")
    if row.raw is None:
        return repr(row.columns).encode(errors="surrogatepass")
    return row.raw
