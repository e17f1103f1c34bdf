"""The folder of an event log (control path): its identity, its lock, its segments, and what of them can be read.

    DIR/log.json            format and log id
    DIR/lock                held by the one process that writes
    DIR/layouts.json        event types and views, so that a child process can rebuild the state
    DIR/segments/N.log      records (ext/event_record.h), oldest first
    DIR/snapshots/          state as of a sequence (features/snapshot.py)
    DIR/parquet/            compacted history, unless it is kept elsewhere (compaction.py)

What must stay true: nothing damaged is read as data. A segment is read up to the first record that does not check; where
readable records follow, reading on would leave out events, so it is refused with file, offset and how many follow.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from .._ext import log as native
from ..errors import LogError
from .schemas import EventSchema, ScoreSchema, read_schema

__all__ = ["Damage", "LogFolder", "Segment"]

FORMAT = native.FORMAT
BLOCK = 512  # what a disk writes whole


class LogIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What log.json holds."""

    format: int
    log_id: int
    created: int


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a segment that are no records. kind: "tail" (nothing readable follows: what a crash leaves), "unsynced"
    (a hole behind what was on disk: a power cut), "damaged" (readable records follow), "header"."""

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
        }[self.kind]
        follow = f"; {self.following} readable records follow" if self.following else ""
        return f"{self.path} at offset {self.offset}: {what} ({self.bytes} bytes){follow}"


class Segment:
    """One segment file, mapped for reading. `data` is a memoryview; keep the Segment while it is used."""

    def __init__(self, path: Path, log_id: int, number: int) -> None:
        self.path = path
        self.log_id = log_id
        self.number = number
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            self._map = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) if size else None
        self.data: Any = memoryview(self._map) if self._map is not None else memoryview(b"")
        if self._map is not None and hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)
        self.size = len(self.data)
        self.start = native.HEAD
        head = native.segment_head(self.data)
        if head is not None and head.whole and head.format > FORMAT:
            raise LogError(
                f"{path}: written by a newer version of Penstock (format {head.format}, this one reads up to {FORMAT})"
            )
        self.head = head if head is not None and head.whole else None
        self.mark = native.segment_mark(self.data)
        self.sealed_end: int | None = self.mark.end if self.mark is not None and self.mark.end else None

    def scan(self, start: int | None = None) -> Any:
        """Check the records from an offset on (native.Scan)."""
        return native.scan(self.data[: self.sealed_end], self.log_id, self.number, start or self.start)

    def schemas(self) -> list[EventSchema | ScoreSchema]:
        """The schemas at the segment's start, by number."""
        found: list[EventSchema | ScoreSchema] = []
        at = self.start
        while (record := native.record_at(self.data, self.log_id, self.number, at)) is not None:
            if record.kind != "schema":
                break
            found.append(read_schema(record.body))
            at += record.length
        return found

    def watermarks(self) -> dict[str, int]:
        """Watermark of each event type where the segment begins; types without one are left out."""
        at = self.start
        names: list[str] = []
        while (record := native.record_at(self.data, self.log_id, self.number, at)) is not None:
            if record.kind == "schema":
                schema = read_schema(record.body)
                if isinstance(schema, EventSchema):
                    names.append(schema.name)
            elif record.kind == "mark":
                values = memoryview(record.body).cast("q").tolist()
                return {n: v for n, v in zip(names, values) if v > -(1 << 61)}
            else:
                break
            at += record.length
        return {}

    def following(self, start: int) -> tuple[int, int]:
        """(offset of the first record that checks behind `start`, how many records check from there on)."""
        data = self.data
        first = at = native.resync(data, self.log_id, self.number, start)
        count = 0
        while at < self.size:
            found = native.scan(data, self.log_id, self.number, at)
            count += found.records
            at = native.resync(data, self.log_id, self.number, found.end + 8)
        return first, count

    def close(self) -> None:
        self.data.release()
        if self._map is not None:
            self._map.close()


