"""Start and stop of the server (control path).

Start: take the port, load the engine, freeze what the garbage collector would walk, then accept (the kernel queues who
comes earlier). Stop (SIGTERM or SIGINT): accept no more connections, answer what was accepted with `Connection: close`,
exit 0; a second signal stops at once. What must stay true: a request that arrived before the signal is answered.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from ..errors import PenstockError
from .config import ServerConfig, load_config

if TYPE_CHECKING:
    from .._ext.http import HttpServer
    from ..app import App
    from ..engine import Engine
    from ..plan import Plan

__all__ = ["bind", "run", "sample_event", "serve"]

BACKLOG = 1024
LINGER = 0.5  # an idle connection may have a request on its way: seconds to wait for it when stopping
SPARE_DESCRIPTORS = 64


def serve(app: App | Engine, **settings: Any) -> int:
    """Serve an app, or an engine that holds state already, until SIGTERM or SIGINT. Returns 0.

    settings: fields of ServerConfig; PENSTOCK_* variables and penstock.toml give the rest.
    Raises DefinitionError for a wrong app, PenstockError where the address cannot be had.
    """
    return run(app, load_config(settings))


def run(app: App | Engine, config: ServerConfig) -> int:
    """Serve with exactly these settings."""
    listener = bind(config.host, config.port)
    try:
        engine = _engine(app, config)
        import uvloop

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_serve(engine, config, listener))
        finally:
            if not isinstance(app, type(engine)):
                engine.close()
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises PenstockError that says what is in the way."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise PenstockError(f"--host {host}: not an address of this machine: {error.strerror}") from None
    except UnicodeError as error:
        raise PenstockError(f"--host {host}: not the name of a machine: {error}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Two listeners may bind with SO_REUSEADDR as long as neither listens: listen() is what tells a port is taken.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        hint = "; --port 0 takes a free one" if port else ""
        raise PenstockError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    listener.setblocking(False)
    return listener


def _engine(app: App | Engine, config: ServerConfig) -> Engine:
    from ..engine import Engine

    if isinstance(app, Engine):
        return app
    if config.log is None:
        return Engine(app, models=config.models)
    from ..offline.options import LogOptions
    from ..terminal import Progress

    options = LogOptions(
        sync=config.log_sync,
        scores=config.log_scores,
        start_cold=config.start_cold,
        snapshot_bytes=config.snapshot_bytes,
        parquet=config.log_parquet,
        retention=config.log_retention,
    )
    with Progress(f"recovering {config.log}") as progress:
        engine = Engine(app, models=config.models, log=config.log, log_options=options, progress=progress)
    if engine.recovery is not None:
        for line in engine.recovery.lines():
            print(f"penstock: {line}", file=sys.stderr, flush=True)
    return engine


async def _serve(engine: Engine, config: ServerConfig, listener: socket.socket) -> int:
    from .._ext.flow import Flow
    from .routes import build_server, pipeline_lanes

    loop = asyncio.get_running_loop()
    state = {"ready": False}
    config = _within_descriptors(config)
    flow = Flow(config.pool_threads)
    flow.start(loop)
    lanes = pipeline_lanes(engine, config)
    server = build_server(engine, config, state, flow=flow, lanes=lanes)
    stopping = asyncio.Event()
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        server.draining = True
        stopping.set()
        if signals > 1:
            server.close_idle(force=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    engine.core.prefer_latency()
    log = engine.core.log
    if log is not None and log.sync_us == 0:
        engine.core.leave_waiting_to_caller()
        server.event_log = log
    gc.collect()
    gc.freeze()
    acceptor = await loop.create_server(server, sock=listener, backlog=BACKLOG)
    state["ready"] = True
    _announce(engine.plan, config, listener)
    period = min(0.5, config.head_timeout / 4, config.body_timeout / 4, config.idle_timeout / 4)
    sweeper = asyncio.ensure_future(_sweep(server, period, engine))
    try:
        await stopping.wait()
        # What the kernel accepted for us before the signal is ours: take it before the listener goes.
        await asyncio.sleep(0.02)
        acceptor.close()
        await _drain(server, config.drain_timeout)
    finally:
        sweeper.cancel()
        server.close_idle(force=True)
        await asyncio.sleep(0)
        flow.stop()
        gc.unfreeze()
    return 0


async def _sweep(server: HttpServer, period: float, engine: Engine) -> None:
    """Timeouts of connections, and what an operator should read of the log, once each."""
    steps = refusing = 0
    said: set[str] = set()
    while True:
        await asyncio.sleep(period)
        server.sweep()
        if engine.core.log is None:
            continue
        for text in engine.check_log():
            if text not in said:
                print(f"penstock: warning: {text}", file=sys.stderr, flush=True)
            said.add(text)
        stats = engine.core.log.stats()
        if stats.error != refusing:
            refusing = stats.error
            what = (
                f"the log takes no more events: {os.strerror(refusing)}" if refusing else "the log takes events again"
            )
            print(f"penstock: {'warning: ' if refusing else ''}{what}", file=sys.stderr, flush=True)
        if stats.clock_steps != steps:
            steps = stats.clock_steps
            seconds = stats.last_step_us / 1e6
            print(f"penstock: warning: the clock was set by {seconds:+.1f} s", file=sys.stderr, flush=True)


async def _drain(server: HttpServer, timeout: float) -> None:
    """Wait until every connection is closed: those with a request answer it first, idle ones linger a little."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while server.open_connections and loop.time() - began < timeout:
        await asyncio.sleep(0.02)
        if loop.time() - began > LINGER:
            server.close_idle()


def _within_descriptors(config: ServerConfig) -> ServerConfig:
    """Raise the limit of open files as far as allowed, and keep the connections within it."""
    import msgspec

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.max_connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (ValueError, OSError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return config
    return msgspec.structs.replace(config, max_connections=max(1, soft - SPARE_DESCRIPTORS))


def sample_event(plan: Plan, name: str) -> dict[str, Any]:
    """A small valid event of a type, as it would be written in JSON; its time is the wall clock's."""
    from ..timestamp import Timestamp

    samples: dict[str, Any] = {"string": "a1", "int64": 1, "float64": 12.5, "bool": False}
    now = int(Timestamp.now()) // 1_000_000
    found: dict[str, Any] = {}
    for field in plan.events[name].fields:
        if not field.required:
            continue
        if field.type == "timestamp":
            scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
            found[field.name] = (
                now * scale[field.unit] if field.unit else Timestamp(now * 1_000_000).isoformat().replace("+00:00", "Z")
            )
        else:
            found[field.name] = samples[field.type]
    return found


def _announce(plan: Plan, config: ServerConfig, listener: socket.socket) -> None:
    import msgspec

    host, port = listener.getsockname()[:2]
    if not _is_loopback(host):
        print(f"penstock: warning: {host} can be reached by others, and there are no keys yet", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    print(f"penstock: serving {plan.app} on http://{shown}:{port}")
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, shown)
    for pipeline in list(plan.pipelines.values())[:1]:
        body = msgspec.json.encode(sample_event(plan, pipeline.event)).decode().replace("'", "'\\''")
        print(f"  curl http://{reachable}:{port}/v1/score/{pipeline.name} -d '{body}'")
    sys.stdout.flush()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
