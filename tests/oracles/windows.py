"""The questions of a WindowStore, answered by the exact engine (penstock/offline/exact.py); tests only.

What must stay true: nothing is decided here; a where mask, a column's number and a status's number are only translated.
"""

from typing import Any, NamedTuple

from penstock.offline.exact import ExactOutput, ExactView, RawEvent

STATUSES = {"INVALID": 0, "PRESENT": 1, "NULL_VALUE": 2, "NOT_FOUND": 3, "OUTSIDE_MAX_AGE": 4}


class Event(NamedTuple):
    event_time: int
    values: tuple[Any, ...] = ()
    where_mask: int = 0


class WindowOracle:
    """Any number of entities; every output of a group is a feature of one view."""

    def __init__(
        self,
        columns: list[str],
        outputs: list[Any],
        groups: list[int] | None = None,
        lateness: int = 0,
        retention: int | None = None,
    ) -> None:
        self.events: dict[Any, list[RawEvent]] = {}
        self.applied = 0
        self.watermark: int | None = None
        self.views = []
        start = 0
        for n in groups or [len(outputs)]:
            views = tuple(self.output(columns, o) for o in outputs[start : start + n])
            self.views.append(ExactView(views, lateness, retention))
            start += n

    @staticmethod
    def output(columns: list[str], o: Any) -> ExactOutput:
        return ExactOutput(
            name=o.function,
            function="count" if o.function == "count_col" else o.function,
            column=None if o.function == "count" else o.column,
            type="int64" if o.column is None else columns[o.column],
            where=None if o.where is None else (lambda row: bool(row["mask"] >> o.where & 1)),
            window=o.window,
            closed=o.closed,
            ttl=o.ttl,
            default=None,
            result="",
        )

    def raw(self, event: Event) -> RawEvent:
        self.applied += 1
        return RawEvent(
            event.event_time, 0, self.applied, "applied", {"mask": event.where_mask, **dict(enumerate(event.values))}
        )

    def apply(self, key: Any, event_time: int, values: Any = (), where_mask: int = 0) -> None:
        self.events.setdefault((type(key), key), []).append(self.raw(Event(event_time, tuple(values), where_mask)))
        self.advance(event_time)

    def advance(self, watermark: int) -> None:
        self.watermark = watermark if self.watermark is None else max(self.watermark, watermark)

    def read(self, key: Any, group: int = 0, as_of: int = 0, extra: Any = None) -> list[tuple[Any, int]]:
        events = self.events.get((type(key), key), [])
        if extra is not None:
            events = [*events, self.raw(Event(*extra))]  # the newest of its time
        found = self.views[group].bare(events, as_of, watermark=self.watermark)
        return [(value, STATUSES[status]) for value, status in found]
