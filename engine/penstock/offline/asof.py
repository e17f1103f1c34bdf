"""Point-in-time joins of tables the user already has (control path): what each feature was at each row's time.

What must stay true: one output row per spine row, in its order (S10), and no value that serving could not have seen at
that time (S5). Here names, types and files are settled; keys, times and values are read by ext/asof.pyx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .._ext.asof import (
    KINDS,
    NOT_FOUND,
    OUTSIDE_MAX_AGE,
    ColumnError,
    FeatureRows,
    KeyIndex,
    SpineOrder,
    Values,
    first_outside,
    ordered,
)
from .._ext.decision import STATUSES
from ..definitions.durations import duration_us
from ..errors import DefinitionError, EventError
from ..tables import FIRST_TIME, LAST_TIME, arrow_table, cast_column, first_null, one_array, pyarrow, sound_column

__all__ = ["FeatureTable", "asof_join", "asof_join_files"]

Progress = Callable[[int], object]
Rows = npt.NDArray[np.uint32]
Times = npt.NDArray[np.int64]

BATCH_ROWS = 1 << 18  # spine rows of a file that are in memory at once, and rows of a row group that is written
SLICE_ROWS = 1 << 20  # spine rows between two calls of progress
MOST_TEXT = 2**31 - 1  # bytes of a string array; beyond, the column has more chunks


class FeatureTable(msgspec.Struct, frozen=True, eq=False):
    """A table of feature values over time, as it lies somewhere already.

    table: an Arrow table, a pandas or polars DataFrame, a dict of columns, a pyarrow dataset, a path or URI of Parquet.
    key: the column with the entity's key, strings or integers, or a list of columns that are the key together;
    `{"column": "spine column", ...}` where the spine has other names for them. `1` and `"1"` are different keys. Null
    in any part matches nothing: such rows are skipped.
    time: the column with the time from which on the values hold, the event time. Naive time is UTC (S1).
    features: the columns to join; left out, all others. NaN is null (S11); types stay, but views become large strings.
    ingest_time: the column that says when a row became known, if the table records it (S5, S6).
    ttl: how old a value may be: "7d", a timedelta; 0 <= T - event time <= ttl (S9). None: as old as it likes.
    defaults: column -> value in place of null, whatever the reason.
    name: output columns are `{name}.{feature}`; without one, `{feature}`.
    Raises DefinitionError where these do not make sense together.
    """

    table: Any
    key: str | Sequence[str] | Mapping[str, str]
    time: str
    features: Sequence[str] | None = None
    ingest_time: str | None = None
    ttl: str | timedelta | None = None
    defaults: Mapping[str, Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        place = f"FeatureTable {self.name!r}" if self.name else "FeatureTable"
        pairs = self.pairs()
        names = [column for column, _ in pairs]
        if not pairs or not all(isinstance(name, str) and name for pair in pairs for name in pair):
            raise DefinitionError(
                f'{place}.key: expected a column, a list of columns or {{"column": "spine column"}}, got {self.key!r}'
            )
        if len(set(names)) < len(names):
            raise DefinitionError(f"{place}.key: the same column twice: {self.key!r}")
        if isinstance(self.features, str) or (self.features is not None and len(self.features) == 0):
            raise DefinitionError(f"{place}.features: expected a list of columns, got {self.features!r}")
        if self.ttl is not None:
            try:
                duration_us(self.ttl)
            except ValueError as error:
                raise DefinitionError(f"{place}.ttl: {error}") from None
        used = [*(("key", name) for name in names), ("time", self.time), ("ingest_time", self.ingest_time)]
        for role, name in used:
            if name is not None and name in (self.features or ()):
                raise DefinitionError(f"{place}.features: {name!r} is the {role} column")
        if self.time in (*names, self.ingest_time):
            raise DefinitionError(f"{place}.time: {self.time!r} is named for something else too")

    def pairs(self) -> list[tuple[str, str]]:
        """The parts of the key: the table's column, and the spine's."""
        if isinstance(self.key, str):
            return [(self.key, self.key)]
        if isinstance(self.key, Mapping):
            return list(self.key.items())
        return [(name, name) for name in self.key] if isinstance(self.key, Sequence) else []


def asof_join(
    spine: Any,
    tables: FeatureTable | Sequence[FeatureTable],
    *,
    time: str,
    backfill: bool = False,
    statuses: bool = False,
    progress: Progress | None = None,
    max_threads: int = 1,
) -> Any:
    """The spine with the features of every table as of each row's time.

    spine: whatever FeatureTable.table takes; `time` is its column of times T, the tables' keys are columns of it too.
    A feature row is visible if its event time <= T and, where the table has an ingest_time, that is <= T as well;
    `backfill=True` makes rows visible whenever they came (S5). The newest by (event time, ingest time, row) wins (S6).
    statuses: beside each feature a column `{feature}__status`: PRESENT, NULL_VALUE, NOT_FOUND or OUTSIDE_MAX_AGE (S17).
    progress: told how many more spine rows are joined. max_threads: over tables and columns.
    Returns a pyarrow.Table: one row per spine row, in its order, its columns untouched. Sorted tables are read in one
    pass; others take an index of 12 bytes per row. Raises EventError with the column, and the row where it is one.
    """
    several = [tables] if isinstance(tables, FeatureTable) else [t for t in tables if isinstance(t, FeatureTable)]
    wanted = [time, *(name for table in several for _, name in table.pairs())]
    data = _load(spine, "spine", None, max_threads, wanted)
    with _Workers(max_threads) as run:
        join = _Join(data.schema, tables, time, backfill, statuses, run, max_threads)
        join.prepare(data)
        return join.join(data, 0, progress)


def asof_join_files(
    spine: Any,
    tables: FeatureTable | Sequence[FeatureTable],
    out: str | Path,
    *,
    time: str,
    backfill: bool = False,
    statuses: bool = False,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
    max_threads: int = 1,
) -> int:
    """As asof_join, from Parquet to Parquet: in memory are the feature tables and one batch of the spine.

    spine: a path or URI of a Parquet file or a folder of them, a list of files, or a pyarrow dataset.
    out: path or URI of one Parquet file; it appears when it is whole. Where the batches follow each other in time, the
    sorted tables are read once in all. progress: told how many more rows are written. Returns the rows written.
    """
    import pyarrow.parquet as pq

    source = _dataset(spine, "spine")
    if source is None:
        raise TypeError(f"expected a path or a pyarrow dataset as the spine, got {type(spine).__name__}")
    if batch_rows < 1:
        raise ValueError(f"batch_rows: expected at least 1, got {batch_rows}")
    files, path = _place(out)
    written = 0
    with _Workers(max_threads) as run:
        join = _Join(source.schema, tables, time, backfill, statuses, run, max_threads)
        join.prepare(None)
        nothing = join.join(source.schema.empty_table(), 0, None)
        draft = path + ".part"
        try:
            with files.open_output_stream(draft) as sink, pq.ParquetWriter(sink, nothing.schema) as writer:
                for batch in _batches(source, batch_rows, max_threads):
                    writer.write_table(join.join(batch, written, None), row_group_size=batch_rows)
                    written += batch.num_rows
                    if progress is not None:
                        progress(batch.num_rows)
            files.move(draft, path)
        except BaseException:
            _discard(files, draft)
            raise
    return written


# ------------------------------------------------------------------------------------------------------- where data is


def _place(path: str | Path) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it."""
    pyarrow()
    from pyarrow import fs

    text = str(path)
    if "://" in text:
        return fs.FileSystem.from_uri(text)  # type: ignore[no-any-return]
    return fs.LocalFileSystem(), str(Path(text).absolute())


