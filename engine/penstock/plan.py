"""Definitions -> Plan (control path): layouts with fingerprints, typed slots, steps; everything checked once, at load.

Compiling is pure: no store, no model file, no server. A Plan that exists is right; every problem of a wrong app is
reported together, each with its place.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import ModuleType
from typing import Any

import msgspec

from .definitions.durations import LifetimeWindow, duration_us, window_label
from .definitions.event import Event, EventOptions, Field, event_fields
from .definitions.experiment import ByArm, Experiment
from .definitions.feature_view import FUNCTIONS, Aggregation, Entity, FeatureView
from .definitions.pipeline import Model, OnDemandFeatureView, Pipeline, Rule
from .errors import DefinitionError
from .experiments.assignment import compile_experiment
from .expressions import CompiledExpression, ExpressionError, compile_expression
from .fingerprint import described, described_function, digest
from .timestamp import Timestamp

__all__ = [
    "EventPlan",
    "FunctionStep",
    "ModelStep",
    "Output",
    "PipelinePlan",
    "Plan",
    "Slot",
    "StorePlan",
    "ViewPlan",
    "ViewRead",
    "compile_plan",
]

MAX_RULES = 64  # a Decision keeps what fired as one 64-bit mask
MAX_EXPERIMENTS = 8  # a Decision keeps one arm per experiment inline
MAX_WHERES = 63  # the window state keeps one mask bit per where= of a store
# Arrays of the engine core (ext/core.pxd).
MAX_STORES = 16
MAX_COLUMNS = 64
MAX_KEYS = 16
MAX_ARGUMENTS = 32
MAX_ARMS = 64


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One feature of a view: what is computed, and the type of its slot."""

    name: str
    function: str
    column: int | None
    where: int | None
    window: int | None
    closed: str
    ttl: int | None
    default: float | int | str | bool | None
    type: str


class EventPlan(msgspec.Struct, frozen=True, kw_only=True):
    """An event type: its fields in order, where time and id stand, and the stores that it updates."""

    name: str
    index: int
    type: type[Event]
    fields: list[Field]
    time: int
    event_id: int | None
    options: EventOptions
    stores: list[int]

    @property
    def slots(self) -> dict[str, tuple[int, str]]:
        return {field.name: (i, field.type) for i, field in enumerate(self.fields)}


class StorePlan(msgspec.Struct, kw_only=True):
    """Window state of one (source, entity): used columns, predicates, outputs in one group per view."""

    index: int
    event: str
    entity: str
    key: int
    key_type: str
    columns: list[int]
    wheres: list[str]
    predicates: list[CompiledExpression]
    outputs: list[Output]
    groups: list[int]
    lateness: int
    lifetime: int | None = None  # how long after its newest event an entity is kept for Lifetime; None: for ever
    fingerprint: int = 0

    @property
    def retention(self) -> int | None:
        """What is kept of an entity, plus lateness, in microseconds; None where it is kept for ever."""
        if self.lifetime is not None:
            return self.lifetime + self.lateness
        if any(o.window is None for o in self.outputs):
            return None
        return max(o.window or 0 for o in self.outputs) + self.lateness


class ViewPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A feature view: one group of outputs of one store."""

    name: str
    entity: str
    event: str
    store: int
    group: int
    key_field: str
    key_type: str
    include_request_event: bool
    outputs: list[Output]
    retention: int | None = None


class Slot(msgspec.Struct, frozen=True):
    """One place of a pipeline's row. `kind` is field, view, function, arm, score or flag."""

    index: int
    name: str
    type: str
    kind: str


class ViewRead(msgspec.Struct, frozen=True):
    """Step: read a view's group for the key in one event field, into consecutive slots."""

    view: str
    key: int
    first_slot: int


class FunctionStep(msgspec.Struct, frozen=True):
    """Step: call an on-demand function on some slots."""

    name: str
    definition: OnDemandFeatureView
    arguments: list[int]
    argument_types: list[str]
    slot: int
    type: str


class AssignStep(msgspec.Struct, frozen=True):
    """Step: assign one experiment's arm to the unit in one event field."""

    experiment: Experiment
    unit: int
    slot: int


class ModelStep(msgspec.Struct, frozen=True):
    """Step: run a model where its guard (experiment index, arm index) holds, or always."""

    model: Model
    slot: int
    decides: bool
    guard: tuple[int, int] | None


