"""Start and stop of the server (control path).

Start: take the ports, load engine and models, freeze what the garbage collector would walk, then accept (the kernel
queues who comes earlier). Stop (SIGTERM or SIGINT): accept no more connections, answer what was accepted with
`Connection: close`, exit 0; a second signal ends the process at once (ext/signals.pyx), as a kill would: what the log
acknowledged stays. SIGHUP is ignored: it comes when a terminal closes. What must stay true: a request that arrived
before the signal is answered.
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
import traceback
from typing import TYPE_CHECKING, Any

from ..errors import LogError, PenstockError
from .config import ServerConfig, load_config
from .outlet import never_in_the_way
from .server_log import ServerLog

if TYPE_CHECKING:
    from .._ext.wire import WireServer
    from ..app import App
    from ..engine import Engine
    from ..models.repository import ModelRepository
    from ..plan import Plan
    from .grpc_server import GrpcServer
    from .oip import OipRoutes

__all__ = ["bind", "run", "sample_event", "serve"]

BACKLOG = 1024
LINGER = 0.5  # an idle connection may have a request on its way: seconds to wait for it when stopping
SPARE_DESCRIPTORS = 64
STOPPING = (signal.SIGTERM, signal.SIGINT)


def serve(app: App | Engine | None = None, **settings: Any) -> int:
    """Serve an app, or an engine that holds state already, until SIGTERM or SIGINT. Returns 0.

    app: None serves only the model folder (models=...). settings: fields of ServerConfig; PENSTOCK_* variables and
    penstock.toml give the rest. Raises DefinitionError for a wrong app, PenstockError where an address cannot be had.
    """
    return run(app, load_config(settings))


def run(app: App | Engine | None, config: ServerConfig) -> int:
    """Serve with exactly these settings."""
    with never_in_the_way(), _Signals() as signals:
        return _run(app, config, signals)


def _run(app: App | Engine | None, config: ServerConfig, signals: _Signals) -> int:
    listeners = [bind(config.host, config.port)]
    try:
        if config.resp_port is not None:
            listeners.append(bind(config.host, config.resp_port, "--resp-port"))
        engine = _engine(app, config)
        try:
            repository = _repository(engine, config)
            _check_limits(engine, config, repository)
            import uvloop

            stop = signals.arm()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(Serving(engine, config, repository).serve(listeners, stop))
        finally:
            if not isinstance(app, type(engine)):
                try:
                    engine.close()
                except LogError as error:  # all that could be done was done; the state of the log said it before
                    print(f"penstock: warning: {error}", file=sys.stderr)
    finally:
        for listener in listeners:
            listener.close()


class _Signals:
    """What signals mean while a server starts and runs. Once armed, the first that stops makes a descriptor readable,
    and the second ends the process, also while it closes. What they meant before comes back at the end."""

    def __enter__(self) -> _Signals:
        from .._ext.signals import stop_on

        self.before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGHUP)}
        self.pipe: tuple[int, ...] = ()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.getpid() == 1:  # the first process of a container, for which a signal's default is nothing
            stop_on(STOPPING, -1)
        return self

    def arm(self) -> int:
        """From now on: the descriptor."""
        from .._ext.signals import stop_on

        self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # asyncio puts no handler of its own in its place
        stop_on(STOPPING, self.pipe[1])
        return self.pipe[0]

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for descriptor in self.pipe:
            os.close(descriptor)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket. Raises PenstockError that says what is in the way."""
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
        hint = f"; {flag} 0 takes a free one" if port else ""
        raise PenstockError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    listener.setblocking(False)
    return listener


