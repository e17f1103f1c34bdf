"""Parity by another route (control path): a sample of logged scores, from raw events by the exact engine (exact.py).

Two walks over the log: the first chooses the scores by a keyed hash, the second collects the events of the entities
that they touched, so that memory is bounded by the sample. What must stay true: no rule of the window kernel, and no
engine, has a part in it; what could not be judged is counted apart. Functions, arms, models and rules are left out.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .._ext import log as native
from .._ext.decision import OUTCOMES, STATUSES
from ..app import App, load_plan
from ..errors import LogError
from ..plan import EventPlan, PipelinePlan, Plan
from ..timestamp import Timestamp
from .exact import ExactValue, ExactView, RawEvent, canonical_key, exact_view
from .history import History, Piece
from .log_folder import LogFolder, readable_records
from .parity import FeatureParity, Mismatch, ParityReport, PipelineParity
from .schemas import SEMANTICS, EventSchema, ScoreSchema, record_fields

__all__ = ["SAMPLE", "independent_parity"]

SAMPLE = 1000  # scores of each pipeline
EXAMPLES = 5  # mismatches kept per feature
BEHIND = 1024  # events that a score may follow its own by: twice a table's block, and some
SCORE = struct.Struct("<26s3hdQq8bBB6x")
PRESENT, WIDE, AGED, ERASED = 1, 0x80, 0x40, 0x20  # the format's status byte

Done = Callable[[int, int], None]


class Values(NamedTuple):
    """Slots of a record: per slot a value and its status byte."""

    values: list[Any]
    statuses: list[int]


class Score(NamedTuple):
    """A sampled score with the event that it is about."""

    sequence: int
    id: str
    as_of: int
    schema: ScoreSchema
    logged: Values
    outcome: str
    event: dict[str, Any] | None  # None: not found, or of a type that the app has not
    erased: frozenset[str]


class _Reading:
    """How the event records of one schema are read as an event type of the app."""

    def __init__(self, schema: EventSchema, event: EventPlan) -> None:
        self.event = event
        self.names = [field.name for field in event.fields]
        self.types = [field.type for field in schema.fields]
        self.time = schema.time
        self.places, self.defaults = record_fields(schema, event)
        self.place_of = dict(zip(self.names, self.places))

    def values(self, body: bytes, n_versions: int) -> tuple[dict[str, Any], frozenset[str]]:
        """The event's fields, and which of them were erased."""
        found = _slots(body, 8 * n_versions, self.types)
        row = {
            name: found.values[place] if place >= 0 else default
            for name, place, default in zip(self.names, self.places, self.defaults)
        }
        gone = [n for n, place in zip(self.names, self.places) if place >= 0 and found.statuses[place] & ERASED]
        return row, frozenset(gone)


def independent_parity(
    app: App,
    log: str | Path,
    *,
    pipelines: list[str] | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    progress: Done | None = None,
) -> ParityReport:
    """Recompute every view feature of a sample of the logged scores, and compare bit for bit.

    sample: scores per pipeline, chosen by a hash with the key `seed`: the same for the same log.
    Raises LogError where history cannot be read, DefinitionError for a wrong app.
    """
    plan = load_plan(app)
    names = pipelines if pipelines is not None else list(plan.pipelines)
    for name in names:
        if name not in plan.pipelines:
            raise LogError(f"no pipeline {name!r} in the app")
    history = History(LogFolder(log))
    history.check()
    walks = _Walks(plan, history, progress)
    chosen, logged, older, events = walks.choose(names, sample, seed)
    seen = walks.collect([score for scores in chosen.values() for _, _, score in scores], names)
    begins = history.first_watermarks() if history.first_sequence > 0 else None
    return ParityReport(
        log=str(log),
        events=events,
        pipelines=[
            msgspec.structs.replace(
                _compare(plan, plan.pipelines[name], sorted(chosen[name], reverse=True), seen, begins),
                scores=logged[name],
                older=older[name],
            )
            for name in names
        ],
        history_begins=max(0, history.first_sequence),
        independent=True,
    )


