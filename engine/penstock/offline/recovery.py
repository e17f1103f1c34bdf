"""Recovery (control path): a log folder into an engine's state, before it serves: newest snapshot, then the log's tail.

What must stay true: every event that was acknowledged is in the state once, as it was judged; layouts that a snapshot
does not hold are rebuilt from all of history; and what cannot be read is refused or reported, never passed over.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from .._ext.core import Core
from .._ext.history import HistoryRun
from .._ext.log import EventLog
from ..errors import LogError
from ..features.layouts import describe_layouts
from ..features.snapshot import LoadedSnapshot, load_snapshot
from .history import History, Piece
from .log_folder import Damage, LogFolder, located, readable_records, write_whole
from .options import LogOptions, parse_sync
from .schemas import EventSchema, ScoreSchema, event_mapping, schemas_of, score_mapping

if TYPE_CHECKING:
    from ..engine import Engine
    from ..plan import Plan

BLOCK = 256  # rows of a table that are scored at once

__all__ = ["LogOptions", "RecoveryReport", "fed", "mappings_of", "open_log", "put_layouts", "recover_state"]

Progress = Callable[[int, int], None]


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What opening a log found and did. seconds: of the whole; events: replayed from the log's tail; rebuilt: layouts
    computed anew from history (events of it in `history_events`); cold: layouts that start empty."""

    snapshot: int | None
    events: int
    history_events: int
    loaded: list[str]
    rebuilt: list[str]
    cold: list[str]
    partial: list[str] = []
    damages: list[Damage]
    skipped_snapshots: list[str]
    clock_behind_us: int
    seconds: float

    def lines(self) -> list[str]:
        """What an operator should read, a line each."""
        found = []
        what = f"snapshot {self.snapshot}" if self.snapshot is not None else "no snapshot"
        rate = f", {self.events / self.seconds:,.0f}/s" if self.seconds > 0.05 and self.events else ""
        found.append(f"log recovered in {self.seconds:.2f} s: {what}, {self.events:,} events replayed{rate}")
        if self.rebuilt:
            found.append(f"rebuilt from {self.history_events:,} events of history: {', '.join(self.rebuilt)}")
        if self.partial:
            found.append(
                f"warning: history that retention dropped is missing in {', '.join(self.partial)}: windows are INVALID "
                "until they have refilled, Lifetime stays so"
            )
        if self.cold:
            found.append(f"started empty as asked: {', '.join(self.cold)}")
        found += [f"warning: {damage}" for damage in self.damages]
        found += [f"warning: snapshot passed over: {reason}" for reason in self.skipped_snapshots]
        if self.clock_behind_us > 1_000_000:
            found.append(
                f"warning: the clock is {self.clock_behind_us / 1e6:.1f} s behind the log's last event; "
                "ingest times stand still until it has caught up"
            )
        return found


def mappings_of(engine: Engine, schemas: list[Any], begins: dict[str, int] | None = None) -> list[Any]:
    """Per schema number of a segment how the engine's app reads its records; None where it has no such type.

    begins: where old history was dropped (score_mapping).
    """
    found: list[Any] = []
    for schema in schemas:
        if isinstance(schema, EventSchema):
            event = engine.plan.events.get(schema.name)
            found.append(None if event is None else event_mapping(schema, event))
        else:
            plan = engine.plan.pipelines.get(schema.pipeline)
            models = running = words = None
            if plan is not None and not engine.features_only:
                words = engine.core.pipes[plan.index].decision_texts
                models = list(words.models)
                running = engine.running(plan.index)
            found.append(score_mapping(schema, engine.plan, plan, models, begins, running, words))
    return found


def fed(
    run: HistoryRun, piece: Piece, mappings: list[Any], first: int = 0, last: int = 1 << 62
) -> Iterator[HistoryRun]:
    """Feed a piece to a run, to its end; gives the run whenever its output is full.

    Raises LogError with the place where a record does not check (and how many readable records follow), or is not of
    its schema.
    """
    at, why = piece.start, "full"
    while why == "full":
        try:
            at, why = run.feed(
                piece.data, piece.log_id, piece.number, at, piece.end, piece.records, mappings, first, last
            )
        except LogError as error:
            raise located(piece.path, error) from None
        if why == "full":
            yield run
    if why == "stopped" and at < piece.end:
        _, n = readable_records(piece.data[: piece.end], piece.log_id, piece.number, at + 8)
        raise LogError(
            f"{piece.path} at offset {at}: damaged; {n} readable records follow in it. "
            "Nothing was changed; restore the file from a copy"
        )


