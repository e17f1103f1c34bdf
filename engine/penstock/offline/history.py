"""History (control path): compacted Parquet, then segments, as pieces of records in order of sequence.

What must stay true: whoever replays reads the same records from either form, each event once; a piece ends where its
segment can be read to; and where history has a hole, that is an error that names the events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LogError
from .batches import Batch, BatchStore, Records, records_from_batch
from .log_folder import Damage, LogFolder, Segment
from .schemas import EventSchema, ScoreSchema

__all__ = ["History", "Piece"]

LOOKS = 5  # at a folder that is compacted meanwhile


class Piece:
    """Records that lie together: a segment, or a compacted batch as records again."""

    def __init__(
        self,
        path: Path | str,
        data: Any,
        log_id: int,
        number: int,
        start: int,
        end: int,
        schemas: list[EventSchema | ScoreSchema],
    ) -> None:
        self.path = path
        self.data = data
        self.log_id = log_id
        self.number = number
        self.start = start
        self.end = end
        self.schemas = schemas


class _Known:
    """What is known of one segment, or of a batch of them, without reading it again.

    first: sequence where it begins; last: of its last event; marks: watermarks where it begins; starts: (sequence,
    watermarks) at every segment's start in it.
    """

    def __init__(
        self,
        number: int,
        last_number: int,
        first: int | None,
        last: int | None,
        last_ingest_time: int | None,
        starts: list[tuple[int, dict[str, int]]],
        schemas: list[EventSchema | ScoreSchema],
        end: int = 0,
        batch: Batch | None = None,
    ) -> None:
        self.number = number
        self.last_number = last_number
        self.first = first
        self.last = last
        self.last_ingest_time = last_ingest_time
        self.starts = starts
        self.marks = starts[0][1]
        self.schemas = schemas
        self.end = end
        self.batch = batch

    @staticmethod
    def of_segment(number: int, segment: Segment, end: int, scan: Any) -> _Known:
        first = segment.head.first_sequence if segment.head is not None else scan.first_sequence
        last = segment.mark.last_sequence if segment.mark is not None else None
        return _Known(
            number,
            number,
            first,
            scan.last_sequence if scan is not None else last,
            scan.last_ingest_time if scan is not None else None,
            [(first or 0, segment.watermarks())],
            segment.schemas(),
            end,
        )

    @staticmethod
    def of_batch(batch: Batch) -> _Known:
        return _Known(
            batch.number,
            batch.segments[-1].number,
            batch.first_sequence,
            batch.last_sequence if batch.events else None,
            batch.last_ingest_time,
            [(segment.first_sequence, batch.marks_of(segment)) for segment in batch.segments],
            batch.read_schemas(),
            batch=batch,
        )


def _follow(stopped: Damage | None, segment: Segment) -> str:
    return f"{stopped}; {segment.scan().records} readable records follow in {segment.path.name}, which was on disk"


class History:
    """All events of a log folder. A folder that another process writes may be read; it is read as of now."""

    def __init__(self, folder: LogFolder) -> None:
        self.folder = folder
        self.store = BatchStore.of(folder)
        self.known: list[_Known] = []
        self.beyond: list[int] = []
        self.first_sequence = -1
        self.last_sequence = -1
        self.last_ingest_time = 0
        self.last_number = 0

    @property
    def batches(self) -> list[Batch]:
        """The compacted batches, oldest first."""
        return [known.batch for known in self.known if known.batch is not None]

    def check(self) -> list[Damage]:
        """Look at every batch's manifest, every segment's header and end, and read the open ones; returns the damages
        at their ends.

        Raises LogError where records that can be read follow ones that cannot, or events are missing.
        """
        for look in range(LOOKS):
            try:
                return self._check()
            except FileNotFoundError:
                if look == LOOKS - 1:
                    raise
        raise AssertionError

    def _check(self) -> list[Damage]:
        damages: list[Damage] = []
        # The segments first: one that is compacted and removed meanwhile is then in a batch that is seen.
        numbers = self.folder.numbers()
        batches = [_Known.of_batch(batch) for batch in self.store.batches()]
        compacted = max((batch.last_number for batch in batches), default=-1)
        self.known, self.beyond = [], []
        self.last_ingest_time = 0
        stopped: Damage | None = None
        cut = False
        newest = numbers[-1] if numbers else 0
        for number in numbers:
            if number <= compacted:
                continue
            segment = self.folder.segment(number)
            try:
                if cut:
                    # It is synced only once the one before it is: what was on disk is no part of a power cut's hole.
                    if segment.mark is not None and segment.mark.synced > segment.start:
                        raise LogError(_follow(stopped, segment))
                    self.beyond.append(number)
                    continue
                whole = (
                    segment.sealed_end is not None and segment.head is not None and segment.size >= segment.sealed_end
                )
                if whole and number != newest:
                    known = _Known.of_segment(number, segment, segment.sealed_end or 0, None)
                else:
                    end, found, scan = self.folder.check(segment)
                    damages += found
                    if scan.events == 0 and not found and segment.head is None:
                        continue
                    known = _Known.of_segment(number, segment, end, scan)
                    if stopped is not None and scan.records:
                        raise LogError(_follow(stopped, segment))
                    stopped = next((d for d in found if d.kind != "header"), stopped)
                    synced = segment.mark.synced if segment.mark is not None else end + 1
                    # A power cut behind the last sync takes what follows with it; so does a hole in the newest segment.
                    cut = stopped is not None and segment.sealed_end is None and end >= synced
            finally:
                segment.close()
            self.known.append(known)
        self.known = batches + self.known
        for before, after in zip(self.known, self.known[1:]):
            if after.number != before.last_number + 1:
                missing = (
                    f"events {before.last + 1} to {after.first - 1}; "
                    if before.last is not None and after.first
                    else ""
                )
                raise LogError(
                    f"{self.folder.segments_path}: segment {before.last_number + 1:012d}.log is missing "
                    f"({missing}between {self._called(before)} and {self._called(after)})"
                )
        times = [known.last_ingest_time for known in self.known if known.last_ingest_time is not None]
        self.last_ingest_time = max(times, default=0)
        lasts = [known.last for known in self.known if known.last is not None]
        # A segment without events says by its first sequence which were before it.
        lasts += [known.first - 1 for known in self.known if known.first is not None]
        self.last_sequence = max(lasts, default=-1)
        self.first_sequence, self.last_number = -1, 0
        if self.known:
            self.first_sequence = (self.known[0].first or 0) if self.last_sequence >= 0 else -1
            self.last_number = self.known[-1].last_number
        if self.first_sequence > self.folder.begins():
            raise LogError(
                f"{self.folder.segments_path}: events {self.folder.begins()} to {self.first_sequence - 1} are missing: "
                f"history begins with {self._called(self.known[0])}"
            )
        return damages

    def _called(self, known: _Known) -> str:
        return f"batch {known.batch.name} of {self.store}" if known.batch is not None else f"{known.number:012d}.log"

    def seal(self) -> list[int]:
        """Close what a crash left open, so that it ends where it can be read to; the folder is locked.

        Returns the numbers of segments behind a power cut's hole: their files are kept as `N.log.cut`.
        """
        for known in self.known:
            if known.batch is not None:
                continue
            segment = self.folder.segment(known.number)
            sealed = segment.sealed_end
            open_end = sealed is None or segment.size != sealed or known.end < sealed
            segment.close()
            if open_end:
                self.folder.seal(known.number, known.end, known.last if known.last is not None else -1)
        for number in self.beyond:
            path = self.folder.segment_path(number)
            path.rename(path.with_suffix(".log.cut"))
        return self.beyond

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """The pieces that may hold events `first` to `last`, in order; each is closed when the next is asked for.

        A batch is in memory as a whole while its piece is used. Raises LogError where one cannot be read.
        """
        compacted: tuple[Batch, Records] | None = None
        for i, known in enumerate(self.known):
            behind = self.known[i + 1].first if i + 1 < len(self.known) else None
            if behind is not None and behind <= first:
                continue
            if known.first is not None and known.first > last:
                return
            if known.batch is not None:
                records = records_from_batch(self.store, known.batch)
                yield self._piece(known.batch, records, records.start, records.end)
                del records
                continue
            try:
                segment = self.folder.segment(known.number)
            except FileNotFoundError:
                # Compacted since check(): its records out of its batch.
                if compacted is None or known.number > compacted[0].segments[-1].number:
                    batch = self._batch_with(known.number)
                    compacted = batch, records_from_batch(self.store, batch)
                batch, records = compacted
                entry = next(s for s in batch.segments if s.number == known.number)
                start = int(records.offsets[entry.first_record])
                yield self._piece(batch, records, start, int(records.offsets[entry.first_record + entry.records]))
                continue
            compacted = None
            try:
                yield Piece(
                    segment.path, segment.data, segment.log_id, known.number, segment.start, known.end, known.schemas
                )
            finally:
                segment.close()

    def _piece(self, batch: Batch, records: Records, start: int, end: int) -> Piece:
        path = f"{self.store}/batches/{batch.name}.json"
        return Piece(path, records.data, batch.log_id, batch.number, start, end, batch.read_schemas())

    def _batch_with(self, number: int) -> Batch:
        for batch in self.store.batches():
            if batch.number <= number <= batch.segments[-1].number:
                return batch
        raise LogError(f"{self.folder.segment_path(number)}: the segment was removed while history was read")

    def watermarks(self) -> dict[str, int]:
        """Watermarks where the last segment begins."""
        return self.known[-1].starts[-1][1] if self.known else {}

    def first_watermarks(self) -> dict[str, int]:
        """Watermarks where history begins: what retention removed is not newer. A window at T is whole where T less its
        length is not before its source's."""
        return self.known[0].marks if self.known else {}

    def last_start(self) -> int:
        """First sequence of the last segment, to which watermarks() belong."""
        return self.known[-1].starts[-1][0] if self.known else 0

    def first_sequence_with(self, behind: Callable[[dict[str, int]], bool]) -> int:
        """First sequence of the newest segment whose watermarks at its start are far enough `behind`, or the first."""
        for known in reversed(self.known):
            for first, marks in reversed(known.starts):
                if behind(marks):
                    return first
        return max(self.first_sequence, 0)
