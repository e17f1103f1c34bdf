"""A spine and what is asked of it (control path): how its rows are keyed and read, and one pass of them over the log.

What must stay true: the spine is checked whole before the first pass; a pass gives the same bits whatever the number of
partitions, and in whatever process it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .._ext.core import Core
from .._ext.events import ColumnSet, EventReader
from .._ext.spine import SpineRun
from .._ext.steps import Source
from .._ext.windows import Output as NativeOutput
from .._ext.windows import WindowStore
from ..definitions.event import Field
from ..errors import EventError, LogError, PenstockError
from ..plan import EventPlan, Output, PipelinePlan, Plan, StorePlan, ViewPlan, suggestion
from ..tables import FIRST_TIME, LAST_TIME, cast_column, column_set, one_array, pyarrow, sound_column
from .history import History
from .log_folder import LogFolder, located
from .own_events import COUNTED, OWN, Reads, search
from .schemas import EventSchema, event_mapping

__all__ = ["Asked", "Feature", "Job", "Task", "Unit", "history_events", "open_history"]

Times = npt.NDArray[np.int64]

FOR_EVER = 1 << 58  # a lateness that no row is older than
SLICE = 1 << 16  # events between two reports of progress
MOST_PARTS = 1 << 14
PRESENT = 1  # a status
COUNTS = ("count", "count_col", "distinct_count")  # functions that give 0 where there is nothing


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a training set, as far as its workers must know."""

    features: tuple[str, ...] | None
    pipeline: str | None
    time: str | None
    sequence: str | None
    backfill: bool
    own: str = "auto"


class Task(msgspec.Struct, frozen=True):
    """One pass over the log: a unit of the job, and the keys whose hash falls on `part` of `parts`."""

    unit: int
    part: int
    parts: int

    def halves(self) -> list[Task]:
        """The same keys in two passes."""
        return [
            Task(self.unit, self.part, 2 * self.parts),
            Task(self.unit, self.part + self.parts, 2 * self.parts),
        ]


class Group(msgspec.Struct):
    """One view that is read: its outputs that are asked for, each with its place among the unit's columns, or -1.
    request: a row that is none of the log's events counts itself (S8)."""

    view: ViewPlan
    request: bool
    columns: list[int]


class Unit(msgspec.Struct):
    """One store that is read: how the spine names its key, its views, and the outputs that become columns."""

    store: StorePlan
    event: EventPlan
    key: str
    groups: list[Group]
    outputs: list[Output]
    reader: EventReader | None = None
    columns: ColumnSet | None = None
    key_ref: tuple[int, bool, bool, bool] = (0, False, False, False)
    lacks: str = ""  # what the spine has not, which rows that count themselves need

    @property
    def request(self) -> bool:
        return any(group.request for group in self.groups)


class Feature(msgspec.Struct, frozen=True):
    """One column of the output: a view's (unit, column), a function's (slot), or a request field's (index)."""

    name: str
    type: str
    kind: str
    unit: int = -1
    index: int = -1