def _discard(files: Any, path: str) -> None:
    try:
        files.delete_file(path)
    except OSError:
        return  # it was never there, or cannot be reached any more: the first error matters


def _dataset(data: Any, label: str) -> Any:
    """The pyarrow dataset of a path, URI, list of files or dataset; None for anything else."""
    pa = pyarrow()
    if isinstance(data, pa.Table):
        return None  # without importing what reads files
    from pyarrow import dataset

    if isinstance(data, dataset.Dataset):
        return data
    several = isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str | Path) for item in data)
    if not several and not isinstance(data, str | Path):
        return None
    places = [_place(item) for item in (data if several else [data])]
    paths = [path for _, path in places]
    try:
        return dataset.dataset(paths if several else paths[0], filesystem=places[0][0], format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise EventError(label, f"expected Parquet at {data}: {str(error).splitlines()[0]}") from None


def _batches(source: Any, rows: int, max_threads: int) -> Iterator[Any]:
    """Tables of `rows` rows in the dataset's order, the last one shorter; little is read ahead."""
    pa = pyarrow()
    from pyarrow import dataset

    # Arrow's own choice reads a whole file ahead and keeps it until its end.
    reading = dataset.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20)
    scanner = source.scanner(
        batch_size=rows,
        batch_readahead=1,
        fragment_readahead=1,
        fragment_scan_options=reading,
        use_threads=max_threads > 1,
        cache_metadata=False,
    )
    held: list[Any] = []
    count = 0
    for batch in scanner.to_batches():
        while count + batch.num_rows >= rows:
            head = batch.slice(0, rows - count)
            yield pa.Table.from_batches([*held, head], source.schema)
            batch = batch.slice(head.num_rows)
            held, count = [], 0
        if batch.num_rows:
            held.append(batch)
            count += batch.num_rows
    if held:
        yield pa.Table.from_batches(held, source.schema)


