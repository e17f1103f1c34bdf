"""Compacted history (control path): batches of whole segments as Parquet, in a folder or an object store, and back.

    ROOT/events/<EventType>/date=YYYY-MM-DD/<first>-<last>.parquet     a column per field, by the event's time
    ROOT/scores/<pipeline>/date=YYYY-MM-DD/<first>-<last>.parquet      a column per logged value, by the score's as_of
    ROOT/batches/<first>-<last>.json                                   what belongs together; written last
    DIR/batches/<first>-<last>.json                                    the same, where ROOT is an object store

The log folder says which batches there are: an engine starts without asking the object store. Names of Penstock's own
columns begin with an underscore. What must stay true: a batch without its manifest does not exist, and what is read
back are the records that were compacted, bit for bit, or an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from .._ext import log as native
from .._ext import log_columns
from .._ext.decision import OUTCOMES
from .._ext.snapshot import crc32c
from ..errors import LogError, PenstockError
from ..tables import pyarrow
from .log_folder import LogFolder, located, write_whole
from .schemas import EventSchema, ScoreSchema, check_schemas, read_schema, record_schemas

__all__ = [
    "Batch",
    "BatchSegment",
    "BatchStore",
    "Part",
    "Records",
    "newest_event_time",
    "records_from_batch",
    "schema_layouts",
    "unavailable",
    "write_batch",
]

FORMAT = 1
ERASED = 0x20
JUDGED = [OUTCOMES.index("applied"), OUTCOMES.index("late")]
OWN_COLUMNS = {
    *("_sequence", "_ingest_time", "_outcome", "_versions", "_erased", "_status", "_wide", "_order", "_record"),
    *("_id", "_as_of", "_action", "_model", "_failed", "_score", "_fired", "_codes"),
}
EPOCH = date(1970, 1, 1).toordinal()
LISTED_AT_ONCE = 16

Schema = EventSchema | ScoreSchema


class BatchFile(msgspec.Struct, frozen=True):
    """One Parquet file of a batch: its path below the root and the number of its schema."""

    path: str
    schema: int
    rows: int
    bytes: int


class BatchSegment(msgspec.Struct, frozen=True):
    """One segment that was compacted. marks: the watermarks at its start, by event type's number; first_record: the
    order of its first record in the batch."""

    number: int
    first_sequence: int
    last_sequence: int
    first_record: int
    records: int
    marks: list[int]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of a batch.

    schemas: the texts of the segments' schema records; crc32c: of the records as records_from_batch builds them;
    newest_event_time: of its events that were judged applied or late (None: none); whole: how many records had to be
    kept whole beside their columns; generation: how often it was written anew.
    """

    format: int
    log_id: int
    name: str
    generation: int = 0
    first_sequence: int
    last_sequence: int
    last_ingest_time: int | None
    newest_event_time: int | None
    events: int
    records: int
    whole: int
    crc32c: int
    segments: list[BatchSegment]
    schemas: list[str]
    files: list[BatchFile]

    @property
    def number(self) -> int:
        return self.segments[0].number

    def marks_of(self, segment: BatchSegment) -> dict[str, int]:
        """Watermark of each event type where a segment begins; types without one are left out."""
        names = [s.name for s in self.read_schemas() if isinstance(s, EventSchema)]
        return {name: mark for name, mark in zip(names, segment.marks) if mark > -(1 << 61)}

    def read_schemas(self) -> list[Schema]:
        return [read_schema(text.encode()) for text in self.schemas]

    def check(self) -> None:
        """Raises LogError where the manifest contradicts itself: nothing in it points outside of it."""
        schemas = self.read_schemas()
        check_schemas(schemas)
        wrong = None
        if not self.segments:
            wrong = "it has no segments"
        elif any(not 0 <= file.schema < len(schemas) or file.rows < 0 for file in self.files):
            wrong = f"a file is of no schema of {len(schemas)}"
        elif sum(file.rows for file in self.files) != self.records:
            wrong = f"its files do not have {self.records} records"
        first, number = 0, self.segments[0].number if self.segments else 0
        events = sum(isinstance(schema, EventSchema) for schema in schemas)
        for segment in self.segments:
            if wrong is None and (segment.first_record, segment.number) != (first, number):
                wrong = f"segment {segment.number} does not stand behind the one before it"
            if wrong is None and (segment.records < 0 or len(segment.marks) != events):
                wrong = f"segment {segment.number} has {segment.records} records and {len(segment.marks)} watermarks"
            first, number = first + segment.records, number + 1
        if wrong is None and first != self.records:
            wrong = f"its segments do not have {self.records} records"
        if wrong is not None:
            raise LogError(wrong)


