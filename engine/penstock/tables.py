"""Arrow tables in and out of the engine (control path): a table is checked whole before its first row is used.

What must stay true: a value that score() would refuse is refused here, with the same words and the row in the path.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from ._ext.events import KEY_BYTES, TEXT_BYTES, ColumnSet
from .definitions.event import Field
from .errors import EventError, PenstockError
from .plan import EventPlan, Slot
from .timestamp import Timestamp, TimestampUnit

__all__ = [
    "OutColumns",
    "arrow_table",
    "cast_column",
    "column_set",
    "event_times",
    "first_null",
    "is_column",
    "one_array",
    "sound_column",
]

FIRST_TIME = -62135596800000000  # 0001-01-01
LAST_TIME = 253402300799999999  # 9999-12-31
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}


def pyarrow() -> Any:
    """The pyarrow module, or an error that names the extra."""
    try:
        import pyarrow
    except ImportError:
        raise PenstockError("Arrow tables need pyarrow: pip install 'penstock[offline]'") from None
    return pyarrow


def arrow_table(data: Any, names: Collection[str] = ()) -> Any:
    """A pyarrow.Table of anything that speaks Arrow: a Table, a RecordBatch, a polars or pandas DataFrame, a dict.

    The index of a pandas DataFrame is no column, whatever it is; but a level of it that has one of these names, which
    no column has, is.
    """
    pa = pyarrow()
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(data, pandas.DataFrame):
        levels = [name for name in data.index.names if name in names and name not in data.columns]
        try:
            return pa.Table.from_pandas(data.reset_index(levels) if levels else data, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise EventError("", f"the frame does not make a table: {' '.join(map(str, error.args))[:200]}") from None
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if isinstance(data, dict):
        return pa.table({name: _array(name, values) for name, values in data.items()})
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise TypeError(
        f"expected an Arrow table (pyarrow, polars, pandas or a dict of columns), got {type(data).__name__}"
    )


def is_column(value: Any) -> bool:
    """Whether a value of a mapping makes it a table: a sequence of values, or an Arrow array, not one value."""
    arrow = ("__arrow_c_array__", "__arrow_c_stream__")
    return isinstance(value, list | tuple | np.ndarray) or any(hasattr(value, name) for name in arrow)


def _array(name: str, values: Any) -> Any:
    pa = pyarrow()
    try:
        return values if isinstance(values, pa.ChunkedArray) else pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise EventError(f".{name}", f"the values do not make a column: {str(error).splitlines()[0]}") from None


def column_set(table: Any, event: EventPlan, keys: set[int], aggregated: set[int]) -> ColumnSet:
    """The table's columns in the order of the event's fields, checked. Raises EventError with `[row].field`."""
    names = {f.name for f in event.fields}
    for name in table.column_names:
        if name not in names:
            raise EventError(f".{name}", f"unknown column; {event.name} has {', '.join(f.name for f in event.fields)}")
        if table.column_names.count(name) > 1:
            raise EventError(f".{name}", "two columns of this name")
    columns = []
    keep: list[Any] = []
    for index, field in enumerate(event.fields):
        if field.name in table.column_names:
            array = one_array(sound_column(table.column(field.name), field.name))
        elif field.required:
            raise EventError(f".{field.name}", f"missing column; {event.name} needs it")
        else:
            array = _constant(_default(field), field.type, table.num_rows)
        array = cast_column(array, field.type, field.name, field.unit)
        columns.append(_column(array, field, index in keys, index in aggregated, keep, is_time=index == event.time))
    return ColumnSet(columns, table.num_rows, keep)


def event_times(table: Any, event: EventPlan) -> npt.NDArray[np.int64]:
    """Event times of a table's rows, microseconds."""
    field = event.fields[event.time]
    if field.name not in table.column_names:
        raise EventError(f".{field.name}", f"missing column; {event.name} needs it")
    array = cast_column(one_array(table.column(field.name)), "timestamp", field.name, field.unit)
    if array.null_count:
        raise EventError(f"[{first_null(array)}].{field.name}", "the event time is missing (null)")
    return np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array)]


def sound_column(column: Any, name: str) -> Any:
    """The column, or EventError where its buffers lie: a damaged file would have us read outside them."""
    try:
        column.validate(full=True)
    except pyarrow().ArrowInvalid as error:
        raise EventError(f".{name}", f"the column is damaged: {str(error).splitlines()[0]}") from None
    return column