def _load(
    data: Any, label: str, names: Callable[[Any], list[str]] | None, max_threads: int, wanted: Sequence[str]
) -> Any:
    """The data as a pyarrow.Table; of a dataset only the columns that `names` picks from its schema. wanted: what may
    also stand in the index of a pandas DataFrame."""
    pa = pyarrow()
    source = _dataset(data, label)
    try:
        if source is not None:
            columns = names(source.schema) if names is not None else None
            return source.to_table(columns=columns, use_threads=max_threads > 1)
        table = arrow_table(data, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise EventError(label, f"cannot be read as a table: {str(error).splitlines()[0]}") from None
    except EventError as error:
        raise EventError(label + error.path, error.message) from None
    return table if names is None else table.select(names(table.schema))


class _Workers:
    """Runs calls, in this thread or in several; the native parts of each leave the GIL alone."""

    def __init__(self, threads: int) -> None:
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"max_threads: expected at least 1, got {threads!r}")
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> Callable[[Sequence[Callable[[], Any]]], list[Any]]:
        return self.all

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        if self.pool is None:
            return [call() for call in calls]
        return [future.result() for future in [self.pool.submit(call) for call in calls]]


# --------------------------------------------------------------------------------------------------- columns and names


@contextmanager
def _column_errors(label: str, column: str, first: int = 0) -> Iterator[None]:
    try:
        yield
    except ColumnError as error:
        row = "" if error.row is None else f"[{first + error.row}]"
        raise EventError(f"{label}{row}.{column}", str(error)) from None


def _need(schema: Any, label: str, column: Any, what: str) -> Any:
    """The type of the column that is `what`, or EventError saying which columns there are."""
    count = schema.names.count(column)
    if count == 0:
        raise EventError(f"{label}.{column}", f"there is no such column ({what}); have {', '.join(schema.names)}")
    if count > 1:
        raise EventError(f"{label}.{column}", f"{count} columns of this name ({what})")
    return schema.field(column).type


def _key_kind(kind: Any, label: str, column: str) -> str | None:
    """ "string" or "integer"; None for a column of nothing but nulls."""
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind):
        return "integer"
    if types.is_string(kind) or types.is_large_string(kind) or _is_string_view(kind):
        return "string"
    if types.is_null(kind):
        return None
    hint = "; pandas makes floats of integers beside missing values: use Int64" if types.is_floating(kind) else ""
    raise EventError(f"{label}.{column}", f"expected keys that are strings or integers, got {kind}{hint}")


def _is_string_view(kind: Any) -> bool:
    return bool(getattr(pyarrow().types, "is_string_view", lambda _: False)(kind))


def _key_chunk(array: Any) -> Any:
    """A chunk of keys in a form that the kernel reads: views and dictionaries of them are made plain."""
    pa = pyarrow()
    kind = array.type
    if pa.types.is_dictionary(kind) and str(kind.value_type) not in KINDS:
        array = array.dictionary_decode()
    return array.cast(pa.large_string()) if _is_string_view(array.type) else array


