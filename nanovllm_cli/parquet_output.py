"""Finished rows -> a Parquet file. Columns that came from Parquet keep their exact types."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .input_file import opened
from .inputs import Source
from .output_columns import Lines, OutputColumns
from .parquet_input import parquet_batches, parquet_schema

_ROWS_AT_ONCE = 1024
_BYTES_AT_ONCE = 16 << 20
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 128 << 20
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
_ALWAYS_THERE = (
    *("completion", "reasoning", "finish_reason", "usage"),
    *("logprob", "num_scored_tokens", "perplexity", "is_greedy"),
)
_MAX_FIELDS = 500  # of a struct; what has more is written as JSON text


def write_parquet(
    file: BinaryIO | Path,
    lines: Lines,
    sources: list[Source],
    columns: OutputColumns,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the rows of `lines`, (row index, JSON line) in input order; read two or three times.

    `metadata` is the file's. Raises CommandError for inputs that are not what they were.
    """
    inputs = _InputColumns(sources, columns)
    schema = _schema(lines, inputs.schema, columns)
    are_known = bool(inputs.schema) and schema is not None
    if schema is None:
        schema = _schema(lines, None, columns)
        assert schema is not None, "only columns of the inputs can be missing"
    schema = schema.with_metadata(dict(metadata) if metadata else None)
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        group: list[pa.RecordBatch] = []
        for chunk in _chunks(lines):
            rows = [orjson.loads(line) for _, line in chunk]
            known = inputs.take([index for index, _ in chunk]) if are_known else None
            arrays = [
                known.column(field.name)
                if known is not None and field.name in known.column_names
                else _array([row.get(field.name) for row in rows], field.type)
                for field in schema
            ]
            group.append(pa.record_batch(arrays, schema=schema))
            num_rows = sum(batch.num_rows for batch in group)
            if num_rows >= _GROUP_ROWS or sum(batch.nbytes for batch in group) >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group), _GROUP_ROWS)
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group), _GROUP_ROWS)
    inputs.check_unchanged()


class _InputColumns:
    """The columns of Parquet inputs, read again row by row index; schema None for other inputs."""

    def __init__(self, sources: list[Source], columns: OutputColumns) -> None:
        # A pipe was read and is gone; opened again it would wait for another writer.
        self._sources = [source for source in sources if not source.is_stream]
        self.schema: pa.Schema | None = None
        if sources and len(self._sources) == len(sources):
            schemas = [_parquet_schema(source) for source in self._sources]
            if schemas[0] is not None and all(schema == schemas[0] for schema in schemas):
                given = [f for f in schemas[0] if f.name not in columns.results]
                is_chosen = columns.chosen or schemas[0].names
                self.schema = pa.schema([f for f in given if f.name in is_chosen])
        self._batches = self._read()
        self._first = 0
        self._batch: Any = None

    def check_unchanged(self) -> None:
        """Raise CommandError if one of the inputs is not what it was."""
        if self.schema is not None:
            for source in self._sources:
                with opened(source) as file:
                    file.check_unchanged()

    def take(self, indices: list[int]) -> pa.Table:
        """The rows at these ascending indices; never asked for an earlier one again."""
        assert self.schema is not None, "only asked for where all inputs are Parquet"
        parts = []
        remaining = iter(indices)
        index = next(remaining, None)
        while index is not None:
            while self._batch is None or index >= self._first + len(self._batch):
                self._first += 0 if self._batch is None else len(self._batch)
                self._batch = next(self._batches, None)
                assert self._batch is not None, "the inputs have as many rows as they had"
            picked = []
            while index is not None and index < self._first + len(self._batch):
                picked.append(index - self._first)
                index = next(remaining, None)
            # Texts that come in dictionaries become themselves.
            parts.append(self._batch.take(pa.array(picked)).cast(self.schema))
        return pa.Table.from_batches(parts, self.schema).combine_chunks().to_batches()[0]

    def _read(self) -> Iterator[Any]:
        assert self.schema is not None, "only asked for where all inputs are Parquet"
        for source in self._sources:
            with opened(source) as file:
                num_rows = 0
                for batch in parquet_batches(file, self.schema.names):
                    num_rows += batch.num_rows
                    yield batch
                file.check_unchanged(num_rows)


