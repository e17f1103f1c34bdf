"""Slow, obvious engine: one event after the other, lists and dicts, every window read from scratch (tests only).

What must stay true: it follows SEMANTICS ("One step", S1-S9, S11, S14, S16) and shares no code with plan, engine or
kernels. An app is a SlowApp; `definitions(app)` writes the same app with Penstock's definitions. Rows are dicts of
field -> value with times as integer microseconds and None for null.
"""

import math
import types
from typing import Any, NamedTuple

from oracles import expressions, split, windows
from penstock import Aggregation, Entity, Event, Experiment, FeatureView, Lifetime, Pipeline, Rule, Timestamp

STATUSES = {1: "PRESENT", 2: "NULL_VALUE", 3: "NOT_FOUND", 4: "OUTSIDE_MAX_AGE"}
UNITS = {"us": 1, "ms": 1000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6}
ANNOTATIONS = {"float64": float, "int64": int, "bool": bool, "string": str, "timestamp": Timestamp}


class SlowEvent(NamedTuple):
    name: str
    fields: dict[str, str]  # name -> slot type, "?" after it where it may be null
    lateness: str
    event_id: str | None = None
    time: str = "at"
    max_skew: str = "5m"
    retry_window: str = "1h"


class SlowAggregation(NamedTuple):
    function: str
    column: str | None
    windows: tuple[str, ...]  # "lifetime" for Lifetime
    where: Any = None  # a tree of oracles.expressions
    default: Any = None
    closed: str = "right"
    ttl: str | None = None


class SlowView(NamedTuple):
    name: str
    event: str
    entity: str
    key: str
    aggregations: tuple[SlowAggregation, ...]
    include: bool = False


class SlowPipeline(NamedTuple):
    name: str
    event: str
    features: tuple[str, ...]
    experiments: tuple[dict[str, Any], ...] = ()
    rules: tuple[tuple[str, Any, str, str | None], ...] = ()  # name, tree, action, reason


class SlowApp(NamedTuple):
    events: tuple[SlowEvent, ...]
    views: tuple[SlowView, ...]
    pipeline: SlowPipeline
    entities: dict[str, type | None]  # name -> type of its keys; None: its field's own


class SlowDecision(NamedTuple):
    outcome: str
    action: str
    reasons: tuple[str, ...]
    arms: dict[str, str | None]
    features: dict[str, Any]
    statuses: dict[str, str]
    reachable: bool  # False: some view was read before what its state must still hold (S14)


def length_us(text):
    unit = text.lstrip("0123456789")
    return int(text[: len(text) - len(unit)]) * UNITS[unit]


def output_type(aggregation, fields):
    kind = fields[aggregation.column].rstrip("?") if aggregation.column else None
    match aggregation.function:
        case "count" | "distinct_count":
            return "int64"
        case "sum":
            return "float64" if kind == "float64" else "int64"
        case "min" | "max" | "first" | "last":
            return kind
    return "float64"