class _Checked(msgspec.Struct):
    """The file of a manifest: the checksum is over the bytes of the batch."""

    crc32: int
    batch: msgspec.Raw


class _Location(msgspec.Struct):
    """offline.json of a log folder."""

    uri: str


class BatchStore:
    """Where the batches of one log are: a local folder, or what pyarrow.fs can reach.

    index: a local folder with copies of an object store's manifests; which ones are in it is what counts.
    """

    def __init__(self, uri: str, log_id: int, index: Path) -> None:
        self.uri = uri
        self.log_id = log_id
        self.index = index
        self.local = Path(uri.removeprefix("file://")) if "://" not in uri or uri.startswith("file://") else None
        self._opened: tuple[Any, str] | None = None

    @staticmethod
    def of(folder: LogFolder, uri: str | None = None) -> BatchStore:
        """The store of a log folder; with `uri` it is kept there from now on.

        Raises LogError where there are batches elsewhere already.
        """
        path = folder.path / "offline.json"
        default = str(folder.path.resolve() / "parquet")
        try:
            known = msgspec.json.decode(path.read_bytes(), type=_Location).uri
        except FileNotFoundError:
            known = default
        except msgspec.DecodeError as error:
            raise LogError(f"{path}: cannot be read: {error}") from None
        index = folder.path / "batches"
        store = BatchStore(known, folder.log_id, index)
        if uri is None:
            return store
        wanted = uri if "://" in uri else str(Path(uri).resolve())
        if wanted != known:
            if store.batches():
                raise LogError(
                    f"{folder.path}: its compacted history is in {known}, not in {wanted}; "
                    f"move it there and say so in {path}"
                )
            store = BatchStore(wanted, folder.log_id, index)
            store.probe()
            store.make_index()
            write_whole(path, msgspec.json.encode(_Location(wanted)))
        return store

    def __str__(self) -> str:
        return self.uri.split("?")[0]

    def probe(self) -> None:
        """Raises LogError where nothing can be written: the place is kept in the log folder only once it works."""
        try:
            self.write("probe", b"written to see whether it can be")
            self.remove(["probe"])
        except (OSError, ValueError) as error:
            raise LogError(f"{self}: history cannot be kept here: {error}") from None

    # files

    def _filesystem(self) -> tuple[Any, str]:
        """(file system, path of the root in it)."""
        if self._opened is None:
            pyarrow()
            from pyarrow import fs

            if self.local is not None:
                self._opened = fs.LocalFileSystem(), str(self.local)
            else:
                with _named(self):
                    self._opened = _remote(fs, self.uri)
        return self._opened

    def _at(self, path: str) -> tuple[Any, str]:
        filesystem, root = self._filesystem()
        return filesystem, f"{root.rstrip('/')}/{path}"

    def read(self, path: str) -> bytes:
        """A small file. Raises FileNotFoundError."""
        if self.local is not None:
            return (self.local / path).read_bytes()
        filesystem, full = self._at(path)
        with _named(self, path), filesystem.open_input_stream(full) as stream:
            return bytes(stream.read())

    def write(self, path: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        if self.local is not None:
            (self.local / path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.local / path, data)
            for parent in (self.local, self.local.parent):
                _sync(parent)
            return
        filesystem, full = self._at(path)
        with _named(self, path), filesystem.open_output_stream(full) as stream:
            stream.write(data)

    def remove(self, paths: Iterable[str]) -> int:
        """Remove files that may be gone already; returns how many there were."""
        removed = 0
        for path in paths:
            if self.local is not None:
                with contextlib.suppress(FileNotFoundError):
                    (self.local / path).unlink()
                    removed += 1
                with contextlib.suppress(OSError):
                    (self.local / path).parent.rmdir()  # the last file of a day
                continue
            filesystem, full = self._at(path)
            with _named(self, path), contextlib.suppress(FileNotFoundError):
                filesystem.delete_file(full)
                removed += 1
        return removed

    def listed(self, folder: str) -> list[str]:
        """Paths of all files below a folder of the root."""
        if self.local is not None:
            found = (self.local / folder).rglob("*")
            return [str(p.relative_to(self.local)) for p in found if p.is_file()]
        filesystem, full = self._at(folder)
        from pyarrow import fs

        with _named(self, folder):
            infos = filesystem.get_file_info(fs.FileSelector(full, recursive=True, allow_not_found=True))
        root = full[: -len(folder)]
        return [info.path.removeprefix(root) for info in infos if info.type == fs.FileType.File]

    def write_table(self, path: str, table: Any, **options: Any) -> int:
        """A Parquet file, on disk when this returns; returns its size."""
        filesystem, full = self._at(path)
        from pyarrow import parquet

        with _named(self, path):
            if self.local is None:
                with filesystem.open_output_stream(full) as stream:
                    parquet.write_table(table, stream, **options)
                return int(filesystem.get_file_info(full).size)
            target = self.local / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # Readers look for *.parquet: they see it whole or not at all.
            temporary = f"{full}.part"
            with filesystem.open_output_stream(temporary) as stream:
                parquet.write_table(table, stream, **options)
            _sync(Path(temporary))
            filesystem.move(temporary, full)
            for parent in (target.parent, target.parent.parent, target.parent.parent.parent):
                _sync(parent)
            return target.stat().st_size

    def read_table(self, path: str) -> Any:
        filesystem, full = self._at(path)
        from pyarrow import parquet

        with _named(self, path), filesystem.open_input_file(full) as stream:
            return parquet.ParquetFile(stream, pre_buffer=self.local is None).read()

    # batches

    def batches(self) -> list[Batch]:
        """The manifests, oldest first. Raises LogError where one cannot be read or batches contradict each other."""
        here = self.index if self.local is None else self.local / "batches"
        if here.is_dir():
            found = [self._read_batch(path) for path in here.glob("[0-9]*.json")]
        else:
            found = self._remote_batches() if self.local is None else []
        batches = sorted((b for b in found if b is not None), key=lambda b: b.number)
        for before, after in pairwise(batches):
            if after.number != before.segments[-1].number + 1:
                raise LogError(
                    f"{self}: events {before.last_sequence + 1} to {after.first_sequence - 1} are missing "
                    f"(between the batches {before.name} and {after.name})"
                )
        return batches

    def _remote_batches(self) -> list[Batch | None]:
        """What the object store itself says: a log folder that was restored without its index."""
        with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
            return list(pool.map(self._read_batch, (p for p in self.listed("batches") if p.endswith(".json"))))

    def make_index(self) -> None:
        """The index of an object store that is new to this log folder."""
        shutil.rmtree(self.index, ignore_errors=True)
        if self.local is None:
            batches = self._remote_batches()
            self.index.mkdir()
            for batch in batches:
                if batch is not None:
                    write_whole(self.index / f"{batch.name}.json", _encoded(batch))

    def _read_batch(self, path: str | Path) -> Batch | None:
        try:
            data = path.read_bytes() if isinstance(path, Path) else self.read(path)
        except FileNotFoundError:
            return None  # retention came between
        if isinstance(path, str):
            path = f"{self}/{path}"
        try:
            checked = msgspec.json.decode(data, type=_Checked)
            if zlib.crc32(bytes(checked.batch)) != checked.crc32:
                raise LogError(f"{path}: damaged: its checksum does not hold; restore it from a copy")
            format = msgspec.json.decode(checked.batch, type=dict[str, Any])["format"]
            if format > FORMAT:
                raise LogError(
                    f"{path}: written by a newer version of Penstock (format {format}, this one reads up to {FORMAT})"
                )
            batch = msgspec.json.decode(checked.batch, type=Batch)
        except (msgspec.DecodeError, LookupError, UnicodeDecodeError) as error:
            raise LogError(f"{path}: damaged: {error}") from None
        if batch.log_id != self.log_id:
            raise LogError(f"{path}: this batch is of another log ({batch.log_id}, not {self.log_id})")
        try:
            batch.check()
        except LogError as error:
            raise LogError(f"{path}: damaged: {error}; restore it from a copy") from None
        return batch

    def put_batch(self, batch: Batch) -> None:
        """The manifest: from now on the batch exists."""
        self.write(f"batches/{batch.name}.json", _encoded(batch))
        if self.local is None:
            self.index.mkdir(exist_ok=True)
            write_whole(self.index / f"{batch.name}.json", _encoded(batch))

    def remove_batch(self, batch: Batch) -> None:
        """The manifest first: a batch is there whole or not at all."""
        if self.local is None:
            (self.index / f"{batch.name}.json").unlink(missing_ok=True)
        self.remove([f"batches/{batch.name}.json"])
        self.remove(file.path for file in batch.files)

    def remove_leftovers(self) -> int:
        """Files that belong to no batch: what a killed compaction or erasure left behind."""
        batches = self.batches()
        kept = {file.path for batch in batches for file in batch.files}
        kept |= {f"batches/{batch.name}.json" for batch in batches}
        lost = [p for folder in ("batches", "events", "scores") for p in self.listed(folder) if p not in kept]
        return self.remove(p for p in lost if p.endswith((".parquet", ".part", ".json")))


def _encoded(batch: Batch) -> bytes:
    """The bytes of a manifest's file."""
    body = msgspec.json.encode(batch)
    return msgspec.json.encode(_Checked(zlib.crc32(body), msgspec.Raw(body)))


@contextlib.contextmanager
def _named(store: BatchStore, path: str = "") -> Iterator[None]:
    """Errors of the file system with the place in them; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LogError(f"{store}{'/' if path else ''}{path}: {error}") from error
    except ValueError as error:  # ArrowInvalid
        raise LogError(f"{store}{'/' if path else ''}{path}: cannot be read or written: {error}") from error


def _remote(fs: Any, uri: str) -> tuple[Any, str]:
    """A file system of pyarrow.fs and the path in it. For s3:// the AWS_* variables say what the URI does not."""
    if uri.startswith("s3://") and "?" not in uri and "@" not in uri:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint or region:
            made = fs.S3FileSystem(endpoint_override=endpoint, region=region or "us-east-1", allow_delayed_open=False)
            return made, uri.removeprefix("s3://")
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- columns


def _types(schema: Schema) -> list[str]:
    if isinstance(schema, ScoreSchema):
        return [kind for _, kind in schema.values]
    return [field.type for field in schema.fields]


def _names(schema: Schema) -> list[str]:
    """Names of the columns of a schema's fields."""
    names = [name for name, _ in schema.values] if isinstance(schema, ScoreSchema) else [f.name for f in schema.fields]
    return [f"{name}_" if name.rstrip("_") in OWN_COLUMNS or name.startswith("_arm_") else name for name in names]


def _layout(schema: Schema) -> tuple[bool, list[str], int]:
    """A schema as log_columns wants it."""
    is_score = isinstance(schema, ScoreSchema)
    return is_score, _types(schema), -1 if isinstance(schema, ScoreSchema) else schema.time


def schema_layouts(schemas: list[Schema]) -> list[tuple[bool, list[str], int]]:
    """Schemas as log_columns.RecordColumns wants them."""
    return [_layout(schema) for schema in schemas]


def newest_event_time(schemas: list[Schema], columns: log_columns.RecordColumns) -> tuple[int | None, int]:
    """(newest time of the events that were judged applied or late, number of events) of columns that were taken."""
    newest, events = None, 0
    for number, schema in enumerate(schemas):
        if isinstance(schema, EventSchema) and columns[number].rows:
            arrays = columns[number].columns
            events += columns[number].rows
            times = arrays[f"data.{schema.time}"][np.isin(arrays["outcome"], JUDGED)]
            if len(times) and (newest is None or int(times.max()) > newest):
                newest = int(times.max())
    return newest, events


def _bitmap(valid: Any) -> Any:
    pa = pyarrow()
    return None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


def _plain(kind: Any, data: Any, valid: Any = None) -> Any:
    pa = pyarrow()
    bitmap = None if valid is None else _bitmap(valid)
    return pa.Array.from_buffers(kind, len(data), [bitmap, pa.py_buffer(data)])


def _text(kind: Any, offsets: Any, data: Any, valid: Any = None) -> Any:
    pa = pyarrow()
    bitmap = None if valid is None else _bitmap(valid)
    return pa.Array.from_buffers(kind, len(offsets) - 1, [bitmap, pa.py_buffer(offsets), pa.py_buffer(data)])


def _list(offsets: Any, values: Any) -> Any:
    pa = pyarrow()
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)).cast(pa.list_(pa.array(values).type))