def _engine(app: App | Engine | None, config: ServerConfig) -> Engine:
    from ..engine import Engine
    from ..plan import no_app

    if isinstance(app, Engine):
        return app
    if app is None:
        if config.models is None:
            raise PenstockError("nothing to serve: name an app, or a model folder (--models DIR)")
        if config.log is not None:
            raise PenstockError("--log: without an app there are no events to log")
        return Engine(no_app())
    if config.log is None:
        return Engine(app, models=config.models)
    from ..offline.options import LogOptions
    from ..terminal import Progress

    options = LogOptions(
        sync=config.log_sync,
        scores=config.log_scores,
        start_cold=config.start_cold,
        start_partial=config.start_partial,
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


def _repository(engine: Engine, config: ServerConfig) -> ModelRepository | None:
    """The model folder as served models, loaded as the settings say; None where there is no folder."""
    if config.models is None:
        return None
    from ..models.repository import ModelRepository
    from .routes import lane_of

    names = [name.strip() for name in config.load.split(",") if name.strip()] if config.load else None
    repository = ModelRepository(
        config.models,
        control=config.models_control,
        lane=lambda name: lane_of(config, name, may_pool=True),
        names=names,
        engine=engine if engine.plan.pipelines else None,
    )
    repository.start()
    for row in repository.index():
        if row["state"] != "READY" and config.models_control != "explicit":
            print(f"penstock: warning: {row['reason']}", file=sys.stderr, flush=True)
    if not repository.index():
        print(f"penstock: warning: {config.models} holds no models, DIR/<name>/<version>/model.*", file=sys.stderr)
    return repository


def _check_limits(engine: Engine, config: ServerConfig, repository: ModelRepository | None) -> None:
    """Say which limits hold for nothing that is served. Only a warning: a model may come later."""
    names = {*engine.plan.pipelines, *engine.plan.events}
    if repository is not None:
        names.update(row["name"] for row in repository.index())
    for name in config.limits:
        if name not in names:
            there = f"there are {', '.join(sorted(names)[:20])}" if names else "there is none"
            print(
                f"penstock: warning: limits.{name}: no pipeline, event or model of that name; {there}", file=sys.stderr
            )


class Serving:
    """One running server: its listeners for every protocol, on one loop."""

    def __init__(self, engine: Engine, config: ServerConfig, repository: ModelRepository | None) -> None:
        self.engine = engine
        self.config = _within_descriptors(config)
        self.repository = repository
        self.state = {"ready": False}
        self.servers: list[WireServer] = []
        self.acceptors: list[asyncio.Server] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.grpc: GrpcServer | None = None
        self.log = ServerLog()

    async def serve(self, listeners: list[socket.socket], stop: int) -> int:
        """Accept, until the descriptor `stop` can be read; then drain. Returns 0."""
        from .._ext.flow import Flow
        from .._ext.infer import nanoseconds_per_tick
        from .._ext.loop_lag import LoopLag
        from .oip import OipRoutes
        from .routes import build_server, event_lanes_of, pipeline_lanes
        from .tracing import Tracing

        engine, config, repository = self.engine, self.config, self.repository
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()

        def signalled() -> None:
            loop.remove_reader(stop)
            for server in self.servers:
                server.draining = True
            stopping.set()

        loop.add_reader(stop, signalled)
        flow = Flow(config.pool_threads)
        flow.start(loop)
        lag = LoopLag()
        lanes, ingest_lanes = pipeline_lanes(engine, config), event_lanes_of(engine, config)
        tracing = Tracing(config.trace_file)
        oip = None
        if repository is not None:
            oip = OipRoutes(repository, tracing=tracing, log=self.log, instances=config.pool_threads)
        table = None if repository is None else repository.table
        resp = None
        if len(listeners) > 1:
            from .resp import build_resp

            resp = build_resp(
                engine,
                config,
                flow=flow,
                lanes=lanes,
                event_lanes=ingest_lanes,
                find_model=None if table is None else table.target,
            )
        http = build_server(
            engine, config, self.state, flow=flow, lanes=lanes, event_lanes=ingest_lanes, oip=oip, resp=resp, lag=lag,
            table=table, ns_per_tick=nanoseconds_per_tick(),
        )  # fmt: skip
        self.servers = [http] if resp is None else [http, resp]
        engine.core.prefer_latency()
        log = engine.core.log
        if log is not None and log.sync_us == 0:
            engine.core.leave_waiting_to_caller()
            for server in self.servers:
                server.event_log = log
        if config.grpc_port is not None:
            self.grpc = await self._start_grpc(oip)
        gc.collect()
        gc.freeze()
        for server, listener in zip(self.servers, listeners):
            self.acceptors.append(await loop.create_server(server, sock=listener, backlog=BACKLOG))
        self.state["ready"] = True
        lag.start(loop, http.after_tick)
        self._announce(listeners)
        self.tasks.append(asyncio.ensure_future(self._sweep()))
        if repository is not None and repository.control == "poll":
            self.tasks.append(asyncio.ensure_future(repository.watch(config.poll_interval)))
        try:
            await stopping.wait()
            # What the kernel accepted for us before the signal is ours: take it before the listener goes.
            await asyncio.sleep(0.02)
            for acceptor in self.acceptors:
                acceptor.close()
            grpc = [] if self.grpc is None else [self.grpc.stop(config.drain_timeout)]
            await asyncio.gather(*grpc, self._drain())
        finally:
            for task in self.tasks:
                task.cancel()
            for server in self.servers:
                server.close_idle(force=True)
            await asyncio.sleep(0)
            lag.stop()
            flow.stop()
            tracing.close()
            if repository is not None:
                await repository.close()
            gc.unfreeze()
        return 0

    async def _start_grpc(self, oip: OipRoutes | None) -> GrpcServer:
        if self.repository is None:
            raise PenstockError("--grpc-port: gRPC serves models; name their folder with --models DIR")
        from .grpc_server import start_grpc

        return await start_grpc(
            self.repository,
            host=self.config.host,
            port=self.config.grpc_port or 0,
            max_message=max(self.config.max_body, self.config.max_tensors),
            state=self.state,
            routes=oip,
        )

    async def _sweep(self) -> None:
        """Timeouts of connections, and what an operator should read of log and models, once each."""
        config = self.config
        period = min(0.5, config.head_timeout / 4, config.body_timeout / 4, config.idle_timeout / 4)
        said: set[str] = set()

        def warn_of_models() -> None:
            for text in () if self.repository is None else self.repository.warnings:
                if text not in said:
                    self.log.say("warning", text)
                said.add(text)

        def warn_of_log() -> None:
            for text in self.engine.check_log():
                self.log.say("warning", text)

        steps = [*(server.sweep for server in self.servers), warn_of_models, warn_of_log]
        while True:
            await asyncio.sleep(period)
            for step in steps:
                try:
                    step()
                except Exception as error:  # the others are done, and the next sweep comes, all the same
                    fault = "".join(traceback.format_exception_only(error))
                    if fault not in said:
                        self.log.fault(error)
                    said.add(fault)

    async def _drain(self) -> None:
        """Wait until every connection is closed: those with a request answer it first, idle ones linger a little."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while any(s.open_connections for s in self.servers) and loop.time() - began < self.config.drain_timeout:
            await asyncio.sleep(0.02)
            if loop.time() - began > LINGER:
                for server in self.servers:
                    server.close_idle()

    def _announce(self, listeners: list[socket.socket]) -> None:
        import msgspec

        plan = self.engine.plan
        host, port = listeners[0].getsockname()[:2]
        if not _is_loopback(host):
            print(f"penstock: warning: {host} can be reached by others, and there are no keys yet", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        what = plan.app if self.repository is None or plan.pipelines or plan.views else self.config.models
        print(f"penstock: serving {what} on http://{shown}:{port}")
        if len(listeners) > 1:
            print(f"penstock: Redis clients on {shown}:{listeners[1].getsockname()[1]}")
        if self.grpc is not None:
            print(f"penstock: gRPC on {shown}:{self.grpc.port}")
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, shown)
        for pipeline in list(plan.pipelines.values())[:1]:
            body = msgspec.json.encode(sample_event(plan, pipeline.event)).decode().replace("'", "'\\''")
            print(f"  curl http://{reachable}:{port}/v1/score/{pipeline.name} -d '{body}'")
        if not plan.pipelines and self.repository is not None:
            for row in self.repository.index(True)[:1]:
                print(f"  curl http://{reachable}:{port}/v2/models/{row['name']}")
        sys.stdout.flush()


def _within_descriptors(config: ServerConfig) -> ServerConfig:
    """Raise the limit of open files as far as allowed, and keep the connections within it."""
    import msgspec

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listeners = 1 if config.resp_port is None else 2
    wanted = listeners * config.max_connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (ValueError, OSError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return config
    return msgspec.structs.replace(config, max_connections=max(1, (soft - SPARE_DESCRIPTORS) // listeners))


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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