class SlowEngine:
    def __init__(self, app, clock="event"):
        self.app = app
        self.clock = clock
        self.events = {e.name: e for e in app.events}
        self.applied = {e.name: [] for e in app.events}
        self.watermark = {e.name: -math.inf for e in app.events}
        self.ids = {e.name: {} for e in app.events}
        self.outcomes = {
            e.name: dict.fromkeys(("off", "applied", "duplicate", "late", "quarantined"), 0) for e in app.events
        }

    # one step

    def judge(self, event, row, now):
        at = row[event.time]
        if at > (at if self.clock == "event" else now) + length_us(event.max_skew):
            return "quarantined"
        if self.watermark[event.name] - at > length_us(event.lateness):
            return "late"
        return "applied"

    def apply(self, event, row):
        self.applied[event.name].append(row)
        self.watermark[event.name] = max(self.watermark[event.name], row[event.time])

    def ingest(self, name, row, now=None):
        event = self.events[name]
        row = self.normal(event, row)
        if event.event_id and row[event.event_id] in self.ids[name]:
            outcome = "duplicate"
        else:
            outcome = self.judge(event, row, now)
            if outcome == "applied":
                self.apply(event, row)
            if event.event_id:
                self.ids[name][row[event.event_id]] = None
        self.outcomes[name][outcome] += 1
        return outcome

    def score(self, row, ingest=True, now=None):
        pipeline = self.app.pipeline
        event = self.events[pipeline.event]
        row = self.normal(event, row)
        id = row[event.event_id] if event.event_id else None
        repeated = id is not None and id in self.ids[event.name]
        if repeated and self.ids[event.name][id] is not None:
            self.outcomes[event.name]["duplicate"] += 1
            return self.ids[event.name][id]._replace(outcome="duplicate")
        outcome = "duplicate" if repeated else self.judge(event, row, now) if ingest else "off"
        self.outcomes[event.name][outcome] += 1
        values, statuses, kinds = {}, {}, {}
        for field, kind in event.fields.items():
            values[field] = row[field]
            statuses[field] = "NULL_VALUE" if row[field] is None else "PRESENT"
            kinds[field] = kind.rstrip("?")
        reachable = True
        extra = row if outcome not in ("applied", "duplicate") else None
        for included in (False, True):
            if included and outcome == "applied":
                self.apply(event, row)
            for view in self.app.views:
                if view.include != included:
                    continue
                key = row[view.key if view.event == event.name else view.entity]
                source = self.events[view.event]
                at = row[event.time]
                reachable &= at >= self.watermark[view.event] - length_us(source.lateness)
                counts = extra if included and view.event == event.name else None
                for name, kind, default, value, status in self.read(view, key, at, counts):
                    if status != "PRESENT" and default is not None:
                        value, status = default, status if status == "OUTSIDE_MAX_AGE" else "PRESENT"
                    values[name], statuses[name], kinds[name] = value, status, kind
        arms = {}
        for experiment in pipeline.experiments:
            arm = split.assign(
                experiment["hash"],
                experiment["arms"],
                row[experiment["unit"]],
                experiment["name"],
                experiment["coverage"],
            )
            arms[experiment["name"]] = arm
            values[experiment["name"]], kinds[experiment["name"]] = arm, "string"
        slots = {name: (kinds[name], values[name]) for name in kinds}
        action, reasons = None, []
        for name, tree, act, reason in pipeline.rules:
            if expressions.evaluate(tree, slots)[1] is True:
                action = action or act
                reasons.append(reason or name)
        names = self.feature_names()
        decision = SlowDecision(
            outcome,
            action or "approve",
            tuple(reasons),
            arms,
            {n: values[n] for n in names},
            {n: statuses[n] for n in names},
            reachable,
        )
        if id is not None and ingest:
            self.ids[event.name][id] = decision
        return decision

    def feature_names(self):
        names = []
        for feature in self.app.pipeline.features:
            views = [v for v in self.app.views if v.name == feature]
            for name in [o[0] for o in self.outputs(views[0])] if views else [feature]:
                if name not in names:
                    names.append(name)
        return names

    # windows

    def outputs(self, view):
        fields = self.events[view.event].fields
        for a in view.aggregations:
            base = f"{a.function}_{a.column}" if a.column else a.function
            for window in a.windows:
                yield f"{view.name}.{base}_{window}", a, window, output_type(a, fields)

    def read(self, view, key, at, extra=None):
        """(name, type, default, value, status) per output, as of `at`; extra counts as if applied now."""
        event = self.events[view.event]
        key = self.key_of(view, key)
        rows = self.kept(view, key)
        unknown = windows.NULL_VALUE if rows or extra else windows.NOT_FOUND
        rows += [extra] if extra else []
        rows.sort(key=lambda r: r[event.time])
        for name, a, window, kind in self.outputs(view):
            seen = [
                windows.Event(r[event.time], (r[a.column] if a.column else None,))
                for r in rows
                if a.where is None or expressions.evaluate(a.where, self.typed(event, r))[1] is True
            ]
            output = windows.Output(
                "count_col" if a.function == "count" and a.column else a.function,
                0 if a.column else None,
                None,
                None if window == "lifetime" else length_us(window),
                a.closed,
                length_us(a.ttl) if a.ttl else None,
            )
            oracle = windows.WindowOracle([event.fields[a.column].rstrip("?") if a.column else "int64"], [output])
            value, status = oracle.evaluate(output, seen, at, unknown)
            yield name, kind, a.default, value, STATUSES[status]

    def kept(self, view, key):
        """The entity's applied events; none once no admissible read of any of the store's views can reach them."""
        event = self.events[view.event]
        reach = [
            length_us(a.ttl) if w == "lifetime" and a.ttl else math.inf if w == "lifetime" else length_us(w)
            for v in self.app.views
            if (v.event, v.entity, v.key) == (view.event, view.entity, view.key)
            for a in v.aggregations
            for w in a.windows
        ]
        rows, newest, watermark = [], -math.inf, -math.inf
        for r in [*self.applied[event.name], None]:
            if newest < watermark - max(reach) - length_us(event.lateness):
                rows, newest = [], -math.inf
            if r is not None:
                watermark = max(watermark, r[event.time])
                if self.key_of(view, r[view.key]) == key:
                    rows.append(r)
                    newest = max(newest, r[event.time])
        return rows

    def features(self, view, key, at):
        view = next(v for v in self.app.views if v.name == view)
        found = {}
        for name, _, default, value, status in self.read(view, key, at):
            found[name] = (value if value is not None else default, status)
        return found

    # rows

    def key_of(self, view, value):
        kind = self.app.entities.get(view.entity)
        if kind is str:
            return str, str(value)
        if kind is int and isinstance(value, str):
            try:
                if str(int(value)) == value and -(2**63) <= int(value) < 2**63:
                    value = int(value)
            except ValueError:
                pass
        return type(value), value

    def normal(self, event, row):
        return {f: None if isinstance(row.get(f), float) and math.isnan(row[f]) else row.get(f) for f in event.fields}

    def typed(self, event, row):
        return {f: (kind.rstrip("?"), row[f]) for f, kind in event.fields.items()}


