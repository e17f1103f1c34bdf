"""Connections of every protocol (hot path): one protocol object each, answers formed in the server's buffer and sent
together once per round of the loop.

What must stay true: answers of one connection leave in the order they were formed in, and nothing of a half-formed
answer reaches another connection; who does not read, or does not send, costs only himself.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove

import asyncio
import traceback

from penstock.errors import LogError

cdef extern from "http_head.h" nogil:
    int64_t ps_http_now()

cdef extern from "sys/socket.h" nogil:
    ssize_t socket_send "send" (int fd, const void *data, size_t n, int flags)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, int *value)
    unsigned long FIONREAD

cdef enum:
    SEND_TOGETHER = 16
    OUT_KEEP = 4194304         # an output buffer larger than this is given back once it is empty
    DISCARD_MAX = 4194304      # bytes read and dropped after a refusal, so that the peer can read the answer

cdef int64_t LINGER_NS = 2000000000


cdef class WireServer:
    """flow: the queues of the loop. write_timeout: seconds for a peer that takes nothing."""

    def __init__(self, Flow flow, *, max_connections=10000, write_timeout=30.0):
        self.flow = flow
        self.connections = set()
        self.max_connections = max_connections
        self.write_timeout = <int64_t>(write_timeout * 1e9)
        self.waiting = []

    def __dealloc__(self):
        free(self.formed)
        free(self.out)

    @property
    def open_connections(self):
        return len(self.connections)

    def sweep(self):
        """Close what has waited too long."""
        cdef int64_t now = ps_http_now()
        cdef WireConnection c
        self.send_all()
        for c in list(self.connections):
            if c.transport is None:
                continue
            if c.closed:                               # the last answer goes out, then what still arrives is dropped
                if now - c.since > (self.write_timeout if c.transport.get_write_buffer_size() else LINGER_NS):
                    c.transport.abort()
            elif c.paused:
                if c.blocked_bytes != c.transport.get_write_buffer_size():
                    c.blocked_bytes = c.transport.get_write_buffer_size()
                    c.blocked_since = now
                elif now - c.blocked_since > self.write_timeout:
                    c.transport.abort()
            elif not c.busy:
                c.expire(now)

    def close_idle(self, bint force=False):
        """Close connections with no request under way (all with `force`); returns how many stay open."""
        cdef WireConnection c
        cdef int waiting
        self.send_all()
        for c in list(self.connections):
            if c.transport is None:
                continue
            waiting = 0
            if force:
                c.transport.abort()
            elif c.idle() and not c.paused and not c.busy and c.pending is None and not c.closed:
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

    cdef int queue(self, WireConnection connection) except -1:
        """Leave the answers formed since the last call to the end of the round, or to when there are enough."""
        cdef Py_ssize_t n = len(self.waiting)
        cdef Formed *grown
        if self.out_n == self.out_from:
            return 0
        if n and self.waiting[n - 1] is connection:
            n -= 1
        else:
            if n == self.formed_cap:
                grown = <Formed *>realloc(self.formed, (2 * n + 64) * sizeof(Formed))
                if grown == NULL:
                    raise MemoryError()
                self.formed = grown
                self.formed_cap = 2 * n + 64
            self.formed[n].answers = 0
            self.formed[n].appended = False
            if n == 0 and not self.called:
                self.called = True
                self.call_soon(self.send_waiting)
            self.waiting.append(connection)
        self.formed[n].end = self.out_n
        self.formed[n].answers += self.answers
        self.formed[n].appended |= self.appended
        self.answers = 0
        self.appended = False
        self.out_from = self.out_n
        if n + 1 >= SEND_TOGETHER:
            self.send_all()
        return 0

    cdef int send_all(self) except -1:
        cdef list waiting = self.waiting
        cdef WireConnection c
        cdef Py_ssize_t i
        cdef size_t start = 0
        cdef bint lost = False
        cdef bytes instead
        if self.event_log is not None and len(waiting):
            # One sync for all that arrived together. What cannot be kept is not acknowledged; the state of the log says why.
            try:
                self.event_log.wait()
            except LogError:
                lost = True
        for i in range(len(waiting)):
            c = <WireConnection>waiting[i]
            try:
                if lost and self.formed[i].appended:
                    instead = c.not_kept() if self.formed[i].answers == 1 and c.transport is not None else None
                    if instead is not None:
                        c.send(PyBytes_AS_STRING(instead), PyBytes_GET_SIZE(instead))
                    elif c.transport is not None:
                        c.transport.abort()
                else:
                    c.send(self.out + start, self.formed[i].end - start)
            except Exception:
                # Its own: the others' answers go out once, and only once.
                traceback.print_exc()
                c.closed = True
                if c.transport is not None:
                    c.transport.abort()
            start = self.formed[i].end
        waiting.clear()
        # What was formed since for a connection that is being read stays.
        if self.out_n > self.out_from:
            memmove(self.out, self.out + self.out_from, self.out_n - self.out_from)
        self.out_n -= self.out_from
        self.out_from = 0
        if self.out_cap > OUT_KEEP and self.out_n == 0:
            free(self.out)
            self.out = NULL
            self.out_cap = 0
        return 0

    cdef void forget(self) noexcept:
        """What was formed and belongs to nobody yet is nobody's."""
        self.out_n = self.out_from
        self.answers = 0
        self.appended = False

    cdef char *room(self, size_t n) except NULL:
        """Where the next n bytes go; whoever writes them adds to out_n."""
        cdef size_t cap
        cdef char *grown
        if self.out_n + n > self.out_cap:
            cap = max(self.out_cap * 2, self.out_n + n, 16384)
            grown = <char *>realloc(self.out, cap)
            if grown == NULL:
                raise MemoryError()
            self.out = grown
            self.out_cap = cap
        return self.out + self.out_n

    cdef int put(self, const char *p, size_t n) except -1:
        memcpy(self.room(n), p, n)
        self.out_n += n
        return 0

    cdef int put_bytes(self, bytes b) except -1:
        return self.put(PyBytes_AS_STRING(b), PyBytes_GET_SIZE(b))

    cdef int put_number(self, int64_t value) except -1:
        cdef char digits[24]
        cdef int i = 24
        cdef bint negative = value < 0
        cdef unsigned long long rest = <unsigned long long>(-value if negative else value)
        while True:
            i -= 1
            digits[i] = <char>(48 + rest % 10)
            rest //= 10
            if rest == 0:
                break
        if negative:
            i -= 1
            digits[i] = b"-"
        return self.put(digits + i, 24 - i)


