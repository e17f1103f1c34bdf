"""Which rows of a spine are the log's own events, and what each row may see (control path): S5, before work is split.

What must stay true: a row is told from the spine and the log alone, over all of both, so that every pass and every
process has the same answer; and a column that cannot be compared is said, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from .._ext.own_events import Look, SpineSearch
from ..definitions.event import Field
from ..errors import EventError, LogError, PenstockError
from ..plan import EventPlan
from ..tables import cast_column, one_array, pyarrow, sound_column
from .history import History
from .log_folder import located
from .schemas import EventSchema, event_mapping

if TYPE_CHECKING:
    from .spine import Job

__all__ = ["AS_OF", "COUNTED", "NEVER", "OWN", "SERVED", "Reads", "search"]

Times = npt.NDArray[np.int64]

AS_OF, OWN, SERVED, COUNTED = 0, 1, 2, 3  # kinds of a row; ext/spine.pxd
NEVER = 1 << 62  # a bound that no sequence reaches
SLICE = 1 << 16  # events between two reports of progress
NULL_CELL, A_CELL, NO_CELL = 0, 1, 2
MOST_ROWS = (1 << 31) - 2


class Reads(msgspec.Struct, kw_only=True):
    """What each row may see. kind: AS_OF, as of its time; OWN, before its own event; SERVED, by a given sequence;
    COUNTED, by a sequence, where its own event is among what it sees, or is behind T, and is not to be counted.
    bound: the first sequence that it does not see. time: with backfill it sees the events before (time, bound), in the
    order S6. own: the sequence of its own event, -1 where it is none."""

    kind: npt.NDArray[np.uint8]
    bound: Times
    time: Times
    own: Times
    found: int = 0  # rows that are an event
    moved: int = 0  # of them, by id: rows with another time than the event
    loaded: int = 0  # of them: the event came in after its time by more than its lateness
    near: int = 0  # rows with key and time of an event that is another
    differs: tuple[str, ...] = ()  # in what they differ
    blind: int = 0  # rows before whose time nothing had been ingested, though it had happened


def search(job: Job, history: History, tell: Callable[[int], None]) -> Reads:
    """Walk over the log once, where the rows' bounds cannot be told without."""
    n = job.spine.num_rows
    if n > MOST_ROWS:
        raise PenstockError(f"the spine has {n:,} rows, expected at most {MOST_ROWS:,}")
    never = np.full(n, NEVER, dtype=np.int64)
    given = job.sequences
    kind = np.full(n, SERVED if given is not None else AS_OF, dtype=np.uint8)
    sequence = np.full(n, -1, dtype=np.int64)
    bound = never.copy() if given is None else given
    reads = Reads(kind=kind, bound=bound, time=job.times, own=sequence)
    looks, names = _looks(job) if job.asked.own != "never" and n else ([], [])
    by_ingest = given is None and not job.asked.backfill
    if n == 0 or not (looks or by_ingest):
        return reads
    time, ingest = job.times.copy(), never.copy()
    taken = np.zeros(n, dtype=np.uint8)
    order = np.argsort(job.times, kind="stable")
    walk = SpineSearch(looks, job.times, order, reads.bound if by_ingest else None, sequence, time, ingest, taken)
    _walk(job, history, walk, tell)
    walk.finish()
    own = sequence >= 0
    reads.found = int(own.sum())
    reads.moved = int((own & (time != job.times)).sum())
    late = max((job.plan.events[name].options.lateness for name in names), default=0)
    reads.loaded = int((own & (ingest - time > late)).sum())
    for look, columns in zip(looks, _columns_of(looks, job)):
        near, bits = look.near(taken)
        reads.near += near
        reads.differs += tuple(c for i, c in enumerate(columns) if bits >> min(i, 63) & 1 and c not in reads.differs)
    _, earliest = walk.totals
    if by_ingest and earliest is not None:
        blind = ~own & (reads.bound <= max(0, history.first_sequence)) & (job.times >= earliest)
        reads.blind = int(blind.sum())
    if given is not None:
        kind[own & (sequence == given)] = OWN
        kind[own & ((sequence < given) | ((sequence == given) & (time > job.times)))] = COUNTED
        return reads
    kind[own] = np.where(time > job.times, COUNTED, OWN)[own]
    reads.bound = np.where(own, sequence, reads.bound)
    if job.asked.backfill:
        reads.time = time
    return reads