class _Seen:
    """What the second walk collected: events per store and key, and each source's watermark at each sampled score."""

    def __init__(self) -> None:
        self.events: dict[int, dict[Any, list[RawEvent]]] = {}
        self.watermarks: dict[int, dict[str, int]] = {}

    def sort(self) -> None:
        """By time, so that of() need not look at all of a busy entity."""
        for keys in self.events.values():
            for events in keys.values():
                events.sort(key=lambda event: event.time)

    def of(self, store: int, key: Any, as_of: int, view: ExactView) -> list[RawEvent]:
        """An entity's events that a view may reach from T; for Lifetime all."""
        events = self.events.get(store, {}).get(key, [])
        if any(output.window is None for output in view.outputs):
            return events
        low = bisect_left(events, as_of - (view.reach or 0), key=lambda event: event.time)
        return events[low : bisect_right(events, as_of, key=lambda event: event.time)]


class _Walks:
    def __init__(self, plan: Plan, history: History, progress: Done | None) -> None:
        self.plan = plan
        self.history = history
        self.progress = progress
        self.total = max(1, history.last_sequence + 1 - max(0, history.first_sequence))
        self.readings: dict[int, _Reading | None] = {}  # by identity of a schema, which its piece keeps
        self.kept: list[Any] = []

    def records(self, walk: int) -> Iterator[tuple[Any, Any]]:
        """(record, its schema) of every event and score; an event is seen once."""
        expected = max(0, self.history.first_sequence)
        first = expected
        for piece in self.history.pieces(0, 1 << 62):
            self.kept.append(piece.schemas)
            at = piece.start
            while at < piece.end:
                record = native.record_at(piece.data, piece.log_id, piece.number, at)
                if record is None:
                    raise LogError(_damaged(piece, at))
                if record.kind == "event":
                    if record.sequence != expected:
                        raise LogError(
                            f"{piece.path}: events {expected} to {record.sequence - 1} are missing before offset {at}"
                        )
                    expected += 1
                    if self.progress is not None and expected % 16384 == 0:
                        self.progress(walk * self.total + expected - first, 2 * self.total)
                if record.kind in ("event", "score"):
                    yield record, piece.schemas[record.schema]
                at += record.length

    def reading(self, schema: EventSchema) -> _Reading | None:
        if id(schema) not in self.readings:
            event = self.plan.events.get(schema.name)
            self.readings[id(schema)] = None if event is None else _Reading(schema, event)
        return self.readings[id(schema)]

    def choose(
        self, names: list[str], sample: int, seed: int
    ) -> tuple[dict[str, list[tuple[int, int, Score]]], dict[str, int], dict[str, int], int]:
        """Per pipeline the scores with the least hashes, how many were logged, and how many of them by older rules, not
        chosen; and the number of events."""
        chosen: dict[str, list[tuple[int, int, Score]]] = {name: [] for name in names}
        logged, older = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        key = seed.to_bytes(8, "little", signed=True)
        recent: list[tuple[Any, Any] | None] = [None] * BEHIND
        events = 0
        for record, schema in self.records(0):
            if record.kind == "event":
                recent[record.sequence % BEHIND] = record, schema
                events += 1
                continue
            if schema.pipeline not in chosen:
                continue
            logged[schema.pipeline] += 1
            if schema.semantics < SEMANTICS:
                older[schema.pipeline] += 1
                continue
            drawn = hashlib.blake2b(f"{record.sequence} {schema.pipeline}".encode(), digest_size=8, key=key).digest()
            # The heap's least is the one to go: the largest hash.
            rank = -int.from_bytes(drawn, "little")
            heap = chosen[schema.pipeline]
            if len(heap) < sample or (heap and rank > heap[0][0]):
                heapq.heappush(heap, (rank, logged[schema.pipeline], self.score(record, schema, recent)))
                if len(heap) > sample:
                    heapq.heappop(heap)
        return chosen, logged, older, events

    def score(self, record: Any, schema: ScoreSchema, recent: Sequence[tuple[Any, Any] | None]) -> Score:
        head = SCORE.unpack_from(record.body)
        logged = _slots(record.body, SCORE.size + 8 * len(record.versions), [kind for _, kind in schema.values])
        about = recent[record.sequence % BEHIND]
        outcome, event, erased = "", None, frozenset[str]()
        if about is not None and about[0].sequence == record.sequence:
            outcome = OUTCOMES[about[0].outcome]
            reading = self.reading(about[1])
            if reading is not None and reading.event.name == self.plan.pipelines[schema.pipeline].event:
                event, erased = reading.values(about[0].body, len(about[0].versions))
        return Score(record.sequence, head[0].decode(), head[6], schema, logged, outcome, event, erased)

    def collect(self, scores: list[Score], names: list[str]) -> _Seen:
        """The events of the entities that some scores read, as far back as a view reaches from one of them."""
        seen = _Seen()
        wanted: dict[int, dict[Any, list[int]]] = {}  # store -> key -> times as of which it was read
        reach: dict[int, int | None] = {}
        views = {read.view for name in names for read in self.plan.pipelines[name].reads}
        for name in views:
            view = exact_view(self.plan, name)
            number = self.plan.views[name].store
            # A Lifetime view is told by its whole history, retention too: when an entity began anew (S9).
            back = None if any(output.window is None for output in view.outputs) else view.reach
            known = reach.get(number, 0)
            reach[number] = None if back is None or known is None else max(back, known)
        for score in scores:
            if score.event is None:
                continue
            for read in self.plan.pipelines[score.schema.pipeline].reads:
                number = self.plan.views[read.view].store
                times = wanted.setdefault(number, {}).setdefault(_key_of(self.plan, score, read), [])
                insort(times, score.as_of)
        sequences = {score.sequence for score in scores}
        stores = {
            event.name: [self.plan.stores[i] for i in event.stores if i in wanted]
            for event in self.plan.events.values()
        }
        watermarks = dict(self.history.first_watermarks())
        for record, schema in self.records(1):
            if record.kind != "event":
                continue
            if record.sequence in sequences:
                seen.watermarks[record.sequence] = dict(watermarks)
            reading = self.reading(schema)
            if reading is None:
                continue
            event = reading.event
            base = 8 * len(record.versions)
            (time,) = struct.unpack_from("<q", record.body, base + 8 * reading.time)
            row: dict[str, Any] | None = None
            for store in stores[event.name]:
                place = reading.place_of[event.fields[store.key].name]
                key = _slot(record.body, base, reading.types, place) if place >= 0 else reading.defaults[store.key]
                key = canonical_key(key, store.key_type if store.entity in self.plan.typed_entities else None)
                read_at = wanted[store.index].get(key)
                if read_at is None:
                    continue
                at = bisect_left(read_at, time)
                back = reach[store.index]
                if at == len(read_at) or (back is not None and read_at[at] > time + back):
                    continue
                if row is None:
                    row = reading.values(record.body, len(record.versions))[0]
                raw = RawEvent(time, record.ingest_time, record.sequence, OUTCOMES[record.outcome], row)
                seen.events.setdefault(store.index, {}).setdefault(key, []).append(raw)
            if OUTCOMES[record.outcome] == "applied":
                watermarks[event.name] = max(time, watermarks.get(event.name, time))
        seen.sort()
        return seen