class LogFolder:
    """A log folder. Opened for writing it is locked for this process; for reading it may be written by another."""

    def __init__(self, path: str | Path, *, write: bool = False) -> None:
        self.path = Path(path)
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
                    write_whole(identity, msgspec.json.encode(made))
            except OSError as error:
                self.close()
                raise LogError(f"{self.path}: cannot be used as a log folder: {error.strerror}") from None
            except LogError:
                self.close()
                raise
        try:
            self.identity = msgspec.json.decode(identity.read_bytes(), type=LogIdentity)
        except FileNotFoundError:
            self.close()
            raise LogError(f"{self.path}: no event log here (log.json is missing)") from None
        except (OSError, msgspec.DecodeError) as error:
            self.close()
            raise LogError(f"{identity}: cannot be read: {error}") from None
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
                f"{self.path}: another process uses this log folder{f' (process {owner})' if owner else ''}; "
                "a folder has one writer"
            ) from None
        stream.seek(0)
        stream.truncate()
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        return stream

    def close(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.segments_path)
        except FileNotFoundError:
            return []
        return sorted(int(m[1]) for m in (re.fullmatch(r"(\d{12})\.log", name) for name in names) if m)

    def segment_path(self, number: int) -> Path:
        return self.segments_path / f"{number:012d}.log"

    def numbers(self) -> list[int]:
        """Numbers of the segments that are there, oldest first."""
        return self._numbers()

    def segment(self, number: int) -> Segment:
        return Segment(self.segment_path(number), self.log_id, number)

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

    def remove_spares(self) -> None:
        """Preallocated segments that a killed process left behind; only while the folder is locked."""
        for path in self.segments_path.glob("spare-*"):
            path.unlink(missing_ok=True)

    def seal(self, number: int, end: int, last_sequence: int) -> None:
        """Cut an open segment behind its last record, for good: what a crash left there is no record."""
        path = self.segment_path(number)
        with path.open("r+b") as stream:
            with mmap.mmap(stream.fileno(), 0) as data:
                native.put_sealed(memoryview(data), end, last_sequence)
                data.flush()
            stream.truncate(end)
            os.fsync(stream.fileno())

    def check(self, segment: Segment, *, last: bool) -> tuple[int, list[Damage], Any]:
        """How far a segment can be read: (offset, damages, native.Scan). Raises LogError where reading must stop although
        readable records follow in it. `last`: no segment with records follows."""
        damages: list[Damage] = []
        if segment.head is None:
            damages.append(Damage(path=segment.path, kind="header", offset=0, bytes=native.HEAD))
        scan = segment.scan()
        end = scan.end
        sealed = segment.sealed_end
        if sealed is not None and end == sealed:
            return end, damages, scan
        limit = sealed if sealed is not None else segment.size
        first, following = segment.following(end + 8)
        if following:
            synced = segment.mark.synced if segment.mark is not None else native.HEAD
            hole = sealed is None and end >= synced and _never_written(segment.data, end, first)
            kind = "unsynced" if hole else "damaged"
            damage = Damage(path=segment.path, kind=kind, offset=end, bytes=first - end, following=following)
            if kind == "damaged" or not last:
                raise LogError(f"{damage}. Nothing was changed; restore the file from a copy, or start without its state")
            return end, [*damages, damage], scan
        if sealed is not None or np.frombuffer(segment.data[end:limit], dtype=np.uint8).any():
            damages.append(Damage(path=segment.path, kind="tail", offset=end, bytes=limit - end))
        return end, damages, scan


def _never_written(data: Any, begin: int, end: int) -> bool:
    """Whether a whole block of the disk within begin..end is zero: it never reached the disk."""
    at = -(-begin // BLOCK) * BLOCK
    while at + BLOCK <= end:
        if not any(data[at : at + BLOCK]):
            return True
        at += BLOCK
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
