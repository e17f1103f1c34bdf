"""The OpenAPI 3.1 document of a server (control path), made from its plan and from the models it has loaded.

What must stay true: an event schema here accepts exactly the fields and JSON types that the server decodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..plan import EventPlan, PipelinePlan, Plan, ViewPlan

if TYPE_CHECKING:
    from .oip import OipRoutes

__all__ = ["openapi_document"]

Schema = dict[str, Any]

OUTCOMES = ["off", "applied", "duplicate", "late", "quarantined"]
STATUSES = ["INVALID", "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"]
TYPES: dict[str, Schema] = {
    "float64": {"type": "number"},
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "bool": {"type": "boolean"},
    "string": {"type": "string"},
    "timestamp": {"type": "string", "format": "date-time"},
}
YEARS = (-62_135_596_800, 253_402_300_799)  # seconds: the years 1 to 9999
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def openapi_document(plan: Plan | None, oip: OipRoutes | None = None) -> Schema:
    """The whole document. plan: of the app, where there is one; oip: where models are served."""
    from .. import __version__

    schemas: dict[str, Schema] = {"Error": _error()}
    paths: dict[str, Schema] = {}
    if plan is not None:
        for event in plan.events.values():
            schemas[f"event.{event.name}"] = _event(event)
            paths[f"/v1/events/{event.name}"] = {"post": _ingest(event)}
        for pipeline in plan.pipelines.values():
            schemas[f"decision.{pipeline.name}"] = _decision(pipeline)
            paths[f"/v1/score/{pipeline.name}"] = {"post": _score(pipeline)}
        for view in plan.views.values():
            schemas[f"features.{view.name}"] = _features(view)
            paths[f"/v1/features/{view.name}"] = {"post": _read(view)}
    if oip is not None:
        from .openapi_oip import oip_paths, oip_schemas

        schemas |= oip_schemas()
        paths |= oip_paths(oip)
    for path, about, kind in (
        ("/health/live", "The process answers.", "application/json"),
        ("/health/ready", "Ready to score; 503 while starting or stopping.", "application/json"),
        ("/metrics", "Metrics as Prometheus text.", "text/plain"),
        ("/status", "State, recovery and log, for an operator.", "application/json"),
        ("/openapi.json", "This document.", "application/json"),
    ):
        answers: Schema = {"200": {"description": about, "content": {kind: {}}}}
        if path == "/health/ready":
            answers["503"] = _refusal("Starting or stopping.", later=True)
        paths[path] = {
            "get": {"summary": about, "operationId": path.strip("/").replace("/", "."), "responses": answers}
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "models" if plan is None else plan.app,
            "version": __version__ if plan is None else plan.fingerprint,
            "description": f"Served by Penstock {__version__}.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _one_or_many(name: str) -> Schema:
    return {"oneOf": [_ref(name), {"type": "array", "items": _ref(name)}]}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _refusal(about: str, later: bool = False) -> Schema:
    """An error answer; `later`: with the seconds after which to try again."""
    refusal: Schema = {"description": about, "content": _json(_ref("Error"))}
    if later:
        refusal["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}}}
    return refusal


def _operation(name: str, about: str, body: Schema, answer: Schema, parameters: list[Schema] | None = None) -> Schema:
    operation: Schema = {
        "summary": about,
        "operationId": name,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {"description": "Done.", "content": _json(answer)},
            "400": _refusal("Not HTTP, not JSON, or an unknown parameter; nothing has changed."),
            "403": _refusal("A browser asks for a page of another origin; nothing has changed."),
            "413": _refusal("The body is too large; nothing has changed."),
            "415": _refusal("A Content-Encoding that is not understood; nothing has changed."),
            "422": _refusal("JSON that does not fit; nothing has changed."),
            "503": _refusal("Too much to do, too late, or the log takes no events; nothing has changed.", later=True),
        },
    }
    if parameters:
        operation["parameters"] = parameters
    return operation


def _score(pipeline: PipelinePlan) -> Schema:
    switches = [
        _query("ingest", "false: evaluate as if the event were applied, and leave nothing behind.", "boolean", True),
        _query("explain", "true: the feature values and their statuses too.", "boolean", False),
    ]
    return _operation(
        f"score.{pipeline.name}",
        f"Score one {pipeline.event}, or several in order, all or nothing.",
        _one_or_many(f"event.{pipeline.event}"),
        _one_or_many(f"decision.{pipeline.name}"),
        [*switches, *_schedule()],
    )


def _query(name: str, about: str, kind: str, default: Any, **limits: int) -> Schema:
    schema = {"type": kind, "default": default, **limits}
    return {"name": name, "in": "query", "description": about, "schema": schema}


def _schedule() -> list[Schema]:
    """What says how long a request may wait, and who goes first."""
    about = "Microseconds that it may wait for its turn; it can only shorten the server's deadline. 0: not given."
    return [
        _query("timeout", about, "integer", 0, minimum=0, maximum=10**15 - 1),
        _query("priority", "1 is served first, 7 last; 0: in the middle.", "integer", 0, minimum=0, maximum=7),
    ]


def _ingest(event: EventPlan) -> Schema:
    answer = {
        "type": "object",
        "required": ["accepted", "outcomes"],
        "properties": {
            "accepted": {"type": "integer"},
            "outcomes": {
                "type": "object",
                "propertyNames": {"enum": OUTCOMES[1:]},
                "additionalProperties": {"type": "integer"},
            },
        },
    }
    return _operation(
        f"ingest.{event.name}",
        f"Apply one {event.name} to the state, or several in order, all or nothing.",
        _one_or_many(f"event.{event.name}"),
        answer,
        _schedule(),
    )


def _read(view: ViewPlan) -> Schema:
    body = {
        "type": "object",
        "additionalProperties": False,
        "required": ["keys"],
        "properties": {
            "keys": {
                "type": "array",
                "maxItems": 10_000,
                "items": {
                    "oneOf": [
                        {"type": "string", "maxLength": 1024},
                        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
                    ]
                },
            },
            "as_of": {
                "description": "RFC 3339, or microseconds since 1970; left out, now.",
                "oneOf": [
                    {"type": "null"},
                    {"type": "string", "format": "date-time"},
                    {"type": "integer", "minimum": -(2**62), "maximum": 2**62 - 1},
                ],
            },
        },
    }
    about = f"Values of {view.name} for some keys of {view.entity}."
    return _operation(f"features.{view.name}", about, body, _ref(f"features.{view.name}"))


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _event(event: EventPlan) -> Schema:
    properties: dict[str, Schema] = {}
    for field in event.fields:
        schema = TYPES[field.type]
        if field.unit is not None:
            scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[field.unit]
            schema = {
                "type": "integer",
                "description": f"{UNITS[field.unit]} since 1970 UTC",
                "minimum": max(YEARS[0] * scale, -(2**63)),
                "maximum": min((YEARS[1] + 1) * scale - 1, 2**63 - 1),
            }
        if field.optional:
            schema = _nullable(schema)
        if not field.required and isinstance(field.default, (str, int, float, bool)):
            schema = {**schema, "default": field.default}
        properties[field.name] = schema
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [field.name for field in event.fields if field.required],
        "properties": properties,
    }


def _decision(pipeline: PipelinePlan) -> Schema:
    actions = list(dict.fromkeys([pipeline.default_action, *(step.rule.action for step in pipeline.rules)]))
    for action in (pipeline.fallback, pipeline.degraded_action):
        if action is not None and action not in actions:
            actions.append(action)
    arms: dict[str, Schema] = {step.experiment.name: {"type": ["string", "null"]} for step in pipeline.experiments}
    slots = {slot.index: slot for slot in pipeline.slots}
    features = {slots[i].name: _nullable(TYPES[slots[i].type]) for i in pipeline.features}
    return {
        "type": "object",
        "required": ["id", "action", "score", "reasons", "model", "model_version", "arms", "outcome"],
        "properties": {
            "id": {"type": "string", "minLength": 26, "maxLength": 26},
            "action": {"type": "string", "enum": actions},
            "score": {"type": ["number", "null"]},
            "reasons": {"type": "array", "items": {"type": "string"}},
            "model": {"type": ["string", "null"]},
            "model_version": {"type": ["string", "null"]},
            "arms": {"type": "object", "properties": arms},
            "features": {"type": "object", "properties": features},
            "statuses": {"type": "object", "additionalProperties": {"enum": STATUSES}},
            "outcome": {"type": "string", "enum": OUTCOMES},
            "degraded": {"const": True},
        },
    }


def _features(view: ViewPlan) -> Schema:
    values = {output.name: _nullable(TYPES[output.type]) for output in view.outputs}
    return {
        "type": "object",
        "required": ["view", "as_of", "features", "statuses"],
        "properties": {
            "view": {"const": view.name},
            "as_of": {"type": "string", "format": "date-time"},
            "features": {"type": "array", "items": {"type": "object", "properties": values}},
            "statuses": {
                "type": "array",
                "items": {"type": "object", "additionalProperties": {"enum": STATUSES}},
            },
        },
    }


def _error() -> Schema:
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "path"],
                "properties": {
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                    "path": {"type": ["string", "null"], "description": "where in the body, such as $[17].amount"},
                },
            }
        },
    }