class _Replay:
    """Feeds pieces of history to a core, in order, with the mappings of each piece's schemas."""

    def __init__(self, engine: Engine, history: History, progress: Progress | None) -> None:
        self.engine = engine
        self.history = history
        self.progress = progress
        self.done = self.total = 0

    def _more(self, events: int) -> None:
        self.done += events
        if self.progress is not None:
            self.progress(self.done, max(self.done, self.total))

    def run(self, core: Core, first: int, last: int | None, ids: bool, expected: int) -> dict[str, Any]:
        """Events `first` to `last` (None: to the end). expected: the first sequence there must be; -1: any."""
        run = HistoryRun(core, [], None, [], -1, True, None, self._more, rows="none", next_sequence=expected, ids=ids)
        until = last if last is not None else 1 << 62
        # The scores of a table are logged behind its events, up to a block of rows later.
        for piece in self.history.pieces(first, until + BLOCK if ids else until):
            if ids:
                _know_models(self.engine, piece.schemas)
            for _ in fed(run, piece, mappings_of(self.engine, piece.schemas), first, until):
                pass  # nothing is put out, so nothing fills up
        run.done()
        return run.totals


def _know_models(engine: Engine, schemas: list[Any]) -> None:
    """Models that decided before a swap or a restart: the first decision on an event is repeated with its model."""
    if engine.features_only:
        return
    for schema in schemas:
        plan = engine.plan.pipelines.get(schema.pipeline) if isinstance(schema, ScoreSchema) else None
        if plan is not None:
            for name, version in schema.models:
                engine.core.pipes[plan.index].know_model(name, version)


class Recovered(msgspec.Struct, kw_only=True):
    """State brought up to the log: what was loaded, what was replayed."""

    history: History
    snapshot: LoadedSnapshot | None
    skipped: list[str]
    damages: list[Damage]
    at: int
    events: int
    history_events: int
    loaded: list[str]
    rebuilt: list[str]
    cold: list[str]
    partial: list[str] = []


def _miss_dropped(engine: Engine, history: History, missing: set[int], begins: int, allowed: bool) -> list[str]:
    """Layouts that need events which retention dropped and no snapshot holds: what they cannot know will be INVALID.

    Returns which they are. Raises LogError, with the numbers, unless that is allowed: it would be counted as if the
    dropped events had never been.
    """
    dropped, newest = history.first_watermarks(), history.watermarks()
    found = []
    for plan in engine.plan.stores:
        mark = dropped.get(plan.event)
        if plan.fingerprint not in missing or mark is None:
            continue
        engine.stores[plan.index].miss_before(mark + 1)
        reach = max((o.window or 0 for o in plan.outputs), default=0) + plan.lateness
        if any(o.window is None for o in plan.outputs) or newest.get(plan.event, mark) - reach <= mark:
            found.append(f"{plan.event} by {plan.entity}")
    if found and not allowed:
        raise LogError(
            f"{history.folder.path}: events 0 to {begins - 1:,} were dropped by retention, and no snapshot that can be "
            f"read holds the state of {', '.join(found)}, which needs them: it would count events {begins:,} to "
            f"{history.last_sequence:,} alone. Put back the snapshot, or start with --start-partial "
            "(start_partial=True: what cannot be known is INVALID, windows until they have refilled, Lifetime for "
            "ever) or with --start-cold (start_cold=True: empty)"
        )
    return found