def _compare(
    plan: Plan,
    pipeline: PipelinePlan,
    chosen: list[tuple[int, int, Score]],
    seen: _Seen,
    begins: dict[str, int] | None,
) -> PipelineParity:
    views: dict[str, ExactView] = {read.view: exact_view(plan, read.view) for read in pipeline.reads}
    wanted = [pipeline.slots[i].name for i in pipeline.logged if pipeline.slots[i].kind == "view"]
    by_name = {name: FeatureParity(name=name, examples=[]) for name in wanted}
    others = {slot.name for slot in pipeline.slots} - set(wanted)
    not_found = other_plans = 0
    for _, _, score in chosen:
        if score.event is None:
            not_found += 1
            continue
        other_plans += score.schema.fingerprint != pipeline.fingerprint
        was = {name: (i, kind) for i, (name, kind) in enumerate(score.schema.values)}
        for name in was:
            if name not in wanted and name not in others and not name.startswith("score."):
                by_name.setdefault(name, FeatureParity(name=name, examples=[])).extra += 1
        for read in pipeline.reads:
            view = views[read.view]
            found = _values(plan, score, read, view, seen)
            for output, value in zip(view.outputs, found):
                if output.name not in wanted:
                    continue
                feature = by_name[output.name]
                index, kind = was.get(output.name, (-1, ""))
                if index < 0:
                    feature.missing += 1
                elif kind != output.result:
                    feature.extra += 1
                elif _dropped(plan, read.view, view, output, value, score.as_of, begins):
                    feature.before += 1
                else:
                    key = plan.events[pipeline.event].fields[read.key].name
                    _judge(feature, score, index, kind, value, key)
    return PipelineParity(
        name=pipeline.name,
        scores=len(chosen),
        features=list(by_name.values()),
        decisions=None,
        other_plans=other_plans,
        not_found=not_found,
        sampled=len(chosen),
    )


