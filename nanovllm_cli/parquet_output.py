"""Finished rows -> a Parquet file. Columns that came from Parquet keep their exact types."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from .inputs import Source
from .output_columns import OutputColumns

_ROWS_AT_ONCE = 1024
_MAX_DEPTH = 32  # levels of a value; a list makes two of the 100 that readers of Parquet take
_SCORED_TOKEN = {
    "token": pa.string(),
    "token_id": pa.int32(),
    "logprob": pa.float32(),
    "bytes": pa.list_(pa.uint8()),  # of a part of a character
}
_LOGPROBS = pa.list_(pa.struct({**_SCORED_TOKEN, "top": pa.list_(pa.struct(_SCORED_TOKEN))}))
_FUNCTION = pa.struct({"name": pa.string(), "arguments": pa.string()})
_SAMPLE_TYPES = {
    "completion": pa.string(),
    "reasoning": pa.string(),
    "tool_calls": pa.list_(
        pa.struct({"id": pa.string(), "type": pa.string(), "function": _FUNCTION})
    ),
    "finish_reason": pa.string(),
    "logprobs": _LOGPROBS,
}
_RESULT_TYPES = {
    **_SAMPLE_TYPES,
    "completions": pa.list_(pa.struct(_SAMPLE_TYPES)),
    "prompt_logprobs": _LOGPROBS,
    "usage": pa.struct({"prompt_tokens": pa.int64(), "completion_tokens": pa.int64()}),
    "logprob": pa.float64(),
    "num_scored_tokens": pa.int64(),
    "perplexity": pa.float64(),
    "is_greedy": pa.bool_(),
    "token_logprobs": pa.list_(pa.float32()),
}
_MAX_FIELDS = 500  # of a struct; what has more is written as JSON text
Lines = Callable[[], Iterator[tuple[int, bytes]]]  # (row number, line), the same each time


def write_parquet(
    file: BinaryIO | Path, lines: Lines, sources: list[Source], columns: OutputColumns
) -> None:
    """Write the rows of `lines`, (row index, JSON line) in input order; read two or three times."""
    inputs = _InputColumns(sources, columns)
    schema = _schema(lines, inputs.schema, columns)
    are_known = bool(inputs.schema) and schema is not None
    if schema is None:
        schema = _schema(lines, None, columns)
        assert schema is not None, "only columns of the inputs can be missing"
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for chunk in _chunks(lines):
            rows = [orjson.loads(line) for _, line in chunk]
            known = inputs.take([index for index, _ in chunk]) if are_known else None
            arrays = [
                known.column(field.name)
                if known is not None and field.name in known.column_names
                else _array([row.get(field.name) for row in rows], field.type)
                for field in schema
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


class _InputColumns:
    """The columns of Parquet inputs, read again row by row index; schema None for other inputs."""

    def __init__(self, sources: list[Source], columns: OutputColumns) -> None:
        # A pipe was read and is gone; opened again it would wait for another writer.
        self._files = [s.path for s in sources if s.path is not None and not s.is_stream]
        self.schema: pa.Schema | None = None
        if sources and len(self._files) == len(sources):
            schemas = [_parquet_schema(file) for file in self._files]
            if schemas[0] is not None and all(schema == schemas[0] for schema in schemas):
                given = [f for f in schemas[0] if f.name not in columns.results]
                is_chosen = columns.chosen or schemas[0].names
                self.schema = pa.schema([f for f in given if f.name in is_chosen])
        self._batches = self._read()
        self._first = 0
        self._batch: Any = None

    def take(self, indices: list[int]) -> pa.Table:
        """The rows at these ascending indices; never asked for an earlier one again."""
        parts = []
        remaining = iter(indices)
        index = next(remaining, None)
        while index is not None:
            while self._batch is None or index >= self._first + len(self._batch):
                self._first += 0 if self._batch is None else len(self._batch)
                self._batch = next(self._batches)
            picked = []
            while index is not None and index < self._first + len(self._batch):
                picked.append(index - self._first)
                index = next(remaining, None)
            parts.append(self._batch.take(pa.array(picked)))
        return pa.Table.from_batches(parts, self.schema).combine_chunks().to_batches()[0]

    def _read(self) -> Iterator[Any]:
        assert self.schema is not None, "only asked for where all inputs are Parquet"
        for file in self._files:
            with pq.ParquetFile(file) as opened:
                yield from opened.iter_batches(_ROWS_AT_ONCE, columns=self.schema.names)


def _parquet_schema(file: Path) -> pa.Schema | None:
    with open(file, "rb") as opened:
        return pq.read_schema(file).remove_metadata() if opened.read(4) == b"PAR1" else None


def _schema(lines: Lines, inputs: pa.Schema | None, columns: OutputColumns) -> pa.Schema | None:
    """The columns over all rows: those chosen, or in the order they first come, the results last.

    None where a line is without a column of the inputs, as OpenAI's lines are.
    """
    types: dict[str, pa.DataType] = {} if inputs is None else {f.name: f.type for f in inputs}
    for chunk in _chunks(lines):
        rows = [orjson.loads(line) for _, line in chunk]
        if inputs is not None and any(name not in row for row in rows for name in inputs.names):
            return None
        for name in dict.fromkeys(key for row in rows for key in row):
            if name in columns.results:
                types.setdefault(name, _RESULT_TYPES[name])
            elif inputs is None:
                found = _type_of([row.get(name) for row in rows])
                found = _unify(types[name], found) if name in types else found
                types[name] = pa.string() if _is_wide(found) else found
    if inputs is None:
        types = {n: pa.string() if _cannot_be_kept(t) else t for n, t in types.items()}
    if columns.chosen:  # one that no row has is there too, and empty
        return pa.schema(
            [(name, types.get(name, _RESULT_TYPES.get(name, pa.null()))) for name in columns.chosen]
        )
    results = [name for name in columns.results if name in types]
    names = [name for name in types if name not in results] + results
    return pa.schema([(name, types[name]) for name in names])


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError):
        return pa.string()  # mixed, or beyond 64 bits: as JSON text


def _cannot_be_kept(kind: pa.DataType) -> bool:
    """Whether Parquet has no such type, or readers do not take it."""
    return _is_empty(kind) or _depth(kind) > _MAX_DEPTH


def _depth(kind: pa.DataType) -> int:
    return 1 + max((_depth(kind.field(at).type) for at in range(kind.num_fields)), default=0)


def _is_empty(kind: pa.DataType) -> bool:
    """Whether it holds a struct without fields, which Parquet has not."""
    children = [kind.field(at).type for at in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not children) or any(map(_is_empty, children))


def _is_wide(kind: pa.DataType) -> bool:
    """Whether it holds a struct that has names for data, as OpenAI's `top_logprobs` has tokens."""
    children = [kind.field(at).type for at in range(kind.num_fields)]
    return len(children) > _MAX_FIELDS or any(map(_is_wide, children))


def _unify(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("", kind)]) for kind in (a, b)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        values = [
            value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
            for value in values
        ]
    try:
        return pa.array(values, kind)
    except pa.ArrowInvalid:  # an integer above 2**53 in a column of floats
        return pa.array(values).cast(kind, safe=False)


def _chunks(lines: Lines) -> Iterator[list[tuple[int, bytes]]]:
    iterator = lines()
    while chunk := list(islice(iterator, _ROWS_AT_ONCE)):
        yield chunk
