"""Schemas of the event log (control path): what the records of a segment hold, and how the app of today reads them.

A segment begins with one JSON schema per event type and per pipeline. What must stay true: a field whose type changed
is refused with the difference; an added optional field reads as null or its default, a removed one is passed over.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .._ext.history import EventMapping, ScoreMapping
from ..errors import LogError
from ..plan import EventPlan, PipelinePlan, Plan
from ..timestamp import Timestamp, TimestampUnit

__all__ = [
    "EventSchema",
    "Running",
    "ScoreSchema",
    "event_mapping",
    "read_schema",
    "record_fields",
    "schemas_of",
    "score_mapping",
    "score_schema",
]


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
    deployment table had seen. Logs from before models were swapped have none of the three.
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


class Running(msgspec.Struct, frozen=True):
    """What a pipeline of an engine runs: (name, version, sha256) of each of its models, in its order."""

    models: list[tuple[str, str, str]]
    deployment: int = 0


Schema = EventSchema | ScoreSchema
NEVER = 1 << 61  # microseconds


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
    )


def read_schema(data: bytes) -> Schema:
    """A schema from the body of its record. Raises LogError where it is none."""
    try:
        schema: Schema = msgspec.json.decode(data, type=Schema)
        return schema
    except msgspec.DecodeError as error:
        raise LogError(f"a schema of the log cannot be read: {error}") from None


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
) -> ScoreMapping:
    """How score records of a schema are compared with a pipeline of today; with None they are passed over.

    models: (name, version) of the pipeline's models, in the order of its decisions' numbers; None: they do not run.
    running: what it runs, where that is known. Decisions are compared where the same files ran.
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
    same_words = schema.fingerprint == pipeline.fingerprint and models is not None
    if running is not None and schema.running:
        same = then == [(name, version) for name, version, _ in running.models]
        digests = [digest for _, _, digest in running.models]
        same = same and (not schema.digests or not all(digests) or schema.digests == digests)
    else:
        same = [tuple(m) for m in schema.models] == [tuple(m) for m in models or []]
    same = same and same_words
    strings = [int(kind == "string") for _, kind in schema.values]
    since = _since(schema, plan, pipeline, begins) if begins else None
    which = [numbers.get((name, version), -1) for name, version in schema.models]
    return ScoreMapping(pipeline.index, place, strings, keys, same, since, which, same_words)


def _since(schema: ScoreSchema, plan: Plan, pipeline: PipelinePlan, begins: dict[str, int]) -> list[int]:
    """Per logged slot the first T for which history reaches back far enough; what is no view's needs all views."""
    since: dict[str, int] = {}
    for read in pipeline.reads:
        view = plan.views[read.view]
        for output in view.outputs:
            reach = output.window if output.window is not None else NEVER
            since[output.name] = min(NEVER, begins[view.event] + reach) if view.event in begins else -NEVER
    every = max(since.values(), default=-NEVER)
    return [since.get(name, every) for name, _ in schema.values]