def one_array(column: Any) -> Any:
    pa = pyarrow()
    if column.num_chunks == 1:
        return column.chunk(0)
    if column.num_chunks == 0:
        return pa.array([], type=column.type)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _default(field: Field) -> Any:
    """The default of a field that a table lacks; a time in microseconds, whatever it was written as."""
    if field.type != "timestamp" or field.default is None or isinstance(field.default, Timestamp):
        return field.default
    if isinstance(field.default, int) and field.unit is not None:
        return TimestampUnit(field.unit).timestamp(field.default)
    return Timestamp.of(field.default)


def _constant(value: Any, slot_type: str, rows: int) -> Any:
    pa = pyarrow()
    kinds = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
    kind = kinds.get(slot_type, pa.timestamp("us"))
    return pa.nulls(rows, kind) if value is None else pa.array([value] * rows, type=kind)


def cast_column(array: Any, slot_type: str, name: str, unit: str | None, first: int = 0) -> Any:
    """The array as the slot's own Arrow type, or EventError where that would change a value. first: the number of its
    first row, for errors."""
    pa = pyarrow()
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_null(kind):
        return _constant(None, slot_type, len(array))
    try:
        if slot_type == "string":
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return array
            if getattr(pa.types, "is_string_view", lambda _: False)(kind):
                return array.cast(pa.large_string())
        elif slot_type == "float64":
            if pa.types.is_float64(kind):
                return array
            if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
                return array.cast(pa.float64(), safe=False)
        elif slot_type == "int64":
            if pa.types.is_integer(kind):
                return array.cast(pa.int64())
        elif slot_type == "bool":
            if pa.types.is_boolean(kind):
                return array
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return _parsed_times(array, name, first)
        elif pa.types.is_timestamp(kind):
            if kind.unit == "ns":
                nanoseconds = array.cast(pa.timestamp("ns", kind.tz)).cast(pa.int64())
                return pc.cast(_floor_divide(nanoseconds, 1000), pa.int64())
            return array.cast(pa.timestamp("us", kind.tz)).cast(pa.int64())
        elif pa.types.is_date(kind):
            return array.cast(pa.timestamp("us")).cast(pa.int64())
        elif pa.types.is_integer(kind):
            integers = array.cast(pa.int64())
            if unit == "ns":
                return _floor_divide(integers, 1000)
            return integers if unit in (None, "us") else pc.multiply_checked(integers, _UNITS[unit])
    except pa.ArrowInvalid as error:
        raise EventError(f".{name}", f"the column does not fit {slot_type}: {str(error).splitlines()[0]}") from None
    raise EventError(f".{name}", f"expected a column of {slot_type}, got {kind}")


def _parsed_times(array: Any, name: str, first: int) -> Any:
    """Times that are written as text, as an event may have them."""
    times: list[int | None] = []
    for row, text in enumerate(array.to_pylist(), first):
        try:
            times.append(None if text is None else int(Timestamp.parse(text)))
        except ValueError as error:
            raise EventError(f"[{row}].{name}", str(error)) from None
    return pyarrow().array(times, type=pyarrow().int64())


