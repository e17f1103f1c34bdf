# wire.pxd: what the connections of every protocol share. See wire.pyx.

from libc.stdint cimport int64_t, uint64_t

from penstock._ext.flow cimport Flow


cdef enum:
    OUT_SOFT = 65536           # answers of one read beyond this are written before the next is formed

ctypedef struct Formed:
    size_t end                 # where the answers of a connection end in `out`
    int answers                # how many there are
    bint appended              # one of them says that an event is in the log


cdef class WireConnection


cdef class WireServer:
    """Output buffer, connections and limits of one listener."""
    cdef:
        set                connections
        public object      event_log      # with `fsync always`: answers leave when its sync is done
        readonly Flow      flow
        readonly int64_t   max_connections
        int64_t            write_timeout
        public bint        draining
        readonly uint64_t  accepted
        readonly uint64_t  refused

        char              *out
        size_t             out_n
        size_t             out_cap
        size_t             out_from       # up to here the answers belong to `waiting`
        list               waiting        # connections whose answers are formed and not sent yet, in order
        Formed            *formed         # of each of them
        Py_ssize_t         formed_cap
        int                answers        # formed behind out_from; protocols that do not count them leave it 0
        bint               appended       # one of those says that an event is in the log
        object             call_soon
        bint               called         # send_waiting will run

    cdef int put(self, const char *p, size_t n) except -1
    cdef int put_bytes(self, bytes b) except -1
    cdef int put_number(self, int64_t value) except -1
    cdef char *room(self, size_t n) except NULL
    cdef int queue(self, WireConnection connection) except -1
    cdef int send_all(self) except -1
    cdef void forget(self) noexcept


cdef class WireConnection:
    cdef:
        WireServer  wire           # its server
        object      transport
        bytes       pending        # received while the peer does not read our answers, or while an answer is waited for
        int64_t     since          # when the current phase began; the sweep compares it with the timeouts
        int64_t     started        # when the read being worked on began
        int64_t     blocked_since  # since when the peer has taken nothing of blocked_bytes
        int64_t     blocked_bytes
        int64_t     discarded
        int         fd
        bint        closed         # no more requests are read; what still arrives is dropped
        bint        closing        # close after the answers of this read
        bint        linger
        bint        spilled        # the transport holds bytes of ours: later ones must queue behind them
        bint        paused         # the peer does not read
        bint        busy           # a request of this connection is queued: later ones wait in `pending`
        bint        half_closed

    cdef int consume(self, bytes data) except -1          # protocol: answer what is complete, keep what is not
    cdef bytes not_kept(self)                             # protocol: in place of a single answer, whose event is not kept
    cdef int too_many(self) except -1                     # protocol: the answer to a connection beyond the limit
    cdef int ended(self) except -1                        # protocol: the peer will send nothing more
    cdef int gone(self) except -1                         # protocol: the connection is lost
    cdef bint idle(self) noexcept                         # protocol: nothing of a request has been read
    cdef int expire(self, int64_t now) except -1          # protocol: timeouts other than for writing
    cdef int take(self, bytes data) except -1
    cdef int read_on(self) except -1                      # after `busy` or `paused`: take up what waits in `pending`
    cdef int fault(self) except -1
    cdef int send(self, const char *p, size_t n) except -1
    cdef int finish(self) except -1