def _values(plan: Plan, score: Score, read: Any, view: ExactView, seen: _Seen) -> list[ExactValue]:
    """A view's values as of the score's own (T, K) (S5, S8)."""
    what = plan.views[read.view]
    events = seen.of(what.store, _key_of(plan, score, read), score.as_of, view)
    own = what.include_request_event and what.event == plan.pipelines[score.schema.pipeline].event
    return view.values(
        events,
        score.as_of,
        before=score.sequence + 1 if own else score.sequence,
        watermark=seen.watermarks[score.sequence].get(what.event),
        request=score.event if own and score.outcome not in ("applied", "duplicate") else None,
    )


def _dropped(
    plan: Plan, name: str, view: ExactView, output: Any, value: ExactValue, as_of: int, begins: dict[str, int] | None
) -> bool:
    """Whether a value reaches back to what retention dropped; of one that is null, whether its view does."""
    source = plan.views[name].event
    if begins is None or source not in begins:
        return False
    window = view.reach if value.status in ("NULL_VALUE", "NOT_FOUND") else output.window
    # What retention dropped is not newer than begins: a window that includes its left edge may reach it.
    return output.window is None or window is None or as_of <= begins[source] + window


def _judge(feature: FeatureParity, score: Score, index: int, kind: str, value: ExactValue, key: str) -> None:
    feature.compared += 1
    if key in score.erased:
        feature.erased += 1
        return
    status = score.logged.statuses[index]
    served = ExactValue(score.logged.values[index], "OUTSIDE_MAX_AGE" if status & AGED else STATUSES[status & 7])
    if served.status == value.status and _bits(served.value, kind) == _bits(value.value, kind):
        feature.equal += 1
    elif score.erased:
        feature.erased += 1
    else:
        feature.mismatched += 1
        if len(feature.examples) < EXAMPLES:
            shown = [Timestamp(v) if kind == "timestamp" and v is not None else v for v in (served.value, value.value)]
            feature.examples.append(
                Mismatch(
                    decision=score.id,
                    sequence=score.sequence,
                    as_of=Timestamp(score.as_of).isoformat(),
                    served=shown[0],
                    served_status=served.status,
                    computed=shown[1],
                    computed_status=value.status,
                )
            )


def _bits(value: Any, kind: str) -> Any:
    """What must be equal: an integer past 64 bits is a float, and not the integer of the same size."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    return None if value is None else (kind, value)


def _key_of(plan: Plan, score: Score, read: Any) -> Any:
    """The entity that a view was read for."""
    view = plan.views[read.view]
    field = plan.events[plan.pipelines[score.schema.pipeline].event].fields[read.key].name
    assert score.event is not None
    return canonical_key(score.event[field], view.key_type if view.entity in plan.typed_entities else None)


def _slots(body: bytes, base: int, types: list[str]) -> Values:
    """The values of a record (event_record.h) whose slots begin at `base`."""
    statuses = list(body[base + 8 * len(types) : base + 9 * len(types)])
    return Values([_slot(body, base, types, i) for i in range(len(types))], statuses)


def _slot(body: bytes, base: int, types: list[str], i: int) -> Any:
    n = len(types)
    status = body[base + 8 * n + i]
    if status & 7 != PRESENT:
        return None
    at = base + 8 * i
    if types[i] == "float64" or status & WIDE:
        return struct.unpack_from("<d", body, at)[0]
    if types[i] == "string":
        offset, length = struct.unpack_from("<II", body, at)
        start = base + 8 * n + (n + 7) // 8 * 8 + offset
        return body[start : start + length].decode()
    value = struct.unpack_from("<q", body, at)[0]
    return bool(value) if types[i] == "bool" else value


def _damaged(piece: Piece, at: int) -> str:
    _, n = readable_records(piece.data[: piece.end], piece.log_id, piece.number, at + 8)
    return (
        f"{piece.path} at offset {at}: damaged; {n} readable records follow in it. "
        "Nothing was changed; restore the file from a copy"
    )
