"""HTTP/1.1 on uvloop: routes, what connections share, and the protocol."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypedDict

from .flow import Flow, Lane
from .infer import Target
from .wire import WireConnection, WireServer

Handler = Callable[[str, bytes], tuple[int, bytes, bytes]]
AsyncHandler = Callable[[str, bytes], Awaitable[tuple[int, bytes, bytes]]]

STATUSES: Final[tuple[int, ...]]
BUCKETS: Final[tuple[float, ...]]

class RouteCounters(TypedDict):
    buckets: list[int]
    count: int
    seconds: float
    statuses: dict[int, int]

class RequestError(Exception):
    """A request that a handler refuses: `status`, and `code`, `message` and `path` of the JSON error."""

    status: int
    code: str
    message: str
    path: str | None
    def __init__(self, status: int, code: str, message: str, path: str | None = None) -> None: ...

class Route:
    """One path of the server and its counters.

    kind: "score", "events", "infer" (answered natively), "handler":
    `handler(query, body) -> (status, content type, payload)`, or "async": the same, awaited. errors: "penstock" or
    "oip". counts: the Route whose counters count its requests.
    """

    @property
    def label(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    def __init__(
        self,
        label: str,
        kind: str,
        methods: tuple[str, ...],
        *,
        index: int = 0,
        core: Any = None,
        decode_one: Callable[[bytes], Any] | None = None,
        decode_many: Callable[[bytes], list[Any]] | None = None,
        handler: Handler | AsyncHandler | None = None,
        target: Target | None = None,
        lane: Lane | None = None,
        errors: str = "penstock",
        counts: Route | None = None,
    ) -> None: ...
    def counters(self) -> RouteCounters: ...

class HttpServer(WireServer):
    """What the connections of one server share. Called without arguments it makes the protocol of a new connection."""

    reuse_heads: bool
    after_tick: Callable[[], object] | None
    trace: Callable[[str, str, str, list[tuple[str, int]]], object] | None
    def __init__(
        self,
        routes: dict[str, Route],
        *,
        not_found: Callable[[str], str],
        event_error: type[Exception],
        flow: Flow | None = None,
        resolve: Callable[[str], Route | None] | None = None,
        log: Callable[[BaseException], object] | None = None,
        max_body: int = ...,
        max_tensors: int = ...,
        max_head: int = ...,
        max_fields: int = ...,
        max_connections: int = ...,
        head_timeout: float = ...,
        body_timeout: float = ...,
        idle_timeout: float = ...,
        write_timeout: float = ...,
    ) -> None: ...
    def __call__(self) -> Connection: ...
    @property
    def max_body(self) -> int: ...
    @property
    def max_tensors(self) -> int: ...
    @property
    def max_head(self) -> int: ...
    @property
    def max_fields(self) -> int: ...
    @property
    def head_hits(self) -> int: ...
    @property
    def head_misses(self) -> int: ...
    @property
    def error_counts(self) -> dict[str, int]: ...
    def all_routes(self) -> list[Route]: ...
    def tell_date(self) -> None: ...
    def forget(self, prefix: str = "/") -> None: ...

class Connection(WireConnection):
    """The protocol of one connection, as uvloop calls it."""

    def __init__(self, server: HttpServer) -> None: ...