def _words(codes: Any, words: list[str]) -> Any:
    """Codes as a dictionary column; a code without a word is null."""
    pa = pyarrow()
    inside = (codes >= 0) & (codes < len(words))
    indices = pa.array(np.where(inside, codes, 0).astype(np.int16), mask=~inside)
    return pa.DictionaryArray.from_arrays(indices, pa.array(words, type=pa.string()))


def _table(schema: Schema, c: dict[str, Any]) -> Any:
    """Native columns (log_columns.SchemaColumns.columns) as an Arrow table."""
    pa = pyarrow()
    time = pa.timestamp("us", "UTC")
    rows = len(c["sequence"])
    names = _names(schema)
    columns: dict[str, Any] = {"_sequence": pa.array(c["sequence"])}
    if isinstance(schema, ScoreSchema):
        size = log_columns.SCORE_ID_BYTES
        columns["_id"] = _text(
            pa.large_string(), np.arange(0, size * rows + 1, size, dtype=np.int64), c["id"], c["id_valid"]
        )
        columns["_as_of"] = _plain(time, c["as_of"])
    columns["_ingest_time"] = _plain(time, c["ingest_time"])
    columns["_outcome"] = _words(c["outcome"].astype(np.int16), list(OUTCOMES))
    if isinstance(schema, ScoreSchema):
        codes = c["codes"].reshape(rows, log_columns.CODE_BYTES)
        action, model, failed = (
            np.ascontiguousarray(codes[:, :6]).view(np.int16).reshape(rows, 3)[:, i] for i in range(3)
        )
        columns["_action"] = _words(action, schema.actions)
        columns["_model"] = _words(model, ["@".join(pair) for pair in schema.models])
        columns["_failed"] = _words(failed, schema.failures)
        for i, (experiment, arms) in enumerate(schema.arms):
            columns[f"_arm_{experiment}"] = _words(codes[:, 6 + i].view(np.int8).astype(np.int16), arms)
        columns["_score"] = _plain(pa.float64(), c["score"], c["score_valid"])
    for i, (name, kind) in enumerate(zip(names, _types(schema))):
        valid = c[f"valid.{i}"]
        if kind == "string":
            columns[name] = _text(pa.large_string(), c[f"at.{i}"], c[f"data.{i}"], valid)
        elif kind == "bool":
            columns[name] = pa.Array.from_buffers(
                pa.bool_(), rows, [_bitmap(valid), pa.py_buffer(np.packbits(c[f"data.{i}"], bitorder="little"))]
            )
        else:
            kinds = {"float64": pa.float64(), "int64": pa.int64(), "timestamp": time}
            columns[name] = _plain(kinds[kind], c[f"data.{i}"], valid)
    if isinstance(schema, ScoreSchema):
        columns["_fired"] = pa.array(c["fired"])
        columns["_codes"] = _plain(pa.binary(log_columns.CODE_BYTES), c["codes"].reshape(rows, -1))
    columns["_versions"] = _list(c["versions_at"], c["versions"])
    status = c["status"].reshape(rows, len(names))
    columns["_erased"] = _erased(status, names)
    if names:
        columns["_status"] = _plain(pa.binary(len(names)), status)
    columns["_wide"] = _list(c["wide_at"], c["wide"])
    columns["_order"] = pa.array(c["order"])
    columns["_record"] = _text(pa.large_binary(), c["record_at"], c["record"], c["record_valid"])
    return pa.table(columns)