def _times(array: Any, label: str, column: str, first: int) -> Any:
    """Times as an int64 array of microseconds without nulls."""
    if array.null_count:
        raise EventError(f"{label}[{first + first_null(array)}].{column}", "the time is missing (null)")
    try:
        return cast_column(array, "timestamp", column, None, first)
    except EventError as error:
        raise EventError(label + error.path, error.message) from None


def _int64(array: Any) -> Times:
    if len(array) == 0:
        return np.empty(0, dtype=np.int64)
    return np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array)]


def _check_range(times: Times, label: str, column: str, first: int) -> None:
    row = first_outside(times, FIRST_TIME, LAST_TIME)
    if row >= 0:
        raise EventError(f"{label}[{first + row}].{column}", "expected a time between the years 1 and 9999")


# ------------------------------------------------------------------------------------------------------------ the join


class _Keys:
    """Ids of the keys that some tables share with the spine.

    A key of several columns is folded from the left: the ids of its first two parts, side by side in 64 bits, are an
    integer key of their own, whose id goes with the third. Null in any part, or a part that nobody has, is null.
    """

    def __init__(self, parts: int) -> None:
        self.parts = [KeyIndex() for _ in range(parts)]
        self.pairs = [KeyIndex() for _ in range(parts - 1)]
        self.index = self.pairs[-1] if self.pairs else self.parts[0]

    def column(
        self, columns: Sequence[list[Any]], label: str, names: Sequence[str], first: int, add: bool
    ) -> list[Any]:
        """Chunks that `index` reads, of the chunks of every part. label, names, first: as errors name them."""
        if not self.pairs:
            return columns[0]
        pa = pyarrow()
        rows = sum(map(len, columns[0]))
        found: Rows | None = None
        for i, (part, chunks, name) in enumerate(zip(self.parts, columns, names)):
            ids = np.empty(rows, dtype=np.uint32)
            with _column_errors(label, name, first):
                part.encode(chunks, ids, add)
            if found is None:
                found = ids
                continue
            both = (found.astype(np.uint64) << np.uint64(32) | ids).view(np.int64)
            pair = pa.array(both, mask=(found == NOT_FOUND) | (ids == NOT_FOUND))
            if i == len(self.pairs):
                return [pair]
            self.pairs[i - 1].encode([pair], found, add)
        raise AssertionError("a key has parts")

    def encode(
        self, columns: Sequence[list[Any]], ids: Rows | None, label: str, names: Sequence[str], first: int, add: bool
    ) -> None:
        """The id of every row into `ids`, where given."""
        chunks = self.column(columns, label, names, first, add)
        with _column_errors(label, names[0], first):
            self.index.encode(chunks, ids, add)


