"""A batch of Parquet rows -> rows of JSON's types.

What JSON has no type for becomes text: a timestamp, a date, a time and a duration as ISO 8601
writes them, to the nanosecond where they have any; a decimal with all its digits; a UUID. A map
becomes a list of [key, value]. Binary alone stays bytes: no prompt is made of it, and results.py
writes it as base64. Python's own types for times hold neither nanoseconds nor years beyond 9999,
so times are read as integers.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

_Convert = Callable[[Any], Any]

_BYTES_AT_ONCE = 8 << 20  # of Arrow's, for which Python's objects take a few times as many
_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of a second's fraction
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = _EPOCH.toordinal()


def rows_of(batch: Any) -> Iterator[tuple[dict[str, Any] | Exception, int]]:
    """The rows of a batch and about how many bytes each is; a bounded number of them at a time.

    For a row with a text that is not UTF-8 comes the reason.
    """
    at = 0
    while at < batch.num_rows:
        num_bytes = _plain_part(batch.slice(at)).nbytes // (batch.num_rows - at)
        count = min(batch.num_rows - at, max(1, _BYTES_AT_ONCE // max(1, num_bytes)))
        part = batch.slice(at, count)
        if count > 1 and _plain_part(part).nbytes > 2 * _BYTES_AT_ONCE:
            part = batch.slice(at, 1)  # rows of very different sizes
        plain_bytes = _plain_part(part).nbytes // part.num_rows
        texts = [field.name for field in part.schema if pa.types.is_dictionary(field.type)]
        for row in _rows_of(part):
            yield row, plain_bytes + _length_of(row, texts)
        at += part.num_rows


def _plain_part(batch: Any) -> Any:
    """The columns whose values are in memory once for each row."""
    names = [field.name for field in batch.schema if not pa.types.is_dictionary(field.type)]
    return batch.select(names)


def _length_of(row: dict[str, Any] | Exception, names: list[str]) -> int:
    if isinstance(row, Exception):
        return 0
    return sum(len(row[name]) for name in names if isinstance(row[name], str | bytes))


def _rows_of(batch: Any) -> list[dict[str, Any] | Exception]:
    try:
        shared: list[tuple[str, list[Any]]] = []
        converts: list[tuple[str, _Convert]] = []
        for at, field in enumerate(batch.schema):
            if pa.types.is_dictionary(field.type):
                shared.append((field.name, _decoded(batch.column(at))))
                batch = batch.set_column(at, field.name, pa.nulls(batch.num_rows))
                continue
            kind, convert = _json_form(field.type)
            if kind != field.type:
                batch = batch.set_column(at, field.name, batch.column(at).cast(kind))
            if convert is not None:
                converts.append((field.name, convert))
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
        return [row for at in range(batch.num_rows) for row in _rows_of(batch.slice(at, 1))]
    for name, values in shared:
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    for name, convert in converts:
        for row in rows:
            if row[name] is not None:
                row[name] = convert(row[name])
    return rows


def _decoded(column: Any) -> list[Any]:
    """The values of a dictionary's indices; equal ones are one object."""
    indices = column.indices
    used = indices.unique().drop_null()
    kind, convert = _json_form(column.dictionary.type)
    values = column.dictionary.take(used).cast(kind).to_pylist()
    of_index = {
        index: _converted(value, convert)
        for index, value in zip(used.to_pylist(), values, strict=True)
    }
    return [None if index is None else of_index[index] for index in indices.to_pylist()]


@lru_cache(maxsize=1024)
def _json_form(kind: Any) -> tuple[Any, _Convert | None]:
    """The type to read a value as, and what then makes JSON of it; None: nothing."""
    types = pa.types
    if types.is_timestamp(kind):
        return pa.int64(), partial(_timestamp, digits=_DIGITS[kind.unit], zone=_zone_of(kind))
    if types.is_date32(kind):
        return pa.int32(), _date
    if types.is_time(kind):
        integer = pa.int32() if types.is_time32(kind) else pa.int64()
        return integer, partial(_time, digits=_DIGITS[kind.unit])
    if types.is_duration(kind):
        return pa.int64(), partial(_duration, digits=_DIGITS[kind.unit])
    if types.is_decimal(kind):
        return kind, "{:f}".format
    if isinstance(kind, pa.UuidType):
        return kind, str
    if types.is_struct(kind):
        fields = [(field.name, *_json_form(field.type)) for field in kind]
        converts = {name: convert for name, _, convert in fields if convert is not None}
        if not converts:
            return kind, None
        plain = pa.struct([(name, plain) for name, plain, _ in fields])
        return plain, partial(_struct, converts=converts)
    if types.is_map(kind):
        key, key_convert = _json_form(kind.key_type)
        item, item_convert = _json_form(kind.item_type)
        return pa.map_(key, item), partial(_map, key=key_convert, item=item_convert)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        plain, convert = _json_form(kind.value_type)
        if convert is None:
            return kind, None
        return _list_type(kind, plain), partial(_list, convert=convert)
    return kind, None


def _zone_of(kind: Any) -> tzinfo | None:
    """None for local times; UTC for a zone that this machine does not know."""
    if kind.tz is None:
        return None
    try:
        return pa.scalar(0, pa.timestamp("s", kind.tz)).as_py().tzinfo
    except ValueError:
        return UTC


def _list_type(kind: Any, value: Any) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(value, kind.list_size)
    return pa.large_list(value) if pa.types.is_large_list(kind) else pa.list_(value)


def _struct(value: dict[str, Any], converts: dict[str, _Convert]) -> dict[str, Any]:
    return {name: _converted(item, converts.get(name)) for name, item in value.items()}


def _map(value: list[tuple[Any, Any]], key: _Convert | None, item: _Convert | None) -> list[Any]:
    return [[_converted(k, key), _converted(v, item)] for k, v in value]


def _list(value: list[Any], convert: _Convert) -> list[Any]:
    return [_converted(item, convert) for item in value]


def _converted(value: Any, convert: _Convert | None) -> Any:
    return value if value is None or convert is None else convert(value)


def _timestamp(value: int, digits: int, zone: tzinfo | None) -> str:
    seconds, fraction = divmod(value, 10**digits)
    try:
        moment = (_EPOCH + timedelta(seconds=seconds)).astimezone(zone or UTC)
    except OverflowError:
        offset = "" if zone is None else "+00:00"
        return f"{np.datetime64(seconds, 's')}{_fraction(fraction, digits)}{offset}"
    text = moment.isoformat()
    offset = "" if zone is None else text[19:]
    return f"{text[:19]}{_fraction(fraction, digits)}{offset}"


def _date(days: int) -> str:
    try:
        return date.fromordinal(_EPOCH_DAY + days).isoformat()
    except (ValueError, OverflowError):
        return str(np.datetime64(days, "D"))


def _time(value: int, digits: int) -> str:
    seconds, fraction = divmod(value, 10**digits)
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{_fraction(fraction, digits)}"


def _duration(value: int, digits: int) -> str:
    seconds, fraction = divmod(abs(value), 10**digits)
    text = f"PT{seconds}{_fraction(fraction, digits).rstrip('0')}S"
    return f"-{text}" if value < 0 else text


def _fraction(value: int, digits: int) -> str:
    """Nothing, microseconds or nanoseconds: as few digits as hold the value."""
    nanoseconds = value * 10 ** (9 - digits)
    if nanoseconds == 0:
        return ""
    text = f".{nanoseconds:09}"
    return text[:7] if nanoseconds % 1000 == 0 else text