def _floor_divide(array: Any, by: int) -> Any:
    """Integers floored to a coarser unit (S1); Arrow's own cast rounds towards zero."""
    pa = pyarrow()
    mask = None
    if array.null_count:
        mask = np.asarray(array.is_null())
        array = array.fill_null(0)
    return pa.array(np.asarray(array) // by, mask=mask)


def _column(array: Any, field: Any, key: bool, aggregated: bool, keep: list[Any], is_time: bool) -> tuple[Any, ...]:
    """(data, validity, validity offset, offsets, wide offsets, bit offset, bits) of one checked array."""
    pa = pyarrow()
    keep.append(array)
    buffers = array.buffers()
    offset = array.offset
    rows = len(array)
    validity = buffers[0].address if buffers[0] is not None and array.null_count else 0
    if field.type == "float64":
        values = np.frombuffer(buffers[1], dtype=np.float64)[offset : offset + rows] if rows else np.empty(0)
        if not np.isfinite(values).all():
            # NaN is null in typed input; an infinity in an aggregated column is refused (S11).
            valid = np.ones(rows, dtype=bool) if not validity else ~np.asarray(array.is_null())
            if not field.optional and (np.isnan(values) & valid).any():
                at = int(np.argmax(np.isnan(values) & valid))
                raise EventError(
                    f"[{at}].{field.name}", "expected a number, got NaN; declare it `| None` where it may be missing"
                )
            if aggregated and (np.isinf(values) & valid).any():
                at = int(np.argmax(np.isinf(values) & valid))
                raise EventError(
                    f"[{at}].{field.name}", "expected a finite number (the field is aggregated), got an infinity"
                )
        data = buffers[1].address + 8 * offset if rows else 0
    if validity and not field.optional:
        what = "the event time is missing (null)" if is_time else "expected a value, got null"
        raise EventError(f"[{first_null(array)}].{field.name}", what)
    if field.type == "float64":
        return (data, validity, offset, 0, 0, 0, 0)
    if field.type == "string":
        wide = pa.types.is_large_string(array.type)
        if rows == 0:
            return (0, 0, 0, 0, wide, 0, 0)
        offsets = np.frombuffer(buffers[1], dtype=np.int64 if wide else np.int32)[offset : offset + rows + 1]
        limit = KEY_BYTES if key else TEXT_BYTES
        lengths = np.diff(offsets)
        if (lengths > limit).any():
            at = int(np.argmax(lengths > limit))
            raise EventError(f"[{at}].{field.name}", f"expected at most {limit} bytes, got {lengths[at]}")
        data = buffers[2].address if buffers[2] is not None else 0
        return (data, validity, offset, buffers[1].address + (8 if wide else 4) * offset, wide, 0, 0)
    if field.type == "bool":
        return (buffers[1].address if rows else 0, validity, offset, 0, 0, offset, 1)
    if rows:
        integers = np.frombuffer(buffers[1], dtype=np.int64)[offset : offset + rows]
        if field.type == "timestamp":
            outside = (integers < FIRST_TIME) | (integers > LAST_TIME)
            if validity:
                outside &= ~np.asarray(array.is_null())
            if outside.any():
                raise EventError(
                    f"[{int(np.argmax(outside))}].{field.name}", "expected a time between the years 1 and 9999"
                )
    return (buffers[1].address + 8 * offset if rows else 0, validity, offset, 0, 0, 0, 0)


def first_null(array: Any) -> int:
    return int(np.argmax(np.asarray(array.is_null())))


class OutColumns:
    """Memory for output columns of a table run, and their assembly into Arrow arrays."""

    def __init__(self, slots: list[Slot], rows: int) -> None:
        self.slots = slots
        self.rows = rows
        self.data: list[npt.NDArray[Any]] = []
        self.absent: list[npt.NDArray[np.uint8]] = []
        self.native: list[tuple[int, int, int, int]] = []
        for slot in slots:
            kind = {"bool": 1, "string": 2}.get(slot.type, 0)
            dtype: Any = {"float64": np.float64, "bool": np.uint8}.get(slot.type, np.int64)
            # From Arrow's pool, which keeps freed memory at hand: fresh pages cost as much as the features in them.
            size = 0 if kind == 2 else rows * np.dtype(dtype).itemsize
            data = np.frombuffer(pyarrow().allocate_buffer(size), dtype=dtype)
            absent = np.zeros(0 if kind == 2 else rows, dtype=np.uint8)  # 1: null, 2: a wide integer
            self.data.append(data)
            self.absent.append(absent)
            self.native.append((slot.index, kind, data.ctypes.data, absent.ctypes.data))

    def arrays(self, texts: list[list[str | None] | None]) -> list[Any]:
        """One Arrow array per column. An integer column with a value beyond int64 becomes float64 (S13)."""
        pa = pyarrow()
        arrays = []
        for slot, data, absent, text in zip(self.slots, self.data, self.absent, texts):
            if text is not None:
                arrays.append(pa.array(text, type=pa.string()))
                continue
            bitmap = None
            if absent.any():
                if slot.type == "int64" and (absent == 2).any():
                    data = np.where(absent == 2, data.view(np.float64), data.astype(np.float64))
                bitmap = pa.py_buffer(np.packbits(absent != 1, bitorder="little"))
            if slot.type == "bool":
                values = pa.py_buffer(np.packbits(data, bitorder="little"))
                arrays.append(pa.Array.from_buffers(pa.bool_(), self.rows, [bitmap, values]))
                continue
            kind = {"timestamp": pa.timestamp("us", "UTC"), "int64": pa.int64()}.get(slot.type, pa.float64())
            if data.dtype == np.float64:
                kind = pa.float64()
            arrays.append(pa.Array.from_buffers(kind, self.rows, [bitmap, pa.py_buffer(data)]))
        return arrays