class RuleStep(msgspec.Struct, frozen=True):
    """Step: test one rule."""

    rule: Rule
    expression: CompiledExpression


class PipelinePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one event type is scored: the row's slots and the steps in the order in which they run."""

    name: str
    index: int
    event: str
    slots: list[Slot]
    features: list[int]
    reads: list[ViewRead]
    functions: list[FunctionStep]
    experiments: list[AssignStep]
    models: list[ModelStep]
    rules: list[RuleStep]
    score: int | None
    default_action: str
    fallback: str | None
    on_degraded: str | None
    degraded: int | None
    fingerprint: str

    @property
    def degraded_failure(self) -> int:
        """The number of `degraded` among the reasons of failures: behind those of functions and models."""
        return len(self.functions) + len(self.models)

    @property
    def degraded_action(self) -> str | None:
        """The action of a degraded decision; None: models and rules decide as ever (S17)."""
        if self.on_degraded in (None, "fallback"):
            return self.fallback
        return None if self.on_degraded == "score" else self.on_degraded

    @property
    def slot_types(self) -> dict[str, tuple[int, str]]:
        return {slot.name: (slot.index, slot.type) for slot in self.slots}

    @property
    def logged(self) -> list[int]:
        """Slots that a score record of the event log holds: the features that are no fields of the event, which has a
        record of its own, then the scores of models that do not decide."""
        beside = {step.slot for step in self.models if not step.decides} - set(self.features)
        return [i for i in self.features if self.slots[i].kind != "field"] + sorted(beside)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine needs to know, compiled from one app."""

    app: str
    events: dict[str, EventPlan]
    stores: list[StorePlan]
    views: dict[str, ViewPlan]
    pipelines: dict[str, PipelinePlan]
    typed_entities: frozenset[str]
    fingerprint: str


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or `; have a, b, c`."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; have {', '.join(names) or 'none'}"


def compile_plan(app: ModuleType | Mapping[str, Any], name: str | None = None) -> Plan:
    """Compile the definitions in a module (or a mapping of names to values) to a Plan.

    Raises DefinitionError with every problem found, each as `place: reason`.
    """
    values = list((vars(app) if isinstance(app, ModuleType) else app).values())
    return _Compiler(values, name or str(getattr(app, "__name__", "app"))).compile()


def no_app() -> Plan:
    """The plan of a server that has models and no app."""
    return Plan(
        app="models", events={}, stores=[], views={}, pipelines={}, typed_entities=frozenset(), fingerprint=digest("")
    )


class _Compiler:
    """Collects definitions and problems; each step leaves out what was wrong, so that one run reports all."""

    def __init__(self, values: list[Any], name: str) -> None:
        self.name = name
        self.problems: list[str] = []
        self.events: dict[str, EventPlan] = {}
        self.stores: list[StorePlan] = []
        self.store_of: dict[tuple[str, str, int, int | None], StorePlan] = {}
        self.views: dict[str, ViewPlan] = {}
        self.entities: dict[str, Entity] = {}
        unique = list({id(v): v for v in values}.values())
        self.event_types = [v for v in unique if isinstance(v, type) and issubclass(v, Event) and v is not Event]
        self.feature_views = [v for v in unique if isinstance(v, FeatureView)]
        self.pipelines = [v for v in unique if isinstance(v, Pipeline)]
        self.declared_entities = [v for v in unique if isinstance(v, Entity)]
        for view in self.feature_views:
            self._add_event_type(view.source)
        for pipeline in self.pipelines:
            self._add_event_type(pipeline.event)
            for feature in pipeline.features:
                if isinstance(feature, FeatureView) and feature not in self.feature_views:
                    self.feature_views.append(feature)
                    self._add_event_type(feature.source)

    def _add_event_type(self, event: Any) -> None:
        if isinstance(event, type) and issubclass(event, Event) and event not in self.event_types:
            self.event_types.append(event)

    def compile(self) -> Plan:
        if not self.feature_views and not self.pipelines:
            raise DefinitionError(f"app {self.name}: no FeatureView and no Pipeline; an app defines at least one")
        for event in self.event_types:
            self._event(event)
        for entity in self.declared_entities:
            if self.entities.setdefault(entity.name, entity) is not entity:
                self.problems.append(f'entity "{entity.name}": defined twice')
        for view in self.feature_views:
            self._view(view)
        for store in self.stores:
            if len(store.columns) > MAX_COLUMNS:
                self.problems.append(
                    f"event {store.event}: more than {MAX_COLUMNS} fields are aggregated for entity {store.entity}"
                )
            if len(self.events[store.event].stores) == MAX_STORES:
                self.problems.append(f"event {store.event}: more than {MAX_STORES} entities")
            store.fingerprint = _store_fingerprint(store, self.events[store.event])
            self.events[store.event].stores.append(store.index)
        pipelines: dict[str, PipelinePlan] = {}
        for pipeline in self.pipelines:
            if pipeline.name in pipelines:
                self.problems.append(f'pipeline "{pipeline.name}": defined twice')
                continue
            compiled = _PipelineCompiler(self, pipeline, len(pipelines)).compile()
            if compiled is not None:
                pipelines[pipeline.name] = compiled
        if self.problems:
            raise DefinitionError(self.problems)
        text = "\n".join([*(str(s.fingerprint) for s in self.stores), *(p.fingerprint for p in pipelines.values())])
        return Plan(
            app=self.name,
            events=self.events,
            stores=self.stores,
            views=self.views,
            pipelines=pipelines,
            typed_entities=frozenset(e.name for e in self.entities.values() if e.type is not None),
            fingerprint=digest(text),
        )

    # events

    def _event(self, event: type[Event]) -> None:
        name = event.__name__
        if name in self.events:
            self.problems.append(f"event {name}: two event types have this name")
            return
        try:
            fields = event_fields(event)
            wrong = [f for f in fields if f.default is not None and not _field_default_fits(f)]
            for field in wrong:
                self.problems.append(
                    f"event {name}.{field.name}: default {field.default!r} does not fit a {field.type} field"
                )
            if wrong:
                return
        except (TypeError, NameError) as error:
            self.problems.append(str(error) if str(error).startswith("event ") else f"event {name}: {error}")
            return
        options: EventOptions = event.__event_options__  # type: ignore[attr-defined]
        names = [f.name for f in fields]
        times = [f.name for f in fields if f.type == "timestamp"]
        time = options.time
        if time is None:
            if len(times) != 1:
                what = "no Timestamp field" if not times else f"several Timestamp fields ({', '.join(times)})"
                self.problems.append(
                    f'event {name}: {what}; say which is the event time: class {name}(Event, time="...")'
                )
                return
            time = times[0]
        elif time not in times:
            self.problems.append(f"event {name}: time={time!r} is not a Timestamp field{suggestion(time, times)}")
            return
        if fields[names.index(time)].optional:
            self.problems.append(f"event {name}.{time}: the event time may not be optional (S1)")
            return
        if options.event_id is not None:
            if options.event_id not in names:
                self.problems.append(
                    f"event {name}: event_id={options.event_id!r}{suggestion(options.event_id, names)}"
                )
                return
            id_field = fields[names.index(options.event_id)]
            if id_field.type not in ("string", "int64") or id_field.optional:
                self.problems.append(f"event {name}.{id_field.name}: an event id is a str or an int, and never None")
                return
        self.events[name] = EventPlan(
            name=name,
            index=len(self.events),
            type=event,
            fields=fields,
            time=names.index(time),
            event_id=names.index(options.event_id) if options.event_id else None,
            options=options,
            stores=[],
        )

    # views

    def _view(self, view: FeatureView) -> None:
        place = f'view "{view.name}"'
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", view.name):
            self.problems.append(f"{place}: a view's name is letters, digits and _")
            return
        if view.name in self.views:
            self.problems.append(f"{place}: defined twice")
            return
        event = self.events.get(getattr(view.source, "__name__", ""))
        if event is None or event.type is not view.source:
            if not (isinstance(view.source, type) and issubclass(view.source, Event)):
                self.problems.append(f"{place}: source is not an Event class, got {view.source!r}")
            return
        entity = view.entity if isinstance(view.entity, Entity) else self.entities.get(view.entity)
        if entity is None:
            entity = Entity(str(view.entity))
        known = self.entities.setdefault(entity.name, entity)
        if known != entity:
            self.problems.append(f'{place}: entity "{entity.name}" is defined in two ways')
            return
        key_name = view.key or entity.key or entity.name
        slots = event.slots
        if key_name not in slots:
            hint = suggestion(key_name, slots)
            self.problems.append(f"{place}: {event.name} has no field {key_name!r} for the key of {entity.name}{hint}")
            return
        key, key_field_type = slots[key_name]
        if key_field_type not in ("string", "int64"):
            self.problems.append(f"{place}: key {key_name} is {key_field_type}; a key is a str or an int")
            return
        if event.fields[key].optional:
            self.problems.append(f"{place}: key {key_name} is optional; a key may not be None")
            return
        key_type = key_field_type
        if entity.type is not None:
            if entity.type not in (str, int):
                self.problems.append(f'entity "{entity.name}": type is str or int, got {entity.type!r}')
                return
            key_type = "string" if entity.type is str else "int64"
        lifetime = self._retention(place, view)
        identity = (event.name, entity.name, key, lifetime)
        store = self.store_of.get(identity)
        if store is None:
            store = StorePlan(
                index=len(self.stores),
                event=event.name,
                entity=entity.name,
                key=key,
                key_type=key_type,
                columns=[],
                wheres=[],
                predicates=[],
                outputs=[],
                groups=[],
                lateness=event.options.lateness,
                lifetime=lifetime,
            )
            self.store_of[identity] = store
            self.stores.append(store)
        outputs: list[Output] = []
        names: set[str] = set()
        if not view.aggregations:
            self.problems.append(f"{place}: no aggregations")
        for position, aggregation in enumerate(view.aggregations):
            for output in self._aggregation(f"{place} aggregation {position + 1}", view, aggregation, event, store):
                if output.name in names:
                    self.problems.append(f"{place}: two features are named {output.name}; give one a name=")
                names.add(output.name)
                outputs.append(output)
        self.views[view.name] = ViewPlan(
            name=view.name,
            entity=entity.name,
            event=event.name,
            store=store.index,
            group=len(store.groups),
            key_field=key_name,
            key_type=key_type,
            include_request_event=view.include_request_event,
            outputs=outputs,
            retention=lifetime,
        )
        store.outputs.extend(outputs)
        store.groups.append(len(outputs))

    def _retention(self, place: str, view: FeatureView) -> int | None:
        """How long Lifetime keeps an entity of the view, where it says so and has such windows."""
        if view.retention is None:
            return None
        try:
            retention = duration_us(view.retention)
            lengths = [
                duration_us(w) for a in view.aggregations for w in _windows(a) if not isinstance(w, LifetimeWindow)
            ]
        except ValueError as error:
            self.problems.append(f"{place}: retention: {error}")
            return None
        if retention < max([1, *lengths]):
            self.problems.append(
                f"{place}: retention {view.retention!r} is shorter than its longest window; "
                "an entity is kept at least as long as a window looks back"
            )
            return None
        if all(not isinstance(w, LifetimeWindow) for a in view.aggregations for w in _windows(a)):
            self.problems.append(f"{place}: retention is for Lifetime windows; the others keep their own length")
            return None
        return retention

    def _aggregation(
        self, place: str, view: FeatureView, aggregation: Aggregation, event: EventPlan, store: StorePlan
    ) -> list[Output]:
        function, column = aggregation.function, aggregation.column
        if function not in FUNCTIONS:
            self.problems.append(f"{place}: unknown function {function!r}{suggestion(function, FUNCTIONS)}")
            return []
        if FUNCTIONS[function] and column is None:
            self.problems.append(f"{place}: {function} needs a column")
            return []
        slots = event.slots
        column_type = "int64"
        column_index = None
        if column is not None:
            if column not in slots:
                self.problems.append(f"{place}: {event.name} has no field {column!r}{suggestion(column, slots)}")
                return []
            field_index, column_type = slots[column]
            numeric = ("float64", "int64", "bool")
            allowed = {
                "sum": numeric,
                "mean": numeric,
                "var_samp": numeric,
                "var_pop": numeric,
                "stddev_samp": numeric,
                "stddev_pop": numeric,
                "min": (*numeric, "timestamp"),
                "max": (*numeric, "timestamp"),
            }.get(function)
            if allowed and column_type not in allowed:
                self.problems.append(f"{place}: {function} of {column} ({column_type}); it takes {', '.join(allowed)}")
                return []
            if field_index not in store.columns:
                store.columns.append(field_index)
            column_index = store.columns.index(field_index)
        where_index = None
        if aggregation.where is not None:
            if aggregation.where not in store.wheres:
                if len(store.wheres) == MAX_WHERES:
                    self.problems.append(f"{place}: more than {MAX_WHERES} different where= on one source and entity")
                    return []
                try:
                    compiled = compile_expression(aggregation.where, slots, where=f"{place} where")
                except ExpressionError as error:
                    self.problems.append(str(error))
                    return []
                if compiled.type != "bool":
                    self.problems.append(f"{place} where: expected a condition, got a {compiled.type} value")
                    return []
                store.wheres.append(aggregation.where)
                store.predicates.append(compiled)
            where_index = store.wheres.index(aggregation.where)
        ttl = None
        if aggregation.ttl is not None:
            if function not in ("first", "last"):
                self.problems.append(f"{place}: ttl is for first and last; a window already bounds {function}")
                return []
            try:
                ttl = duration_us(aggregation.ttl)
            except ValueError as error:
                self.problems.append(f"{place}: ttl: {error}")
                return []
        if aggregation.closed not in ("right", "both", "left"):
            self.problems.append(f"{place}: closed: expected right, both or left, got {aggregation.closed!r}")
            return []
        if not aggregation.windows:
            self.problems.append(f"{place}: no windows")
        slot_type = _output_type(function, column_type)
        if aggregation.default is not None and not _default_fits(aggregation.default, slot_type):
            self.problems.append(f"{place}: default {aggregation.default!r} does not fit a {slot_type} feature")
            return []
        outputs = []
        base = aggregation.name or (f"{function}_{column}" if column else function)
        windows = _windows(aggregation)
        for window in windows:
            try:
                length = None if isinstance(window, LifetimeWindow) else duration_us(window)
            except ValueError as error:
                self.problems.append(f"{place}: window: {error}")
                continue
            if length == 0 and aggregation.closed != "both":
                self.problems.append(
                    f'{place}: window: expected a length above 0, got {window!r}; the instant itself is closed="both"'
                )
                continue
            named_alone = aggregation.name is not None and len(windows) == 1
            outputs.append(
                Output(
                    name=f"{view.name}.{base}" if named_alone else f"{view.name}.{base}_{window_label(window)}",
                    function="count_col" if function == "count" and column else function,
                    column=column_index,
                    where=where_index,
                    window=length,
                    closed=aggregation.closed,
                    ttl=ttl,
                    default=aggregation.default,
                    type=slot_type,
                )
            )
        return outputs


class _PipelineCompiler:
    """Lays out one pipeline's row and its steps."""

    def __init__(self, app: _Compiler, pipeline: Pipeline, index: int) -> None:
        self.app = app
        self.pipeline = pipeline
        self.index = index
        self.place = f'pipeline "{pipeline.name}"'
        self.slots: list[Slot] = []
        self.by_name: dict[str, Slot] = {}
        self.reads: list[ViewRead] = []
        self.functions: list[FunctionStep] = []

    def problem(self, text: str) -> None:
        self.app.problems.append(f"{self.place}{text}")

    def add(self, name: str, type: str, kind: str) -> Slot | None:
        if name in self.by_name:
            self.problem(f": two things are named {name}")
            return None
        slot = Slot(len(self.slots), name, type, kind)
        self.slots.append(slot)
        self.by_name[name] = slot
        return slot

    def compile(self) -> PipelinePlan | None:
        pipeline = self.pipeline
        event = self.app.events.get(getattr(pipeline.event, "__name__", ""))
        if event is None or event.type is not pipeline.event:
            if not (isinstance(pipeline.event, type) and issubclass(pipeline.event, Event)):
                self.problem(f": event is not an Event class, got {pipeline.event!r}")
            return None
        for field in event.fields:
            self.add(field.name, field.type, "field")
        on_demand = [f for f in pipeline.features if isinstance(f, OnDemandFeatureView)]
        for view in self._views_used(on_demand):
            self._read(view, event)
        keys = {(s.key, s.key_type) for s in self.app.stores if s.event == event.name}
        if len(keys | {(r.key, self.app.views[r.view].key_type) for r in self.reads}) > MAX_KEYS:
            self.problem(f": more than {MAX_KEYS} different keys")
        for definition in on_demand:
            self._function(definition)
        features = self._features()
        experiments = self._experiments(event)
        models, score = self._models(experiments, event)
        degraded = self._degraded()
        rules = self._rules()
        depends = {
            "slots": [(s.name, s.type) for s in self.slots],
            "features": features,
            "reads": [self._described_read(read) for read in self.reads],
            "functions": [(f.name, described_function(f.definition.function)) for f in self.functions],
            "experiments": [described(step.experiment) for step in experiments],
            "models": [{"model": described(m.model), "decides": m.decides, "guard": m.guard} for m in models],
            "rules": [described(step.rule) for step in rules],
            "actions": {
                name: described(getattr(pipeline, name))
                for name in ("default_action", "fallback", "on_degraded")
                if getattr(pipeline, name) is not None
            },
        }
        return PipelinePlan(
            name=pipeline.name,
            index=self.index,
            event=event.name,
            slots=self.slots,
            features=features,
            reads=self.reads,
            functions=self.functions,
            experiments=experiments,
            models=models,
            rules=rules,
            score=score,
            default_action=pipeline.default_action,
            fallback=pipeline.fallback,
            on_degraded=pipeline.on_degraded,
            degraded=degraded,
            fingerprint=digest(depends),
        )

    def _described_read(self, read: ViewRead) -> Any:
        view = self.app.views[read.view]
        return {
            "view": read.view,
            "key": read.key,
            "state": f"{self.app.stores[view.store].fingerprint:016x}",
            "request_event": view.include_request_event,
            "defaults": [output.default for output in view.outputs],
        }

    def _views_used(self, on_demand: list[OnDemandFeatureView]) -> list[ViewPlan]:
        """Views named by the features, by functions' parameters or by rules, in the order of the features first."""
        used: dict[str, ViewPlan] = {}
        for feature in self.pipeline.features:
            name = feature.name if isinstance(feature, FeatureView) else feature if isinstance(feature, str) else ""
            view = self.app.views.get(name.split(".")[0])
            if view is not None:
                used[view.name] = view
        for view in self.app.views.values():
            parameters = [p for d in on_demand for p in inspect.signature(d.function).parameters]
            in_functions = any(p.startswith(view.name + "__") for p in parameters)
            in_rules = any(re.search(rf"\b{re.escape(view.name)}\.", rule.when) for rule in self.pipeline.rules)
            if in_functions or in_rules:
                used[view.name] = view
        return list(used.values())

    def _read(self, view: ViewPlan, event: EventPlan) -> None:
        entity = self.app.entities[view.entity]
        slots = event.slots
        key_name = view.key_field if view.event == event.name else (entity.key or entity.name)
        if key_name not in slots:
            key_name = view.key_field if view.key_field in slots else key_name
        if key_name not in slots:
            self.problem(f": view {view.name} needs a field {key_name!r} in {event.name}{suggestion(key_name, slots)}")
            return
        key, key_type = slots[key_name]
        if key_type not in ("string", "int64") or event.fields[key].optional:
            self.problem(
                f": {event.name}.{key_name} is the key of view {view.name}; it must be a str or an int, not None"
            )
            return
        if key_type != view.key_type and entity.type is None:
            self.problem(
                f": key {key_name} is {key_type} in {event.name} but {view.key_type} in {view.event}; "
                f'say Entity("{entity.name}", type=str) (or int) where they are the same key'
            )
            return
        first = len(self.slots)
        for output in view.outputs:
            self.add(output.name, output.type, "view")
        self.reads.append(ViewRead(view.name, key, first))

    def _function(self, definition: OnDemandFeatureView) -> None:
        place = f': function "{definition.name}"'
        try:
            parameters, returns = _signature(definition.function)
        except TypeError as error:
            self.problem(f"{place}: {error}")
            return
        arguments = []
        for parameter, declared in parameters:
            name = parameter if parameter in self.by_name else parameter.replace("__", ".", 1)
            slot = self.by_name.get(name)
            if slot is None:
                self.problem(f"{place}: no feature for parameter {parameter}{suggestion(name, self.by_name)}")
                return
            if declared is not None and declared != slot.type:
                self.problem(f"{place}: {parameter} is annotated {declared}, but {slot.name} is {slot.type}")
                return
            if slot.type == "string" and definition.mode != "python":
                self.problem(f'{place}: {parameter} is a str; strings need @on_demand_feature_view(mode="python")')
                return
            arguments.append(slot)
        if len(arguments) > MAX_ARGUMENTS:
            self.problem(f"{place}: more than {MAX_ARGUMENTS} parameters")
            return
        slot = self.add(definition.name, returns, "function")
        if slot is not None:
            self.functions.append(
                FunctionStep(
                    definition.name,
                    definition,
                    [s.index for s in arguments],
                    [s.type for s in arguments],
                    slot.index,
                    returns,
                )
            )

    def _features(self) -> list[int]:
        features: list[int] = []
        for feature in self.pipeline.features:
            if isinstance(feature, FeatureView):
                view = self.app.views.get(feature.name)
                names = [o.name for o in view.outputs] if view else []
            elif isinstance(feature, OnDemandFeatureView):
                names = [feature.name] if feature.name in self.by_name else []
            elif isinstance(feature, str):
                if feature in self.app.views:
                    names = [o.name for o in self.app.views[feature].outputs]
                elif feature in self.by_name:
                    names = [feature]
                else:
                    self.problem(f": unknown feature {feature!r}{suggestion(feature, self.by_name)}")
                    continue
            else:
                self.problem(f": a feature is a name, a FeatureView or an on-demand feature, got {feature!r}")
                continue
            for name in names:
                if name in self.by_name and self.by_name[name].index not in features:
                    features.append(self.by_name[name].index)
        return features

    def _experiments(self, event: EventPlan) -> list[AssignStep]:
        steps = []
        slots = event.slots
        if len(self.pipeline.experiments) > MAX_EXPERIMENTS:
            self.problem(f": more than {MAX_EXPERIMENTS} experiments")
        for experiment in self.pipeline.experiments:
            place = f': experiment "{experiment.name}"'
            if experiment.unit not in slots:
                self.problem(
                    f"{place}: {event.name} has no field {experiment.unit!r}{suggestion(experiment.unit, slots)}"
                )
                continue
            if len(experiment.arms) > MAX_ARMS:
                self.problem(f"{place}: more than {MAX_ARMS} arms")
                continue
            unit, unit_type = slots[experiment.unit]
            if unit_type not in ("string", "int64"):
                self.problem(f"{place}: unit {experiment.unit} is {unit_type}; a unit is a str or an int")
                continue
            try:
                compile_experiment(experiment)
            except ValueError as error:
                self.app.problems.append(f"{self.place}: {error}")
                continue
            slot = self.add(experiment.name, "string", "arm")
            if slot is not None:
                steps.append(AssignStep(experiment, unit, slot.index))
        return steps

    def _models(self, experiments: list[AssignStep], event: EventPlan) -> tuple[list[ModelStep], int | None]:
        deciding: list[tuple[Model, tuple[int, int] | None]] = []
        model = self.pipeline.model
        if isinstance(model, ByArm):
            names = [step.experiment.name for step in experiments]
            if model.experiment not in names:
                self.problem(f": by_arm names experiment {model.experiment!r}{suggestion(model.experiment, names)}")
                return [], None
            at = names.index(model.experiment)
            arms = list(experiments[at].experiment.arms)
            for arm, value in model.values.items():
                if arm not in arms:
                    self.problem(f": by_arm names arm {arm!r} of {model.experiment}{suggestion(arm, arms)}")
                    continue
                deciding.append((_as_model(value), (at, arms.index(arm))))
            missing = [arm for arm in arms if arm not in model.values]
            if missing:
                self.problem(f": by_arm of {model.experiment} gives no model for arm {', '.join(missing)}")
            if model.otherwise is not None:
                deciding.append((_as_model(model.otherwise), (at, -1)))
            elif experiments[at].experiment.coverage < 1:
                coverage = experiments[at].experiment.coverage
                self.problem(
                    f": by_arm of {model.experiment} (coverage {coverage:g}) gives no model for units outside it; "
                    "say otherwise=..."
                )
            elif event.fields[experiments[at].unit].optional:
                unit = event.fields[experiments[at].unit].name
                self.problem(
                    f": by_arm of {model.experiment} gives no model where the unit {unit} is None; say otherwise=..."
                )
        elif model is not None:
            deciding.append((_as_model(model), None))
        steps: list[ModelStep] = []
        every = [(m, guard, True) for m, guard in deciding] + [
            (_as_model(m), None, False) for m in self.pipeline.models
        ]
        for definition, guard, decides in every:
            if not re.fullmatch(r"[^@/\\\s]+@[^@/\\\s]+", definition.ref):
                self.problem(f": model {definition.ref!r}: expected name@version or name@alias")
                continue
            slot_name = "score." + re.sub(r"\W", "_", definition.ref)
            slot = self.by_name.get(slot_name) or self.add(slot_name, "float64", "score")
            if slot is not None:
                steps.append(ModelStep(definition, slot.index, decides, guard))
        if not deciding:
            return steps, None
        score = self.add("score", "float64", "score")
        return steps, score.index if score else None

    def _degraded(self) -> int | None:
        """The slot of `degraded`, where a rule asks for it and nothing else has that name."""
        wanted = self.pipeline.on_degraded
        if wanted is not None and not isinstance(wanted, str):
            self.problem(f': on_degraded: expected "fallback", "score" or an action, got {wanted!r}')
        elif wanted == "fallback" and self.pipeline.fallback is None:
            self.problem(': on_degraded="fallback", but there is no fallback; say fallback="..."')
        if "degraded" in self.by_name or not any(re.search(r"\bdegraded\b", r.when) for r in self.pipeline.rules):
            return None
        slot = self.add("degraded", "bool", "flag")
        return slot.index if slot else None

    def _rules(self) -> list[RuleStep]:
        steps: list[RuleStep] = []
        if len(self.pipeline.rules) > MAX_RULES:
            self.problem(f": more than {MAX_RULES} rules")
        types = {slot.name: (slot.index, slot.type) for slot in self.slots}
        names: set[str] = set()
        for rule in self.pipeline.rules:
            if rule.name in names:
                self.problem(f': rule "{rule.name}": defined twice')
            names.add(rule.name)
            try:
                expression = compile_expression(rule.when, types, where=f'{self.place}: rule "{rule.name}"')
            except ExpressionError as error:
                self.app.problems.append(str(error))
                continue
            if expression.type != "bool":
                self.problem(f': rule "{rule.name}": expected a condition, got a {expression.type} value')
                continue
            steps.append(RuleStep(rule, expression))
        return steps


