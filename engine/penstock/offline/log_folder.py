"""The folder of an event log (control path): its identity, its lock, its segments, and what of them can be read.

    DIR/log.json            format and log id
    DIR/lock                held by the one process that writes
    DIR/begins.json         the first event that retention has kept
    DIR/layouts.json        event types and views, so that a child process can rebuild the state
    DIR/segments/N.log      records (ext/event_record.h), oldest first
    DIR/snapshots/          state as of a sequence (features/snapshot.py)
    DIR/parquet/            compacted history, unless it is kept elsewhere (compaction.py)

What must stay true: nothing damaged is read as data, and no record that is not what its schema says. A segment is read
up to the first record that does not check; where readable records follow, reading on would leave out events: refused,
with file, offset and how many follow.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import shutil
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from .._ext import log as native
from ..errors import LogError
from ..features.snapshot import sync_folder
from .schemas import EventSchema, ScoreSchema, check_schemas, read_schema, record_schemas

__all__ = ["Damage", "LogFolder", "Prelude", "Segment", "located", "readable_records", "write_whole"]

FORMAT = native.FORMAT
BLOCK = 512  # what a disk writes whole
CHUNK = 1 << 16  # bytes of a segment in use that are read at once


class LogIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What log.json holds."""

    format: int
    log_id: int
    created: int
    crc: int | None = None

    def checksum(self) -> int:
        return zlib.crc32(f"{self.format} {self.log_id} {self.created}".encode())


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a segment that are no records. kind: "tail" (what a crash leaves at the end), "unsynced" (a hole behind
    what was on disk: a power cut), "damaged" (it was on disk, or readable records follow), "header", "short" (neither
    sealed nor as long as it was made)."""

    path: Path
    kind: str
    offset: int
    bytes: int
    following: int = 0

    def __str__(self) -> str:
        what = {
            "tail": "the end is no record, as a crash leaves it",
            "unsynced": "not everything behind the last sync reached the disk, as a power cut leaves it",
            "damaged": "damaged",
            "header": "the header is damaged",
            "short": "the file is shorter than it was made: records may be missing",
        }[self.kind]
        follow = f"; {self.following} readable records follow" if self.following else ""
        return f"{self.path} at offset {self.offset}: {what} ({self.bytes} bytes){follow}"


class Prelude(msgspec.Struct, frozen=True):
    """What a segment begins with: its schemas by number, as text and as read, and the watermark of each of its event
    types (empty: the mark was not written yet). end: the offset behind it."""

    texts: list[bytes]
    schemas: list[EventSchema | ScoreSchema]
    marks: list[int]
    end: int


def located(path: Path | str, error: LogError) -> LogError:
    """An error about a segment or a batch, with its path."""
    text = str(error)
    return LogError(f"{path} {text}" if text.startswith("at offset ") else f"{path}: {text}")


class Segment:
    """One segment file, read. `data` is a memoryview; keep the Segment while it is used.

    live: another process may write it. What it still writes is copied, not mapped: a file that is cut to its length
    under a mapping takes the reader's process with it.
    """

    def __init__(self, path: Path, log_id: int, number: int, live: bool = False) -> None:
        self.path = path
        self.log_id = log_id
        self.number = number
        self.start = native.HEAD
        self.data: Any = memoryview(b"")
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open(live)
        except FileNotFoundError:
            raise
        except OSError as error:
            self.close()
            raise LogError(f"{path}: cannot be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _open(self, live: bool) -> None:
        assert self._file is not None
        self.size = os.fstat(self._file).st_size
        page = os.pread(self._file, native.HEAD, 0)
        head = native.segment_head(page)
        self.head = head if head is not None and head.whole else None
        if self.head is not None:
            self._check_identity(self.head)
        self.mark = native.segment_mark(page)
        self.sealed_end: int | None = self.mark.end if self.mark is not None and self.mark.end else None
        length = self.size if self.sealed_end is None else min(self.size, self.sealed_end)
        if live and self.sealed_end is None:
            self.data = memoryview(bytearray(length))
            self.refresh(0)
        elif length:
            self._map = mmap.mmap(self._file, length, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_SEQUENTIAL)
            self.data = memoryview(self._map)

    def _check_identity(self, head: Any) -> None:
        if head.format > FORMAT:
            raise LogError(
                f"{self.path}: written by a newer version of Penstock "
                f"(format {head.format}, this one reads up to {FORMAT})"
            )
        if head.log_id != self.log_id:
            raise LogError(f"{self.path}: this segment is of another log ({head.log_id}, not {self.log_id})")
        if head.number != self.number:
            raise LogError(f"{self.path}: this is segment {head.number:012d}.log under another's name")

    def refresh(self, start: int) -> bool:
        """Read a segment in use again, from an offset on. False where it is mapped: that is always as of now."""
        if self._map is not None or self._file is None:
            return False
        # From its end to its start: what is read later was written before.
        for at in range(len(self.data) - len(self.data) % CHUNK, start - start % CHUNK - 1, -CHUNK):
            view = self.data[at : at + CHUNK]
            done = os.preadv(self._file, [view], at) if len(view) else 0
            if done < len(view):
                view[done:] = bytes(len(view) - done)
        return True

    def scan(self, start: int | None = None) -> Any:
        """Check the records from an offset on (native.Scan), each against its schema. Raises LogError."""
        prelude = self.prelude()
        known = record_schemas(prelude.schemas, prelude.end)
        try:
            return native.scan(self.data, self.log_id, self.number, self.start if start is None else start, known)
        except LogError as error:
            raise located(self.path, error) from None

    def prelude(self) -> Prelude:
        """What the segment begins with, as far as it can be read. Raises LogError where it is not what a log writes."""
        texts: list[bytes] = []
        schemas: list[EventSchema | ScoreSchema] = []
        marks: list[int] = []
        at = self.start
        try:
            while (record := native.record_at(self.data, self.log_id, self.number, at)) is not None:
                if record.kind == "schema":
                    if record.schema != len(schemas):
                        raise LogError(f"schema {record.schema} stands where schema {len(schemas)} should")
                    texts.append(record.body.rstrip(b" "))
                    schemas.append(read_schema(record.body))
                elif record.kind == "mark":
                    marks = memoryview(record.body).cast("q").tolist()
                    events = sum(isinstance(schema, EventSchema) for schema in schemas)
                    if len(marks) != events:
                        raise LogError(f"there are {len(marks)} watermarks for {events} event types")
                    at += record.length
                    break
                elif schemas:
                    raise LogError("a record stands before the mark that ends the schemas")
                else:
                    break
                at += record.length
            check_schemas(schemas)
        except LogError as error:
            raise LogError(
                f"{self.path} at offset {at}: damaged: {error}. Nothing was changed; restore the file from a copy"
            ) from None
        return Prelude(texts, schemas, marks, at)

    def schemas(self) -> list[EventSchema | ScoreSchema]:
        """The schemas at the segment's start, by number."""
        return self.prelude().schemas

    def watermarks(self) -> dict[str, int]:
        """Watermark of each event type where the segment begins; types without one are left out."""
        prelude = self.prelude()
        names = [schema.name for schema in prelude.schemas if isinstance(schema, EventSchema)]
        return {n: v for n, v in zip(names, prelude.marks) if v > -(1 << 61)}

    def following(self, start: int) -> tuple[int, int]:
        """(offset of the first record that checks behind `start`, how many records check from there on)."""
        return readable_records(self.data, self.log_id, self.number, start)

    def close(self) -> None:
        self.data.release()
        if self._map is not None:
            self._map.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


