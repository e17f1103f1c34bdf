"""Schemas of the event log (control path): what the records of a segment hold, and how the app of today reads them.

A segment begins with one JSON schema per event type and per pipeline. What must stay true: a field whose type changed
is refused with the difference; an added optional field reads as null or its default, a removed one is passed over.
A schema is checked as a record is: no number in it points outside of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from .._ext.events import TYPE_CODES
from .._ext.history import EventMapping, ScoreMapping
from .._ext.log import RecordLayout, RecordSchemas
from ..errors import LogError
from ..plan import EventPlan, PipelinePlan, Plan
from ..timestamp import Timestamp, TimestampUnit

__all__ = [
    "SEMANTICS",
    "EventSchema",
    "Running",
    "ScoreSchema",
    "check_schemas",
    "event_mapping",
    "read_schema",
    "record_fields",
    "record_schemas",
    "schemas_of",
    "score_mapping",
    "score_schema",
]


#: The rules by which the kernel of this version computes what it logs. 1: before status INVALID where state no longer
#: reaches back, exact variances, and values of wide records that were not overwritten. Scores of older rules are not
#: compared with those of newer ones.
SEMANTICS = 2


class SchemaField(msgspec.Struct, frozen=True):
    """One field of an event record."""

    name: str
    type: str
    optional: bool = False


class EventSchema(msgspec.Struct, frozen=True, kw_only=True, tag="event"):
    """An event type as it was when a segment was begun. `stores`: (entity, key field) of each version in a record."""

    name: str
    fields: list[SchemaField]
    time: int
    event_id: int | None = None
    stores: list[tuple[str, int]] = []


class ScoreSchema(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """A pipeline as it was: the logged slots, and the words behind the numbers of a score record.

    values: (name, type) of each logged slot, the first `n_features` of them features; reads: (view, key field) of each
    version. models: (name, version) of every model that a record's number can mean; running: of them, that of each
    model of the pipeline, in its order, and digests, the sha256 of their files; deployment: how many swaps the
    deployment table had seen. Logs from before models were swapped have none of the three. semantics: see SEMANTICS.
    """

    pipeline: str
    event: str
    fingerprint: str
    values: list[tuple[str, str]]
    n_features: int
    reads: list[tuple[str, int]]
    actions: list[str]
    reasons: list[str]
    failures: list[str]
    models: list[tuple[str, str]]
    arms: list[tuple[str, list[str]]]
    running: list[int] = []
    digests: list[str] = []
    deployment: int = 0
    semantics: int = 1


class Running(msgspec.Struct, frozen=True):
    """What a pipeline of an engine runs: (name, version, sha256) of each of its models, in its order."""

    models: list[tuple[str, str, str]]
    deployment: int = 0


Schema = EventSchema | ScoreSchema
NEVER = 1 << 61  # microseconds
MOST_SCHEMAS = 256  # of one segment
MOST = {"versions": 255, "reasons": 64, "arms": 8, "names of arms": 127}  # what a record has room for


def schemas_of(plan: Plan, texts: list[Any], running: list[Running] | None = None) -> list[bytes]:
    """The schemas of an app, in the order of their numbers: event types first, then pipelines (`texts` and what runs of
    each)."""
    found: list[Schema] = []
    for event in plan.events.values():
        stores = [(plan.stores[i].entity, plan.stores[i].key) for i in event.stores]
        found.append(
            EventSchema(
                name=event.name,
                fields=[SchemaField(f.name, f.type, f.optional) for f in event.fields],
                time=event.time,
                event_id=event.event_id,
                stores=stores,
            )
        )
    for pipeline, words in zip(plan.pipelines.values(), texts):
        now = running[pipeline.index] if running is not None else Running([])
        found.append(score_schema(pipeline, words, list(words.models), now))
    return [msgspec.json.encode(schema) for schema in found]


def score_schema(pipeline: PipelinePlan, words: Any, models: list[tuple[str, str]], running: Running) -> ScoreSchema:
    """A pipeline's schema. models: what the numbers of its decisions mean, those of `running` among them."""
    logged = [pipeline.slots[i] for i in pipeline.logged]
    return ScoreSchema(
        pipeline=pipeline.name,
        event=pipeline.event,
        fingerprint=pipeline.fingerprint,
        values=[(slot.name, slot.type) for slot in logged],
        n_features=sum(slot.kind != "score" for slot in logged),
        reads=[(read.view, read.key) for read in pipeline.reads],
        actions=list(words.actions),
        reasons=list(words.reasons),
        failures=list(words.failures),
        models=models,
        arms=[(name, list(arms)) for name, arms in zip(words.experiments, words.arms)],
        running=[models.index((name, version)) for name, version, _ in running.models],
        digests=[digest for _, _, digest in running.models],
        deployment=running.deployment,
        semantics=SEMANTICS,
    )