class _Source:
    """One feature table: its columns loaded and named, its rows ready to be found once the keys are known."""

    def __init__(self, table: FeatureTable, position: int, spine: Any, spine_time: str, max_threads: int) -> None:
        self.label = table.name or f"tables[{position}]"
        self.table = table
        self.ttl = None if table.ttl is None else duration_us(table.ttl)
        pairs = table.pairs()
        self.key = [column for column, _ in pairs]
        self.spine_key = tuple(column for _, column in pairs)
        spine_kinds = [
            _key_kind(_need(spine, "spine", column, f"the key of {self.label}"), "spine", column)
            for column in self.spine_key
        ]
        self.features: list[str] = []
        wanted = [*self.key, table.time, *(table.features or ()), *([table.ingest_time] if table.ingest_time else ())]
        self.data = _load(table.table, self.label, self._columns, max_threads, wanted)
        kinds = [_key_kind(self.data.schema.field(column).type, self.label, column) for column in self.key]
        for column, spine_column, kind, spine_kind in zip(self.key, self.spine_key, kinds, spine_kinds):
            if kind and spine_kind and kind != spine_kind:
                raise EventError(
                    f"{self.label}.{column}",
                    f'{kind} keys, but spine.{spine_column} has {spine_kind} keys, and 1 and "1" are different keys: '
                    "cast one of the two columns",
                )
        self.matches = None not in kinds and None not in spine_kinds
        self.outputs = [f"{table.name}.{f}" if table.name else f for f in self.features]
        self.columns = [self._column(feature) for feature in self.features]
        self.segments: list[tuple[list[list[Any]], Any, Any | None]] = []
        first = 0
        for batch in self.data.to_batches():
            event = _times(batch.column(table.time), self.label, table.time, first)
            ingest = None
            if table.ingest_time is not None:
                ingest = _times(batch.column(table.ingest_time), self.label, table.ingest_time, first)
                _check_range(_int64(ingest), self.label, table.ingest_time, first)
            self.segments.append(([[_key_chunk(batch.column(column))] for column in self.key], event, ingest))
            first += batch.num_rows
        self.rows: FeatureRows | None = None

    def _columns(self, schema: Any) -> list[str]:
        """Checks what the table names, settles the features, and gives all columns that are read."""
        table = self.table
        for column in self.key:
            _need(schema, self.label, column, "the key")
        _need(schema, self.label, table.time, "the event time")
        used = [*self.key, table.time]
        if table.ingest_time is not None:
            _need(schema, self.label, table.ingest_time, "the ingest time")
            used.append(table.ingest_time)
        self.features = list(table.features) if table.features else [n for n in schema.names if n not in used]
        for feature in self.features:
            _need(schema, self.label, feature, "a feature")
        for name in table.defaults or {}:
            if name not in self.features:
                raise EventError(f"{self.label}.defaults.{name}", f"no such feature; have {', '.join(self.features)}")
        return [*used, *self.features]

    def _column(self, feature: str) -> _Column:
        default = (self.table.defaults or {}).get(feature)
        return _Column(self.data.column(feature), self.label, feature, default)

    def _encoded(self, keys: _Keys, add: bool) -> Iterator[Any]:
        """The key column of each segment as the index of `keys` reads it."""
        first = 0
        for columns, event, _ in self.segments:
            yield keys.column(columns, self.label, self.key, first, add)[0]
            first += len(event)

    def add_keys(self, keys: _Keys) -> None:
        for chunk in self._encoded(keys, True):
            with _column_errors(self.label, self.key[0]):
                keys.index.encode([chunk], None, True)

    def prepare(self, keys: _Keys, backfill: bool) -> None:
        segments = []
        if self.matches:
            segments = [(key, *rest) for key, (_, *rest) in zip(self._encoded(keys, False), self.segments)]
        with _column_errors(self.label, self.key[0]):
            self.rows = FeatureRows(keys.index, segments, not backfill)
        # The ends of times that never fall say where all of them lie.
        ends = self.rows.ordered and self.table.ingest_time is None
        first = 0
        for _, event, _ in self.segments:
            times = _int64(event)
            if not ends or (len(times) and not FIRST_TIME <= times[0] <= times[-1] <= LAST_TIME):
                _check_range(times, self.label, self.table.time, first)
            first += len(times)

    def find(self, ids: Rows, times: Times, found: Rows, order: SpineOrder | None, start: int, stop: int) -> None:
        assert self.rows is not None
        with _column_errors(self.label, self.key[0]):
            self.rows.find(ids, times, found, order if self.rows.ordered else None, start, stop)

    def apply_ttl(self, times: Times, found: Rows) -> None:
        assert self.rows is not None
        if self.ttl is not None:
            self.rows.apply_ttl(times, found, self.ttl)


