"""Compaction (control path): closed segments become Parquet; those that are safe there and in a snapshot are removed.

It runs in a child process beside the engine, one round of a folder at a time (keeper.one_round, held by the caller).
What must stay true: a segment is removed only when its batch was read back and found equal, record for record, its
manifest is written, and the newest complete snapshot has applied all of its events. A kill at any point loses nothing:
files without a manifest are removed by the next round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..errors import LogError
from .batches import FORMAT, Batch, BatchSegment, BatchStore, Part, unavailable, write_batch
from .log_folder import LogFolder, Segment

__all__ = ["CompactionReport", "compact", "newest_snapshot"]

BATCH_BYTES = 64 << 20
WRITING = "writing.json"

Progress = Callable[[int, int], None]


class CompactionReport(msgspec.Struct, kw_only=True):
    """What a round did. reason: why it did nothing; kept: closed segments that wait for a snapshot."""

    to: str = ""
    batches: int = 0
    segments: int = 0
    events: int = 0
    scores: int = 0
    segment_bytes: int = 0
    parquet_bytes: int = 0
    whole: int = 0
    removed: int = 0
    kept: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return self.reason
        parts = [f"nothing new to compact in {self.to}"]
        if self.batches:
            parts = [
                f"{self.segments} segments with {self.events:,} events and {self.scores:,} scores "
                f"({self.segment_bytes:,} bytes) are Parquet in {self.to} ({self.parquet_bytes:,} bytes)"
            ]
        if self.removed:
            parts.append(f"{self.removed} segments removed")
        if self.kept:
            parts.append(f"{self.kept} stay until a snapshot holds their events")
        return "; ".join(parts)


def compact(
    path: str | Path, uri: str | None = None, *, batch_bytes: int = BATCH_BYTES, progress: Progress | None = None
) -> CompactionReport:
    """Turn the closed segments of a log folder into Parquet; the folder may be in use. progress: (bytes done, of).

    uri: a folder or an object store (s3://bucket/prefix), kept in the folder from then on; by default DIR/parquet.
    batch_bytes: segments go together into a batch of at most so many bytes; a batch is in memory as a whole.
    Raises LogError where a segment cannot be read or the place not be written; what is there stays as it was.
    """
    reason = unavailable()
    if reason is not None:
        return CompactionReport(reason=reason)
    folder = LogFolder(path)
    numbers = folder.numbers()
    store = BatchStore.of(folder, uri)
    clear_leftovers(folder, store)
    batches = store.batches()
    report = CompactionReport(to=str(store))
    compacted = {segment.number for batch in batches for segment in batch.segments}
    behind = max(compacted, default=-1)
    todo = [number for number in numbers[:-1] if number > behind]
    if batches and todo and todo[0] != behind + 1:
        raise LogError(
            f"{folder.segments_path}: segment {behind + 1:012d}.log is missing behind batch {batches[-1].name}"
        )
    total = folder.bytes_of(todo)
    names = {batch.name for batch in batches}
    for segments in _groups(folder, todo, batch_bytes):
        try:
            batch = _write(folder, store, segments, names)
        finally:
            for segment in segments:
                segment.close()
        names.add(batch.name)
        batches.append(batch)
        report.batches += 1
        report.segments += len(batch.segments)
        report.events += batch.events
        report.scores += batch.records - batch.events
        report.whole += batch.whole
        report.segment_bytes += sum(segment.size for segment in segments)
        report.parquet_bytes += sum(file.bytes for file in batch.files)
        if progress is not None:
            progress(report.segment_bytes, max(total, report.segment_bytes))
    report.removed, report.kept = _remove_segments(folder, batches)
    return report


def clear_leftovers(folder: LogFolder, store: BatchStore) -> None:
    """Remove what a killed round left behind. Only one round of a folder at a time."""
    marker = folder.path / WRITING
    if marker.exists():
        store.remove_leftovers()
        marker.unlink()


@contextlib.contextmanager
def writing(folder: LogFolder) -> Iterator[None]:
    """While files are written that no manifest names yet: whoever is killed in here has left some."""
    marker = folder.path / WRITING
    marker.write_bytes(b"{}")
    yield
    marker.unlink(missing_ok=True)


def _groups(folder: LogFolder, numbers: list[int], batch_bytes: int) -> Iterator[list[Segment]]:
    """Closed segments that go together: with the same schemas, of at most so many bytes. The caller closes them."""
    group: list[Segment] = []
    prelude: list[bytes] | None = None
    size = 0
    for number in numbers:
        try:
            segment = folder.segment(number)
        except FileNotFoundError:
            break  # a start has set it aside, behind a power cut's hole
        if segment.sealed_end is None or segment.head is None or segment.size < segment.sealed_end:
            segment.close()
            break  # its end is still being written, or is damaged: recovery will say
        mine = segment.prelude().texts
        if group and (mine != prelude or size + segment.size > batch_bytes):
            yield group
            group, size = [], 0
        prelude = mine
        group.append(segment)
        size += segment.size
    if group:
        yield group


def _write(folder: LogFolder, store: BatchStore, segments: list[Segment], names: set[str]) -> Batch:
    """One batch of some segments."""
    parts, entries, scans = [], [], []
    schemas: list[str] = []
    for segment in segments:
        end = segment.sealed_end or 0
        assert segment.head is not None
        scan = segment.scan()
        if scan.end != end:
            raise LogError(f"{segment.path} at offset {scan.end}: a record does not check; it was not compacted")
        prelude = segment.prelude()
        parts.append(Part(segment.path, segment.data, segment.log_id, segment.number, prelude.end, end))
        schemas = [text.decode() for text in prelude.texts]
        first = segment.head.first_sequence
        last = scan.last_sequence if scan.events else first - 1
        entries.append(BatchSegment(segment.number, first, last, 0, 0, prelude.marks))
        scans.append(scan)
    times = [scan.last_ingest_time for scan in scans if scan.last_ingest_time is not None]
    first, last = entries[0].first_sequence, entries[-1].last_sequence
    name = f"{first:020d}-{max(last, 0):020d}"
    if last < first or name in names:
        name += f"-{entries[0].number}"  # scores alone
    draft = Batch(
        format=FORMAT,
        log_id=folder.log_id,
        name=name,
        first_sequence=first,
        last_sequence=last,
        last_ingest_time=max(times, default=None),
        newest_event_time=None,
        events=0,
        records=0,
        whole=0,
        crc32c=0,
        segments=entries,
        schemas=schemas,
        files=[],
    )
    with writing(folder):
        return write_batch(store, draft, parts)


def _remove_segments(folder: LogFolder, batches: list[Batch]) -> tuple[int, int]:
    """Remove the segments whose batch is complete and that a snapshot holds: (removed, kept), oldest first."""
    snapshot = newest_snapshot(folder)
    there = set(folder.numbers())
    removed = kept = 0
    for batch in batches:
        for segment in batch.segments:
            if segment.number not in there:
                continue
            if snapshot is None or segment.last_sequence > snapshot["sequence"]:
                kept += 1
                continue
            folder.segment_path(segment.number).unlink(missing_ok=True)
            removed += 1
    return removed, kept


def newest_snapshot(folder: LogFolder) -> dict[str, Any] | None:
    """The position of the newest complete snapshot of this log: sequence, watermarks and so on; None where none is."""
    if not folder.snapshots_path.is_dir():
        return None
    names = sorted((p.name for p in folder.snapshots_path.iterdir() if p.name[:20].isdigit()), reverse=True)
    for name in names:
        try:
            manifest = json.loads((folder.snapshots_path / name / "manifest.json").read_bytes())["manifest"]
            position = manifest["position"]
            files = [file["path"] for state in manifest["stores"].values() for file in state["files"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if position["log_id"] == folder.log_id and all((folder.snapshots_path / file).exists() for file in files):
            return dict(position)
    return None