def read_schema(data: bytes) -> Schema:
    """A schema from the body of its record. Raises LogError where it is none, or contradicts itself."""
    try:
        schema: Schema = msgspec.json.decode(data.decode(), type=Schema)  # what it passes over is text too
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LogError(f"a schema of the log cannot be read: {error}") from None
    wrong = _event_problem(schema) if isinstance(schema, EventSchema) else _score_problem(schema)
    if wrong is not None:
        what = f"event {schema.name}" if isinstance(schema, EventSchema) else f"pipeline {schema.pipeline}"
        raise LogError(f"a schema of the log cannot be read: {what}: {wrong}")
    return schema


def _event_problem(schema: EventSchema) -> str | None:
    n = len(schema.fields)
    if (kind := _unknown_type(field.type for field in schema.fields)) is not None:
        return f"there is no type {kind!r}"
    if not 0 <= schema.time < n or schema.fields[schema.time].type != "timestamp":
        return f"its time is field {schema.time}, which is no timestamp"
    if schema.event_id is not None and not 0 <= schema.event_id < n:
        return f"its event id is field {schema.event_id}, of {n}"
    for entity, at in schema.stores:
        if not 0 <= at < n or schema.fields[at].type not in ("string", "int64"):
            return f"the key of {entity} is field {at}, which is no string and no integer"
    return _too_many(versions=len(schema.stores))


def _score_problem(schema: ScoreSchema) -> str | None:
    if (kind := _unknown_type(kind for _, kind in schema.values)) is not None:
        return f"there is no type {kind!r}"
    if not 0 <= schema.n_features <= len(schema.values):
        return f"{schema.n_features} features of {len(schema.values)} values"
    if any(not 0 <= i < len(schema.models) for i in schema.running):
        return f"it runs models {schema.running}, of {len(schema.models)}"
    longest = max((len(arms) for _, arms in schema.arms), default=0)
    counts = {"versions": len(schema.reads), "reasons": len(schema.reasons), "arms": len(schema.arms)}
    return _too_many(**counts, **{"names of arms": longest})


def _unknown_type(kinds: Iterable[str]) -> str | None:
    return next((kind for kind in kinds if kind not in TYPE_CODES), None)


def _too_many(**counts: int) -> str | None:
    return next((f"{n} {what}, of at most {MOST[what]}" for what, n in counts.items() if n > MOST[what]), None)


def check_schemas(schemas: list[Schema]) -> None:
    """The schemas of one segment together. Raises LogError where one reads fields that its event does not have."""
    if len(schemas) > MOST_SCHEMAS:
        raise LogError(f"{len(schemas)} schemas in one segment, of at most {MOST_SCHEMAS}")
    events = {schema.name: schema for schema in schemas if isinstance(schema, EventSchema)}
    for schema in schemas:
        if isinstance(schema, ScoreSchema) and (event := events.get(schema.event)) is not None:
            for view, at in schema.reads:
                if not 0 <= at < len(event.fields):
                    raise LogError(
                        f"a schema of the log cannot be read: pipeline {schema.pipeline}: view {view} is read by field "
                        f"{at}, and {event.name} has {len(event.fields)}"
                    )


def record_schemas(schemas: list[Schema], prelude: int = 0) -> RecordSchemas:
    """What the records of a segment with these schemas must be like. prelude: the offset where its schemas and its mark
    end; 0: only events and scores are read."""
    return RecordSchemas([_record_layout(schema) for schema in schemas], prelude)


def _record_layout(schema: Schema) -> RecordLayout:
    if isinstance(schema, EventSchema):
        keys = {at for _, at in schema.stores}
        fields = [
            (field.name, field.type, 2 if i == schema.time else int(i in keys and not field.optional))
            for i, field in enumerate(schema.fields)
        ]
        return RecordLayout(False, fields, len(schema.stores))
    return RecordLayout(
        True,
        [(name, kind, 0) for name, kind in schema.values],
        len(schema.reads),
        len(schema.actions),
        len(schema.models),
        len(schema.failures),
        len(schema.reasons),
        tuple(len(arms) for _, arms in schema.arms),
    )


def event_mapping(schema: EventSchema, event: EventPlan) -> EventMapping:
    """How records of a schema are read as an event type of today. Raises LogError with every difference."""
    fields, defaults = record_fields(schema, event)
    return EventMapping(event.index, fields, [f.type for f in event.fields], defaults, len(schema.fields))