def _erased(status: Any, names: list[str]) -> Any:
    """Names of the fields whose value was erased; null where none was."""
    pa = pyarrow()
    flags = (status & ERASED) != 0
    if not flags.any():
        return pa.nulls(len(status), pa.list_(pa.string()))
    found = [[names[i] for i in np.flatnonzero(row)] if row.any() else None for row in flags]
    return pa.array(found, type=pa.list_(pa.string()))


def _arrays(schema: Schema, table: Any) -> dict[str, Any]:
    """An Arrow table out of Parquet as native columns again."""
    pa = pyarrow()
    rows = table.num_rows

    def column(name: str, kind: Any = None) -> Any:
        array = table.column(name)
        if kind is not None and array.type != kind:
            array = array.cast(kind)
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
        return array if array.offset == 0 else pa.concat_arrays([array])

    def numbers(array: Any, dtype: Any) -> Any:
        buffer = array.buffers()[1]
        return np.empty(0, dtype) if buffer is None else np.frombuffer(buffer, dtype)[:rows]

    def texts(name: str, kind: Any) -> tuple[Any, Any]:
        _, offsets, data = column(name, kind).buffers()
        empty = np.zeros(1, np.int64)
        return (
            empty if offsets is None else np.frombuffer(offsets, np.int64)[: rows + 1],
            np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8),
        )

    def valid(array: Any) -> Any:
        return np.ascontiguousarray(array.is_valid().cast(pa.uint8()).to_numpy(zero_copy_only=False))

    def lists(name: str, kind: Any, dtype: Any) -> tuple[Any, Any]:
        array = column(name, pa.large_list(kind))
        return np.frombuffer(array.buffers()[1], np.int64)[: rows + 1], array.values.to_numpy().astype(
            dtype, copy=False
        )

    def fixed(name: str, size: int) -> Any:
        return np.frombuffer(column(name, pa.binary(size)).buffers()[1], np.uint8)[: size * rows]

    names = _names(schema)
    c: dict[str, Any] = {
        "sequence": numbers(column("_sequence", pa.int64()), np.int64),
        "ingest_time": numbers(column("_ingest_time"), np.int64),
        "order": numbers(column("_order", pa.int64()), np.int64),
        "outcome": _codes(column("_outcome"), OUTCOMES),
        "status": fixed("_status", len(names)) if names else np.empty(0, np.uint8),
        "record_valid": valid(column("_record")),
    }
    c["versions_at"], c["versions"] = lists("_versions", pa.uint64(), np.uint64)
    c["wide_at"], c["wide"] = lists("_wide", pa.float64(), np.float64)
    c["record_at"], c["record"] = texts("_record", pa.large_binary())
    for i, (name, kind) in enumerate(zip(names, _types(schema))):
        if kind == "string":
            c[f"at.{i}"], c[f"data.{i}"] = texts(name, pa.large_string())
        elif kind == "bool":
            values = column(name).fill_null(False).cast(pa.uint8())
            c[f"data.{i}"] = np.ascontiguousarray(values.to_numpy())
        else:
            c[f"data.{i}"] = numbers(column(name), np.float64 if kind == "float64" else np.int64)
    if isinstance(schema, ScoreSchema):
        at, data = texts("_id", pa.large_string())
        c["id"] = _ids(at, data, rows)
        c["as_of"] = numbers(column("_as_of"), np.int64)
        score = column("_score")
        c["score"], c["score_valid"] = numbers(score, np.float64), valid(score)
        c["fired"] = numbers(column("_fired", pa.uint64()), np.uint64)
        c["codes"] = fixed("_codes", log_columns.CODE_BYTES)
    return c


