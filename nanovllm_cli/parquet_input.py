"""A Parquet file -> batches of its rows, every page checked, streamed by row groups.

Parquet may be written without checksums: then a flipped bit may go unseen, while a truncated file
is always found. A file of few bytes may hold rows of many: a text that is stored once stands in
every row. Batches of such rows are short, and their texts come as Arrow's dictionaries, so that
they are in memory once as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanovllm_cli.core.errors import MemoryTooSmall

from .input_file import InputFile, unusable

_BATCH_ROWS = 256
_PROBE_ROWS = 4  # of each row group
_LARGE_ROW_BYTES = 1 << 16
_LARGE_BATCH_ROWS = 16
_LARGE_BATCH_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


def parquet_batches(file: InputFile, columns: list[str] | None = None) -> Iterator[Any]:
    """Batches of rows, in order; every page and what the footer says of it is checked.

    With `columns`, these alone are read. A text may come as itself or in a dictionary.
    """
    place = "its footer"
    try:
        with _opened(file) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) < len(names):
                raise unusable(f"{file.source.name} has two columns of one name", "Rename one.")
            paths = [parquet.schema.column(at).path for at in range(len(parquet.schema))]
            num_groups = parquet.num_row_groups
            num_rows = num_expected = 0
            for group in range(num_groups):
                place = f"row group {group + 1} of {num_groups}"
                for batch in _group_batches(file, parquet, group, columns):
                    num_rows += batch.num_rows
                    yield batch
                # Only after the pages: asked for damaged metadata, pyarrow 26 may abort.
                metadata = parquet.metadata.row_group(group)
                chunks = [metadata.column(at) for at in range(metadata.num_columns)]
                num_expected += metadata.num_rows
                if num_rows != num_expected or paths != [c.path_in_schema for c in chunks]:
                    raise file.damaged("it holds other rows than the footer says", place)
            # Old writers leave the sum 0, and readers go by the row groups.
            if parquet.metadata.num_rows not in (0, num_rows):
                raise file.damaged("the row groups hold other rows than it says", "its footer")
    except MemoryError as error:  # of Arrow too
        reason = " ".join(str(error).split())
        raise MemoryTooSmall(
            f"too little memory to read {file.source.name}, seen at {place}: {reason}",
            "Give the job more memory, or write the file with fewer or smaller values in a row.",
        ) from error
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise file.unreadable(error) from error
        raise file.damaged(" ".join(str(error).split()), place) from error


def parquet_schema(file: InputFile) -> Any:
    """The columns as the file's footer has them, without metadata."""
    try:
        with _opened(file) as parquet:
            return parquet.schema_arrow.remove_metadata()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise file.damaged(" ".join(str(error).split()), "its footer") from error


@contextmanager
def _opened(file: InputFile, dictionaries: list[str] | None = None) -> Iterator[Any]:
    """The file that is open, and not one that has taken its place."""
    with (
        pa.OSFile(file.system_path) as handle,
        pq.ParquetFile(
            handle,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            read_dictionary=dictionaries,
        ) as parquet,
    ):
        yield parquet


def _group_batches(
    file: InputFile, parquet: Any, group: int, columns: list[str] | None
) -> Iterator[Any]:
    """A row group's batches; those of large rows are short, with texts in dictionaries."""

    def batches(of: Any, num_rows: int) -> Iterator[Any]:
        found: Iterator[Any] = of.iter_batches(num_rows, row_groups=[group], columns=columns)
        return found

    num_done = 0
    probe = next(batches(parquet, _PROBE_ROWS), None)
    if probe is None or probe.nbytes <= _LARGE_ROW_BYTES * max(1, probe.num_rows):
        for batch in batches(parquet, _BATCH_ROWS):
            yield batch
            num_done += batch.num_rows
            if batch.nbytes > _LARGE_BATCH_BYTES:
                break  # larger rows have come
        else:
            return
    del probe
    texts = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
    with _opened(file, texts) as large:
        for batch in batches(large, _LARGE_BATCH_ROWS):
            num_known = min(num_done, batch.num_rows)
            num_done -= num_known
            if num_known < batch.num_rows:
                yield batch.slice(num_known)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))