def record_fields(schema: EventSchema, event: EventPlan) -> tuple[list[int], list[Any]]:
    """Per field of an event type of today its index in records of a schema (-1: they lack it), and its default.

    Raises LogError with every difference that cannot be read.
    """
    have = {field.name: (i, field) for i, field in enumerate(schema.fields)}
    fields: list[int] = []
    defaults: list[Any] = []
    problems: list[str] = []
    for field in event.fields:
        index, was = have.get(field.name, (-1, None))
        fields.append(index)
        defaults.append(_default(field))
        if was is None:
            if field.required and not field.optional:
                problems.append(f"{field.name} was added without a default: the log's older events do not have it")
        elif was.type != field.type:
            problems.append(f"{field.name} was {was.type} and is {field.type} now")
        elif was.optional and not field.optional:
            problems.append(f"{field.name} could be null and cannot now")
    if problems:
        raise LogError(
            f"event {event.name} has changed in a way that its log cannot be read: {'; '.join(problems)}. "
            "Give the event type a new name, or undo the change"
        )
    return fields, defaults


def _default(field: Any) -> Any:
    if field.type != "timestamp" or field.default is None:
        return field.default
    if isinstance(field.default, int) and not isinstance(field.default, Timestamp) and field.unit is not None:
        return int(TimestampUnit(field.unit).timestamp(field.default))
    return int(Timestamp.of(field.default))


def score_mapping(
    schema: ScoreSchema,
    plan: Plan,
    pipeline: PipelinePlan | None,
    models: list[Any] | None,
    begins: dict[str, int] | None = None,
    running: Running | None = None,
    words: Any = None,
) -> ScoreMapping:
    """How score records of a schema are compared with a pipeline of today; with None they are passed over.

    models: (name, version) of the pipeline's models, in the order of its decisions' numbers; None: they do not run.
    running: what it runs, where that is known. Decisions are compared where the same files ran. words: the pipeline's
    decision texts; a recorded decision is repeated (S16) in the words that it was made in, though the plan is another
    now or its fingerprint was made in another way; without them it takes the same plan.
    begins: per event type the time before which history was dropped: a value whose window reaches further back is not
    compared.
    """
    if pipeline is None:
        return ScoreMapping(-1, [-1] * len(schema.values), [0] * len(schema.values), [-1] * len(schema.values), False)
    slots = pipeline.slot_types
    key_of: dict[str, int] = {}
    for read in pipeline.reads:
        for output in plan.views[read.view].outputs:
            key_of[output.name] = read.key
    place, keys = [], []
    for name, kind in schema.values:
        index, now = slots.get(name, (-1, ""))
        if models is None and index >= 0 and pipeline.slots[index].kind == "score":
            index = -1
        place.append(index if now == kind else -1)
        keys.append(key_of.get(name, -1))
    numbers = {(name, version): i for i, (name, version) in enumerate(models or [])}
    then = [schema.models[i] for i in schema.running if i < len(schema.models)]
    same_plan = schema.fingerprint == pipeline.fingerprint
    same_words = models is not None and (same_plan or words is not None)
    if words is not None:
        # Reasons of failures grow behind those of functions and models: a record means the first of them.
        failures = (*words.failures[: len(schema.failures)],)
        same_words = same_words and _said(schema) == (
            (*words.actions,),
            (*words.reasons,),
            failures,
            (*zip(words.experiments, words.arms),),
        )
    if running is not None and schema.running:
        same = then == [(name, version) for name, version, _ in running.models]
        digests = [digest for _, _, digest in running.models]
        same = same and (not schema.digests or not all(digests) or schema.digests == digests)
    else:
        same = [tuple(m) for m in schema.models] == [tuple(m) for m in models or []]
    same = same and same_words and same_plan
    strings = [int(kind == "string") for _, kind in schema.values]
    since = _since(schema, plan, pipeline, begins) if begins else None
    if schema.semantics < SEMANTICS:
        since = [NEVER] * len(schema.values)
    which = [numbers.get((name, version), -1) for name, version in schema.models]
    return ScoreMapping(pipeline.index, place, strings, keys, same, since, which, same_words)


def _said(schema: ScoreSchema) -> tuple[Any, ...]:
    """The words that a decision's numbers stand for, all but the models."""
    arms = tuple((name, tuple(arms)) for name, arms in schema.arms)
    return tuple(schema.actions), tuple(schema.reasons), tuple(schema.failures), arms


def _since(schema: ScoreSchema, plan: Plan, pipeline: PipelinePlan, begins: dict[str, int]) -> list[int]:
    """Per logged slot the first T for which history reaches back far enough; what is no view's needs all views."""
    since: dict[str, int] = {}
    for read in pipeline.reads:
        view = plan.views[read.view]
        for output in view.outputs:
            # What was dropped is as old as begins at most; a window closed on the left may hold that very instant.
            reach = output.window + (output.closed != "right") if output.window is not None else NEVER
            since[output.name] = min(NEVER, begins[view.event] + reach) if view.event in begins else -NEVER
    every = max(since.values(), default=-NEVER)
    return [since.get(name, every) for name, _ in schema.values]
