"""Retention (control path): history that is older than asked for is removed, oldest first.

What must stay true: what goes is whole batches and segments from the beginning, so that history has no hole; all their
events are older than the cut-off by event time and in the newest complete snapshot; the newest segment stays.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path

import msgspec

from .._ext.log_columns import RecordColumns
from ..definitions.durations import duration_us
from ..errors import LogError
from ..timestamp import Timestamp
from .batches import Batch, BatchStore, newest_event_time, schema_layouts
from .compaction import clear_leftovers, newest_snapshot, writing
from .log_folder import LogFolder, Segment, located
from .schemas import record_schemas

__all__ = ["RetentionReport", "retain"]


class RetentionReport(msgspec.Struct, kw_only=True):
    """What was removed. before: events older than that could go (microseconds); first_sequence: where history begins
    now; kept: why what follows stays."""

    batches: int = 0
    segments: int = 0
    events: int = 0
    before: int | None = None
    first_sequence: int | None = None
    kept: str = ""

    def __str__(self) -> str:
        if self.before is None:
            return f"nothing removed: {self.kept}"
        removed = f"nothing is all before {Timestamp(self.before)}"
        if self.batches or self.segments:
            removed = f"removed {self.batches} batches and {self.segments} segments with {self.events:,} events"
        begins = "" if self.first_sequence is None else f"; history begins at event {self.first_sequence}"
        return f"{removed}{begins}" + (f" ({self.kept})" if self.kept else "")


def retain(path: str | Path, keep: int | str | timedelta, *, now: int | None = None) -> RetentionReport:
    """Remove the batches and segments whose events are all older than `keep` before now; the folder may be in use.

    keep: microseconds, or a length such as "90d". Now is the wall clock, or the newest watermark where that is behind
    it; now: in place of the wall clock. Events that a repeated event id may still ask for stay as well.
    Raises LogError where the folder cannot be read.
    """
    keep_us = keep if isinstance(keep, int) else duration_us(keep)
    folder = LogFolder(path)
    snapshot = newest_snapshot(folder)
    if snapshot is None or not snapshot["watermarks"]:
        return RetentionReport(kept="there is no complete snapshot yet, so history is all there is of the state")
    clock = now if now is not None else time.time_ns() // 1000
    reach = _id_reach(folder)
    before = min(clock, max(snapshot["watermarks"].values())) - max(keep_us, reach)
    covered = int(snapshot["sequence"])
    store = BatchStore.of(folder)
    clear_leftovers(folder, store)
    report = RetentionReport(before=before)
    if reach > keep_us:
        report.kept = f"event ids are remembered for {reach / 86_400e6:.4g} days, which is longer"
    numbers = folder.numbers()
    batches = store.batches()
    for batch in batches:
        report.first_sequence = batch.first_sequence
        if not _may_go(batch.newest_event_time, batch.last_sequence, before, covered):
            return report
        if numbers and batch.segments[-1].number >= numbers[-1]:
            return report
        folder.begin_at(batch.last_sequence + 1)
        _remove(folder, store, batch)
        report.batches += 1
        report.events += batch.events
    compacted = batches[-1].segments[-1].number if batches else -1
    for number in numbers:
        if number <= compacted:
            continue
        segment = folder.segment(number)
        try:
            report.first_sequence = segment.head.first_sequence if segment.head is not None else report.first_sequence
            if segment.sealed_end is None or segment.mark is None or number == numbers[-1]:
                return report
            last = segment.mark.last_sequence
            if last > covered:
                return report
            newest, events = _newest_of(segment)
        finally:
            segment.close()
        if not _may_go(newest, last, before, covered):
            return report
        folder.begin_at(last + 1)
        segment.path.unlink(missing_ok=True)
        report.segments += 1
        report.events += events
    return report


def _may_go(newest: int | None, last_sequence: int, before: int, covered: int) -> bool:
    return last_sequence <= covered and (newest is None or newest < before)


def _remove(folder: LogFolder, store: BatchStore, batch: Batch) -> None:
    """A batch, and first its segments that are still there: while they are, the batch still names them."""
    for segment in batch.segments:
        folder.segment_path(segment.number).unlink(missing_ok=True)
    with writing(folder):
        store.remove_batch(batch)


def _newest_of(segment: Segment) -> tuple[int | None, int]:
    """(newest event time, number of events) of a closed segment."""
    prelude = segment.prelude()
    schemas = prelude.schemas
    columns = RecordColumns(schema_layouts(schemas), record_schemas(schemas))
    end = segment.sealed_end or 0
    try:
        columns.count(segment.data, segment.log_id, segment.number, prelude.end, end)
    except LogError as error:
        raise located(segment.path, error) from None
    columns.take(segment.data, segment.log_id, segment.number, prelude.end, end)
    return newest_event_time(schemas, columns)


def _id_reach(folder: LogFolder) -> int:
    """How far back event ids are remembered, in microseconds: their events must be there to be read again."""
    try:
        layouts = json.loads((folder.path / "layouts.json").read_bytes())
        options = [event["options"] for event in layouts["events"]]
    except FileNotFoundError:
        return 0
    except (ValueError, LookupError, TypeError) as error:
        raise LogError(f"{folder.path / 'layouts.json'}: cannot be read: {error}") from None
    return max((o["lateness"] + o["retry_window"] for o in options if o.get("event_id") is not None), default=0)
