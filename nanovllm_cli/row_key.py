"""What a row is known by when a job goes on: its number over all inputs, and its content's hash."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .rows import BadRow, Row

Keys = npt.NDArray[np.uint64]
_MAX_MARKS = 64
_LARGE_ROW_BYTES = 1 << 16


def row_key(row: Row | BadRow) -> int:
    """xxh3_128 of the row as it was read; of a row of Parquet, of its values as Python shows them.

    What is no row has its error for a content: equal errors give equal lines.
    """
    return _digest_of(row).intdigest()


def content_id(row: Row | BadRow) -> str:
    """The same as text: what ids in outputs are made of."""
    return _digest_of(row).hexdigest()


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


def _digest_of(row: Row | BadRow) -> xxhash.xxh3_128:
    if isinstance(row, BadRow):
        message = row.message if row.known_as is None else row.known_as
        return xxhash.xxh3_128(_encoded_repr((row.id, row.code, message)))
    if row.raw is not None:
        return xxhash.xxh3_128(row.raw)
    if row.num_bytes < _LARGE_ROW_BYTES:
        return xxhash.xxh3_128(_encoded_repr(row.columns))
    digest = xxhash.xxh3_128()  # of what repr writes, without a copy of it
    before = b"{"
    for name, value in row.columns.items():
        digest.update(before + _encoded_repr(name) + b": ")
        is_long = isinstance(value, str) and len(value) > _LARGE_ROW_BYTES
        digest.update(_repr_of_long_text(value) if is_long else _encoded_repr(value))
        before = b", "
    digest.update(b"}")
    return digest


def _encoded_repr(value: Any) -> bytes:
    return repr(value).encode(errors="surrogatepass")


@lru_cache(maxsize=4)  # the rows of a Parquet file may share one
def _repr_of_long_text(value: str) -> bytes:
    return _encoded_repr(value)
