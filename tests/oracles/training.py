"""Oracle of training sets: for every spine row, filter the whole log by the row's own (T, K), then read every window.

What must stay true: it follows S5, S6, S8, S9, S11, S14 and S17 word for word. Events are Logged tuples in the order of
the log; rows are dicts with times as integer microseconds and None for null.
"""

import math
from typing import Any, NamedTuple

from oracles.engine import SlowEngine, length_us


class Logged(NamedTuple):
    event: str
    row: dict[str, Any]
    outcome: str
    ingest_time: int


class AsOf(SlowEngine):
    """Views as of one T, with the events of one K in the order in which they count.

    forgets: what online state may have released by the watermark is unknown. before: an event finds the watermark of
    the times before its own, so that it does not depend on the order of equal times.
    """

    def __init__(self, app, known, forgets, before):
        super().__init__(app)
        self.forgets = forgets
        self.before = before
        for logged in known:
            self.apply(self.events[logged.event], logged.row)

    def kept(self, view, key):
        event = self.events[view.event]
        if not self.forgets:
            return [r for r in self.applied[event.name] if self.key_of(view, r[view.key]) == key]
        spans = [
            length_us(a.ttl) if w == "lifetime" and a.ttl else math.inf if w == "lifetime" else length_us(w)
            for v in self.app.views
            if (v.event, v.entity, v.key) == (view.event, view.entity, view.key)
            for a in v.aggregations
            for w in a.windows
        ]
        reach = max(spans) + length_us(event.lateness)
        rows, newest, watermark = [], -math.inf, -math.inf
        for i, r in enumerate(self.applied[event.name]):
            at = r[event.time]
            if self.key_of(view, r[view.key]) == key:
                if self.before:
                    earlier = [x[event.time] for x in self.applied[event.name][:i] if x[event.time] < at]
                    watermark = max(earlier, default=-math.inf)
                if newest < watermark - reach:
                    rows, newest = [], -math.inf
                rows.append(r)
                newest = max(newest, at)
            watermark = max(watermark, at)
        return [] if newest < watermark - reach else rows


def training_set(app, log, spine, views, time, mode="ingest_time"):
    """Per spine row a dict: feature -> (value, status).

    views: names; time: the spine's column with T; mode: ingest_time, backfill, or the name of the column with the
    sequence before which events count.
    """
    found = []
    for row in spine:
        at = row[time]
        features = {}
        for view in (v for v in app.views if v.name in views):
            event = next(e for e in app.events if e.name == view.event)
            known, latest = [], -math.inf
            for sequence, logged in enumerate(log):
                latest = max(latest, logged.ingest_time)  # the ingest clock never goes back
                if logged.outcome != "applied" or logged.event != view.event:
                    continue
                if mode == "backfill":
                    visible = logged.row[event.time] <= at
                elif mode == "ingest_time":
                    visible = latest <= at
                else:
                    visible = sequence < row[mode]
                if visible:
                    known.append(logged)
            if mode == "backfill":
                known.sort(key=lambda logged: (logged.row[event.time], logged.ingest_time))
            newest = max((logged.row[event.time] for logged in known), default=-math.inf)
            # Older than online state reaches: read as if nothing had ever been given up.
            forgets = at >= newest - length_us(event.lateness)
            engine = AsOf(app, known, forgets, mode == "backfill")
            own = engine.normal(event, {**row, event.time: at})
            extra = own if view.include and mode != "backfill" else None
            key = row[view.key] if view.key in row else row[view.entity]
            for name, _, default, value, status in engine.read(view, key, at, extra):
                if status != "PRESENT" and default is not None:
                    value, status = default, status if status == "OUTSIDE_MAX_AGE" else "PRESENT"
                features[name] = (value, status)
        found.append(features)
    return found
