"""History (control path): compacted Parquet, then segments, as pieces of records in order of sequence.

What must stay true: whoever replays reads the same records from either form; a piece ends where its segment can be
read to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LogError
from .log_folder import Damage, LogFolder, Segment
from .schemas import EventSchema, ScoreSchema

__all__ = ["History", "Piece"]


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
    """What is known of one segment without reading it again."""

    def __init__(self, number: int, segment: Segment, end: int, scan: Any) -> None:
        self.number = number
        self.end = end
        self.schemas = segment.schemas()
        self.marks = segment.watermarks()
        self.first = segment.head.first_sequence if segment.head is not None else scan.first_sequence
        self.last_ingest_time = scan.last_ingest_time if scan is not None else None
        if scan is not None:
            self.last = scan.last_sequence
        else:
            self.last = segment.mark.last_sequence if segment.mark is not None else None


class History:
    """All events of a log folder. A folder that another process writes may be read; it is read as of now."""

    def __init__(self, folder: LogFolder) -> None:
        self.folder = folder
        self.known: list[_Known] = []
        self.beyond: list[int] = []
        self.first_sequence = -1
        self.last_sequence = -1
        self.last_ingest_time = 0
        self.last_number = 0

    def check(self) -> list[Damage]:
        """Look at every segment's header and end, and read the open ones; returns what is damaged at their ends.

        Raises LogError where records that can be read follow ones that cannot.
        """
        damages: list[Damage] = []
        numbers = self.folder.numbers()
        self.known, self.beyond = [], []
        stopped: Damage | None = None
        cut = False
        for number in numbers:
            if cut:
                self.beyond.append(number)
                continue
            segment = self.folder.segment(number)
            try:
                whole = segment.sealed_end is not None and segment.head is not None and segment.size >= segment.sealed_end
                if whole and number != numbers[-1]:
                    known = _Known(number, segment, segment.sealed_end or 0, None)
                else:
                    end, found, scan = self.folder.check(segment, last=number == numbers[-1])
                    damages += found
                    if scan.events == 0 and not found and segment.head is None:
                        continue
                    known = _Known(number, segment, end, scan)
                    if stopped is not None and scan.records:
                        raise LogError(f"{stopped}; segment {segment.path.name} behind it holds {scan.records} records")
                    stopped = next((d for d in found if d.kind != "header"), stopped)
                    synced = segment.mark.synced if segment.mark is not None else end + 1
                    # A power cut behind the last sync takes what follows with it; so does a hole in the newest segment.
                    cut = stopped is not None and segment.sealed_end is None and end >= synced
            finally:
                segment.close()
            self.known.append(known)
            if known.last_ingest_time is not None:
                self.last_ingest_time = max(self.last_ingest_time, known.last_ingest_time)
        for before, after in zip(self.known, self.known[1:]):
            if after.number != before.number + 1:
                raise LogError(
                    f"{self.folder.segments_path}: segment {before.number + 1:012d}.log is missing "
                    f"(between {before.number:012d}.log and {after.number:012d}.log)"
                )
        lasts = [known.last for known in self.known if known.last is not None and known.last >= 0]
        self.last_sequence = max(lasts, default=-1)
        if self.known:
            self.first_sequence = min(self.known[0].first or 0, self.last_sequence)
            self.last_number = self.known[-1].number
        return damages

    def seal(self) -> list[int]:
        """Close what a crash left open, so that it ends where it can be read to; the folder is locked.

        Returns the numbers of segments behind a power cut's hole: their files are kept as `N.log.cut`.
        """
        for known in self.known:
            segment = self.folder.segment(known.number)
            open_end = segment.sealed_end is None or segment.size > segment.sealed_end
            segment.close()
            if open_end:
                self.folder.seal(known.number, known.end, known.last if known.last is not None else -1)
        for number in self.beyond:
            path = self.folder.segment_path(number)
            path.rename(path.with_suffix(".log.cut"))
        return self.beyond

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """The pieces that may hold events `first` to `last`, in order; each is closed when the next is asked for."""
        for i, known in enumerate(self.known):
            behind = self.known[i + 1].first if i + 1 < len(self.known) else None
            if behind is not None and behind <= first:
                continue
            if known.first is not None and known.first > last:
                return
            segment = self.folder.segment(known.number)
            try:
                yield Piece(
                    segment.path, segment.data, segment.log_id, known.number, segment.start, known.end, known.schemas
                )
            finally:
                segment.close()

    def watermarks(self) -> dict[str, int]:
        """Watermarks where the last segment begins."""
        return self.known[-1].marks if self.known else {}

    def first_sequence_with(self, behind: Callable[[dict[str, int]], bool]) -> int:
        """First sequence of the newest segment whose watermarks at its start are far enough `behind`; else the first."""
        for known in reversed(self.known):
            if behind(known.marks):
                return known.first or 0
        return max(self.first_sequence, 0)