class _Join:
    """Feature tables and what is to be made of them: prepared once, joined to one spine or to batch after batch."""

    def __init__(
        self,
        schema: Any,
        tables: FeatureTable | Sequence[FeatureTable],
        time: str,
        backfill: bool,
        statuses: bool,
        run: Callable[[Sequence[Callable[[], Any]]], list[Any]],
        max_threads: int,
    ) -> None:
        tables = [tables] if isinstance(tables, FeatureTable) else list(tables)
        for position, table in enumerate(tables):
            if not isinstance(table, FeatureTable):
                raise TypeError(f"tables[{position}]: expected a FeatureTable, got {type(table).__name__}")
        _need(schema, "spine", time, "the time")
        self.time = time
        self.backfill = backfill
        self.statuses = statuses
        self.run = run
        self.sources = [_Source(table, i, schema, time, max_threads) for i, table in enumerate(tables)]
        self.keys: dict[tuple[str, ...], _Keys] = {}
        taken = {name: f"spine.{name}" for name in schema.names}
        for source in self.sources:
            for feature, output in zip(source.features, source.outputs):
                for name in [output, f"{output}__status"] if statuses else [output]:
                    origin = f"{source.label}.{feature}"
                    if name in taken:
                        both = f"{taken[name]} and {origin}"
                        raise EventError(
                            "", f"two columns would be called {name!r}: {both}; give a table another name="
                        )
                    taken[name] = origin

    def prepare(self, spine: Any | None) -> None:
        """Takes the keys from the side with fewer rows, the spine or the tables; from the tables without a spine."""
        for names in dict.fromkeys(source.spine_key for source in self.sources):
            of_key = [source for source in self.sources if source.spine_key == names and source.matches]
            keys = self.keys[names] = _Keys(len(names))
            if spine is not None and spine.num_rows <= sum(source.data.num_rows for source in of_key):
                if of_key:
                    self._ids(spine, names, 0, None, True)
            else:
                for source in of_key:
                    source.add_keys(keys)
        self.run([partial(s.prepare, self.keys[s.spine_key], self.backfill) for s in self.sources])

    def _ids(self, spine: Any, names: tuple[str, ...], first: int, ids: Rows | None, add: bool) -> None:
        columns = [[_key_chunk(chunk) for chunk in spine.column(name).chunks] for name in names]
        self.keys[names].encode(columns, ids, "spine", names, first, add)

    def join(self, spine: Any, first: int, progress: Progress | None) -> Any:
        """The spine with all features. first: the number of its first row, for errors."""
        times = _int64(_times(one_array(spine.column(self.time)), "spine", self.time, first))
        _check_range(times, "spine", self.time, first)
        ids: dict[tuple[str, ...], Rows] = {}
        for names in self.keys:
            ids[names] = np.empty(len(times), dtype=np.uint32)
            if any(source.spine_key == names and source.matches for source in self.sources):
                self._ids(spine, names, first, ids[names], False)
            else:
                ids[names].fill(NOT_FOUND)
        order = None
        if not ordered(times) and any(source.rows is not None and source.rows.ordered for source in self.sources):
            order = SpineOrder(times)
        found = [np.empty(len(times), dtype=np.uint32) for _ in self.sources]
        for start in range(0, len(times), SLICE_ROWS):
            stop = min(start + SLICE_ROWS, len(times))
            pairs = zip(self.sources, found)
            self.run([partial(s.find, ids[s.spine_key], times, f, order, start, stop) for s, f in pairs])
            if progress is not None:
                progress(stop - start)
        del ids, order
        self.run([partial(s.apply_ttl, times, f) for s, f in zip(self.sources, found)])
        columns = [(column, f) for s, f in zip(self.sources, found) for column in s.columns]
        gathered = self.run([partial(column.gather, f, self.statuses) for column, f in columns])
        outputs = [output for source in self.sources for output in source.outputs]
        out = spine
        for name, (values, statuses) in zip(outputs, gathered):
            out = out.append_column(name, values)
            if statuses is not None:
                out = out.append_column(f"{name}__status", statuses)
        return out


