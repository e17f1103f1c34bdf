"""HTTP/1.1 on uvloop (hot path): one protocol object per connection, everything inline, one send per read.

llhttp (httptools) judges every head and says where every message ends; no framing is decided here. A head whose bytes
were accepted before is not judged again: the same bytes at the start of a message mean the same to llhttp, so its route
and its Content-Length are kept with them. What must stay true: a request answered without llhttp is byte for byte one
that llhttp has accepted, from its first byte to the last byte of its body's length.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

import asyncio
import sys
import time
import traceback
import zlib

import httptools
import msgspec

from penstock.errors import InProgress, LogError

from penstock._ext.core cimport BLOCK_ROWS, Block, Core, by_time, run_block
from penstock._ext.decision cimport Decision
from penstock._ext.flow cimport DONE, FULL, INLINE, LATE, MORE, NATIVE, QUEUE, Flow, Lane, Work, native_call
from penstock._ext.infer cimport InferCall, ServedModel, Target
from penstock._ext.steps cimport Pipe, Source
from penstock._ext.wire cimport OUT_SOFT, WireConnection, WireServer

from penstock._ext.infer import InferError

cdef extern from "tensor.h" nogil:
    int64_t ps_ticks()

cdef extern from "http_head.h" nogil:
    ctypedef struct ps_http_fields:
        int64_t content_length
        uint32_t fields
        uint32_t hosts
        int chunked
        int expect
        int encoding
        int accepts
        int foreign
        int navigates
        int64_t upgrade
        int64_t inference
    int64_t ps_http_now()
    int64_t ps_http_blank_line(const char *p, size_t n)
    uint64_t ps_http_hash(const char *p, size_t n)
    ps_http_fields ps_http_scan(const char *head, size_t n)

cdef enum:
    SCORE = 1
    EVENTS = 2
    HANDLER = 3
    INFER = 4
    ASYNC = 5

cdef enum:
    IN_HEAD = 0
    IN_BODY = 1
    IN_CHUNKS = 2

cdef enum:
    HEAD_CACHED = 1024         # longest head that is remembered
    WIRE_FACTOR = 4            # a chunked body may take this many times the body limit on the wire
    RESOLVED = 4096            # paths of models that are remembered
    COMPRESS_FROM = 1024       # answers of fewer bytes are sent as they are,
    COMPRESS_MOST = 65536      # and of more: the loop would be held up
    GZIP = 1
    DEFLATE = 2

STATUSES = (200, 400, 403, 404, 405, 408, 413, 415, 417, 422, 431, 500, 501, 503, 0)
BUCKETS = (10e-6, 20e-6, 30e-6, 50e-6, 75e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 1.0)
cdef int64_t BOUNDS[16]
for _i, _b in enumerate(BUCKETS):
    BOUNDS[_i] = <int64_t>round(_b * 1e9)

cdef dict PHRASES = {
    200: b"OK", 400: b"Bad Request", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
    408: b"Request Timeout", 413: b"Content Too Large", 415: b"Unsupported Media Type", 417: b"Expectation Failed",
    422: b"Unprocessable Content", 431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
    501: b"Not Implemented", 503: b"Service Unavailable",
}
cdef dict STATUS_LINES = {s: b"HTTP/1.1 %d %s\r\nContent-Type: " % (s, p) for s, p in PHRASES.items()}
cdef dict STATUS_INDEX = {s: i for i, s in enumerate(STATUSES)}
cdef bytes JSON = b"application/json"
cdef bytes OCTETS = b"application/octet-stream"
cdef bytes OK_JSON = STATUS_LINES[200] + JSON + b"\r\nContent-Length: "
cdef bytes CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
cdef bytes NOTHING = b""
cdef object encode = msgspec.json.encode
cdef object DecodeError = msgspec.DecodeError
cdef object ValidationError = msgspec.ValidationError
cdef object RequestParser = httptools.HttpRequestParser
cdef object ParserError = httptools.HttpParserError
cdef object ParserUpgrade = httptools.HttpParserUpgrade


class RequestError(Exception):
    """A request that a handler refuses: `status`, and `code`, `message` and `path` of the JSON error."""

    def __init__(self, status: int, code: str, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.path = path


@cython.final
cdef class Route:
    """One path of the server and its counters.

    kind "score" and "events" are answered here: `decode_one`, `decode_many` turn a body into wire objects, `core` and
    `index` say which pipeline or event type. kind "infer" runs `target`'s model. kind "handler" calls
    `handler(query: str, body: bytes) -> (status, content_type: bytes, payload: bytes)`; kind "async" awaits it, and only
    its own connection waits. lane: queue and limits of score, events and infer. errors: "penstock" or "oip".
    counts: the Route whose counters count its requests, where many paths are one row of the metrics.
    """

    def __init__(self, str label, str kind, tuple methods, *, int index=0, core=None, decode_one=None, decode_many=None,
                 handler=None, Target target=None, Lane lane=None, str errors="penstock", Route counts=None):
        self.label = label
        self.kind = kind
        self.methods = methods
        self.native = {"score": SCORE, "events": EVENTS, "handler": HANDLER, "infer": INFER, "async": ASYNC}[kind]
        self.index = index
        self.core = core
        self.pipe = core.pipes[index] if kind == "score" else None
        self.decode_one = decode_one
        self.decode_many = decode_many
        self.handler = handler
        self.target = target
        self.lane = target.lane if target is not None and lane is None else lane
        self.oip = {"penstock": False, "oip": True}[errors]
        self.counts = counts

    def counters(self):
        """`{"buckets": counts per bound of BUCKETS and above, "count", "seconds", "statuses": {status: n}}`."""
        cdef int i
        return {
            "buckets": [self.buckets[i] for i in range(N_BUCKETS)],
            "count": self.requests,
            "seconds": self.total_ns / 1e9,
            "statuses": {s: self.statuses[i] for i, s in enumerate(STATUSES) if self.statuses[i]},
        }


cdef void observe(Route route, int status_index, int64_t ns) noexcept:
    cdef int i = 0
    if route.counts is not None:
        route = route.counts
    while i < N_BUCKETS - 1 and ns > BOUNDS[i]:
        i += 1
    route.buckets[i] += 1
    route.requests += 1
    route.total_ns += ns
    route.statuses[status_index] += 1


@cython.final
@cython.no_gc
cdef class Head:
    """A request head that llhttp accepted, with what it means."""


cdef Head NO_HEAD = Head()
NO_HEAD.content_length = -1
NO_HEAD.inference = -1


@cython.final
cdef class HttpServer(WireServer):
    """What the connections of one server share: routes, limits, remembered heads, the output buffer, counters.

    routes: path -> Route. resolve(path) -> Route or None is asked about other paths; what it gives is remembered until
    forget(). not_found(path) -> message for a 404. event_error: the exception type of refused events, with `.path` and
    `.message`. Timeouts are in seconds, sizes in bytes.
    """

    def __init__(self, dict routes, *, not_found, event_error, Flow flow=None, resolve=None, log=None, max_body=1 << 20,
                 max_tensors=1 << 26, max_head=16384, max_fields=100, max_connections=10000, head_timeout=10.0, body_timeout=10.0,
                 idle_timeout=75.0, write_timeout=30.0):
        WireServer.__init__(self, Flow() if flow is None else flow, max_connections=max_connections,
                            write_timeout=write_timeout)
        self.routes = routes
        self.resolved = {}
        self.resolve = resolve
        self.not_found = not_found
        self.event_error = event_error
        self.log = log
        self.heads = [None] * N_HEADS
        self.errors = {}
        self.tasks = set()
        self.unmatched = Route("other", "handler", ())
        self.unmatched_oip = Route("v2/other", "handler", (), errors="oip")
        self.clock_ns = ps_http_now()
        self.clock_ticks = ps_ticks()
        self.max_body = max_body
        self.max_tensors = max(max_body, max_tensors)
        self.max_head = max_head
        self.max_fields = max_fields
        self.head_timeout = <int64_t>(head_timeout * 1e9)
        self.body_timeout = <int64_t>(body_timeout * 1e9)
        self.idle_timeout = <int64_t>(idle_timeout * 1e9)
        self.reuse_heads = True
        self.tell_date()

    def __call__(self):
        """A protocol for one connection (the factory that `loop.create_server` wants)."""
        return Connection(self)

    @property
    def error_counts(self):
        return dict(self.errors)

    def all_routes(self):
        """Every Route that counts once, the one of unmatched requests last."""
        cdef dict found = {}
        cdef Route route
        for route in self.routes.values():
            found[route if route.counts is None else route.counts] = None
        for route in self.resolved.values():
            found[route if route.counts is None else route.counts] = None
        return [*found, self.unmatched_oip, self.unmatched]

    def forget(self, str prefix="/"):
        """Ask `resolve` anew about paths that begin so."""
        self.resolved = {path: route for path, route in self.resolved.items() if not path.startswith(prefix)}
        self.heads = [None] * N_HEADS

    def tell_date(self):
        """Renew the Date field: called once per sweep, so that no request formats a date."""
        cdef bytes text = b"\r\nDate: " + time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
        memcpy(self.date, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        self.date_n = PyBytes_GET_SIZE(text)

    def sweep(self):
        """Close what has waited too long: 408 for half a request, silently where nothing was asked."""
        self.tell_date()
        WireServer.sweep(self)

    cdef Route route_of(self, str path):
        cdef object route = self.routes.get(path)
        if route is None and self.resolve is not None:
            route = self.resolved.get(path)
            if route is None:
                route = self.resolve(path)
                if route is not None:
                    if len(self.resolved) >= RESOLVED:
                        self.resolved.clear()
                    self.resolved[path] = route
        return route

    cdef Route stranger(self, str path):
        """What a request that no Route answers counts under, and whose form its refusal takes. path: None where it
        cannot be known."""
        if path is not None and (path == "/v2" or path.startswith("/v2/")):
            return self.unmatched_oip
        return self.unmatched

    cdef int64_t most_body(self, Head head):
        """How long a body may be: binary tensors are read where they lie, all else is parsed while others wait."""
        return self.max_tensors if head.route.native == INFER and head.inference >= 0 else self.max_body

    cdef Head find(self, const char *p, size_t n):
        cdef object found = (<list>self.heads)[<Py_ssize_t>(ps_http_hash(p, n) % N_HEADS)]
        cdef Head head
        if found is not None:
            head = <Head>found
            if <size_t>PyBytes_GET_SIZE(head.raw) == n and memcmp(PyBytes_AS_STRING(head.raw), p, n) == 0:
                return head
        return None

    cdef int keep(self, Head head) except -1:
        cdef size_t n = PyBytes_GET_SIZE(head.raw)
        (<list>self.heads)[<Py_ssize_t>(ps_http_hash(PyBytes_AS_STRING(head.raw), n) % N_HEADS)] = head
        return 0


cdef tuple split_path(str place, str message):
    """msgspec's message and path: `Expected ... - at `$[17].amount`` -> (message, path)."""
    at = message.rfind(" - at `")
    if at >= 0 and message.endswith("`"):
        return message[:at], message[at + 7:len(message) - 1]
    return message, place


