"""The server's paths (control path): which Route answers what, and the handlers that are not native.

Scoring and ingesting are answered in ext/http.pyx; the handlers here run once per call of an operator or a tool.
What must stay true: nothing here holds logic of the engine's; a handler checks its input, calls, and encodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .._ext.flow import Flow, Lane
from .._ext.http import HttpServer, RequestError, Route
from ..errors import EventError, ReplayNeeded
from ..timestamp import Timestamp
from .config import ServerConfig
from .metrics import Metrics

if TYPE_CHECKING:
    from .._ext.loop_lag import LoopLag
    from .._ext.resp import RespServer
    from ..engine import Engine
    from ..models.deployment import Deployment
    from ..plan import PipelinePlan
    from .oip import OipRoutes

__all__ = ["build_server"]

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
MAX_KEYS = 10_000
CORE_NS = 10_000  # an event over HTTP without its models


class FeaturesRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/features/{view}. as_of: RFC 3339 text or integer microseconds; left out, now."""

    keys: list[int | str]
    as_of: int | str | None = None


def lane_of(config: ServerConfig, name: str, *, row_ns: int = 0, may_pool: bool = False) -> Lane:
    """A lane with the limits that the settings give it."""
    limits = config.limits_of(name)
    return Lane(
        name,
        max_rows=limits.queue_rows or 0,
        default_timeout=limits.deadline or 0.0,
        max_timeout=limits.max_deadline or 0.0,
        row_ns=row_ns,
        may_pool=may_pool,
    )


def pipeline_lanes(engine: Engine, config: ServerConfig) -> dict[str, Lane]:
    """One lane per pipeline, for every protocol that scores it; its models' cost is known before the first event."""
    return {
        pipeline.name: lane_of(
            config, pipeline.name, row_ns=_models_ns(engine, pipeline) + CORE_NS, may_pool=bool(pipeline.models)
        )
        for pipeline in engine.plan.pipelines.values()
    }


def _models_ns(engine: Engine, pipeline: PipelinePlan) -> int:
    """What the models of an event take: all that always run, and the slowest of those that an arm chooses."""
    import time

    import numpy as np

    always = chosen = 0
    for step in pipeline.models:
        key = (step.model.ref, tuple(step.model.inputs) if step.model.inputs is not None else None)
        if key not in engine.loaded_models:
            continue  # an engine of features only
        runtime = engine.loaded_models[key][0]
        row = np.zeros((1, runtime.n_inputs))
        best = 1 << 60
        for _ in range(3):
            began = time.perf_counter_ns()
            runtime.predict(row)
            best = min(best, time.perf_counter_ns() - began)
        if step.guard is None:
            always += best
        else:
            chosen = max(chosen, best)
    return always + chosen


def event_lanes_of(engine: Engine, config: ServerConfig) -> dict[str, Lane]:
    """One lane per event type, for every protocol that ingests it."""
    return {name: lane_of(config, name, row_ns=3000) for name in engine.plan.events}