class _Column:
    """One feature: how its values are gathered into a new array of the same type."""

    def __init__(self, column: Any, label: str, feature: str, default: Any) -> None:
        pa = pyarrow()
        self.path = f"{label}.{feature}"
        self.dictionary: Any = None
        if view := {"string_view": pa.large_string(), "binary_view": pa.large_binary()}.get(str(column.type)):
            column = column.cast(view)  # Arrow takes no rows of views
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.unify_dictionaries()
            plain = column.num_chunks == 0 or default is not None or column.chunk(0).dictionary.null_count
            if plain:
                column = column.cast(kind.value_type)
                kind = column.type
            else:
                self.dictionary = column.chunk(0).dictionary
                kind = kind.index_type
        self.type = column.type
        self.storage = kind
        self.default = None
        if default is not None:
            try:
                self.default = pa.scalar(default, type=self.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
                raise EventError(
                    f"{label}.defaults.{feature}", f"does not fit {self.type}: {str(error).splitlines()[0]}"
                ) from None
        self.width = _width(kind)
        self.native: Values | None = None
        if self.width is None:
            self.other = sound_column(column, self.path)
        else:
            chunks = [c.indices if self.dictionary is not None else c for c in column.chunks]
            try:
                self.native = Values(chunks, self.width, pa.types.is_floating(kind))
            except ColumnError as error:
                raise EventError(self.path, str(error)) from None

    def gather(self, found: Rows, statuses: bool) -> tuple[Any, Any]:
        """The values of the found rows, and their statuses if asked."""
        pa = pyarrow()
        codes = np.empty(len(found), dtype=np.int8) if statuses else None
        if self.native is None:
            values = self._take(found, codes)
        elif self.width is not None and self.width < 0:
            values = self._gather_text(found, codes)
        else:
            values = self._gather_fixed(found, codes)
        if self.default is not None and values.null_count:
            import pyarrow.compute as pc

            values = pc.fill_null(values, self.default)
        if codes is None:
            return values, None
        return values, pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(STATUSES))

    def _gather_fixed(self, found: Rows, codes: npt.NDArray[np.int8] | None) -> Any:
        pa = pyarrow()
        assert self.native is not None
        assert self.width is not None
        n = len(found)
        room = pa.allocate_buffer(n * self.width if self.width else (n + 7) // 8)
        validity = pa.allocate_buffer((n + 7) // 8)
        nulls = self.native.gather(
            found, np.frombuffer(room, dtype=np.uint8), np.frombuffer(validity, dtype=np.uint8), codes
        )
        values = pa.Array.from_buffers(self.storage, n, [validity if nulls else None, room], nulls)
        if self.dictionary is None:
            return values
        try:
            return pa.DictionaryArray.from_arrays(values, self.dictionary, ordered=self.type.ordered)
        except pa.ArrowException as error:
            raise EventError(self.path, f"the column is damaged: {str(error).splitlines()[0]}") from None

    def _gather_text(self, found: Rows, codes: npt.NDArray[np.int8] | None) -> Any:
        pa = pyarrow()
        assert self.native is not None
        n = len(found)
        offsets = np.empty(n + 1, dtype=np.int64)
        validity = pa.allocate_buffer((n + 7) // 8)
        try:
            nulls = self.native.gather_offsets(found, offsets, np.frombuffer(validity, dtype=np.uint8), codes)
        except ColumnError as error:
            raise EventError(self.path, str(error)) from None
        if self.width == -4 and offsets[-1] > MOST_TEXT:
            half = n // 2 // 8 * 8 or n // 2
            parts = [self._gather_text(f, None) for f in (found[:half], found[half:])]
            return pa.chunked_array([c for p in parts for c in (p.chunks if isinstance(p, pa.ChunkedArray) else [p])])
        room = pa.allocate_buffer(int(offsets[-1]))
        self.native.gather_text(found, offsets, np.frombuffer(room, dtype=np.uint8))
        narrow = offsets.astype(np.int32) if self.width == -4 else offsets
        buffers = [validity if nulls else None, pa.py_buffer(narrow), room]
        return pa.Array.from_buffers(self.storage, n, buffers, nulls)

    def _take(self, found: Rows, codes: npt.NDArray[np.int8] | None) -> Any:
        """Of types that have no kernel here (lists, structs): Arrow's own."""
        pa = pyarrow()
        values = self.other.take(pa.array(found, mask=found >= OUTSIDE_MAX_AGE))
        if codes is not None:
            codes[:] = np.where(np.asarray(values.is_null()), STATUSES.index("NULL_VALUE"), STATUSES.index("PRESENT"))
            codes[found == NOT_FOUND] = STATUSES.index("NOT_FOUND")
            codes[found == OUTSIDE_MAX_AGE] = STATUSES.index("OUTSIDE_MAX_AGE")
        return values


def _width(kind: Any) -> int | None:
    """How the kernel sees values of a type: see ext/asof.pyx, Values. None: it does not."""
    types = pyarrow().types
    if types.is_boolean(kind):
        return 0
    if types.is_string(kind) or types.is_binary(kind):
        return -4
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return -8
    if types.is_primitive(kind) or types.is_decimal(kind):
        width = int(kind.bit_width) // 8
        return width if width in (1, 2, 4, 8, 16) else None
    return None