def event_class(event):
    """The Event class that a SlowEvent describes, in a module of its own."""
    annotations = {
        f: ANNOTATIONS[k.rstrip("?")] | None if k.endswith("?") else ANNOTATIONS[k] for f, k in event.fields.items()
    }
    options = {
        "time": event.time,
        "lateness": event.lateness,
        "max_skew": event.max_skew,
        "retry_window": event.retry_window,
    }
    if event.event_id:
        options["event_id"] = event.event_id
    defaults = {f: None for f, k in event.fields.items() if k.endswith("?")}
    namespace = {"__annotations__": annotations, "__module__": __name__, **defaults}
    return types.new_class(event.name, (Event,), {**options, "kw_only": True}, lambda ns: ns.update(namespace))


def definitions(app):
    """The same app written with Penstock's definitions: name -> value."""
    classes = {e.name: event_class(e) for e in app.events}
    found = dict(classes)
    for name, kind in app.entities.items():
        if kind is not None:
            found[f"entity_{name}"] = Entity(name, type=kind)
    for view in app.views:
        kind = app.entities.get(view.entity)
        found[view.name] = FeatureView(
            view.name,
            entity=Entity(view.entity, type=kind) if kind is None else found[f"entity_{view.entity}"],
            source=classes[view.event],
            key=view.key,
            include_request_event=view.include,
            aggregations=[
                Aggregation(
                    a.function,
                    a.column,
                    windows=[Lifetime if w == "lifetime" else w for w in a.windows],
                    where=None if a.where is None else expressions.text(a.where),
                    default=a.default,
                    closed=a.closed,
                    ttl=a.ttl,
                )
                for a in view.aggregations
            ],
        )
    pipeline = app.pipeline
    found["pipeline"] = Pipeline(
        pipeline.name,
        event=classes[pipeline.event],
        features=list(pipeline.features),
        experiments=[Experiment(**e) for e in pipeline.experiments],
        rules=[Rule(name, expressions.text(tree), action, reason) for name, tree, action, reason in pipeline.rules],
    )
    return found