_locked: weakref.WeakSet[LogFolder] = weakref.WeakSet()


def _after_fork() -> None:
    """A child process lets go: the lock is its parent's, and must not outlive it."""
    for folder in list(_locked):
        folder.close()


os.register_at_fork(after_in_child=_after_fork)


class LogFolder:
    """A log folder. Opened for writing it is locked for this process; for reading it may be written by another."""

    def __init__(self, path: str | Path, *, write: bool = False) -> None:
        self.path = Path(path)
        self.write = write
        self.segments_path = self.path / "segments"
        self.snapshots_path = self.path / "snapshots"
        self._lock: IO[Any] | None = None
        identity = self.path / "log.json"
        if write:
            try:
                self.segments_path.mkdir(parents=True, exist_ok=True)
                self._lock = self._locked()
                if not identity.exists():
                    if self._numbers():
                        raise LogError(f"{identity}: missing, but there are segments; this is not a whole log folder")
                    made = LogIdentity(format=FORMAT, log_id=secrets.randbits(62) | 1, created=time.time_ns() // 1000)
                    write_whole(identity, msgspec.json.encode(msgspec.structs.replace(made, crc=made.checksum())))
            except OSError as error:
                self.close()
                where = error.filename or self.path
                raise LogError(f"{self.path}: cannot be used as a log folder: {where}: {error.strerror}") from None
            except LogError:
                self.close()
                raise
        try:
            self.identity = msgspec.json.decode(identity.read_bytes(), type=LogIdentity)
        except FileNotFoundError:
            self.close()
            raise LogError(f"{self.path}: no event log here (log.json is missing)") from None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self.close()
            raise LogError(f"{identity}: cannot be read: {error}") from None
        if self.identity.crc is not None and self.identity.crc != self.identity.checksum():
            self.close()
            raise LogError(f"{identity}: damaged: its checksum does not hold; restore it from a copy")
        if self.identity.format > FORMAT:
            self.close()
            raise LogError(
                f"{identity}: written by a newer version of Penstock (format {self.identity.format}, "
                f"this one reads up to {FORMAT})"
            )
        self.log_id = self.identity.log_id

    def _locked(self) -> IO[Any]:
        stream = (self.path / "lock").open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read(32).strip()
            stream.close()
            raise LogError(
                f"{self.path}: this process has the log folder open already"
                if owner == str(os.getpid())
                else f"{self.path}: another process uses this log folder{f' (process {owner})' if owner else ''}; "
                "a folder has one writer"
            ) from None
        # Who it is, for others to read: on a full disk they do without.
        with contextlib.suppress(OSError):
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"{os.getpid()}\n".encode())
        _locked.add(self)
        return stream

    def close(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.close()
        _locked.discard(self)

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.segments_path)
        except FileNotFoundError:
            return []
        return sorted(int(m[1]) for m in (re.fullmatch(r"(\d{12})\.log", name) for name in names) if m)

    def segment_path(self, number: int) -> Path:
        return self.segments_path / f"{number:012d}.log"

    def bytes_of(self, numbers: list[int]) -> int:
        """Bytes of some segments together; one that is gone has none."""
        total = 0
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                total += self.segment_path(number).stat().st_size
        return total

    def numbers(self) -> list[int]:
        """Numbers of the segments that are there, oldest first."""
        return self._numbers()

    def segment(self, number: int) -> Segment:
        return Segment(self.segment_path(number), self.log_id, number, live=not self.write)

    def segments(self) -> Iterator[Segment]:
        """The segments, oldest first, each closed when the next is asked for."""
        for number in self._numbers():
            try:
                segment = self.segment(number)
            except FileNotFoundError:
                continue  # compacted meanwhile
            try:
                yield segment
            finally:
                segment.close()

    def begins(self) -> int:
        """First event that history must still have: retention has dropped those before it, and says so here."""
        path = self.path / "begins.json"
        try:
            return int(msgspec.json.decode(path.read_bytes(), type=dict[str, int])["sequence"])
        except FileNotFoundError:
            return 0
        except (msgspec.DecodeError, KeyError) as error:
            raise LogError(f"{path}: cannot be read: {error}") from None

    def begin_at(self, sequence: int) -> None:
        """History may begin with an event from now on; before the ones before it are removed."""
        if sequence > self.begins():
            write_whole(self.path / "begins.json", msgspec.json.encode({"sequence": sequence}))

    def remove_spares(self) -> None:
        """Preallocated segments that a killed process left behind; only while the folder is locked."""
        for path in self.segments_path.glob("spare-*"):
            path.unlink(missing_ok=True)

    def seal(self, number: int, end: int, last_sequence: int) -> None:
        """Cut an open segment behind its last record, for good: what a crash left there is no record.

        Where more than that is lost (damage, a power cut's hole) the file as it was is kept as `N.log.cut`.
        """
        path = self.segment_path(number)
        segment = self.segment(number)
        try:
            synced = segment.mark.synced if segment.mark is not None else native.HEAD
            keep = end < synced or segment.following(end)[1] > 0
            headless = segment.head is None
            first_sequence = segment.scan().first_sequence if headless else None
        finally:
            segment.close()
        if keep:
            shutil.copyfile(path, path.with_suffix(".log.cut"))
        with path.open("r+b") as stream:
            if os.fstat(stream.fileno()).st_size < end:
                stream.truncate(end)
            with mmap.mmap(stream.fileno(), 0) as data:
                # The records first: a mark says that what is before it is on disk.
                data.flush()
                if headless and first_sequence is not None:
                    native.put_head(memoryview(data), self.log_id, number, first_sequence, 0)
                native.put_sealed(memoryview(data), end, last_sequence)
                data.flush()
            stream.truncate(end)
            os.fsync(stream.fileno())

    def check(self, segment: Segment) -> tuple[int, list[Damage], Any]:
        """How far a segment can be read: (offset, damages, native.Scan).

        Raises LogError where reading must stop although readable records follow, and no power cut explains it.
        """
        damages: list[Damage] = []
        if segment.head is None:
            damages.append(Damage(path=segment.path, kind="header", offset=0, bytes=min(native.HEAD, segment.size)))
        scan = segment.scan()
        sealed = segment.sealed_end
        while True:
            end = scan.end
            if sealed is not None and end == sealed:
                return end, damages, scan
            first, following = segment.following(end + 8)
            # Another process may have written on while this one read.
            more = segment.scan(end) if following and segment.refresh(end) else None
            if more is None or not more.records:
                break
            scan = _joined(scan, more)
        synced = segment.mark.synced if segment.mark is not None else native.HEAD
        if following:
            kind = "unsynced" if end >= synced and _never_written(segment.data, end, first) else "damaged"
            damage = Damage(path=segment.path, kind=kind, offset=end, bytes=first - end, following=following)
            if kind == "damaged":
                raise LogError(f"{damage}. Nothing was changed; restore the file from a copy")
            return end, [*damages, damage], scan
        limit = sealed if sealed is not None else segment.size
        if end < synced or sealed is not None:
            damages.append(Damage(path=segment.path, kind="damaged", offset=end, bytes=max(limit, synced) - end))
        elif segment.head is not None and sealed is None and segment.size != segment.head.capacity:
            lost = max(segment.head.capacity - end, 0)
            damages.append(Damage(path=segment.path, kind="short", offset=end, bytes=lost))
        elif limit > end and any_byte(segment.data[end:limit]):
            damages.append(Damage(path=segment.path, kind="tail", offset=end, bytes=limit - end))
        return end, damages, scan