_ANNOTATIONS: dict[Any, str] = {float: "float64", int: "int64", bool: "bool", str: "string", Timestamp: "timestamp"}


def _signature(function: Any) -> tuple[list[tuple[str, str | None]], str]:
    """Parameters with the slot type of each annotation (None where there is none), and the slot type returned."""
    signature = inspect.signature(function, eval_str=True)
    parameters: list[tuple[str, str | None]] = []
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise TypeError(f"parameter {parameter.name}: expected a plain parameter without a default")
        declared = None
        if parameter.annotation is not parameter.empty:
            declared = _slot_type(parameter.annotation, f"parameter {parameter.name}")
        parameters.append((parameter.name, declared))
    if signature.return_annotation is signature.empty:
        raise TypeError("give its return type: -> float, int, bool or Timestamp")
    return parameters, _slot_type(signature.return_annotation, "the return value")


def _slot_type(annotation: Any, what: str) -> str:
    try:
        return _ANNOTATIONS[annotation]
    except (KeyError, TypeError):
        raise TypeError(f"{what} is annotated {annotation!r}; expected float, int, bool, str or Timestamp") from None


def _windows(aggregation: Aggregation) -> list[Any]:
    given: Any = aggregation.windows
    return list(given) if isinstance(given, list | tuple) else [given]


