"""HTTP/1.1 on uvloop (hot path): one protocol object per connection, everything inline, one send per read.

llhttp (httptools) judges every head and says where every message ends; no framing is decided here. A head whose bytes
were accepted before is not judged again: the same bytes at the start of a message mean the same to llhttp, so its route
and its Content-Length are kept with them. What must stay true: a request answered without llhttp is byte for byte one
that llhttp has accepted, from its first byte to the last byte of its body's length.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy, memset

import asyncio
import sys
import time
import traceback

import httptools
import msgspec

from penstock.errors import LogError

cdef extern from "http_head.h" nogil:
    ctypedef struct ps_http_fields:
        int64_t content_length
        uint32_t fields
        uint32_t hosts
        int chunked
        int expect
        int encoded
        int64_t upgrade
    int64_t ps_http_now()
    int64_t ps_http_blank_line(const char *p, size_t n)
    uint64_t ps_http_hash(const char *p, size_t n)
    ps_http_fields ps_http_scan(const char *head, size_t n)

cdef extern from "sys/socket.h" nogil:
    ssize_t socket_send "send" (int fd, const void *data, size_t n, int flags)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, int *value)
    unsigned long FIONREAD

cdef enum:
    SCORE = 1
    EVENTS = 2
    HANDLER = 3

cdef enum:
    IN_HEAD = 0
    IN_BODY = 1
    IN_CHUNKS = 2
    CLOSED = 3

cdef enum:
    OUT_SOFT = 65536           # answers of one read beyond this are written before the next is formed
    SEND_TOGETHER = 16
    OUT_KEEP = 4194304         # an output buffer larger than this is given back once it is empty
    HEAD_CACHED = 1024         # longest head that is remembered
    DISCARD_MAX = 4194304      # bytes read and dropped after a refusal, so that the peer can read the answer
    WIRE_FACTOR = 4            # a chunked body may take this many times the body limit on the wire

cdef int64_t LINGER_NS = 2000000000

STATUSES = (200, 400, 404, 405, 408, 413, 415, 417, 422, 431, 500, 503, 0)
BUCKETS = (10e-6, 20e-6, 30e-6, 50e-6, 75e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 1.0)
cdef int64_t BOUNDS[16]
for _i, _b in enumerate(BUCKETS):
    BOUNDS[_i] = <int64_t>round(_b * 1e9)

cdef dict PHRASES = {
    200: b"OK", 400: b"Bad Request", 404: b"Not Found", 405: b"Method Not Allowed", 408: b"Request Timeout",
    413: b"Content Too Large", 415: b"Unsupported Media Type", 417: b"Expectation Failed",
    422: b"Unprocessable Content", 431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
    503: b"Service Unavailable",
}
cdef dict STATUS_LINES = {s: b"HTTP/1.1 %d %s\r\nContent-Type: " % (s, p) for s, p in PHRASES.items()}
cdef dict STATUS_INDEX = {s: i for i, s in enumerate(STATUSES)}
cdef bytes JSON = b"application/json"
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

    kind "score" and "events" are answered here: `decode_one`, `decode_many` turn a body into wire objects, and
    `call_one(index, object, ...)`, `call_many(index, list, ...)` are the engine's. kind "handler" calls
    `handler(query: str, body: bytes) -> (status, content_type: bytes, payload: bytes)`.
    """

    def __init__(self, str label, str kind, tuple methods, *, index=None, decode_one=None, decode_many=None,
                 call_one=None, call_many=None, handler=None):
        self.label = label
        self.kind = kind
        self.methods = methods
        self.native = {"score": SCORE, "events": EVENTS, "handler": HANDLER}[kind]
        self.index = index
        self.decode_one = decode_one
        self.decode_many = decode_many
        self.call_one = call_one
        self.call_many = call_many
        self.handler = handler

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