def _joined(scan: Any, more: Any) -> Any:
    """A scan and the one that went on where it ended."""
    times = [t for t in (scan.last_ingest_time, more.last_ingest_time) if t is not None]
    return more._replace(
        records=scan.records + more.records,
        events=scan.events + more.events,
        scores=scan.scores + more.scores,
        first_sequence=scan.first_sequence if scan.events else more.first_sequence,
        last_sequence=more.last_sequence if more.events else scan.last_sequence,
        last_ingest_time=max(times, default=None),
    )


def readable_records(data: Any, log_id: int, number: int, start: int) -> tuple[int, int]:
    """(offset of the first record that checks at or behind `start`, how many records check from there on)."""
    first = at = native.resync(data, log_id, number, start)
    count = 0
    while at < len(data):
        found = native.scan(data, log_id, number, at)
        count += found.records
        at = native.resync(data, log_id, number, found.end + 8)
    return first, count


def any_byte(data: Any) -> bool:
    """Whether any byte is not zero."""
    return any(bytes(data[at : at + CHUNK]).strip(b"\0") for at in range(0, len(data), CHUNK))


def _never_written(data: Any, begin: int, end: int) -> bool:
    """Whether what lies in begin..end never reached the disk: the rest of the disk's block at `begin` is zero, or a
    whole block behind it is."""
    at = -(-(begin + 1) // BLOCK) * BLOCK
    if not any_byte(data[begin : min(at, end)]):
        return True
    while at + BLOCK <= end:
        if not any_byte(data[at : at + BLOCK]):
            return True
        at += BLOCK
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