def _as_model(value: Any) -> Model:
    return value if isinstance(value, Model) else Model(str(value))


def _output_type(function: str, column_type: str) -> str:
    if function in ("count", "distinct_count"):
        return "int64"
    if function == "sum":
        return "float64" if column_type == "float64" else "int64"
    if function in ("min", "max", "first", "last"):
        return column_type
    return "float64"


def _default_fits(default: Any, slot_type: str) -> bool:
    if isinstance(default, int) and not isinstance(default, bool):
        return slot_type in ("float64", "int64", "timestamp") and -(2**63) <= default < 2**63
    if slot_type == "float64":
        return isinstance(default, float) and math.isfinite(default)
    return type(default) is {"bool": bool, "string": str}.get(slot_type)


def _field_default_fits(field: Field) -> bool:
    if field.type == "timestamp" and isinstance(field.default, str | datetime):
        return True
    return _default_fits(field.default, field.type)


def _store_fingerprint(store: StorePlan, event: EventPlan) -> int:
    layout = [
        store.event,
        store.entity,
        event.fields[store.key].name,
        store.key_type,
        [(event.fields[c].name, event.fields[c].type) for c in store.columns],
        store.wheres,
        [(o.function, o.column, o.where, o.window, o.closed, o.ttl) for o in store.outputs],
        store.groups,
        store.lateness,
        *([store.lifetime] if store.lifetime is not None else []),
    ]
    return int.from_bytes(hashlib.blake2b(msgspec.json.encode(layout), digest_size=8).digest(), "little")
