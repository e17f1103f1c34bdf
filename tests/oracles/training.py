"""Oracle of training sets: for every spine row, filter the whole log by the row's own (T, K), then read every window.

What must stay true: it follows S5, S6, S8, S9, S11, S14 and S17 word for word. Events are Logged tuples in the order of
the log; rows are dicts with times as integer microseconds and None for null.
"""

import math
from typing import Any, NamedTuple

from oracles.engine import SlowEngine, exact_view
from penstock.offline.exact import RawEvent


class Logged(NamedTuple):
    event: str
    row: dict[str, Any]
    outcome: str
    ingest_time: int


def own_events(app, log, spine, views, time):
    """Per spine row the sequence of the log's event that it is, or None (S5).

    Rows may be events of the views' types: of those whose id the spine has, else of those that share most columns. Rows
    with an id choose first; a row whose equal events are all taken is the last of them.
    """
    asked = {v.event for v in app.views if v.name in views}
    columns = set().union(*spine)
    keys = {e.name: {v.key for v in app.views if v.event == e.name and v.name in views} for e in app.events}
    shared = {
        e.name: (e.event_id in columns, len(keys[e.name] | {e.time} | {f for f in e.fields if f in columns}))
        for e in app.events
        if e.name in asked
    }
    candidates = [e for e in app.events if e.name in asked and shared[e.name] == max(shared.values())]
    taken = set()
    found = [None] * len(spine)

    def has_id(row):
        return any(e.event_id in columns and row[e.event_id] is not None for e in candidates)

    for i, row in sorted(enumerate(spine), key=lambda one: (not has_id(one[1]), one[0])):
        for sequence, logged in enumerate(log):
            event = next((e for e in candidates if e.name == logged.event), None)
            if event is None or logged.outcome == "duplicate":
                continue
            if event.event_id in columns and row[event.event_id] is not None:
                same = row[event.event_id] == logged.row[event.event_id]
            else:
                at = logged.row[event.time] == row[time]
                fields = [f for f in event.fields if f in columns and f not in (event.event_id, event.time)]
                same = at and all(without_nan(row[f]) == logged.row[f] for f in fields)
            if same:
                found[i] = sequence
                if sequence not in taken:
                    taken.add(sequence)
                    break
    return found


def without_nan(value):
    return None if isinstance(value, float) and math.isnan(value) else value


def training_set(app, log, spine, views, time, mode="ingest_time", own="auto"):
    """Per spine row a dict: feature -> (value, status).

    views: names; time: the spine's column with T; mode: ingest_time, backfill, or the name of the column with the
    sequence before which events count. own: "never": no row is one of the log's events.
    """
    owns = [None] * len(spine) if own == "never" else own_events(app, log, spine, views, time)
    engine = SlowEngine(app)
    clock, latest = [], -math.inf
    for logged in log:
        latest = max(latest, logged.ingest_time)  # the ingest clock never goes back
        clock.append(latest)
    found = []
    for row, mine in zip(spine, owns):
        features = {}
        for view in (v for v in app.views if v.name in views):
            event = next(e for e in app.events if e.name == view.event)
            given = row[view.key] if view.key in row else row[view.entity]
            for output, value in values(engine, view, event, log, clock, row, row[time], given, mine, mode):
                features[output.name] = (value.value, value.status)
        found.append(features)
    return found


def values(engine, view, event, log, clock, row, at, key, mine, mode):
    """One view of one row."""

    def place(sequence):  # S6
        logged = log[sequence]
        return (logged.row[engine.events[logged.event].time], clock[sequence], sequence)

    applied = [s for s, logged in enumerate(log) if logged.event == view.event and logged.outcome == "applied"]
    own = mine if mode in ("ingest_time", "backfill") or mine == row[mode] else None
    served = own is not None or mode not in ("ingest_time", "backfill")
    if mode == "backfill":
        before = [s for s in applied if own is None or place(s) < place(own)]
    elif own is not None:
        before = [s for s in applied if s < own]
    elif mode == "ingest_time":
        before = [s for s in applied if clock[s] <= at]
    else:
        before = [s for s in applied if s < row[mode]]
    # What the online state had given up by then is invalid; a row as of its time alone is read from all of history.
    watermark = None
    if served and mode != "backfill":
        watermark = max((log[s].row[event.time] for s in before), default=None)
    request = None
    if own is not None and view.include and log[own].event == view.event:
        if own in applied:
            before.append(own)
        else:
            request = log[own].row
    elif own is None and view.include and mode != "backfill":
        counted = mine is not None and mode != "ingest_time" and mine < row[mode]  # among what it sees
        request = None if counted else engine.normal(event, {**row, event.time: at})
    key = engine.key_of(view, key)
    if mode == "backfill":
        before.sort(key=place)
    events = [
        RawEvent(log[s].row[event.time], clock[s], i, "applied", log[s].row)
        for i, s in enumerate(before)
        if engine.key_of(view, log[s].row[view.key]) == key
    ]
    exact = exact_view(engine.app, view)
    return zip(exact.outputs, exact.values(events, at, watermark=watermark, request=request))
