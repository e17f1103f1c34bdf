"""History (control path): compacted Parquet, then segments, as pieces of records in order of sequence.

What must stay true: whoever replays reads the same records from either form, each event once; a piece ends where its
segment can be read to; and where history has a hole, that is an error that names the events. Compaction, erasure and
retention may work on the folder meanwhile, also during a start: whoever finds a file gone looks again here
(look_again), and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LogError
from .batches import Batch, BatchStore, Records, records_from_batch
from .log_folder import Damage, LogFolder, Segment
from .schemas import EventSchema, ScoreSchema, record_schemas

__all__ = ["History", "Piece", "look_again"]

LOOKS = 8  # at a folder that is worked on meanwhile
PAUSE = 0.02  # seconds before the second look, twice as long before each further one

T = TypeVar("T")


class _Gone(Exception):
    """What was seen at one look was no longer there when it was read; the text says what."""


def look_again(look: Callable[[], T]) -> T:
    """Look at a folder until nothing that was seen has gone meanwhile. Raises what the last look raised."""
    for turn in range(LOOKS):
        try:
            return look()
        except (FileNotFoundError, _Gone) as error:
            if turn == LOOKS - 1:
                raise LogError(f"{error}; it was looked for {LOOKS} times") from None
            time.sleep(PAUSE * 2**turn)
    raise AssertionError


class Piece:
    """Records that lie together: a segment, or a compacted batch as records again. records: what they must be like;
    prelude: the offset where the schemas and the mark end."""

    def __init__(
        self,
        path: Path | str,
        data: Any,
        log_id: int,
        number: int,
        start: int,
        end: int,
        schemas: list[EventSchema | ScoreSchema],
        prelude: int,
    ) -> None:
        self.records = record_schemas(schemas, prelude)
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
        prelude: int = 0,
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
        self.prelude = prelude
        self.end = end
        self.batch = batch

    @staticmethod
    def of_segment(number: int, segment: Segment, end: int, scan: Any) -> _Known:
        first = segment.head.first_sequence if segment.head is not None else scan.first_sequence
        last = segment.mark.last_sequence if segment.mark is not None else None
        prelude = segment.prelude()
        return _Known(
            number,
            number,
            first,
            scan.last_sequence if scan is not None else last,
            scan.last_ingest_time if scan is not None else None,
            [(first or 0, segment.watermarks())],
            prelude.schemas,
            prelude.end,
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
        return look_again(self._check)

    def _check(self) -> list[Damage]:
        damages: list[Damage] = []
        # The segments first: one that is compacted and removed meanwhile is then in a batch that is seen.
        begins = self.folder.begins()
        numbers = self.folder.numbers()
        batches = [_Known.of_batch(batch) for batch in self._batches()]
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
                raise self._gone(
                    begins,
                    f"{self.folder.segments_path}: segment {before.last_number + 1:012d}.log is missing "
                    f"({missing}between {self._called(before)} and {self._called(after)})",
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
            raise self._gone(
                begins,
                f"{self.folder.segments_path}: events {self.folder.begins()} to {self.first_sequence - 1} are missing: "
                f"history begins with {self._called(self.known[0])}",
            )
        return damages

    def _gone(self, begins: int, text: str) -> Exception:
        """What a hole in history means: one that retention made during this look, or events that are missing."""
        return _Gone(text) if self.folder.begins() != begins else LogError(text)

    def _batches(self) -> list[Batch]:
        """The batches as of now, wherever they are kept by now."""
        begins = self.folder.begins()
        store = BatchStore.of(self.folder)
        if store.uri != self.store.uri:
            self.store = store
        try:
            return self.store.batches()
        except LogError as error:
            raise self._gone(begins, str(error)) from None

    def _called(self, known: _Known) -> str:
        return f"batch {known.batch.name} of {self.store}" if known.batch is not None else f"{known.number:012d}.log"

    def seal(self) -> list[int]:
        """Close what a crash left open, so that it ends where it can be read to; the folder is locked.

        Returns the numbers of segments behind a power cut's hole: their files are kept as `N.log.cut`.
        """
        compacted = -1
        for known in self.known:
            if known.batch is not None or known.number <= compacted:
                continue
            segment = self._opened(known)
            if isinstance(segment, Batch):
                compacted = segment.segments[-1].number  # only what is sealed is compacted
                continue
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
            segment: Segment | None = None
            if compacted is None or known.number > compacted[0].segments[-1].number:
                compacted = None
                found = known.batch if known.batch is not None else self._opened(known)
                if isinstance(found, Batch):
                    compacted = self._read(known, found)
                else:
                    segment = found
            if compacted is not None:
                yield self._piece(known, *compacted)
                continue
            assert segment is not None
            try:
                yield Piece(
                    segment.path,
                    segment.data,
                    segment.log_id,
                    known.number,
                    segment.start,
                    known.end,
                    known.schemas,
                    known.prelude,
                )
            finally:
                segment.close()

    def _opened(self, known: _Known) -> Segment | Batch:
        """What check() saw, as it is now: a segment may have become part of a batch. Raises LogError where it is
        neither: retention has dropped it, or its file was lost."""

        def look() -> Segment | Batch:
            if known.batch is None:
                try:
                    return self.folder.segment(known.number)
                except FileNotFoundError:
                    pass
            for batch in self._batches():
                if batch.number <= known.number and known.last_number <= batch.segments[-1].number:
                    return batch
            begins = self.folder.begins()
            if known.last is not None and known.last < begins:
                raise LogError(
                    f"{self.folder.path}: the events before {begins} were dropped (retention) while history was read, "
                    f"{self._called(known)} with them; begin again"
                )
            raise _Gone(f"{self._called(known)}: was removed while history was read")

        found: Segment | Batch = look_again(look)
        return found

    def _read(self, known: _Known, batch: Batch) -> tuple[Batch, Records]:
        """A batch, or what it has become: erasure writes batches anew."""

        def look() -> tuple[Batch, Records]:
            nonlocal batch
            try:
                return batch, records_from_batch(self.store, batch)
            except LogError as error:
                now = self._opened(known)
                if not isinstance(now, Batch) or now.files == batch.files:
                    raise
                batch = now
                raise _Gone(str(error)) from None

        return look_again(look)

    def check_batches(self) -> Iterator[tuple[str, LogError | None]]:
        """Read every batch: its name, and what is wrong with it."""
        for known in self.known:
            if known.batch is not None:
                try:
                    self._read(known, known.batch)
                except LogError as error:
                    yield known.batch.name, error
                else:
                    yield known.batch.name, None

    def _piece(self, known: _Known, batch: Batch, records: Records) -> Piece:
        """A batch as a whole, or the part of it that was one segment."""
        path = f"{self.store}/batches/{batch.name}.json"
        start, end = records.start, records.end
        if known.batch is None:
            entry = next(s for s in batch.segments if s.number == known.number)
            start = int(records.offsets[entry.first_record])
            end = int(records.offsets[entry.first_record + entry.records])
        prelude = int(records.offsets[0])
        return Piece(path, records.data, batch.log_id, batch.number, start, end, batch.read_schemas(), prelude)

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