class Job:
    """A spine and what is asked of it, checked: everything that a worker needs beside the log.

    reads: what each row may see, as another process has found it; else find() does.
    """

    reads: Reads

    def __init__(self, plan: Plan, spine: Any, asked: Asked, reads: Reads | None = None) -> None:
        self.plan = plan
        self.spine = spine
        self.asked = asked
        self.mode = "backfill" if asked.backfill else "sequence"
        self.pipeline: PipelinePlan | None = None
        if asked.backfill and asked.sequence is not None:
            raise PenstockError("backfill counts every event; say either backfill=True or sequence=")
        if asked.features is not None and asked.pipeline is not None:
            raise PenstockError("say either features= or pipeline=")
        if asked.features is None:
            self.pipeline = _pipeline(plan, asked.pipeline)
        views = self._wanted()
        self.time_name = self._time_name([plan.views[name] for name in views])
        self.times = self._times()
        self.sequences = self._sequences()
        self.units: list[Unit] = []
        self.features: list[Feature] = []
        for name, wanted in views.items():
            self._add_view(plan.views[name], wanted)
        self._order_features(views)
        self._check_names()
        for unit in self.units:
            self._read_spine(unit)
        self.event_columns = self._event_columns()
        if reads is not None:
            self.reads = reads

    def find(self, history: History, tell: Callable[[int], None]) -> None:
        """Which rows are the log's own events, and what each may see (S5): a walk over the log, where one is needed."""
        self.reads = search(self, history, tell)
        own = np.isin(self.reads.kind, (OWN, COUNTED))
        for unit in self.units:
            if unit.lacks and not own.all():
                raise PenstockError(f"{unit.lacks} (row {int(np.argmin(own))} is none of the log's own events)")

    # what is asked

    def _wanted(self) -> dict[str, list[str]]:
        """Views that are read -> names of their outputs that are asked for, or that functions take."""
        views: dict[str, list[str]] = {}
        by_name = {output.name: view.name for view in self.plan.views.values() for output in view.outputs}
        if self.pipeline is not None:
            slots = self.pipeline.slots
            names = [slots[i].name for i in self.pipeline.features]
            names += [slots[i].name for step in self.functions() for i in step.arguments]
        else:
            names = []
            for name in self.asked.features or ():
                if name in self.plan.views:
                    names += [output.name for output in self.plan.views[name].outputs]
                elif name in by_name:
                    names.append(name)
                else:
                    known = [*self.plan.views, *by_name]
                    raise PenstockError(
                        f"no view or feature {name!r}{suggestion(name, known)}; "
                        "on-demand functions and request fields come with pipeline="
                    )
            if not names:
                raise PenstockError("features: say at least one view or feature")
        for name in names:
            if name in by_name and name not in views.setdefault(by_name[name], []):
                views[by_name[name]].append(name)
        return views

    def functions(self) -> list[Any]:
        """The pipeline's functions that its features need, in order."""
        if self.pipeline is None:
            return []
        needed = set(self.pipeline.features)
        found = []
        for step in reversed(self.pipeline.functions):
            if step.slot in needed:
                needed.update(step.arguments)
                found.append(step)
        return found[::-1]

    def _add_view(self, view: ViewPlan, wanted: list[str]) -> None:
        store = self.plan.stores[view.store]
        event = self.plan.events[view.event]
        if self.pipeline is not None:
            read = next(read for read in self.pipeline.reads if read.view == view.name)
            key = self.plan.events[self.pipeline.event].fields[read.key].name
        else:
            names = self.spine.column_names
            key = next((name for name in (view.key_field, view.entity) if name in names), "")
            if not key:
                either = "" if view.key_field == view.entity else f" or {view.entity!r}"
                raise PenstockError(
                    f"view {view.name}: the spine has no key column {view.key_field!r}{either}"
                    f"{suggestion(view.key_field, names)}"
                )
        own = self.pipeline is None or self.pipeline.event == view.event
        request = view.include_request_event and own and not self.asked.backfill
        unit = next((u for u in self.units if u.store is store and u.key == key), None)
        if unit is None:
            unit = Unit(store, event, key, [], [])
            self.units.append(unit)
        columns = []
        for output in view.outputs:
            if output.name in wanted:
                columns.append(len(unit.outputs))
                unit.outputs.append(output)
            else:
                columns.append(-1)
        unit.groups.append(Group(view, request, columns))

    def _order_features(self, views: dict[str, list[str]]) -> None:
        places = {
            output.name: Feature(output.name, output.type, "view", u, c)
            for u, unit in enumerate(self.units)
            for c, output in enumerate(unit.outputs)
        }
        if self.pipeline is None:
            self.features = [places[name] for names in views.values() for name in names]
            order = {name: i for i, name in enumerate(self._asked_names())}
            self.features.sort(key=lambda feature: order[feature.name])
            return
        for index in self.pipeline.features:
            slot = self.pipeline.slots[index]
            self.features.append(places.get(slot.name) or Feature(slot.name, slot.type, slot.kind, -1, index))

    def _asked_names(self) -> list[str]:
        names: list[str] = []
        for name in self.asked.features or ():
            view = self.plan.views.get(name)
            names += [output.name for output in view.outputs] if view is not None else [name]
        return list(dict.fromkeys(names))

    def _check_names(self) -> None:
        names = self.spine.column_names
        for name in names:
            if names.count(name) > 1:
                raise EventError(f".{name}", "two columns of this name")
        for feature in self.features:
            if feature.kind != "field" and feature.name in names:
                raise PenstockError(f"the spine has a column {feature.name!r}, the name of a feature that is asked for")

    # the spine's columns

    def _time_name(self, views: list[ViewPlan]) -> str:
        pa = pyarrow()
        names = self.spine.column_names
        if self.asked.time is not None:
            if self.asked.time not in names:
                raise PenstockError(
                    f"time: the spine has no column {self.asked.time!r}{suggestion(self.asked.time, names)}"
                )
            return self.asked.time
        events = [self.pipeline.event] if self.pipeline is not None else [view.event for view in views]
        fields = {self.plan.events[name].fields[self.plan.events[name].time].name for name in events}
        found = [name for name in fields if name in names]
        if len(found) != 1:
            found = [f.name for f in self.spine.schema if pa.types.is_timestamp(f.type)]
        if len(found) != 1:
            have = f"several timestamp columns ({', '.join(found)})" if found else "no timestamp column"
            raise PenstockError(f'the spine has {have}; say which is the time: time="..."')
        return found[0]

    def _times(self) -> Times:
        field = None
        if self.pipeline is not None:
            event = self.plan.events[self.pipeline.event]
            field = event.fields[event.time]
        name = self.time_name
        column = one_array(sound_column(self.spine.column(name), name))
        unit = field.unit if field is not None and field.name == name else None
        times = _integers(cast_column(column, "timestamp", name, unit), name, "the time is missing (null)")
        outside = (times < FIRST_TIME) | (times > LAST_TIME)
        if outside.any():
            raise EventError(f"[{int(np.argmax(outside))}].{name}", "expected a time between the years 1 and 9999")
        return times

    def _sequences(self) -> Times | None:
        name = self.asked.sequence
        if name is None:
            return None
        names = self.spine.column_names
        if name not in names:
            raise PenstockError(f"sequence: the spine has no column {name!r}{suggestion(name, names)}")
        column = one_array(sound_column(self.spine.column(name), name))
        return _integers(cast_column(column, "int64", name, None), name, "expected a sequence, got null")

    def _read_spine(self, unit: Unit) -> None:
        """How the rows' keys, and where the row itself counts its values, are read."""
        to_int = unit.store.key_type == "int64"
        if unit.request:
            needed: dict[int, str] = {unit.store.key: unit.groups[0].view.name}
            for group in unit.groups:
                if group.request:
                    for field in _fields_of(unit, group):
                        needed.setdefault(field, group.view.name)
            unit.lacks = self._lacks(unit.event, needed, {unit.store.key: unit.key})
        if unit.request and not unit.lacks:
            plan, columns = self._as_events(unit.event, needed, {unit.store.key: unit.key}, unit.store.columns)
            unit.reader, unit.columns = EventReader(plan, set(), set()), columns
            kind = unit.event.fields[unit.store.key].type
            unit.key_ref = (unit.store.key, kind == "int64", to_int, False)
            return
        for group in unit.groups:
            group.request = False
        if self.pipeline is not None:
            event = self.plan.events[self.pipeline.event]
            kind = next(f.type for f in event.fields if f.name == unit.key)
        else:
            kind = self._key_kind(unit)
        if unit.key not in self.spine.column_names:
            raise PenstockError(f"the spine has no column {unit.key!r}, the key of {unit.groups[0].view.name}")
        may_be_null = self.pipeline is None
        fields = [
            Field(name=unit.key, type=kind, optional=may_be_null, required=True),
            Field(name="T", type="timestamp", optional=False, required=True),
        ]
        shape = msgspec.defstruct("SpineRow", [(unit.key, Any), ("T", Any)])
        plan = EventPlan(
            name="the spine",
            index=0,
            type=shape,  # type: ignore[arg-type]
            fields=fields,
            time=1,
            event_id=None,
            options=unit.event.options,
            stores=[],
        )
        table = pyarrow().table({unit.key: self.spine.column(unit.key), "T": self.times})
        unit.reader, unit.columns = EventReader(plan, {0}, set()), column_set(table, plan, {0}, set())
        unit.key_ref = (0, kind == "int64", to_int, may_be_null)

    def _key_kind(self, unit: Unit) -> str:
        """The type of the spine's key column. The other kind would be other keys, unless the entity has a type."""
        pa = pyarrow()
        kind = self.spine.schema.field(unit.key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        found = "int64" if pa.types.is_integer(kind) else "string"
        view = unit.groups[0].view
        if pa.types.is_null(kind):
            return unit.store.key_type
        if found != unit.store.key_type and view.entity not in self.plan.typed_entities:
            raise PenstockError(
                f"key {unit.key} is {kind} in the spine but {unit.store.key_type} in {view.event}; "
                f'say Entity("{view.entity}", type=str) (or int) where they are the same key'
            )
        return found

    def _as_events(
        self, event: EventPlan, needed: dict[int, str], called: dict[int, str], aggregated: Sequence[int] = ()
    ) -> tuple[EventPlan, ColumnSet]:
        """The spine read as events of a type: the fields that are needed; the others are null. T is the event time.

        needed: field -> who needs it; called: field -> the spine's name for it, where that is another.
        """
        names = self.spine.column_names
        fields: list[Field] = []
        columns: dict[str, Any] = {}
        if lacks := self._lacks(event, needed, called):
            raise PenstockError(lacks)
        for i, field in enumerate(event.fields):
            source = called.get(i, field.name)
            if i == event.time:
                columns[field.name] = self.times
                fields.append(msgspec.structs.replace(field, unit=None))
            elif i not in needed:
                fields.append(msgspec.structs.replace(field, optional=True, required=False, default=None))
            else:
                fields.append(field)
                if source in names:
                    columns[field.name] = self.spine.column(source)
        plan = msgspec.structs.replace(event, fields=fields)
        wanted = {i for i in aggregated if i in needed}
        keys = {i for i in needed if i in self._key_fields(event)}
        return plan, column_set(pyarrow().table(columns), plan, keys, wanted)

    def _lacks(self, event: EventPlan, needed: dict[int, str], called: dict[int, str]) -> str:
        """What the spine has not, in words; arguments as for _as_events."""
        names = self.spine.column_names
        missing = [
            i
            for i, field in enumerate(event.fields)
            if i != event.time and i in needed and field.required and called.get(i, field.name) not in names
        ]
        if not missing:
            return ""
        for_whom = sorted({needed[i] for i in missing})
        return (
            f"the spine has no column {', '.join(event.fields[i].name for i in missing)}, needed by "
            f"{', '.join(for_whom)}: its rows are read as {event.name} events (include_request_event). "
            "Add it to the spine, or ask for other features"
        )

    def _key_fields(self, event: EventPlan) -> set[int]:
        return {self.plan.stores[i].key for i in event.stores}

    def _event_columns(self) -> tuple[EventPlan, EventReader, ColumnSet] | None:
        """The spine as the pipeline's events, where functions or request fields are computed from it."""
        if self.pipeline is None:
            return None
        event = self.plan.events[self.pipeline.event]
        n = len(event.fields)
        needed = {i: f"pipeline {self.pipeline.name}" for i in self.pipeline.features if i < n}
        for step in self.functions():
            for i in step.arguments:
                if i < n:
                    needed.setdefault(i, f"function {step.name}")
        plan, columns = self._as_events(event, needed, {})
        return plan, EventReader(plan, set(), set()), columns

    # the work

    def tasks(self, history: History, workers: int, budget: int) -> list[Task]:
        """Passes over the log, so many that each one's state should fit; one that does not is split when that shows."""
        found = []
        events = history_events(history)
        for u, unit in enumerate(self.units):
            per_event = 24 + 8 * len(unit.store.columns)
            size = events * (per_event + 24)
            if unit.store.retention is not None:
                size //= 4
            if self.asked.backfill:
                size += events * (9 * len(unit.event.fields) + 16)
            # Event types differ in how many events there are: with several units, pieces small enough to share out.
            share = workers if len(self.units) == 1 else -(-2 * workers // len(self.units)) if workers > 1 else 1
            parts = max(share, -(-size // budget))
            parts = min(parts, MOST_PARTS)
            found += [Task(u, part, parts) for part in range(parts)]
        return found

    def run(self, task: Task, history: History, budget: int, tell: Callable[[int], None]) -> Any:
        """One pass over the log: a table of row numbers, values (8 bytes, or strings), status bytes, and `any`: whether
        the row has a value that is no count of 0.

        None where the state does not fit into the budget.
        """
        pa = pyarrow()
        unit = self.units[task.unit]
        # A row with a K as it was served finds given up what the online state had given up by then (S14).
        first = _Pass(self, unit, task, unit.store.lateness, unit.store.lateness, budget)
        rows = first.run.choose()
        values = np.zeros((len(unit.outputs), len(rows)), dtype=np.int64)
        status = np.zeros((len(unit.outputs), len(rows)), dtype=np.uint8)
        texts = first.read(history, rows, values, status, tell)
        if texts is None:
            return None
        beyond = first.beyond
        if beyond.any():
            # Rows older than the online state reaches: once more, with a state that gives nothing up.
            again = _Pass(self, unit, task, FOR_EVER, FOR_EVER, budget)
            places = np.flatnonzero(beyond)
            more_values = np.zeros((len(unit.outputs), len(places)), dtype=np.int64)
            more_status = np.zeros((len(unit.outputs), len(places)), dtype=np.uint8)
            more = again.read(history, rows[places], more_values, more_status, tell)
            if more is None:
                return None
            values[:, places] = more_values
            status[:, places] = more_status
            texts = {i: _replaced(array, places, more[i]) for i, array in texts.items()}
            first.anything[places] = again.anything
        columns: dict[str, Any] = {"row": pa.array(rows), "any": pa.array(first.anything)}
        for i in range(len(unit.outputs)):
            columns[f"v{i}"] = texts[i] if i in texts else pa.array(values[i])
            columns[f"s{i}"] = pa.array(status[i])
        return pa.table(columns)


class _Pass:
    """One pass of one partition over the log. Rows as of their time that are older than the watermark by more than
    `reach` are set aside."""

    def __init__(self, job: Job, unit: Unit, task: Task, lateness: int, reach: int, budget: int) -> None:
        self.job = job
        self.unit = unit
        self.budget = budget
        store = unit.store
        self.state = WindowStore(
            columns=[unit.event.fields[c].type for c in store.columns],
            outputs=[NativeOutput(o.function, o.column, o.where, o.window, o.closed, o.ttl) for o in store.outputs],
            groups=store.groups,
            lateness=lateness,
            n_where=len(store.wheres),
            fingerprint=store.fingerprint,
            max_bytes=budget // 2 if job.asked.backfill else budget,
            retention=store.lifetime,
        )
        source = Source(unit.event, EventReader(unit.event, set(), set()))
        is_int = unit.event.fields[store.key].type == "int64"
        programs = [predicate.program for predicate in store.predicates]
        source.add_stores([(self.state, store.key, is_int, store.key_type == "int64", store.columns, programs)])
        assert unit.reader is not None
        assert unit.columns is not None
        self.run = SpineRun(
            Core([source], [], [self.state], b"", True),
            source,
            self.state,
            unit.reader,
            unit.columns,
            unit.key_ref,
            task.part,
            task.parts,
            job.mode,
            reach,
            budget // 2,  # with backfill: of the events that wait to be sorted
            max(2, len(unit.event.fields)),
        )
        self.beyond: npt.NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self.anything: npt.NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)

    def read(
        self, history: History, rows: Times, values: Any, status: Any, tell: Callable[[int], None]
    ) -> dict[int, Any] | None:
        """Fill values and status (outputs x rows); gives the string columns, or None where the state does not fit."""
        pa = pyarrow()
        unit, run = self.unit, self.run
        reads = self.job.reads
        if history.first_sequence > 0 and unit.event.name in (marks := history.first_watermarks()):
            # What retention dropped is not newer than this: a window that reaches back to it cannot be known (S17).
            self.state.miss_before(max(FIRST_TIME, marks[unit.event.name]) + 1)
        bounds = reads.bound[rows]
        if self.job.asked.backfill:
            places = np.lexsort((bounds, reads.time[rows]))
        else:
            places = np.argsort(bounds, kind="stable")
        self.beyond = np.zeros(len(rows), dtype=np.uint8)
        self.anything = np.zeros(len(rows), dtype=np.uint8)
        outputs = []
        for i, output in enumerate(unit.outputs):
            is_string, counts = output.type == "string", output.function in COUNTS
            outputs.append((values[i].ctypes.data, status[i].ctypes.data, is_string, counts, _default_bytes(output)))
        groups = [(g.view.group, g.view.include_request_event, g.request, g.columns) for g in unit.groups]
        order = rows[places]
        run.begin(
            order,
            places,
            self.job.times[order],
            reads.kind[order],
            reads.bound[order],
            reads.time[order],
            groups,
            outputs,
            self.beyond,
            self.anything,
        )
        if not (self._feed(history, tell) and run.finish()):
            if run.never_fits:
                what = "what is kept of one key's events" if self.job.asked.backfill else "the state of one key"
                raise PenstockError(
                    f"{what} does not fit into {self.budget / 2**20:,.1f} MiB, a worker's share; "
                    "give more memory= or fewer workers="
                )
            return None
        texts: dict[int, Any] = {}
        for i, output in enumerate(unit.outputs):
            if output.type == "string":
                offsets, data = run.text_column(i, values[i].view(np.uint64), status[i])
                valid = pa.py_buffer(np.packbits((status[i] & 7) == PRESENT, bitorder="little"))
                buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(data)]
                texts[i] = pa.Array.from_buffers(pa.large_string(), len(rows), buffers)
        return texts

    def _feed(self, history: History, tell: Callable[[int], None]) -> bool:
        """All of history; False where the state does not fit."""
        run, event = self.run, self.unit.event
        last = history.last_sequence
        told = 0
        for piece in history.pieces(0, last):
            mappings = [
                event_mapping(schema, event) if isinstance(schema, EventSchema) and schema.name == event.name else None
                for schema in piece.schemas
            ]
            at, why = piece.start, "some"
            while why == "some":
                try:
                    at, why = run.feed(
                        piece.data, piece.log_id, piece.number, at, piece.end, piece.records, mappings, last, SLICE
                    )
                except LogError as error:
                    raise located(piece.path, error) from None
                events = run.totals[0]
                tell(events - told)
                told = events
            if why == "stopped":
                raise LogError(f"{piece.path} at offset {at}: a record does not check")
            if why == "large":
                return False
            if why == "done":
                break
        return True


def open_history(log: str | Path, last_sequence: int | None = None) -> History:
    """The history of a log folder, as of now, or as it was when `last_sequence` was its last event."""
    history = History(LogFolder(log))
    history.check()
    if last_sequence is not None:
        if history.last_sequence < last_sequence:
            raise LogError(
                f"{log}: ends with event {history.last_sequence} here; when the job began it had event {last_sequence}"
            )
        history.last_sequence = last_sequence
    return history


def history_events(history: History) -> int:
    """How many events a history holds."""
    return max(0, history.last_sequence + 1 - max(0, history.first_sequence))


def _pipeline(plan: Plan, name: str | None) -> PipelinePlan:
    if name is None and len(plan.pipelines) == 1:
        return next(iter(plan.pipelines.values()))
    if name is None:
        raise PenstockError(f"say features= or pipeline={suggestion('', plan.pipelines)}")
    if name not in plan.pipelines:
        raise PenstockError(f"no pipeline {name!r}{suggestion(name, plan.pipelines)}")
    return plan.pipelines[name]


def _fields_of(unit: Unit, group: Group) -> list[int]:
    """Fields of the event that a view's outputs, those asked for, are computed from."""
    slots = unit.event.slots
    found = []
    for output, column in zip(group.view.outputs, group.columns):
        if column < 0:
            continue
        if output.column is not None:
            found.append(unit.store.columns[output.column])
        if output.where is not None:
            found += [slots[name][0] for name in unit.store.predicates[output.where].names if name in slots]
    return found


def _default_bytes(output: Output) -> bytes | None:
    if output.default is None:
        return None
    if output.type == "string":
        return str(output.default).encode()
    if output.type == "float64":
        return np.float64(output.default).tobytes()
    return np.int64(output.default).tobytes()


def _replaced(array: Any, places: Any, by: Any) -> Any:
    """The array with other values at some places."""
    pa = pyarrow()
    index = np.arange(len(array))
    index[places] = len(array) + np.arange(len(places))
    return pa.concat_arrays([array, by]).take(pa.array(index))


def _integers(array: Any, name: str, what: str) -> Times:
    if array.null_count:
        raise EventError(f"[{int(np.argmax(np.asarray(array.is_null())))}].{name}", what)
    return np.ascontiguousarray(np.asarray(array), dtype=np.int64)
