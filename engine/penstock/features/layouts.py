"""The definitions of window state as data (control path): a process without the user's app rebuilds the same stores.

What must stay true: `plan_from_layouts(describe_layouts(plan))` has the stores of `plan`, in its order, with its
fingerprints, or is an error. Pipelines, functions, models and rules are not part of it: state does not depend on them.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec

from ..definitions.durations import Lifetime
from ..definitions.event import Event, EventMeta, EventOptions, Field
from ..definitions.feature_view import Aggregation, Entity, FeatureView
from ..definitions.pipeline import Pipeline
from ..errors import PenstockError
from ..plan import Output, Plan, StorePlan, ViewPlan, compile_plan
from ..timestamp import Timestamp, TimestampUnit

__all__ = ["describe_layouts", "plan_from_layouts"]

FORMAT = 1
_ANNOTATIONS: dict[str, Any] = {"string": str, "int64": int, "float64": float, "bool": bool, "timestamp": Timestamp}


class EventLayout(msgspec.Struct, frozen=True):
    """An event type: its fields in order and its time rules."""

    name: str
    fields: list[Field]
    options: EventOptions


class AggregationLayout(msgspec.Struct, frozen=True, omit_defaults=True):
    """One function in one window; lengths in microseconds, window None is Lifetime."""

    name: str
    function: str
    column: str | None = None
    window: int | None = None
    where: str | None = None
    closed: str = "right"
    ttl: int | None = None
    default: float | int | str | bool | None = None


class ViewLayout(msgspec.Struct, frozen=True, omit_defaults=True):
    """A feature view; key is the source's field."""

    name: str
    entity: str
    event: str
    key: str
    include_request_event: bool
    aggregations: list[AggregationLayout]
    retention: int | None = None


class Layouts(msgspec.Struct, frozen=True):
    """entities: the types of keys ("string" or "int64") where they are said. fingerprints: of the stores, in order."""

    format: int
    app: str
    events: list[EventLayout]
    entities: dict[str, str]
    views: list[ViewLayout]
    fingerprints: list[str]


def describe_layouts(plan: Plan) -> bytes:
    """Event types, entities and feature views of a plan as JSON; the same bytes for the same definitions."""
    layouts = Layouts(
        format=FORMAT,
        app=plan.app,
        events=[EventLayout(e.name, [_plain_field(f) for f in e.fields], e.options) for e in plan.events.values()],
        entities={v.entity: v.key_type for v in plan.views.values() if v.entity in plan.typed_entities},
        views=[_view_layout(plan, view) for view in plan.views.values()],
        fingerprints=[f"{store.fingerprint:016x}" for store in plan.stores],
    )
    return msgspec.json.encode(layouts)


def _view_layout(plan: Plan, view: ViewPlan) -> ViewLayout:
    store = plan.stores[view.store]
    return ViewLayout(
        name=view.name,
        entity=view.entity,
        event=view.event,
        key=view.key_field,
        include_request_event=view.include_request_event,
        aggregations=[_aggregation_layout(plan, store, view, output) for output in view.outputs],
        retention=view.retention,
    )


def _aggregation_layout(plan: Plan, store: StorePlan, view: ViewPlan, output: Output) -> AggregationLayout:
    fields = plan.events[view.event].fields
    return AggregationLayout(
        name=output.name.removeprefix(view.name + "."),
        function="count" if output.function == "count_col" else output.function,
        column=None if output.column is None else fields[store.columns[output.column]].name,
        window=output.window,
        where=None if output.where is None else store.wheres[output.where],
        closed=output.closed,
        ttl=output.ttl,
        default=_plain(output.default),
    )


def _plain_field(field: Field) -> Field:
    return msgspec.structs.replace(field, default=_plain(field.default))


def _plain(default: Any) -> Any:
    """A default as JSON holds it: a time as text or as microseconds."""
    if isinstance(default, datetime):
        return default.isoformat()
    return int(default) if isinstance(default, int) and not isinstance(default, bool) else default


def plan_from_layouts(data: bytes) -> Plan:
    """A plan with the stores that `describe_layouts` described, without pipelines.

    Raises PenstockError where the data cannot be read, or this version lays the same definitions out in another way.
    """
    layouts = _read(data)
    try:
        events = {layout.name: _event_class(layout) for layout in layouts.events}
        entities = {name: Entity(name, type=int if kind == "int64" else str) for name, kind in layouts.entities.items()}
        views = [_view(layout, events, entities) for layout in layouts.views]
        # An app defines a view or a pipeline; where only pipelines were, one stands in for them.
        others = [] if views else [Pipeline("events", event=event) for event in list(events.values())[:1]]
        plan = compile_plan({str(i): v for i, v in enumerate([*events.values(), *views, *others])}, layouts.app)
    except (PenstockError, TypeError, ValueError, LookupError) as error:
        raise PenstockError(f"layouts of {layouts.app}: {error}") from error
    found = [f"{store.fingerprint:016x}" for store in plan.stores]
    if found != layouts.fingerprints:
        stores = [f"{s.event} by {s.entity}" for s in plan.stores]
        wrong = [name for name, a, b in zip(stores, found, layouts.fingerprints) if a != b]
        raise PenstockError(
            f"layouts of {layouts.app}: {', '.join(wrong) or 'the number of stores'} is laid out in another way by "
            f"this version: fingerprints {', '.join(found)}, expected {', '.join(layouts.fingerprints)}"
        )
    return msgspec.structs.replace(plan, pipelines={})


def _read(data: bytes) -> Layouts:
    try:
        format = msgspec.json.decode(data, type=dict[str, Any]).get("format")
        if isinstance(format, int) and format > FORMAT:
            raise PenstockError(f"layouts: format {format}; this version of Penstock reads formats up to {FORMAT}")
        return msgspec.json.decode(data, type=Layouts)
    except msgspec.MsgspecError as error:
        raise PenstockError(f"layouts: {error}") from error


def _event_class(layout: EventLayout) -> type[Event]:
    annotations: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for field in layout.fields:
        annotation = _ANNOTATIONS[field.type] if field.unit is None else TimestampUnit(field.unit)
        annotations[field.name] = annotation | None if field.optional else annotation
        if not field.required:
            defaults[field.name] = field.default
    options = layout.options
    made: Any = EventMeta(
        layout.name,
        (Event,),
        {"__module__": __name__, "__annotations__": annotations, **defaults},
        time=options.time,
        event_id=options.event_id,
        lateness=timedelta(microseconds=options.lateness),
        max_skew=timedelta(microseconds=options.max_skew),
        retry_window=timedelta(microseconds=options.retry_window),
        kw_only=True,  # the order of the fields, whichever have defaults
    )
    event: type[Event] = made
    return event


def _view(layout: ViewLayout, events: dict[str, type[Event]], entities: dict[str, Entity]) -> FeatureView:
    return FeatureView(
        layout.name,
        entity=entities.get(layout.entity, layout.entity),
        source=events[layout.event],
        key=layout.key,
        include_request_event=layout.include_request_event,
        retention=None if layout.retention is None else timedelta(microseconds=layout.retention),
        aggregations=[
            Aggregation(
                a.function,
                a.column,
                windows=[Lifetime if a.window is None else timedelta(microseconds=a.window)],
                where=a.where,
                default=a.default,
                closed=a.closed,  # type: ignore[arg-type]
                ttl=None if a.ttl is None else timedelta(microseconds=a.ttl),
                name=a.name,
            )
            for a in layout.aggregations
        ],
    )