def _walk(job: Job, history: History, walk: SpineSearch, tell: Callable[[int], None]) -> None:
    """All of history, as far as it is needed."""
    events = {event.name: event for event in [*_candidates(job), *(unit.event for unit in job.units)]}
    told = 0
    for piece in history.pieces(0, history.last_sequence):
        mappings: list[Any] = []
        times = []
        for schema in piece.schemas:
            event = events.get(schema.name) if isinstance(schema, EventSchema) else None
            mappings.append(event_mapping(schema, event) if isinstance(schema, EventSchema) and event else None)
            times.append(event.time if event else -1)
        at, why = piece.start, "some"
        while why == "some":
            try:
                at, why = walk.feed(
                    piece.data,
                    piece.log_id,
                    piece.number,
                    at,
                    piece.end,
                    piece.records,
                    mappings,
                    times,
                    history.last_sequence,
                    SLICE,
                )
            except LogError as error:
                raise located(piece.path, error) from None
            seen, _ = walk.totals
            tell(seen - told)
            told = seen
        if why == "stopped":
            raise LogError(f"{piece.path} at offset {at}: a record does not check")
        if why == "done":
            return


# the spine beside an event type


def _candidates(job: Job) -> list[EventPlan]:
    """The event types that rows may be: the pipeline's; else, of those that are asked about, those with an event id in
    the spine, else those that share most columns with it."""
    if job.pipeline is not None:
        return [job.plan.events[job.pipeline.event]]
    names = set(job.spine.column_names)
    events = list({unit.event.name: unit.event for unit in job.units}.values())

    def shared(event: EventPlan) -> tuple[bool, int]:
        called = {unit.store.key for unit in job.units if unit.event is event}
        has_id = event.event_id is not None and event.fields[event.event_id].name in names
        return has_id, len(called | {i for i, f in enumerate(event.fields) if f.name in names} | {event.time})

    most = max((shared(event) for event in events), default=None)
    return [event for event in events if shared(event) == most]


def _columns(job: Job, event: EventPlan) -> dict[int, str]:
    """Field -> the spine's column for it. Keys may be named as their entity."""
    names = set(job.spine.column_names)
    found = {i: field.name for i, field in enumerate(event.fields) if field.name in names}
    if job.pipeline is None:
        for unit in job.units:
            if unit.event is event:
                found.setdefault(unit.store.key, unit.key)
    return found


def _columns_of(looks: list[Look], job: Job) -> list[list[str]]:
    events = {event.index: event for event in _candidates(job)}
    return [[name for _, name in _compared(job, events[look.source])] for look in looks]


def _compared(job: Job, event: EventPlan) -> list[tuple[int, str]]:
    """What a row is compared in when it has no id: the time, and every field that the spine has."""
    time = event.time, job.time_name
    return [time, *((i, name) for i, name in _columns(job, event).items() if i != event.event_id and (i, name) != time)]


def _looks(job: Job) -> tuple[list[Look], list[str]]:
    """Per event type one for the rows with an id, and one for the others."""
    n = job.spine.num_rows
    looks: list[Look] = []
    names = []
    for event in _candidates(job):
        names.append(event.name)
        keys = {job.plan.stores[i].key for i in event.stores} | {
            unit.store.key for unit in job.units if unit.event is event
        }
        if job.pipeline is not None:
            keys |= {read.key for read in job.pipeline.reads}
        columns = _columns(job, event)
        skip = np.zeros(n, dtype=np.uint8)
        if event.event_id in columns:
            assert event.event_id is not None
            field = event.fields[event.event_id]
            data, texts, state = _cells(job, event, field, columns[event.event_id], False)
            known = ~np.asarray(job.spine.column(columns[event.event_id]).is_null(nan_is_null=True), dtype=bool)
            one = (event.event_id, field.type, False, data, texts, state)
            looks.append(Look(event.index, [one], (~known).astype(np.uint8), False, -1))
            skip = known.astype(np.uint8)
            if known.all():
                continue
        compared = []
        for i, name in _compared(job, event):
            field = event.fields[i]
            is_time = i == event.time and name == job.time_name
            if is_time:
                cells: Any = (job.times, None, np.full(n, A_CELL, dtype=np.uint8))
            else:
                cells = _cells(job, event, field, name, i in keys)
            compared.append((i, field.type, i in keys or is_time, *cells))
        looks.append(Look(event.index, compared, skip, len(compared) > sum(c[2] for c in compared), event.time))
    return looks, names