cdef str shown(bytes text):
    cdef str s = text[:100].decode("utf-8", "backslashreplace")
    return s + "..." if len(text) > 100 else s


@cython.final
@cython.no_gc_clear
cdef class Connection(WireConnection):
    """The protocol of one HTTP connection (every method runs on the loop's thread)."""

    def __cinit__(self, HttpServer server):
        self.server = server
        self.wire = server
        self.fd = -1
        self.state = IN_HEAD
        self.tail = bytearray()
        self.url = NOTHING
        self.head = NO_HEAD

    # What the connection below asks.

    cdef int too_many(self) except -1:
        return self.hang_up(503, "too_many_connections",
                            f"connections: {self.server.max_connections} are open already; retry later")

    cdef bytes not_kept(self):
        cdef HttpServer server = self.server
        server.errors["log_refused"] = server.errors.get("log_refused", 0) + 1
        message = server.event_log.taking or "the event log was closed before the event was on disk"
        payload = encode({"error": {"code": "log_refused", "message": f"{message} (the event may be lost)", "path": None}})
        return (STATUS_LINES[503] + JSON + b"\r\nContent-Length: %d" % len(payload) + server.date[:server.date_n]
                + b"\r\nRetry-After: 1\r\n" + (b"Connection: close\r\n" if self.closing else b"") + b"\r\n" + payload)

    cdef int gone(self) except -1:
        self.parser = None
        self.body = None
        return 0

    cdef int ended(self) except -1:
        if self.state != IN_HEAD or self.tail:
            self.hang_up(400, "incomplete_request", "request: the connection ended before the request did")
        return 0

    cdef bint idle(self) noexcept:
        return self.state == IN_HEAD and PyByteArray_GET_SIZE(self.tail) == 0

    cdef int expire(self, int64_t now) except -1:
        if self.idle():
            if now - self.since > self.server.idle_timeout:
                self.transport.close()
        elif now - self.since > (self.server.head_timeout if self.state == IN_HEAD else self.server.body_timeout):
            part = "head" if self.state == IN_HEAD else "body"
            self.hang_up(408, "timeout", f"{part}: the rest of the request did not arrive in time")
        return 0

    # What llhttp calls, through httptools.

    def on_message_begin(self):
        self.begun += 1
        self.url = NOTHING

    def on_url(self, bytes url):
        self.url = self.url + url if self.url else url

    def on_headers_complete(self):
        # Only now: llhttp forgets what Connection said once the message is complete.
        self.keep_alive = self.parser.should_keep_alive()
        self.headed += 1

    def on_body(self, bytes part):
        self.body_n += PyBytes_GET_SIZE(part)
        if self.body_n > self.most:
            return                                     # refused by whoever fed it
        if self.body is None:
            self.body = part
        else:
            if isinstance(self.body, bytes):
                self.body = bytearray(<bytes>self.body)
            (<bytearray>self.body).extend(part)

    def on_message_complete(self):
        self.complete += 1

    # The work.

    cdef int consume(self, bytes data) except -1:
        """Answer every request that is complete in `data`; keep what is not."""
        cdef HttpServer server = self.server
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t pos = 0
        cdef Py_ssize_t body_n
        cdef int64_t head_n
        cdef Head head
        self.consuming = True
        while pos < n and not self.closed:
            if server.out_n > OUT_SOFT:
                server.queue(self)
                server.send_all()
                if self.paused:
                    self.pending = data[pos:]
                    self.consuming = False
                    return 0
            if self.state == IN_HEAD and server.reuse_heads and PyByteArray_GET_SIZE(self.tail) == 0:
                head_n = ps_http_blank_line(p + pos, n - pos)
                if head_n > 0:
                    head = server.find(p + pos, head_n)
                    if head is not None and head_n + max(head.content_length, 0) <= n - pos:
                        server.head_hits += 1
                        body_n = max(head.content_length, 0)
                        pos += head_n + body_n
                        self.last = pos == n
                        self.answer(head, p + pos - body_n, body_n, None)
                        if self.closing or self.busy:
                            break
                        continue
                    server.head_misses += 1
            pos = self.parse(data, pos)
            if self.closing or self.busy:
                break
        server.queue(self)
        self.consuming = False
        if self.busy:
            if pos < n:
                self.pending = data[pos:]
        elif self.closing and not self.closed:
            self.linger = self.linger or pos < n
            self.finish()
        return 0

    cdef Py_ssize_t piece_end(self, bytes data, Py_ssize_t pos) except -2:
        """Where the next blank line ends, also one that began in an earlier read; -1 if there is none."""
        cdef Py_ssize_t kept = PyByteArray_GET_SIZE(self.tail)
        cdef int64_t found
        cdef bytes joined
        if kept == 0:
            found = ps_http_blank_line(PyBytes_AS_STRING(data) + pos, PyBytes_GET_SIZE(data) - pos)
            return pos + found if found > 0 else -1
        kept = min(kept, 3)
        joined = bytes(self.tail[PyByteArray_GET_SIZE(self.tail) - kept:]) + data[pos:pos + 3]
        found = ps_http_blank_line(PyBytes_AS_STRING(joined), PyBytes_GET_SIZE(joined))
        if found > kept:
            return pos + found - kept
        found = ps_http_blank_line(PyBytes_AS_STRING(data) + pos, PyBytes_GET_SIZE(data) - pos)
        return pos + found if found > 0 else -1

    cdef int feed(self, bytes piece) except -1:
        """Give llhttp a piece. Returns 0, or 1 after answering a refusal."""
        self.begun = self.headed = self.complete = 0
        if self.parser is None:
            self.parser = RequestParser(self)
        try:
            self.parser.feed_data(piece)
        except ParserUpgrade:
            return 2
        except ParserError as error:
            self.hang_up(400, "bad_request", f"request: not HTTP/1.1: {error}")
            return 1
        return 0

    cdef Py_ssize_t parse(self, bytes data, Py_ssize_t pos) except -1:
        """Feed the next piece: up to a head's end, a body's end, or a place where a chunked body may end.

        So a message never ends inside a piece; where llhttp says it does, the connection is closed.
        """
        cdef HttpServer server = self.server
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t end
        cdef bint complete
        cdef bytes piece
        cdef int failed
        if self.state == IN_BODY:
            end = min(n, pos + self.body_left)
            complete = end == pos + self.body_left
            self.body_left -= end - pos
            if self.feed(data[pos:end]):
                return end
            if self.begun or complete != (self.complete == 1):
                self.hang_up(400, "bad_request", "body: it does not end where Content-Length says")
            elif complete:
                self.last = end == n
                self.message_done()
            return end
        end = self.piece_end(data, pos)
        complete = end >= 0
        if not complete:
            end = n
        piece = data[pos:end]
        if self.state == IN_CHUNKS:
            self.body_left += end - pos
            if self.feed(piece):
                return end
            if self.body_n > self.most or self.body_left > WIRE_FACTOR * self.most + server.max_head:
                self.hang_up(413, "body_too_large", f"body: more than {self.most} bytes")
            elif self.begun or (self.complete and not complete):
                self.hang_up(400, "bad_request", "body: it does not end where its chunks say")
            elif self.complete:
                self.last = end == n
                self.tail.clear()
                self.message_done()
            else:
                self.tail.extend(piece)
                del self.tail[:max(0, PyByteArray_GET_SIZE(self.tail) - 3)]
            return end
        if PyByteArray_GET_SIZE(self.tail) + end - pos > server.max_head:
            self.tail.extend(piece)
            self.hang_up(431, "head_too_large", f"head: more than {server.max_head} bytes before the blank line")
            return end
        if PyByteArray_GET_SIZE(self.tail) == 0:
            self.since = self.started
        self.tail.extend(piece)                        # first: a refusal asks it for the path
        failed = self.feed(piece)
        if failed == 1:
            return end
        self.last = end == n
        if failed == 2:
            self.upgrade()
        elif self.headed:
            self.head_done(bytes(self.tail))
        elif complete and not bytes(self.tail).strip():
            self.tail.clear()                          # blank lines before a request are skipped
        return end

    def upgrade(self):
        """An offer to change the protocol may be ignored (RFC 9110 7.8): judge the head again without it."""
        cdef bytes raw = bytes(self.tail)
        cdef ps_http_fields fields = ps_http_scan(PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))
        if self.parser.get_method() == b"CONNECT" or fields.upgrade < 0:
            self.hang_up(405, "method_not_allowed", "method: CONNECT is not served here")
            return
        self.parser = None
        if self.feed(raw[:fields.upgrade] + b"x-unuse" + raw[fields.upgrade + 7:]) == 0:
            if self.headed:
                self.head_done(raw)
            else:
                self.hang_up(400, "bad_request", "head: the offer to upgrade could not be read")
        elif not self.closed and not self.closing:
            self.hang_up(400, "bad_request", "head: the offer to upgrade could not be read")

    cdef int head_done(self, bytes raw) except -1:
        """llhttp has accepted a head: check the limits, find the route, and make ready for the body."""
        cdef HttpServer server = self.server
        cdef ps_http_fields fields
        cdef Head head = Head.__new__(Head)
        cdef str method, path, query, version
        cdef Route route
        raw = raw.lstrip(b"\r\n")
        fields = ps_http_scan(PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))
        self.tail.clear()
        method = self.parser.get_method().decode()
        version = self.parser.get_http_version()
        head.raw = raw
        path, query = self.target(self.url)
        route = server.route_of(path) if path is not None else None
        head.route = server.stranger(path) if route is None else route
        head.query = ""
        head.content_length = fields.content_length
        head.keep_alive = self.keep_alive
        head.http10 = version != "1.1"
        head.head_only = method == "HEAD"
        head.ingest = True
        head.inference = fields.inference
        head.encoding = fields.encoding
        head.accepts = fields.accepts
        self.head = head
        self.body = None
        self.body_n = 0
        self.most = server.most_body(head)
        self.refusal = None
        self.since = self.started
        if version not in ("1.0", "1.1"):
            return self.hang_up(400, "bad_request", f"version: expected HTTP/1.1 or HTTP/1.0, got HTTP/{version}")
        if fields.fields > server.max_fields:
            return self.hang_up(431, "head_too_large", f"head: {fields.fields} header fields, at most {server.max_fields}")
        if fields.hosts != 1 and (fields.hosts or not head.http10):
            return self.hang_up(400, "bad_request", f"host: expected one Host field, got {fields.hosts}")
        if fields.chunked == 2 or (fields.chunked and head.http10):
            return self.hang_up(400, "bad_request", "transfer-encoding: only chunked is understood, and not in HTTP/1.0")
        if fields.content_length > self.most:
            return self.hang_up(413, "body_too_large", f"body: {fields.content_length} bytes, at most {self.most}")
        if fields.expect == 2:
            return self.hang_up(417, "expectation_failed", "expect: only 100-continue is understood")
        if fields.foreign and not (fields.foreign == 2 and fields.navigates and method in ("GET", "HEAD")):
            what = "Origin" if fields.foreign & 1 else "Sec-Fetch-Site"
            self.refusal = (403, "foreign_origin", f"{what}: the page that asks is of another origin than this server (a proxy "
                            "must pass Host on)", None, NOTHING)
        elif path is None:
            self.refusal = (400, "bad_request", f"target: not a path: {shown(self.url)}", None, NOTHING)
        elif route is None:
            self.refusal = (404, "not_found", server.not_found(path), None, NOTHING)
        elif method not in route.methods:
            self.refusal = (405, "method_not_allowed", f"method: {path} answers {' and '.join(route.methods)}, got {method}",
                            None, b"Allow: " + ", ".join(route.methods).encode() + b"\r\n")
        elif fields.encoding > DEFLATE:
            self.refusal = (415, "unsupported_encoding", "content-encoding: send the body as it is, or as gzip or deflate",
                            None, NOTHING)
        else:
            head.query = query
            if route.native == SCORE or route.native == EVENTS:
                try:
                    self.options(head, route, query)
                except RequestError as error:
                    self.refusal = (error.status, error.code, error.message, error.path, NOTHING)
        self.cacheable = (
            self.refusal is None and not fields.chunked and not fields.expect and fields.upgrade < 0
            and PyBytes_GET_SIZE(raw) <= HEAD_CACHED
        )
        if self.complete:
            if fields.content_length > 0 or fields.chunked:
                return self.hang_up(400, "bad_request", "body: missing")
            return self.message_done()
        if fields.expect:
            if self.refusal is not None:               # the body was asked about, and is not wanted
                refusal = self.refusal
                return self.hang_up(refusal[0], refusal[1], refusal[2])
            if self.last and not head.http10:
                server.put_bytes(CONTINUE)
        if fields.chunked:
            self.state = IN_CHUNKS
            self.body_left = 0
        elif fields.content_length > 0:
            self.state = IN_BODY
            self.body_left = fields.content_length
        else:
            return self.hang_up(400, "bad_request", "body: neither Content-Length nor chunks")
        return 0

    @staticmethod
    def target(bytes url):
        """(path, query) of a request target in origin form or absolute form; (None, "") if it is neither."""
        if not url.startswith(b"/"):
            try:
                parsed = httptools.parse_url(url)
            except httptools.HttpParserInvalidURLError:
                return None, ""
            if parsed.schema is None or parsed.schema.lower() not in (b"http", b"https"):
                return None, ""
            url = (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")
        path, _, query = url.partition(b"#")[0].partition(b"?")
        try:
            if b"%" in path:
                from urllib.parse import unquote_to_bytes

                # An encoded slash is part of a name, and no name here has one: it must not become a separator.
                if b"%2F" in path or b"%2f" in path:
                    return path.decode(), ""
                path = unquote_to_bytes(path)
            return path.decode(), query.decode()
        except UnicodeDecodeError:
            return None, ""

    @staticmethod
    def options(Head head, Route route, str query):
        """The options of a query such as `explain=true&timeout=5000`."""
        known = ("ingest", "explain", "timeout", "priority") if route.native == SCORE else ("timeout", "priority")
        for item in query.split("&") if query else ():
            name, _, value = item.partition("=")
            if name not in known:
                raise RequestError(400, "unknown_parameter",
                                   f"query: no parameter {name[:60]!r} here (known: {' and '.join(known)})")
            if name in ("timeout", "priority"):
                if not (value.isascii() and value.isdigit()) or len(value) > 15 or (name == "priority" and int(value) > 7):
                    what = "a whole number of microseconds" if name == "timeout" else "0 to 7, 1 the highest"
                    raise RequestError(400, "bad_parameter", f"query: {name} is {what}, got {value[:60]!r}")
                if name == "timeout":
                    head.timeout_us = int(value)
                else:
                    head.priority = int(value)
                continue
            if value not in ("true", "false", "1", "0"):
                raise RequestError(400, "bad_parameter", f"query: {name} is true or false, got {value[:60]!r}")
            if name == "ingest":
                head.ingest = value in ("true", "1")
            else:
                head.explain = value in ("true", "1")

    cdef int message_done(self) except -1:
        cdef Head head = self.head
        cdef object body = self.body
        cdef tuple refusal = self.refusal
        self.state = IN_HEAD
        self.since = self.started
        self.head = NO_HEAD
        self.body = None
        self.refusal = None
        self.url = NOTHING
        if refusal is not None:
            return self.refuse(head, refusal[0], refusal[1], refusal[2], refusal[3], refusal[4])
        if self.cacheable:
            self.server.keep(head)
        if body is None:
            body = NOTHING
        elif not isinstance(body, bytes):
            body = bytes(body)
        return self.answer(head, PyBytes_AS_STRING(<bytes>body), PyBytes_GET_SIZE(<bytes>body), <bytes>body)

    cdef int answer(self, Head head, const char *p, size_t n, bytes held) except -1:
        """Answer a request: at once, or by a Work that waits. `held`: the bytes that p points into, where the body is
        an object of its own; else it lies in the receive buffer."""
        cdef Route route = head.route
        cdef int status
        cdef bytes kind, payload
        try:
            if head.encoding:
                held = self.inflate(head, p, n)
                p = PyBytes_AS_STRING(held)
                n = PyBytes_GET_SIZE(held)
            if route.native == INFER:
                return self.infer(head, p, n, held)
            if route.native == SCORE or route.native == EVENTS:
                return self.score(head, p, n, held)
            if held is None:
                held = PyBytes_FromStringAndSize(p, n)
            if route.native == ASYNC:
                return self.call(head, held)
            status, kind, payload = route.handler(head.query, held)
        except Exception as error:
            return self.refuse_for(head, error)
        return self.respond(head, status, kind, payload, NOTHING)

    cdef bytes inflate(self, Head head, const char *p, size_t n):
        """A compressed body as it was, at most as much of it as a plain one may have."""
        cdef bytes plain
        cdef int64_t most = self.server.most_body(head)
        stream = zlib.decompressobj(31 if head.encoding == GZIP else 15)
        try:
            plain = stream.decompress(PyBytes_FromStringAndSize(p, n), most + 1)
        except zlib.error as error:
            raise RequestError(400, "bad_encoding", f"body: not {'gzip' if head.encoding == GZIP else 'deflate'}: {error}")
        if PyBytes_GET_SIZE(plain) > most:
            raise RequestError(413, "body_too_large", f"body: more than {most} bytes when unpacked")
        if not stream.eof or stream.unused_data:
            raise RequestError(400, "bad_encoding", "body: the compressed data is cut short, or more follows it")
        return plain

    # scoring and ingesting

    cdef int score(self, Head head, const char *p, size_t n, bytes held) except -1:
        cdef Route route = head.route
        cdef Lane lane = route.lane
        cdef size_t at
        cdef int64_t rows = 1
        cdef int64_t deadline = 0
        cdef int admitted = INLINE
        cdef HttpWork work
        at = blanks(p, n)
        if at == n:
            raise RequestError(400, "malformed_json", "body: expected a JSON object or an array of them, got nothing", "$")
        if lane is not None:
            if p[at] == b"[":
                rows = max(<int64_t>1, <int64_t>n // lane.row_bytes)
            admitted = self.server.flow.admit(lane, rows, self.started, self.started, head.timeout_us, head.priority, &deadline, False)
            if admitted >= FULL:
                return self.overloaded(head, admitted)
        if held is None:
            held = PyBytes_FromStringAndSize(p, n)
        if admitted == INLINE:
            return self.answer_events(head, held)
        work = HttpWork.__new__(HttpWork)
        work.body = held
        work.lane = lane
        work.rows = rows
        work.deadline = deadline
        work.priority = head.priority
        work.head = head
        if route.native == SCORE and p[at] == b"{":
            # One event: with others for the same pipeline that wait too, if they ask the same.
            work.like = (<int64_t><void *>route) + 2 * head.ingest + head.explain
        return self.wait_for(work)

    cdef int answer_events(self, Head head, bytes body) except -1:
        """Score or ingest now, one event or an array, and put the answer into the output buffer."""
        cdef Route route = head.route
        cdef list events
        cdef int64_t began
        if first_of(body) == b"[":
            events = route.decode_many(body)
            if route.lane is not None and len(events):
                learn_row_bytes(route.lane, PyBytes_GET_SIZE(body) // len(events))
            if route.native == SCORE:
                return self.answer_many(head, route.core.score_many(route.index, events, head.ingest, head.explain))
            return self.answer_many(head, route.core.ingest_many(route.index, events))
        began = self.started
        self.answer_event(head, route.decode_one(body))
        if route.lane is not None:
            (<Lane>route.lane).observe(1, self.started - began)
        return 0

    cdef int answer_event(self, Head head, object event) except -1:
        """Score or ingest one event now."""
        cdef Route route = head.route
        if route.native == SCORE:
            return self.respond(head, 200, JSON,
                                route.core.score(route.index, event, head.ingest, head.explain).json(head.explain), NOTHING)
        return self.respond(head, 200, JSON, encode({"accepted": 1, "outcomes": {route.core.ingest(route.index, event): 1}}),
                            NOTHING)

    cdef int answer_many(self, Head head, list answers) except -1:
        """The decisions, or the outcomes, of an array."""
        cdef list parts
        cdef int64_t began = self.started
        if head.route.native == SCORE:
            parts = []
            for decision in answers:
                parts.append((<Decision>decision).json(head.explain))
            self.respond(head, 200, JSON, b"[" + b",".join(parts) + b"]", NOTHING)
        else:
            outcomes = {}
            for outcome in answers:
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            self.respond(head, 200, JSON, encode({"accepted": len(answers), "outcomes": outcomes}), NOTHING)
        if head.route.lane is not None and not self.busy:
            (<Lane>head.route.lane).observe(len(answers), self.started - began)
        return 0

    # inference

    cdef int infer(self, Head head, const char *p, size_t n, bytes held) except -1:
        cdef Target target = head.route.target
        cdef ServedModel model = target.model
        cdef Lane lane = target.lane
        cdef InferCall call
        cdef HttpWork work
        cdef int64_t began
        cdef int64_t deadline = 0
        cdef int admitted = INLINE
        if model is None:
            raise RequestError(503, "not_loaded", f"model {target.name!r} is not loaded")
        if n == 0:
            raise RequestError(400, "bad_request", "body: expected an inference request, got nothing")
        if head.inference < -1 or head.inference > <int64_t>n:
            raise RequestError(400, "bad_request", "Inference-Header-Content-Length: expected the bytes of the JSON header, "
                                                   f"at most the body's {n}")
        call = InferCall.of_http(model, p, n, head.inference)
        if lane is not None:
            admitted = self.server.flow.admit(lane, call.rows, self.started, self.started, call.timeout_us, call.priority,
                                              &deadline, True)
            if admitted >= FULL:
                return self.overloaded(head, admitted)
        if admitted == INLINE:
            call.run()
            call.finish()
            began = self.started
            self.respond_infer(head, call)
            if self.server.trace is not None:
                self.traced(call, began)
            if lane is not None:
                lane.observe(call.rows, self.started - began)
            return 0
        work = HttpWork.__new__(HttpWork)
        if held is None:
            held = PyBytes_FromStringAndSize(p, n)
            call = InferCall.of_http(model, PyBytes_AS_STRING(held), n, head.inference)
        work.body = held
        work.inference = call
        work.whole = True
        work.lane = lane
        work.rows = call.rows
        work.deadline = deadline
        work.priority = call.priority
        work.head = head
        return self.wait_for(work)

    # what waits

    cdef int wait_for(self, HttpWork work) except -1:
        """This connection's later requests wait until `work` has answered."""
        work.connection = self
        work.arrival = self.started
        self.busy = True
        self.server.queue(self)                        # submitting may answer others
        return self.server.flow.submit(work)

    cdef int released(self) except -1:
        """The request that was waited for is answered: send, then go on reading."""
        self.busy = False
        if self.transport is None:
            return 0
        self.server.queue(self)
        if self.consuming:
            return 0
        if self.closing and not self.closed:
            self.linger = self.linger or self.pending is not None
            self.finish()
        elif not self.paused:
            self.read_on()
        return 0

    cdef int call(self, Head head, bytes body) except -1:
        """Await a handler; this connection's later requests wait."""
        self.busy = True
        task = asyncio.ensure_future(self.awaited(head, body, self.started))
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)
        return 0

    async def awaited(self, Head head, bytes body, int64_t started):
        try:
            status, kind, payload = await head.route.handler(head.query, body)
            error = None
        except Exception as failed:
            error = failed
        if self.transport is None:
            self.busy = False
            return
        self.started = started
        self.last = self.pending is None
        try:
            if error is not None:
                self.refuse_for(head, error)
            else:
                self.respond(head, status, kind, payload, NOTHING)
        except BaseException:
            self.busy = False
            self.fault()
            raise
        self.released()

    # answers

    cdef int start_line(self, Head head, int status, bytes kind) except -1:
        cdef HttpServer server = self.server
        if not head.keep_alive or (server.draining and self.last):
            self.closing = True
        if status == 200 and kind is JSON:
            return server.put_bytes(OK_JSON)
        server.put_bytes(STATUS_LINES[status])
        server.put_bytes(kind)
        return server.put(b"\r\nContent-Length: ", 18)

    cdef int end_head(self, Head head, int64_t length, bytes extra) except -1:
        self.server.put_number(length)
        return self.end_fields(head, extra)

    cdef int end_fields(self, Head head, bytes extra) except -1:
        cdef HttpServer server = self.server
        server.put(server.date, server.date_n)
        if self.closing:
            server.put(b"\r\nConnection: close\r\n", 21)
        elif head.http10:
            server.put(b"\r\nConnection: keep-alive\r\n", 26)
        else:
            server.put(b"\r\n", 2)
        if extra:
            server.put_bytes(extra)
        return server.put(b"\r\n", 2)

    cdef int count(self, Head head, int status) except -1:
        cdef int64_t now = ps_http_now()
        observe(head.route if head.route is not None else self.server.unmatched,
                0 if status == 200 else STATUS_INDEX.get(status, len(STATUSES) - 1), now - self.started)
        self.started = now
        self.server.answers += 1
        if self.state == IN_HEAD:
            self.since = now
        return 0

    cdef int respond(self, Head head, int status, bytes kind, bytes payload, bytes extra) except -1:
        if status == 200 and head.route.native <= EVENTS and head.ingest:
            self.server.appended = True
        self.start_line(head, status, kind)
        self.end_head(head, PyBytes_GET_SIZE(payload), extra)
        if not head.head_only:
            self.server.put_bytes(payload)
        return self.count(head, status)

    cdef int respond_infer(self, Head head, InferCall call) except -1:
        cdef HttpServer server = self.server
        cdef size_t json_n = PyBytes_GET_SIZE(call.json_head)
        cdef size_t total = json_n
        cdef size_t n = 0
        cdef const char *part
        cdef int i
        for i in range(call.n_parts):
            call.part(i, &n)
            total += n
        if head.accepts and COMPRESS_FROM <= total <= COMPRESS_MOST:
            return self.respond_compressed(head, call)
        server.room(total + 1024)                      # all of it or nothing
        self.start_line(head, 200, OCTETS if call.binary else JSON)
        server.put_number(total)
        if call.binary:
            server.put(b"\r\nInference-Header-Content-Length: ", 35)
            self.end_head(head, json_n, NOTHING)
        else:
            self.end_fields(head, NOTHING)
        if not head.head_only:
            server.put_bytes(call.json_head)
            for i in range(call.n_parts):
                part = call.part(i, &n)
                server.put(part, n)
        return self.count(head, 200)

    cdef int traced(self, InferCall call, int64_t arrival) except -1:
        """Give the times of an inference, in ns, to who asked for traces. Nothing that happens there undoes the answer."""
        cdef HttpServer server = self.server
        cdef int64_t now = ps_http_now()
        cdef int64_t ticks = ps_ticks()
        cdef double ns = <double>(now - server.clock_ns) / <double>max(<int64_t>1, ticks - server.clock_ticks)
        cdef int64_t last = arrival
        times = [("REQUEST_START", arrival)]
        for name, at in (("QUEUE_START", call.decoded), ("COMPUTE_START", call.started), ("COMPUTE_END", call.ended)):
            last = max(last, now - <int64_t>(<double>(ticks - at) * ns))
            times.append((name, last))
        times.append(("REQUEST_END", max(last, now)))
        try:
            request = msgspec.json.decode(b'"' + call.id[:call.id_n] + b'"') if call.id != NULL else ""
            server.trace(call.model.name, call.model.version, request, times)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
        return 0

    cdef int respond_compressed(self, Head head, InferCall call) except -1:
        cdef size_t n = 0
        cdef const char *part
        cdef int i
        cdef list parts = [call.json_head]
        cdef bint gzip = head.accepts & GZIP
        for i in range(call.n_parts):
            part = call.part(i, &n)
            parts.append(PyBytes_FromStringAndSize(part, n))
        stream = zlib.compressobj(1, zlib.DEFLATED, 31 if gzip else 15)
        payload = stream.compress(b"".join(parts)) + stream.flush()
        extra = b"Content-Encoding: gzip\r\n" if gzip else b"Content-Encoding: deflate\r\n"
        if call.binary:
            extra += b"Inference-Header-Content-Length: %d\r\n" % len(call.json_head)
        return self.respond(head, 200, OCTETS if call.binary else JSON, payload, extra)

    cdef int overloaded(self, Head head, int why) except -1:
        """Refused by admission, or dropped from the queue: nothing of it was read beyond its head."""
        if why == FULL:
            return self.refuse(head, 503, "overloaded", "the queue is full; retry later", None, NOTHING)
        text = "it could not be answered by its deadline; retry later"
        if head.route is not None and head.route.lane is not None:
            text += f" (a row takes about {(<Lane>head.route.lane).row_ns / 1e6:.3g} ms)"
        return self.refuse(head, 503, "deadline", text, None, NOTHING)

    cdef int refuse(self, Head head, int status, str code, str message, object path, bytes extra) except -1:
        """The JSON error of a refused request."""
        cdef HttpServer server = self.server
        server.errors[code] = server.errors.get(code, 0) + 1
        message = message.encode("utf-8", "replace").decode()
        if head.route is not None and head.route.oip:
            payload = encode({"error": message})
        else:
            payload = encode({"error": {"code": code, "message": message, "path": path}})
        if status == 503:
            extra = b"Retry-After: 1\r\n" + extra
        return self.respond(head, status, JSON, payload, extra)

    cdef int refuse_for(self, Head head, object error) except -1:
        """The answer to an exception: what the caller did wrong is 4xx, only our own faults are 500."""
        if isinstance(error, RequestError):
            return self.refuse(head, error.status, error.code, error.message, error.path, NOTHING)
        if isinstance(error, InferError):
            return self.refuse(head, error.status, "invalid_inference" if error.status < 500 else "inference_failed",
                               error.message, None, NOTHING)
        if isinstance(error, self.server.event_error):
            return self.refuse(head, 422, "invalid_event", error.message, "$" + error.path, NOTHING)
        if isinstance(error, ValidationError):
            message, path = split_path("$", str(error))
            return self.refuse(head, 422, "invalid_event", message, path, NOTHING)
        if isinstance(error, DecodeError):
            return self.refuse(head, 400, "malformed_json", str(error), "$", NOTHING)
        if isinstance(error, UnicodeError):
            return self.refuse(head, 400, "invalid_utf8", f"body: not UTF-8: {getattr(error, 'reason', error)}", "$", NOTHING)
        if isinstance(error, InProgress):
            return self.refuse(head, 503, "in_progress", str(error), None, NOTHING)
        if isinstance(error, LogError):
            return self.refuse(head, 503, "log_refused", str(error), None, NOTHING)
        if isinstance(error, RecursionError):
            return self.refuse(head, 400, "too_deep", "body: nested too deeply", "$", NOTHING)
        if self.server.log is not None:
            self.server.log(error)
        else:
            traceback.print_exception(error, file=sys.stderr)
        message = str(error) if hasattr(error, "ingested") else "the server failed; its log has the reason"
        return self.refuse(head, 500, "internal", message, None, NOTHING)

    cdef Route begun_route(self):
        """The Route that a head asks for of which there is no more than its beginning."""
        cdef list words = bytes(self.tail[:self.server.max_head]).lstrip(b"\r\n").split(b"\r\n", 1)[0].split(b" ")
        cdef str path = self.target(words[1])[0] if len(words) > 1 else None
        cdef Route route = self.server.route_of(path) if path is not None else None
        return self.server.stranger(path) if route is None else route

    cdef int hang_up(self, int status, str code, str message) except -1:
        """Refuse a request whose rest cannot be read, and close. Outside a read this also writes."""
        cdef Head head = Head.__new__(Head)
        cdef int64_t now = ps_http_now()
        head.content_length = -1
        head.route = self.head.route
        head.head_only = self.head.head_only
        if head.route is None:
            head.route = self.begun_route()
        self.closing = True
        self.linger = True
        self.refuse(head, status, code, message, None, NOTHING)
        self.started = now
        return self.finish()


cdef void run_inference(InferCall call) noexcept nogil:
    call.run()


@cython.final
@cython.no_gc
cdef class HttpWork(Work):
    """A request that waits for its turn on the loop, or for a thread of the pool."""

    cdef int begin(self) except -1:
        cdef Connection connection = self.connection
        cdef int got
        if connection.transport is None and self.stage == 0:
            self.inference = None                      # nobody waits for it any more
            return DONE
        try:
            if self.inference is not None:
                got = self.begin_infer()
            elif self.stage or first_of(self.body) == b"[":
                got = self.begin_many()
            else:
                got = self.begin_score()
        except Exception as error:
            self.fail(error)
            return DONE
        if got == DONE:
            self.done()
        return got

    cdef int ready(self) except -1:
        """Before an answer: the clock starts where the request came, and only what came since follows it."""
        self.connection.started = self.arrival
        self.connection.last = self.connection.pending is None
        return 0

    cdef int done(self) except -1:
        cdef Connection connection = self.connection
        self.connection = None
        self.inference = None
        self.block = None
        return connection.released()

    cdef int fail(self, object error) except -1:
        if self.connection.transport is not None:
            self.ready()
            self.connection.refuse_for(self.head, error)
        return self.done()

    cdef int refuse(self, int why) except -1:
        if self.connection.transport is not None:
            self.ready()
            self.connection.overloaded(self.head, why)
        return self.done()

    cdef int fault(self) except -1:
        if self.connection is not None:
            self.connection.busy = False
            self.connection.fault()
        return 0

    cdef int begin_infer(self) except -1:
        cdef int64_t began
        if self.pooled:
            self.job.call = <native_call>run_inference
            self.job.arg = <void *>self.inference
            return NATIVE
        began = ps_http_now()
        self.inference.run()
        self.inference.finish()
        self.ready()
        self.connection.respond_infer(self.head, self.inference)
        if self.connection.server.trace is not None:
            self.connection.traced(self.inference, self.arrival)
        self.lane.observe(self.rows, ps_http_now() - began)
        return DONE

    cdef int begin_score(self) except -1:
        """One event: on the pool; or together with those behind it that ask the same."""
        cdef Route route = self.head.route
        cdef int64_t began = ps_http_now()
        if self.pooled and route.native == SCORE:
            self.block = route.core.begin_apart(route.pipe, [route.decode_one(self.body)], self.head.ingest,
                                                self.head.explain)
            if self.block.n == 0:
                self.finish_score()
                return DONE
            self.job.call = run_block
            self.job.arg = &self.block.parts
            return NATIVE
        event = route.decode_one(self.body)
        if route.native == EVENTS or self.join(began, [self], [event]) is None:
            self.ready()
            self.connection.answer_event(self.head, event)
            self.lane.observe(1, ps_http_now() - began)
        return DONE

    cdef object join(self, int64_t now, list works, list events):
        """Score this event together with those that wait behind it, no more than a slice of them. None: there are none."""
        cdef Flow flow = self.connection.server.flow
        cdef Route route = self.head.route
        cdef Py_ssize_t most = min(<int64_t>BLOCK_ROWS, flow.slice_ns // max(<int64_t>1, self.lane.row_ns))
        cdef HttpWork work
        cdef Py_ssize_t i
        cdef list answers
        while len(works) < most:
            work = <HttpWork>flow.next_like(self, now)
            if work is None:
                break
            if work.connection.transport is None:
                work.done()
                continue
            try:
                events.append(route.decode_one(work.body))
            except Exception as error:
                work.fail(error)
                continue
            works.append(work)
        if len(works) == 1:
            return None
        try:
            answers = route.core.score_together(route.pipe, events, self.head.ingest, self.head.explain)
        except Exception as error:
            answers = [error] * len(works)
        for i in range(len(works)):
            work = <HttpWork>works[i]
            try:
                if work.connection.transport is not None:
                    work.answer(answers[i])
                    self.connection.server.queue(work.connection)    # before another's answer is formed
                if i:
                    work.done()
            except Exception:
                traceback.print_exc()
                work.fault()
        self.lane.observe(len(works), ps_http_now() - now)
        return answers

    cdef int answer(self, object answer) except -1:
        """A Decision or an exception as the answer."""
        self.ready()
        if isinstance(answer, Exception):
            return self.connection.refuse_for(self.head, answer)
        return self.connection.respond(self.head, 200, JSON, (<Decision>answer).json(self.head.explain), NOTHING)

    cdef int finish_score(self) except -1:
        cdef object answer = self.head.route.core.end_apart(self.block)[0]
        if self.connection.transport is None:
            return 0
        return self.answer(answer)

    cdef int begin_many(self) except -1:
        """An array, a part at a time: first every event is checked, then they are scored in order, or ingested by time."""
        cdef Route route = self.head.route
        cdef int64_t began = ps_http_now()
        cdef int64_t until = began + self.connection.server.flow.slice_ns
        cdef Source source
        cdef Py_ssize_t n, first
        if self.stage == 0:
            self.events = route.decode_many(self.body)
            n = len(self.events)
            if n:
                learn_row_bytes(self.lane, PyBytes_GET_SIZE(self.body) // n)
            self.answers = []
            self.times = [] if route.native == EVENTS else None
            self.at = 0
            self.stage = 1
        n = len(self.events)
        source = route.pipe.source if route.native == SCORE else <Source>route.core.sources[route.index]
        while self.stage == 1 and self.at < n:
            first = self.at
            self.at = min(n, first + BLOCK_ROWS)
            route.core.check(source, self.events, first, self.at, self.times)
            if ps_http_now() >= until:
                return MORE
        if self.stage == 1:
            if self.times is not None:
                self.events = [self.events[i] for i in by_time(self.times)]
            self.stage = 2
            self.at = 0
        if self.pooled and route.native == SCORE:
            return self.begin_part()
        first = self.at
        while self.at < n:
            if route.native == SCORE:
                self.answers.append(route.core.score(route.index, self.events[self.at], self.head.ingest, self.head.explain))
            else:
                self.answers.append(route.core.ingest(route.index, self.events[self.at]))
            self.at += 1
            if self.at % 8 == 0 and ps_http_now() >= until:
                self.lane.observe(self.at - first, ps_http_now() - began)
                return MORE
        if self.connection.transport is not None:
            self.ready()
            self.connection.answer_many(self.head, self.answers)
        if self.at > first:
            self.lane.observe(self.at - first, ps_http_now() - began)
        return DONE

    cdef int begin_part(self) except -1:
        """The next events of an array whose models run on the pool: about ten milliseconds of them."""
        cdef Route route = self.head.route
        cdef Py_ssize_t most = max(<int64_t>1, min(<int64_t>BLOCK_ROWS, 10000000 // max(<int64_t>1, self.lane.row_ns)))
        cdef list part
        while self.at < len(self.events):
            part = self.events[self.at:self.at + most]
            self.block = route.core.begin_apart(route.pipe, part, self.head.ingest, self.head.explain)
            self.at += len(self.block.answers)
            self.rows = len(self.block.answers)
            if self.block.n:
                self.job.call = run_block
                self.job.arg = &self.block.parts
                return NATIVE
            self.take_part()
        if self.connection.transport is not None:
            self.ready()
            self.connection.answer_many(self.head, self.answers)
        return DONE

    cdef int take_part(self) except -1:
        for answer in self.head.route.core.end_apart(self.block):
            if isinstance(answer, Exception):
                raise answer
            self.answers.append(answer)
        self.block = None
        return 0

    cdef int finish(self) except -1:
        """The pool has run it."""
        cdef Flow flow = self.connection.server.flow
        try:
            if self.stage:
                self.take_part()
                if self.at < len(self.events):
                    return flow.again(self)
                if self.connection.transport is not None:
                    self.ready()
                    self.connection.answer_many(self.head, self.answers)
            elif self.block is not None:
                self.finish_score()
            else:
                self.inference.finish()
                if self.connection.transport is not None:
                    self.ready()
                    self.connection.respond_infer(self.head, self.inference)
                    if self.connection.server.trace is not None:
                        self.connection.traced(self.inference, self.arrival)
        except Exception as error:
            return self.fail(error)
        return self.done()


cdef void learn_row_bytes(Lane lane, int64_t each) noexcept:
    """A running mean, from which one odd body cannot take it far."""
    lane.row_bytes += (min(max(each, <int64_t>16), <int64_t>1024) - lane.row_bytes) // 8


cdef size_t blanks(const char *p, size_t n) noexcept:
    """How many blanks JSON may begin with stand at p."""
    cdef size_t at = 0
    while at < n and (p[at] == b" " or p[at] == b"\n" or p[at] == b"\r" or p[at] == b"\t"):
        at += 1
    return at


cdef char first_of(bytes body) noexcept:
    """The first byte that is no blank; 0 where there is none."""
    return PyBytes_AS_STRING(body)[blanks(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))]