def build_server(
    engine: Engine,
    config: ServerConfig,
    state: dict[str, bool],
    *,
    flow: Flow | None = None,
    lanes: dict[str, Lane] | None = None,
    event_lanes: dict[str, Lane] | None = None,
    oip: OipRoutes | None = None,
    resp: RespServer | None = None,
    lag: LoopLag | None = None,
    table: Deployment | None = None,
    ns_per_tick: float = 1.0,
) -> HttpServer:
    """An HttpServer with every route of the engine's plan. state: "ready" is what /health/ready tells.

    flow, lanes, event_lanes: the loop's queues and the lanes, shared with the other protocols. oip: what answers under
    /v2, where models are served. resp, lag, table: what /metrics tells of beside.
    """
    plan, core = engine.plan, engine.core
    lanes = pipeline_lanes(engine, config) if lanes is None else lanes
    ingest_lanes = event_lanes_of(engine, config) if event_lanes is None else event_lanes
    routes: dict[str, Route] = {}
    wire = {}
    for event in plan.events.values():
        kind = core.wire_type(event.index)
        one, many = msgspec.json.Decoder(kind), msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
        wire[event.name] = (one.decode, many.decode)
        routes[f"/v1/events/{event.name}"] = Route(
            f"events/{event.name}",
            "events",
            ("POST",),
            core=core,
            index=event.index,
            decode_one=one.decode,
            decode_many=many.decode,
            lane=ingest_lanes[event.name],
        )
    for pipeline in plan.pipelines.values():
        one_of, many_of = wire[pipeline.event]
        routes[f"/v1/score/{pipeline.name}"] = Route(
            f"score/{pipeline.name}",
            "score",
            ("POST",),
            core=core,
            index=pipeline.index,
            decode_one=one_of,
            decode_many=many_of,
            lane=lanes[pipeline.name],
        )
    for view in plan.views:
        routes[f"/v1/features/{view}"] = Route(
            f"features/{view}", "handler", ("POST",), handler=FeatureReads(engine, view)
        )

    if oip is not None:
        routes |= oip.fixed

    def not_found(path: str) -> str:
        if oip is not None and path.startswith("/v2"):
            return oip.not_found(path)
        for prefix, what, known in (
            ("/v1/score/", "pipeline", plan.pipelines),
            ("/v1/events/", "event", plan.events),
            ("/v1/features/", "view", plan.views),
        ):
            if path.startswith(prefix):
                name = path.removeprefix(prefix)
                names = ", ".join(sorted(known)) or "none"
                return f"path: no {what} {name[:100]!r}; have {names}"
        return f"path: nothing is served at {path[:100]!r}; GET / lists what is"

    server = HttpServer(
        routes,
        not_found=not_found,
        event_error=EventError,
        flow=flow,
        resolve=None if oip is None else oip.resolve,
        log=None if oip is None else oip.log.fault,
        max_body=config.max_body,
        max_tensors=config.max_tensors,
        max_head=config.max_head,
        max_connections=config.max_connections,
        head_timeout=config.head_timeout,
        body_timeout=config.body_timeout,
        idle_timeout=config.idle_timeout,
        write_timeout=config.write_timeout,
    )
    metrics = Metrics(
        engine,
        server,
        state,
        lanes=lambda: [*lanes.values(), *ingest_lanes.values()],
        flow=flow,
        table=table,
        ns_per_tick=ns_per_tick,
        resp=resp,
        lag=lag,
    )
    server.after_tick = metrics.tick
    index = (
        "".join(f"{' and '.join(route.methods)} {path}\n" for path, route in routes.items())
        + "GET /health/live\nGET /health/ready\nGET /metrics\nGET /status\nGET /openapi.json\n"
    )

    def live(query: str, body: bytes) -> tuple[int, bytes, bytes]:
        return 200, JSON, b'{"live":true}'

    def not_ready() -> str | None:
        if server.draining:
            return "the server is stopping"
        if not state["ready"]:
            return "the server is starting"
        return core.log.taking if core.log is not None else None

    if oip is not None:
        oip.not_ready = not_ready
        oip.tracing.on_change = lambda hook: setattr(server, "trace", hook)

    def ready(query: str, body: bytes) -> tuple[int, bytes, bytes]:
        why = not_ready()
        if why is None and core.log is not None and core.log.state != "ok":
            return 200, JSON, msgspec.json.encode({"ready": True, "log": core.log.state})
        if why is None:
            return 200, JSON, b'{"ready":true}'
        raise RequestError(503, "not_ready", why)

    def status(query: str, body: bytes) -> tuple[int, bytes, bytes]:
        return 200, JSON, msgspec.json.encode(engine_status(engine))

    def openapi(query: str, body: bytes) -> tuple[int, bytes, bytes]:
        from .openapi import openapi_document

        return 200, JSON, msgspec.json.encode(openapi_document(plan, oip))

    read_only = ("GET", "HEAD")
    for path, handler in (
        ("/", lambda query, body: (200, TEXT, index.encode())),
        ("/health/live", live),
        ("/health/ready", ready),
        ("/metrics", metrics.answer),
        ("/status", status),
        ("/openapi.json", openapi),
    ):
        routes[path] = Route(path.strip("/") or "index", "handler", read_only, handler=handler)
    return server


def engine_status(engine: Engine) -> dict[str, Any]:
    """What an operator asks first: the plan's fingerprint, the state's size, what recovery did, how the log stands."""
    status: dict[str, Any] = {
        "app": engine.plan.app,
        "plan": engine.plan.fingerprint,
        "stores": engine.stats()["stores"],
    }
    log = engine.core.log
    if log is not None and engine.recovery is not None:
        recovery = engine.recovery
        status["recovery"] = {
            "snapshot": recovery.snapshot,
            "events": recovery.events,
            "loaded": recovery.loaded,
            "rebuilt": recovery.rebuilt,
            "cold": recovery.cold,
            "seconds": recovery.seconds,
            "said": recovery.lines(),
        }
        sync = {0: "always", -1: "never"}.get(log.sync_us, f"every {log.sync_us / 1000:g} ms")
        status["log"] = {
            "folder": log.folder,
            "sync": sync,
            **log.stats()._asdict(),
            "next_event": engine.core.next_sequence,
        }
    return status


class FeatureReads:
    """Answers POST /v1/features/{view}: `{"view", "as_of", "features": [...], "statuses": [...]}`, in key order."""

    def __init__(self, engine: Engine, view: str) -> None:
        self.engine = engine
        self.view = view
        self.decode = msgspec.json.Decoder(FeaturesRequest).decode

    def __call__(self, query: str, body: bytes) -> tuple[int, bytes, bytes]:
        request = self.decode(body)
        if len(request.keys) > MAX_KEYS:
            raise RequestError(422, "too_many_keys", f"{len(request.keys)} keys, at most {MAX_KEYS}", "$.keys")
        for i, key in enumerate(request.keys):
            if isinstance(key, str) and len(key) > 1024:
                raise RequestError(422, "invalid_key", "expected a key of at most 1024 bytes", f"$.keys[{i}]")
        as_of = request.as_of
        try:
            at = None if as_of is None else Timestamp.of(as_of)
        except (ValueError, TypeError, OverflowError) as error:
            raise RequestError(422, "invalid_time", str(error), "$.as_of") from None
        if at is not None and not -(2**62) <= int(at) < 2**62:
            raise RequestError(422, "invalid_time", "expected microseconds since 1970, or RFC 3339 text", "$.as_of")
        try:
            found = self.engine.features(self.view, request.keys, at)
        except ReplayNeeded as error:
            raise RequestError(422, "replay_needed", str(error), "$.as_of") from None
        document = {
            "view": found.view,
            "as_of": found.as_of.isoformat(),
            "features": [{name: _plain(value) for name, value in row.items()} for row in found.rows],
            "statuses": found.statuses,
        }
        return 200, JSON, msgspec.json.encode(document)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, Timestamp) else value