@cython.final
cdef class HttpServer:
    """What the connections of one server share: routes, limits, remembered heads, the output buffer, counters.

    routes: path -> Route. not_found(path) -> message for a 404. event_error: the exception type of refused events,
    with `.path` and `.message`. Timeouts are in seconds, sizes in bytes.
    """

    def __init__(self, dict routes, *, not_found, event_error, log=None, max_body=1 << 20, max_head=16384,
                 max_fields=100, max_connections=10000, head_timeout=10.0, body_timeout=10.0, idle_timeout=75.0,
                 write_timeout=30.0):
        self.routes = routes
        self.not_found = not_found
        self.event_error = event_error
        self.log = log
        self.heads = [None] * N_HEADS
        self.connections = set()
        self.errors = {}
        self.unmatched = Route("other", "handler", ())
        self.max_body = max_body
        self.max_head = max_head
        self.max_fields = max_fields
        self.max_connections = max_connections
        self.head_timeout = <int64_t>(head_timeout * 1e9)
        self.body_timeout = <int64_t>(body_timeout * 1e9)
        self.idle_timeout = <int64_t>(idle_timeout * 1e9)
        self.write_timeout = <int64_t>(write_timeout * 1e9)
        self.reuse_heads = True
        self.waiting = []
        self.tell_date()

    def __dealloc__(self):
        free(self.ends)
        free(self.out)

    def __call__(self):
        """A protocol for one connection (the factory that `loop.create_server` wants)."""
        return Connection(self)

    @property
    def open_connections(self):
        return len(self.connections)

    @property
    def error_counts(self):
        return dict(self.errors)

    def all_routes(self):
        """Every Route once, the one that counts unmatched requests last."""
        return [*dict.fromkeys(self.routes.values()), self.unmatched]

    def tell_date(self):
        """Renew the Date field: called once per sweep, so that no request formats a date."""
        cdef bytes text = b"\r\nDate: " + time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
        memcpy(self.date, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        self.date_n = PyBytes_GET_SIZE(text)

    def sweep(self):
        """Close what has waited too long: 408 for half a request, silently where nothing was asked."""
        cdef int64_t now = ps_http_now()
        cdef Connection c
        self.tell_date()
        self.send_all()
        for c in list(self.connections):
            if c.transport is None:
                continue
            if c.state == CLOSED:                      # the last answer goes out, then what still arrives is dropped
                if now - c.since > (self.write_timeout if c.transport.get_write_buffer_size() else LINGER_NS):
                    c.transport.abort()
            elif c.paused:
                if c.blocked_bytes != c.transport.get_write_buffer_size():
                    c.blocked_bytes = c.transport.get_write_buffer_size()
                    c.blocked_since = now
                elif now - c.blocked_since > self.write_timeout:
                    c.transport.abort()
            elif c.state == IN_HEAD and not c.tail:
                if now - c.since > self.idle_timeout:
                    c.transport.close()
            elif now - c.since > (self.head_timeout if c.state == IN_HEAD else self.body_timeout):
                part = "head" if c.state == IN_HEAD else "body"
                c.hang_up(408, "timeout", f"{part}: the rest of the request did not arrive in time")

    def close_idle(self, bint force=False):
        """Close connections with no request under way (all with `force`); returns how many stay open."""
        cdef Connection c
        cdef int waiting
        self.send_all()
        for c in list(self.connections):
            if c.transport is None:
                continue
            waiting = 0
            if force:
                c.transport.abort()
            elif c.state == IN_HEAD and not c.tail and not c.paused:
                if ioctl(c.fd, FIONREAD, &waiting) != 0 or waiting == 0:
                    c.transport.close()
        return len(self.connections)

    def send_waiting(self):
        """Send what the connections answered in this round of the loop (the loop calls it once per such round).

        Sending together wakes the peers once, not once per answer: 0.7 us less CPU per request. More than SEND_TOGETHER
        would save little more, and the first of them would wait.
        """
        self.called = False
        self.send_all()

    cdef int queue(self, Connection connection) except -1:
        """Leave the answers formed since the last call to the end of the round, or to when there are enough."""
        cdef Py_ssize_t n = len(self.waiting)
        cdef size_t *grown
        if self.out_n == self.out_from:
            return 0
        if n and self.waiting[n - 1] is connection:
            n -= 1
        else:
            if n == self.ends_cap:
                grown = <size_t *>realloc(self.ends, (2 * n + 64) * sizeof(size_t))
                if grown == NULL:
                    raise MemoryError()
                self.ends = grown
                self.ends_cap = 2 * n + 64
            if n == 0 and not self.called:
                self.called = True
                self.call_soon(self.send_waiting)
            self.waiting.append(connection)
        self.ends[n] = self.out_n
        self.out_from = self.out_n
        if n + 1 >= SEND_TOGETHER:
            self.send_all()
        return 0

    cdef int send_all(self) except -1:
        cdef list waiting = self.waiting
        cdef Connection c
        cdef Py_ssize_t i
        cdef size_t start = 0
        cdef bint lost = False
        if self.event_log is not None and len(waiting):
            # One sync for all that arrived together. What cannot be kept is not acknowledged.
            try:
                self.event_log.wait()
            except LogError as error:
                lost = True
                print(f"penstock: {error}", file=sys.stderr, flush=True)
        for i in range(len(waiting)):
            c = <Connection>waiting[i]
            if lost:
                if c.transport is not None:
                    c.transport.abort()
                continue
            c.send(self.out + start, self.ends[i] - start)
            start = self.ends[i]
        waiting.clear()
        self.out_n = 0
        self.out_from = 0
        if self.out_cap > OUT_KEEP:
            free(self.out)
            self.out = NULL
            self.out_cap = 0
        return 0

    cdef int put(self, const char *p, size_t n) except -1:
        cdef size_t cap
        cdef char *grown
        if self.out_n + n > self.out_cap:
            cap = max(self.out_cap * 2, self.out_n + n, 16384)
            grown = <char *>realloc(self.out, cap)
            if grown == NULL:
                raise MemoryError()
            self.out = grown
            self.out_cap = cap
        memcpy(self.out + self.out_n, p, n)
        self.out_n += n
        return 0

    cdef int put_bytes(self, bytes b) except -1:
        return self.put(PyBytes_AS_STRING(b), PyBytes_GET_SIZE(b))

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


cdef int put_number(HttpServer server, int64_t value) except -1:
    cdef char digits[24]
    cdef int i = 24
    while True:
        i -= 1
        digits[i] = <char>(48 + value % 10)
        value //= 10
        if value == 0:
            break
    return server.put(digits + i, 24 - i)


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
cdef class Connection:
    """The protocol of one connection (uvloop calls it; every method runs on the loop's thread)."""

    def __cinit__(self, HttpServer server):
        self.server = server
        self.fd = -1
        self.state = IN_HEAD
        self.tail = bytearray()
        self.url = NOTHING
        self.head = NO_HEAD

    # What uvloop calls.

    def connection_made(self, transport):
        cdef HttpServer server = self.server
        self.transport = transport
        self.since = ps_http_now()
        self.started = self.since
        self.fd = transport.get_extra_info("socket").fileno()
        transport.set_write_buffer_limits(high=OUT_SOFT)
        if server.call_soon is None:
            server.call_soon = asyncio.get_running_loop().call_soon
        server.accepted += 1
        server.connections.add(self)
        if len(server.connections) > server.max_connections:
            server.refused += 1
            self.hang_up(503, "too_many_connections", f"connections: {server.max_connections} are open already; retry later")

    def connection_lost(self, exc):
        # Only after this does uvloop close the descriptor, whose number may then name another connection.
        self.server.connections.discard(self)
        self.transport = None
        self.fd = -1
        self.parser = None
        self.pending = None
        self.body = None
        self.state = CLOSED

    def data_received(self, bytes data):
        if self.state == CLOSED:
            self.discarded += PyBytes_GET_SIZE(data)
            if self.discarded > DISCARD_MAX and self.transport is not None:
                self.transport.abort()
            return
        if self.paused:
            self.pending = data if self.pending is None else self.pending + data
            return
        self.started = ps_http_now()
        self.consume(data)

    def eof_received(self):
        if self.state == CLOSED:
            return False
        if self.paused:
            self.half_closed = True
            return True
        if self.state != IN_HEAD or self.tail:
            self.hang_up(400, "incomplete_request", "request: the connection ended before the request did")
        self.server.send_all()
        if self.paused:
            self.half_closed = True
            return True
        return False

    def pause_writing(self):
        """The peer does not read: form no more answers, and read no more requests."""
        self.paused = True
        self.blocked_since = ps_http_now()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self):
        cdef bytes data = self.pending
        self.paused = False
        self.pending = None
        self.started = ps_http_now()
        if self.state != CLOSED:
            self.since = self.started
        if self.transport is None:
            return
        if data is not None and self.state != CLOSED:
            self.consume(data)
        if not self.paused and self.transport is not None and not self.transport.is_closing():
            if self.half_closed:
                self.transport.close()
            else:
                self.transport.resume_reading()

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
        if self.body_n > self.server.max_body:
            return                                     # refused by whoever fed it
        if self.body is None:
            self.body = part
        else:
            if isinstance(self.body, bytes):
                self.body = bytearray(<bytes>self.body)
            (<bytearray>self.body).extend(part)

    def on_message_complete(self):
        self.ended += 1

    # The work.

    cdef int consume(self, bytes data) except -1:
        """Answer every request that is complete in `data`; keep what is not."""
        cdef HttpServer server = self.server
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t pos = 0
        cdef int64_t head_n
        cdef Head head
        try:
            while pos < n and self.state != CLOSED:
                if server.out_n > OUT_SOFT:
                    server.queue(self)
                    server.send_all()
                    if self.paused:
                        self.pending = data[pos:]
                        return 0
                if self.state == IN_HEAD and server.reuse_heads and PyByteArray_GET_SIZE(self.tail) == 0:
                    head_n = ps_http_blank_line(p + pos, n - pos)
                    if head_n > 0:
                        head = server.find(p + pos, head_n)
                        if head is not None and head_n + max(head.content_length, 0) <= n - pos:
                            server.head_hits += 1
                            pos += head_n
                            body = PyBytes_FromStringAndSize(p + pos, max(head.content_length, 0))
                            pos += max(head.content_length, 0)
                            self.last = pos == n
                            self.answer(head, body)
                            if self.closing:
                                self.linger = self.linger or pos < n
                                break
                            continue
                        server.head_misses += 1
                pos = self.parse(data, pos)
                if self.closing:
                    self.linger = self.linger or pos < n
                    break
            server.queue(self)
            if self.closing and self.state != CLOSED:
                self.finish()
        except BaseException:
            # A fault of ours: nothing of a half-formed answer may reach another connection.
            server.out_n = server.out_from
            self.state = CLOSED
            if self.transport is not None:
                self.transport.abort()
            raise
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
        self.begun = self.headed = self.ended = 0
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
            if self.begun or complete != (self.ended == 1):
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
            if self.body_n > server.max_body or self.body_left > WIRE_FACTOR * server.max_body + server.max_head:
                self.hang_up(413, "body_too_large", f"body: more than {server.max_body} bytes")
            elif self.begun or (self.ended and not complete):
                self.hang_up(400, "bad_request", "body: it does not end where its chunks say")
            elif self.ended:
                self.last = end == n
                self.tail.clear()
                self.message_done()
            else:
                self.tail.extend(piece)
                del self.tail[:max(0, PyByteArray_GET_SIZE(self.tail) - 3)]
            return end
        if PyByteArray_GET_SIZE(self.tail) + end - pos > server.max_head:
            self.hang_up(431, "head_too_large", f"head: more than {server.max_head} bytes before the blank line")
            return end
        if PyByteArray_GET_SIZE(self.tail) == 0:
            self.since = self.started
        failed = self.feed(piece)
        if failed == 1:
            return end
        self.tail.extend(piece)
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
        elif self.state != CLOSED and not self.closing:
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
        head.route = server.unmatched
        head.query = ""
        head.content_length = fields.content_length
        head.keep_alive = self.keep_alive
        head.http10 = version != "1.1"
        head.head_only = method == "HEAD"
        head.ingest = True
        self.head = head
        self.body = None
        self.body_n = 0
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
        if fields.content_length > server.max_body:
            return self.hang_up(413, "body_too_large",
                                f"body: {fields.content_length} bytes, at most {server.max_body}")
        if fields.expect == 2:
            return self.hang_up(417, "expectation_failed", "expect: only 100-continue is understood")
        path, query = self.target(self.url)
        route = server.routes.get(path) if path is not None else None
        if path is None:
            self.refusal = (400, "bad_request", f"target: not a path: {shown(self.url)}", None, NOTHING)
        elif route is None:
            self.refusal = (404, "not_found", server.not_found(path), None, NOTHING)
        elif method not in route.methods:
            head.route = route
            self.refusal = (405, "method_not_allowed", f"method: {path} answers {' and '.join(route.methods)}, got {method}",
                            None, b"Allow: " + ", ".join(route.methods).encode() + b"\r\n")
        elif fields.encoded:
            head.route = route
            self.refusal = (415, "unsupported_encoding", "content-encoding: send the body as it is (identity)", None, NOTHING)
        else:
            head.route = route
            head.query = query
            if route.native != HANDLER:
                try:
                    head.ingest, head.explain = self.options(route, query)
                except RequestError as error:
                    self.refusal = (error.status, error.code, error.message, error.path, NOTHING)
        self.cacheable = (
            self.refusal is None and not fields.chunked and not fields.expect and fields.upgrade < 0
            and PyBytes_GET_SIZE(raw) <= HEAD_CACHED
        )
        if self.ended:
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

                path = unquote_to_bytes(path)
            return path.decode(), query.decode()
        except UnicodeDecodeError:
            return None, ""

    @staticmethod
    def options(Route route, str query):
        """The (ingest, explain) of a query such as `explain=true&ingest=false`."""
        given = {"ingest": True, "explain": False}
        if route.native == EVENTS:
            given = {}
        for item in query.split("&") if query else ():
            name, _, value = item.partition("=")
            if name not in given:
                known = " and ".join(given) or "none"
                raise RequestError(400, "unknown_parameter", f"query: no parameter {name[:60]!r} here (known: {known})")
            if value not in ("true", "false", "1", "0"):
                raise RequestError(400, "bad_parameter", f"query: {name} is true or false, got {value[:60]!r}")
            given[name] = value in ("true", "1")
        return given.get("ingest", True), given.get("explain", False)

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
        return self.answer(head, body)

    cdef int answer(self, Head head, bytes body) except -1:
        """Score, ingest, or call the handler, and put the response into the output buffer."""
        cdef Route route = head.route
        cdef bytes payload
        cdef bytes kind
        cdef const char *p = PyBytes_AS_STRING(body)
        cdef const char *end = p + PyBytes_GET_SIZE(body)
        cdef bint many
        cdef list parts
        cdef int status
        try:
            if route.native == HANDLER:
                status, kind, payload = route.handler(head.query, body)
                return self.respond(head, status, kind, payload, NOTHING)
            while p < end and (p[0] == b" " or p[0] == b"\n" or p[0] == b"\r" or p[0] == b"\t"):
                p += 1
            if p == end:
                raise RequestError(400, "malformed_json", "body: expected a JSON object or an array of them, got nothing", "$")
            many = p[0] == b"["
            if route.native == SCORE:
                if not many:
                    decision = route.call_one(route.index, route.decode_one(body), head.ingest, head.explain)
                    payload = decision.json(True) if head.explain else decision.json()
                else:
                    parts = []
                    for decision in route.call_many(route.index, route.decode_many(body), head.ingest, head.explain):
                        parts.append(decision.json(head.explain))
                    payload = b"[" + b",".join(parts) + b"]"
            else:
                outcomes = {}
                if not many:
                    outcomes[route.call_one(route.index, route.decode_one(body))] = 1
                else:
                    for outcome in route.call_many(route.index, route.decode_many(body)):
                        outcomes[outcome] = outcomes.get(outcome, 0) + 1
                payload = encode({"accepted": sum(outcomes.values()), "outcomes": outcomes})
        except Exception as error:
            return self.refuse_for(head, error)
        return self.respond(head, 200, JSON, payload, NOTHING)

    cdef int respond(self, Head head, int status, bytes kind, bytes payload, bytes extra) except -1:
        cdef HttpServer server = self.server
        cdef int64_t now
        if not head.keep_alive or (server.draining and self.last):
            self.closing = True
        if status == 200 and kind is JSON:
            server.put_bytes(OK_JSON)
        else:
            server.put_bytes(STATUS_LINES[status])
            server.put_bytes(kind)
            server.put(b"\r\nContent-Length: ", 18)
        put_number(server, PyBytes_GET_SIZE(payload))
        server.put(server.date, server.date_n)
        if self.closing:
            server.put(b"\r\nConnection: close\r\n", 21)
        elif head.http10:
            server.put(b"\r\nConnection: keep-alive\r\n", 26)
        else:
            server.put(b"\r\n", 2)
        if extra:
            server.put_bytes(extra)
        server.put(b"\r\n", 2)
        if not head.head_only:
            server.put_bytes(payload)
        now = ps_http_now()
        observe(head.route if head.route is not None else server.unmatched,
                0 if status == 200 else STATUS_INDEX.get(status, len(STATUSES) - 1), now - self.started)
        self.started = now
        if self.state == IN_HEAD:
            self.since = now
        return 0

    cdef int refuse(self, Head head, int status, str code, str message, str path, bytes extra) except -1:
        """The JSON error of a refused request."""
        cdef HttpServer server = self.server
        server.errors[code] = server.errors.get(code, 0) + 1
        payload = encode({"error": {"code": code, "message": message.encode("utf-8", "replace").decode(), "path": path}})
        if status == 503:
            extra = b"Retry-After: 1\r\n" + extra
        return self.respond(head, status, JSON, payload, extra)

    cdef int refuse_for(self, Head head, object error) except -1:
        """The answer to an exception: what the caller did wrong is 4xx, only our own faults are 500."""
        if isinstance(error, RequestError):
            return self.refuse(head, error.status, error.code, error.message, error.path, NOTHING)
        if isinstance(error, self.server.event_error):
            return self.refuse(head, 422, "invalid_event", error.message, "$" + error.path, NOTHING)
        if isinstance(error, ValidationError):
            message, path = split_path("$", str(error))
            return self.refuse(head, 422, "invalid_event", message, path, NOTHING)
        if isinstance(error, DecodeError):
            return self.refuse(head, 400, "malformed_json", str(error), "$", NOTHING)
        if isinstance(error, UnicodeError):
            return self.refuse(head, 400, "invalid_utf8", f"body: not UTF-8: {error.reason}", "$", NOTHING)
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

    cdef int hang_up(self, int status, str code, str message) except -1:
        """Refuse a request whose rest cannot be read, and close. Outside a read this also writes."""
        cdef Head head = Head.__new__(Head)
        cdef int64_t now = ps_http_now()
        head.route = self.server.unmatched
        head.content_length = -1
        if self.head is not None and self.head.route is not None and self.state != IN_HEAD:
            head.route = self.head.route
        if self.head is not None:
            head.head_only = self.head.head_only
        self.closing = True
        self.linger = True
        self.refuse(head, status, code, message, None, NOTHING)
        self.started = now
        self.server.queue(self)
        return self.finish()

    cdef int send(self, const char *p, size_t n) except -1:
        """One send; what the kernel does not take waits in the transport."""
        cdef ssize_t sent = 0
        if self.transport is None:
            return 0
        if self.spilled and self.transport.get_write_buffer_size() == 0:
            self.spilled = False
        if not self.spilled:
            sent = socket_send(self.fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    self.state = CLOSED
                    self.transport.abort()
                    return 0
                sent = 0
        if <size_t>sent < n:
            self.spilled = True
            self.transport.write(PyBytes_FromStringAndSize(p + sent, n - sent))
        return 0

    cdef int finish(self) except -1:
        """Close after the last answer. After a refusal what still arrives is read and dropped for a while: closing
        with unread bytes would reset the connection, and the peer would lose the answer."""
        if self.transport is None or self.state == CLOSED:
            return 0
        self.server.send_all()
        if self.state == CLOSED:
            return 0
        self.state = CLOSED
        self.since = ps_http_now()
        self.parser = None
        self.body = None
        self.pending = None
        if self.linger and self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        else:
            self.transport.close()
        return 0