def _codes(array: Any, words: tuple[str, ...]) -> Any:
    """A column of words as their codes."""
    pa = pyarrow()
    from pyarrow import compute

    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    codes = compute.index_in(array.dictionary, value_set=pa.array(words, type=array.dictionary.type))
    table = np.append(codes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint8), 0).astype(np.uint8)
    return table[array.indices.fill_null(0).to_numpy(zero_copy_only=False)]


def _ids(at: Any, data: Any, rows: int) -> Any:
    """The ids one after the other; where one is not shown as text its record is kept whole."""
    size = log_columns.SCORE_ID_BYTES
    lengths = np.diff(at)
    if (lengths == size).all():
        return data[int(at[0]) : int(at[0]) + size * rows]
    out = np.zeros((rows, size), np.uint8)
    whole = np.flatnonzero(lengths == size)
    out[whole] = data[at[whole][:, None] + np.arange(size)]
    return out.reshape(-1)


def _written(schema: Schema) -> dict[str, Any]:
    """How a schema's Parquet files are written: numbers that grow as differences, and words as a dictionary. No
    dictionary for floats: it takes one NaN for another."""
    growing = ["_sequence", "_ingest_time", "_order"]
    growing += ["_as_of"] if isinstance(schema, ScoreSchema) else [_names(schema)[schema.time]]
    words = ["_outcome", "_status"]
    if isinstance(schema, ScoreSchema):
        words += ["_action", "_model", "_failed", "_codes", "_fired", *(f"_arm_{name}" for name, _ in schema.arms)]
    words += [
        name
        for name, kind in zip(_names(schema), _types(schema))
        if kind in ("string", "int64") and name not in growing
    ]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": words,
        "column_encoding": dict.fromkeys(growing, "DELTA_BINARY_PACKED"),
    }