@cython.no_gc_clear
cdef class WireConnection:
    """The protocol of one connection (uvloop calls it; every method runs on the loop's thread)."""

    # What uvloop calls.

    def connection_made(self, transport):
        cdef WireServer server = self.wire
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
            self.too_many()

    def connection_lost(self, exc):
        # Only after this does uvloop close the descriptor, whose number may then name another connection.
        self.wire.connections.discard(self)
        self.transport = None
        self.fd = -1
        self.pending = None
        self.closed = True
        self.gone()

    def data_received(self, bytes data):
        if self.closed:
            self.discarded += PyBytes_GET_SIZE(data)
            if self.discarded > DISCARD_MAX and self.transport is not None:
                self.transport.abort()
            return
        if self.paused or self.busy:
            self.pending = data if self.pending is None else self.pending + data
            if self.busy and not self.paused and PyBytes_GET_SIZE(self.pending) > OUT_SOFT:
                self.transport.pause_reading()         # until its answer is there
            return
        self.started = ps_http_now()
        self.take(data)

    cdef int take(self, bytes data) except -1:
        cdef WireServer server = self.wire
        try:
            self.consume(data)
        except BaseException:
            self.fault()
            raise
        return 0

    cdef int fault(self) except -1:
        """A fault of ours: nothing of a half-formed answer may reach another connection."""
        self.wire.forget()
        self.closed = True
        if self.transport is not None:
            self.transport.abort()
        return 0

    def eof_received(self):
        if self.closed:
            return False
        if self.paused or self.busy:
            self.half_closed = True
            return True
        self.ended()
        self.wire.send_all()
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
        self.paused = False
        self.started = ps_http_now()
        if not self.closed:
            self.since = self.started
        if not self.busy:
            self.read_on()

    cdef int read_on(self) except -1:
        """Take up what waits in `pending`, then read again."""
        cdef bytes data = self.pending
        if self.transport is None:
            return 0
        self.pending = None
        if data is not None and not self.closed:
            try:
                self.take(data)
            except Exception:
                # In the turn of whoever let it go on, who has no part in it.
                traceback.print_exc()
                return 0
        if self.paused or self.busy or self.transport is None or self.transport.is_closing():
            return 0
        if self.half_closed and not self.closed:
            self.ended()
            self.wire.send_all()
            if not self.paused and self.transport is not None:
                self.transport.close()
        else:
            self.transport.resume_reading()
        return 0

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
                    self.closed = True
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
        if self.transport is None or self.closed:
            return 0
        self.wire.queue(self)
        self.wire.send_all()
        if self.closed:
            return 0
        self.closed = True
        self.since = ps_http_now()
        self.pending = None
        self.gone()
        if self.linger and self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        else:
            self.transport.close()
        return 0

    # What a protocol says.

    cdef int consume(self, bytes data) except -1:
        raise NotImplementedError

    cdef bytes not_kept(self):
        return None

    cdef int too_many(self) except -1:
        raise NotImplementedError

    cdef int ended(self) except -1:
        return 0

    cdef int gone(self) except -1:
        return 0

    cdef bint idle(self) noexcept:
        return True

    cdef int expire(self, int64_t now) except -1:
        return 0
