"""Slow, obvious engine: one event after the other, lists and dicts, every window read from scratch (tests only).

What must stay true: it follows SEMANTICS ("One step", S1-S9, S11, S14, S16, S17) and shares no code with plan, engine
or kernels; views are read by the exact engine (penstock/offline/exact.py). An app is a SlowApp; `definitions(app)`
writes the same app with Penstock's definitions. Rows are dicts of field -> value with times as integer microseconds and
None for null.
"""

import math
import types
from typing import Any, NamedTuple

from oracles import expressions, split
from penstock import Aggregation, Entity, Event, Experiment, FeatureView, Lifetime, Pipeline, Rule, Timestamp
from penstock.offline.exact import ExactOutput, ExactView, RawEvent, canonical_key

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
    retention: str | None = None


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
    degraded: bool  # S17


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
        self.views = {v.name: exact_view(app, v) for v in app.views}
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
        extra = row if outcome not in ("applied", "duplicate") else None
        for included in (False, True):
            if included and outcome == "applied":
                self.apply(event, row)
            for view in self.app.views:
                if view.include != included:
                    continue
                key = row[view.key if view.event == event.name else view.entity]
                counts = extra if included and view.event == event.name else None
                for output, found in self.read(view, key, row[event.time], counts):
                    name = output.name
                    values[name], statuses[name], kinds[name] = found.value, found.status, output.result
        degraded = outcome in ("late", "quarantined") or "INVALID" in statuses.values()
        values["degraded"], kinds["degraded"] = degraded, "bool"
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
            degraded,
        )
        if id is not None and ingest:
            self.ids[event.name][id] = decision
        return decision

    def feature_names(self):
        names = []
        for feature in self.app.pipeline.features:
            views = [v for v in self.app.views if v.name == feature]
            for name in [o.name for o in self.outputs(views[0])] if views else [feature]:
                if name not in names:
                    names.append(name)
        return names

    # windows

    def outputs(self, view):
        return self.views[view.name].outputs

    def read(self, view, key, at, extra=None):
        """(output, value and status) of each, as of `at`; extra counts as if applied now."""
        event = self.events[view.event]
        key = self.key_of(view, key)
        events = [
            RawEvent(row[event.time], 0, sequence, "applied", row)
            for sequence, row in enumerate(self.applied[event.name])
            if self.key_of(view, row[view.key]) == key
        ]
        watermark = self.watermark[event.name]
        exact = self.views[view.name]
        found = exact.values(events, at, watermark=None if watermark == -math.inf else watermark, request=extra)
        return list(zip(exact.outputs, found))

    def features(self, view, key, at):
        view = next(v for v in self.app.views if v.name == view)
        return {output.name: (found.value, found.status) for output, found in self.read(view, key, at)}

    # rows

    def key_of(self, view, value):
        return canonical_key(value, {str: "string", int: "int64", None: None}[self.app.entities.get(view.entity)])

    def normal(self, event, row):
        return {f: None if isinstance(row.get(f), float) and math.isnan(row[f]) else row.get(f) for f in event.fields}


def exact_view(app, view):
    """A SlowView for the exact engine."""
    event = next(e for e in app.events if e.name == view.event)
    kinds = {f: kind.rstrip("?") for f, kind in event.fields.items()}

    def where(tree):
        return tree and (lambda row: expressions.evaluate(tree, {f: (kind, row[f]) for f, kind in kinds.items()})[1])

    return ExactView(
        tuple(
            ExactOutput(
                name=f"{view.name}.{a.function}{'_' + a.column if a.column else ''}_{window}",
                function=a.function,
                column=a.column,
                type=kinds[a.column] if a.column else "int64",
                where=where(a.where),
                window=None if window == "lifetime" else length_us(window),
                closed=a.closed,
                ttl=length_us(a.ttl) if a.ttl else None,
                default=a.default,
                result=output_type(a, event.fields),
            )
            for a in view.aggregations
            for window in a.windows
        ),
        length_us(event.lateness),
        length_us(view.retention) if view.retention else None,
    )


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
            **({"retention": view.retention} if view.retention else {}),
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