# ---- batches


class Records(msgspec.Struct, eq=False):
    """A batch as records again. data: uint8; offsets: of every record behind the prelude, and the end."""

    data: Any
    start: int
    offsets: Any

    @property
    def end(self) -> int:
        return int(self.offsets[-1])


def records_from_batch(store: BatchStore, batch: Batch, check: bool = True) -> Records:
    """Read a batch back: records with checksums, as they would lie in its first segment. check: against the manifest.

    Raises LogError where a file is missing, or what is read is not what was written.
    """
    schemas = batch.read_schemas()
    sources = []
    for file in batch.files:
        schema = schemas[file.schema]
        try:
            arrays = _arrays(schema, store.read_table(file.path))
        except FileNotFoundError:
            raise LogError(
                f"{store}/{file.path}: missing; events {batch.first_sequence} to {batch.last_sequence}"
            ) from None
        except (LookupError, ValueError, TypeError, AttributeError, NotImplementedError) as error:  # also Arrow's
            raise LogError(f"{store}/{file.path}: is not what was written: {error}") from None
        is_score, types, time = _layout(schema)
        try:
            sources.append((file.schema, log_columns.Source(is_score, types, time, arrays)))
        except LogError as error:
            raise LogError(f"{store}/{file.path}: {error}") from None
    prelude = [text.encode() for text in batch.schemas]
    try:
        data, offsets = log_columns.build_records(
            batch.log_id,
            batch.number,
            batch.segments[0].first_sequence,
            native.HEAD,
            prelude,
            batch.segments[0].marks,
            batch.records,
            sources,
            record_schemas(schemas),
        )
    except (LogError, MemoryError) as error:
        raise LogError(f"{store}: batch {batch.name}: {error}") from None
    if check and crc32c(data) != batch.crc32c:
        raise LogError(
            f"{store}: batch {batch.name}: its files are not what was written (events {batch.first_sequence} to "
            f"{batch.last_sequence}); restore them from a copy"
        )
    return Records(data, native.HEAD, offsets)