def recover_state(
    engine: Engine,
    folder: LogFolder,
    start_cold: bool = False,
    progress: Progress | None = None,
    start_partial: bool = False,
) -> Recovered:
    """Load the newest snapshot into an engine's state and replay the log's tail; changes nothing in the folder."""
    plan = engine.plan
    stores = {store.fingerprint: engine.stores[store.index] for store in plan.stores}
    names = {store.fingerprint: f"{store.event} by {store.entity}" for store in plan.stores}
    history = History(folder)
    damages = history.check()
    skipped: list[str] = []
    snapshot = None
    if folder.snapshots_path.is_dir():
        snapshot = load_snapshot(folder.snapshots_path, stores, skipped=skipped)
    loaded: set[int] = set()
    at, position = -1, None
    if snapshot is not None and snapshot.position is not None and (snapshot.loaded or not stores):
        loaded, position = set(snapshot.loaded), snapshot.position
        at = position.sequence
    if position is not None and position.log_id != folder.log_id:
        raise LogError(
            f"{folder.snapshots_path}: the snapshots are of another log; move them away to rebuild the state"
        )
    if at > history.last_sequence:
        raise LogError(
            f"{folder.path}: the snapshot is of event {at}, but the log ends with event {history.last_sequence}; "
            "segments are missing"
        )
    begins = max(0, history.first_sequence)  # later than 0 where old history was dropped
    if 0 <= at < begins - 1:
        raise LogError(f"{folder.path}: events {at + 1} to {begins - 1} are neither in a snapshot nor in history")
    replay = _Replay(engine, history, progress)
    missing = [f for f in stores if f not in loaded]
    found = Recovered(
        history=history,
        snapshot=snapshot,
        skipped=skipped,
        damages=damages,
        at=at,
        events=0,
        history_events=0,
        loaded=[names[f] for f in stores if f in loaded],
        rebuilt=[],
        cold=[],
    )
    if missing and begins and not start_cold:
        found.partial = _miss_dropped(engine, history, set(missing), begins, start_partial)
    tail = max(at + 1, begins)
    replay.total = history.last_sequence + 1 - tail
    if missing and not start_cold and position is not None:
        replay.total += at + 1 - begins
    marks = dict(position.watermarks) if position is not None else history.first_watermarks() if begins else {}
    if missing and start_cold:
        found.cold = [names[f] for f in missing] if history.last_sequence >= 0 else []
        if position is None and history.known:
            # No state at all: only where the watermarks stand, and the ids, are taken from the log.
            recent = engine.core_of(set())
            recent.go_on_from(0, 0, [history.watermarks().get(name) for name in plan.events])
            replay.run(recent, history.last_start(), None, False, -1)
            at = history.last_sequence
            tail = at + 1
            marks = {e.name: m for e in plan.events.values() if (m := recent.watermark(e.index)) is not None}
    elif missing and position is not None:
        # Only the layouts that the snapshot lacks, up to where it stands; the tail is for all.
        found.history_events = replay.run(engine.core_of(set(missing)), begins, at, False, begins)["events"]
        found.rebuilt = [names[f] for f in missing]
    elif snapshot is not None and snapshot.position is not None:
        found.rebuilt = [names[f] for f in missing]
    ingest_time = position.ingest_time if position is not None else 0
    engine.core.go_on_from(tail, ingest_time, [marks.get(name) for name in plan.events])
    if at >= 0:
        _recover_ids(replay, engine, history, at)
    totals = replay.run(engine.core, tail, None, True, tail)
    found.events = totals["events"]
    if found.rebuilt and not found.history_events:
        found.history_events = found.events
    engine.core.go_on_from(
        history.last_sequence + 1, max(history.last_ingest_time, totals["ingest_time"]), [None] * len(plan.events)
    )
    engine.core.reset_counters()
    return found


def open_log(engine: Engine, folder: LogFolder, options: LogOptions, progress: Progress | None) -> RecoveryReport:
    """Bring an engine's state up to its log, and attach the log for writing. The folder is locked by the caller.

    Raises LogError, with file and offset, where history cannot be read as it was written.
    """
    began = time.perf_counter()
    plan = engine.plan
    sync_us = parse_sync(options.sync)
    folder.remove_spares()
    found = recover_state(engine, folder, options.start_cold, progress, options.start_partial)
    history = found.history
    history.seal()
    put_layouts(folder, plan)
    texts = [pipe.decision_texts for pipe in engine.core.pipes]
    event_schemas = list(range(len(plan.events)))
    score_schemas = list(range(len(plan.events), len(plan.events) + len(plan.pipelines)))
    schemas = schemas_of(plan, texts, [engine.running(i) for i in range(len(plan.pipelines))])
    log = EventLog(
        str(folder.segments_path),
        folder.log_id,
        max([*folder.numbers(), history.last_number], default=0) + 1,
        history.last_sequence + 1,
        options.segment_bytes,
        sync_us,
        int(options.segment_seconds * 1e6),
        schemas,
        engine.core.sources,
        [str(folder.segments_path), str(folder.path / "lock")],
    )
    engine.schemas = schemas
    engine.core.attach_log(log, event_schemas, score_schemas, options.scores)
    return RecoveryReport(
        snapshot=found.at if found.at >= 0 else None,
        events=found.events,
        history_events=found.history_events,
        loaded=found.loaded,
        rebuilt=found.rebuilt,
        cold=found.cold,
        partial=found.partial,
        damages=found.damages,
        skipped_snapshots=found.skipped,
        clock_behind_us=max(0, engine.core.last_ingest_time - time.time_ns() // 1000),
        seconds=time.perf_counter() - began,
    )


def put_layouts(folder: LogFolder, plan: Plan) -> bool:
    """Describe the stores for child processes. False where the disk has no room for it: no keeper may run then."""
    path, data = folder.path / "layouts.json", describe_layouts(plan)
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return True
    try:
        write_whole(path, data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    return True


def _recover_ids(replay: _Replay, engine: Engine, history: History, last: int) -> None:
    """The event ids that a snapshot does not hold: from the log, as far back as ids are remembered."""
    events = [e for e in engine.plan.events.values() if e.event_id is not None]
    if not events:
        return
    reach = {e.name: e.options.lateness + e.options.retry_window for e in events}
    marks = {e.name: engine.core.watermark(e.index) for e in events}
    oldest = {name: mark - reach[name] for name, mark in marks.items() if mark is not None}
    first = history.first_sequence_with(
        lambda marks: all(name not in marks or marks[name] < since for name, since in oldest.items())
    )
    core = engine.core_of(set())
    replay.run(core, first, last, True, -1)
    engine.core.take_ids(core)