def _cells(
    job: Job, event: EventPlan, field: Field, name: str, is_key: bool
) -> tuple[Times, Any, npt.NDArray[np.uint8]]:
    """A column as its field's values: 8 bytes per row, or offsets and bytes; and a state per row."""
    pa = pyarrow()
    array = one_array(sound_column(job.spine.column(name), name))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    n = len(array)
    state = np.where(np.asarray(array.is_null(nan_is_null=True)), NULL_CELL, A_CELL).astype(np.uint8)
    if field.type == "int64" and pa.types.is_floating(array.type):
        array, state = _whole(array, state)
    elif is_key and _may_be_typed(job, event) and field.type in ("int64", "string"):
        array, state = _key_as(array, field.type, state)
    elif field.type == "int64" and pa.types.is_uint64(array.type):
        numbers = np.asarray(array.fill_null(0)).view(np.int64)
        state[numbers < 0] = NO_CELL  # beyond int64
        array = pa.array(numbers)
    try:
        array = cast_column(array, field.type, name, field.unit)
    except EventError:
        raise EventError(
            f".{name}",
            f"{array.type} in the spine, but {field.type} in {event.name}: whether a row is one of the log's own events"
            " cannot be told. Give the column another name or type, or say own='never'",
        ) from None
    null = state == NULL_CELL
    if null.any() and not field.optional:
        state[null] = NO_CELL  # no event of the log has a null here
    if field.type == "string":
        wide = array.cast(pa.large_string())
        if n == 0:
            return np.zeros(1, dtype=np.int64), None, state
        buffers = wide.buffers()
        offsets = np.frombuffer(buffers[1], dtype=np.int64)[wide.offset : wide.offset + n + 1]
        texts = None if buffers[2] is None else np.frombuffer(buffers[2], dtype=np.uint8)
        return offsets, texts, state
    if field.type == "float64":
        return (np.asarray(array.fill_null(0.0)) + 0.0).view(np.int64), None, state  # -0.0 equals 0.0
    if field.type == "bool":
        array = array.cast(pa.int8()).cast(pa.int64())
    return np.array(array.fill_null(0), dtype=np.int64), None, state


def _may_be_typed(job: Job, event: EventPlan) -> bool:
    return any(unit.event is event and unit.groups[0].view.entity in job.plan.typed_entities for unit in job.units)


def _whole(array: Any, state: npt.NDArray[np.uint8]) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Integers that pandas made floats because one is missing; another fraction is no integer."""
    pa = pyarrow()
    numbers = np.nan_to_num(np.asarray(array.fill_null(0.0)).astype(np.float64), nan=0.0, posinf=0.5, neginf=0.5)
    is_whole = (np.floor(numbers) == numbers) & (np.abs(numbers) < 2.0**63)
    state = np.where((state == A_CELL) & ~is_whole, NO_CELL, state).astype(np.uint8)
    return pa.array(np.where(is_whole, numbers, 0).astype(np.int64)), state


def _key_as(array: Any, kind: str, state: npt.NDArray[np.uint8]) -> tuple[Any, npt.NDArray[np.uint8]]:
    """A key of the other kind, where the entity's type says that they are the same keys."""
    pa = pyarrow()
    if kind == "string" and pa.types.is_integer(array.type):
        return array.cast(pa.string()), state
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    if kind != "int64" or not is_text:
        return array, state
    values: list[int | None] = []
    for text in array.to_pylist():
        try:
            number = int(text) if text is not None else None
        except ValueError:
            number = None
        same = number is not None and str(number) == text and -(1 << 63) <= number < 1 << 63
        values.append(number if same else None)
    made = pa.array(values, type=pa.int64())
    unlike = np.asarray(made.is_null()) & (state == A_CELL)
    return made, np.where(unlike, NO_CELL, state).astype(np.uint8)