class Part(msgspec.Struct, eq=False):
    """Records to be compacted that lie together: a segment, or a batch. start: behind its prelude."""

    path: Path | str
    data: Any
    log_id: int
    number: int
    start: int
    end: int


def write_batch(store: BatchStore, draft: Batch, parts: list[Part], begin: Callable[[], None] | None = None) -> Batch:
    """Write parts as a batch: the files, then read them back and compare record for record, then the manifest.

    draft: the manifest but for what is found out here. begin: called before the first file is written.
    """
    schemas = draft.read_schemas()
    columns = log_columns.RecordColumns(schema_layouts(schemas), record_schemas(schemas))
    records = []
    for part in parts:
        try:
            records.append(columns.count(part.data, part.log_id, part.number, part.start, part.end))
        except LogError as error:
            raise located(part.path, error) from None
    for part in parts:
        columns.take(part.data, part.log_id, part.number, part.start, part.end)
    if begin is not None:
        begin()
    suffix = f".{draft.generation}" if draft.generation else ""
    files: list[BatchFile] = []
    for number, schema in enumerate(schemas):
        if not columns[number].rows:
            continue
        arrays = columns[number].columns
        if isinstance(schema, EventSchema):
            folder = f"events/{quote(schema.name, safe='')}"
        else:
            folder = f"scores/{quote(schema.pipeline, safe='')}"
        table = _table(schema, arrays)
        for day, rows in _by_day(table, arrays["day"]):
            path = f"{folder}/date={_date(day)}/{draft.name}{suffix}.parquet"
            size = store.write_table(path, rows, **_written(schema))
            files.append(BatchFile(path, number, rows.num_rows, size))
    newest, events = newest_event_time(schemas, columns)
    segments, first = [], 0
    for segment, count in zip(draft.segments, _counts(draft, records)):
        segments.append(msgspec.structs.replace(segment, first_record=first, records=count))
        first += count
    batch = msgspec.structs.replace(
        draft,
        events=events,
        records=sum(records),
        whole=sum(columns[i].raws for i in range(len(schemas))),
        newest_event_time=newest,
        segments=segments,
        files=files,
    )
    del columns
    built = records_from_batch(store, batch, check=False)
    at = int(built.offsets[0])
    for part in parts:
        at, reached = log_columns.same_records(built.data, at, part.data, part.start, part.end)
        if reached != part.end:
            raise LogError(
                f"{store}: batch {batch.name}: what was read back is not segment {part.number} at offset {reached}; "
                "nothing was removed"
            )
    batch = msgspec.structs.replace(batch, crc32c=crc32c(built.data))
    store.put_batch(batch)
    return batch


def _counts(draft: Batch, records: list[int]) -> list[int]:
    """Records per segment; a batch that is written anew has one part for all of them."""
    return records if len(records) == len(draft.segments) else [segment.records for segment in draft.segments]


def _date(day: int) -> str:
    return date.fromordinal(day + EPOCH).isoformat()


def _by_day(table: Any, days: Any) -> Iterator[tuple[int, Any]]:
    """(day, the rows of it) in order of the days; rows keep their order. Times that no date can name are together
    with the first or the last date: each date is one file."""
    days = np.clip(days, 1 - EPOCH, date.max.toordinal() - EPOCH)
    if (np.diff(days) < 0).any():
        order = np.argsort(days, kind="stable")
        table, days = table.take(pyarrow().array(order)), days[order]
    found, starts = np.unique(days, return_index=True)
    for day, start, end in zip(found, starts, [*starts[1:], len(days)]):
        yield int(day), table.slice(int(start), int(end - start))


def unavailable() -> str | None:
    """Why there can be no Parquet here; None where there can."""
    try:
        pyarrow()
        from pyarrow import parquet  # noqa: F401
    except (ImportError, PenstockError):
        return "Parquet needs pyarrow: pip install 'penstock[offline]'; segments stay and are read as they are"
    return None
