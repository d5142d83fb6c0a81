"""A Parquet file -> batches of its rows, every page checked, streamed by row groups.

Parquet may be written without checksums: then a flipped bit may go unseen, while a truncated file
is always found.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .input_file import InputFile, unusable

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20


def parquet_batches(file: InputFile) -> Iterator[Any]:
    """Batches of rows, in order; every page and what the footer says of it is checked."""
    place = "its footer"
    try:
        with (
            pa.OSFile(file.system_path) as handle,
            pq.ParquetFile(
                handle, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER_BYTES
            ) as parquet,
        ):
            names = parquet.schema_arrow.names
            if len(set(names)) < len(names):
                raise unusable(f"{file.source.name} has two columns of one name", "Rename one.")
            paths = [parquet.schema.column(at).path for at in range(len(parquet.schema))]
            num_rows = num_expected = 0
            for group in range(parquet.num_row_groups):
                place = f"row group {group + 1} of {parquet.num_row_groups}"
                for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group]):
                    num_rows += batch.num_rows
                    yield batch
                # Only after the pages: asked for damaged metadata, pyarrow 26 may abort.
                metadata = parquet.metadata.row_group(group)
                columns = [metadata.column(at) for at in range(metadata.num_columns)]
                num_expected += metadata.num_rows
                if num_rows != num_expected or paths != [c.path_in_schema for c in columns]:
                    raise file.damaged("it holds other rows than the footer says", place)
            if num_rows != parquet.metadata.num_rows:
                raise file.damaged("the row groups hold other rows than it says", "its footer")
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise file.unreadable(error) from error
        raise file.damaged(" ".join(str(error).split()), place) from error