def _parquet_schema(source: Source) -> pa.Schema | None:
    with opened(source) as file:
        return parquet_schema(file) if file.format == "parquet" else None


def _schema(lines: Lines, inputs: pa.Schema | None, columns: OutputColumns) -> pa.Schema | None:
    """The columns over all rows: those chosen, or in the order they first come, the results last.

    None where a line is without a column of the inputs, as OpenAI's lines are.
    """
    types: dict[str, pa.DataType] = {} if inputs is None else {f.name: f.type for f in inputs}
    with_odd_integers: set[str] = set()
    has_rows = False
    for chunk in _chunks(lines):
        has_rows = True
        rows = [orjson.loads(line) for _, line in chunk]
        if inputs is not None and any(name not in row for row in rows for name in inputs.names):
            return None
        for name in dict.fromkeys(key for row in rows for key in row):
            if name in columns.results:
                types.setdefault(name, _RESULT_TYPES[name])
            elif inputs is None:
                found, has_odd = _type_of([row.get(name) for row in rows])
                found = _unify(types[name], found) if name in types else found
                types[name] = pa.string() if _is_wide(found) else found
                if has_odd:
                    with_odd_integers.add(name)
    if not has_rows:  # readers want columns, and know what to expect by them
        types |= {name: _RESULT_TYPES[name] for name in columns.results if name in _ALWAYS_THERE}
    if inputs is None:
        for name, kind in types.items():
            is_rounded = name in with_odd_integers and _holds(kind, pa.types.is_floating)
            if is_rounded or _cannot_be_kept(kind):
                types[name] = pa.string()
    if columns.chosen:  # one that no row has is there too, and empty
        return pa.schema(
            [(name, types.get(name, _RESULT_TYPES.get(name, pa.null()))) for name in columns.chosen]
        )
    results = [name for name in columns.results if name in types]
    names = [name for name in types if name not in results] + results
    return pa.schema([(name, types[name]) for name in names])


def _type_of(values: list[Any]) -> tuple[pa.DataType, bool]:
    """The type of JSON's values, and whether they hold integers that no float is equal to.

    What is mixed, or beyond 64 bits, is JSON text.
    """
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.string(), False
    kind = array.type
    # Arrow takes true for 1.0 where it has seen a float.
    if _holds(kind, pa.types.is_floating) and any(_holds_bool(value, kind) for value in values):
        return pa.string(), False
    return kind, _holds(kind, pa.types.is_integer) and _has_odd_integers(array)


def _holds(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    children = [kind.field(at).type for at in range(kind.num_fields)]
    return is_wanted(kind) or any(_holds(child, is_wanted) for child in children)


def _holds_bool(value: Any, kind: pa.DataType) -> bool:
    """Whether there is true or false where `kind` has a float."""
    if isinstance(value, dict):
        return any(_holds_bool(value.get(field.name), field.type) for field in kind)
    if isinstance(value, list):
        types = set(map(type, value))
        if types <= {float, int, type(None)}:
            return False
        return any(_holds_bool(item, kind.value_type) for item in value)
    return isinstance(value, bool) and pa.types.is_floating(kind)


def _has_odd_integers(array: pa.Array) -> bool:
    kind = array.type
    if pa.types.is_integer(kind):
        as_float = array.cast(pa.float64(), safe=False)
        return pc.all(pc.equal(as_float.cast(kind, safe=False), array)).as_py() is False
    if pa.types.is_struct(kind):
        return any(_has_odd_integers(array.field(at)) for at in range(kind.num_fields))
    return pa.types.is_list(kind) and _has_odd_integers(array.flatten())


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
    except pa.ArrowInvalid:  # an integer above 2**53 in a column of floats, that one is equal to
        return pa.array(values).cast(kind, safe=False)


def _chunks(lines: Lines) -> Iterator[list[tuple[int, bytes]]]:
    """A bounded number of rows at a time, of long ones fewer."""
    chunk: list[tuple[int, bytes]] = []
    num_bytes = 0
    for index, line in lines():
        chunk.append((index, line))
        num_bytes += len(line)
        if len(chunk) == _ROWS_AT_ONCE or num_bytes >= _BYTES_AT_ONCE:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
