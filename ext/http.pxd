# http.pxd: the layout of the server's native classes.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef enum:
    N_BUCKETS = 17
    N_STATUSES = 16
    N_HEADS = 1024


cdef class Route:
    cdef:
        readonly str      label
        readonly str      kind
        readonly tuple    methods
        int               native
        object            index
        object            decode_one
        object            decode_many
        object            call_one
        object            call_many
        object            handler
        uint64_t          buckets[N_BUCKETS]
        uint64_t          requests
        int64_t           total_ns
        uint64_t          statuses[N_STATUSES]


cdef class Head:
    cdef:
        bytes    raw
        Route    route
        str      query
        int64_t  content_length
        bint     keep_alive
        bint     http10
        bint     head_only
        bint     ingest
        bint     explain


cdef class Connection


cdef class HttpServer:
    cdef:
        dict               routes
        list               heads
        set                connections
        object             not_found
        object             event_error
        object             log
        public object      event_log      # with `fsync always`: answers leave when its sync is done
        dict               errors
        Route              unmatched

        readonly int64_t   max_body
        readonly int64_t   max_head
        readonly uint32_t  max_fields
        readonly int64_t   max_connections
        int64_t            head_timeout
        int64_t            body_timeout
        int64_t            idle_timeout
        int64_t            write_timeout
        public bint        draining
        public bint        reuse_heads
        readonly uint64_t  accepted
        readonly uint64_t  refused
        readonly uint64_t  head_hits
        readonly uint64_t  head_misses

        char              *out
        size_t             out_n
        size_t             out_cap
        size_t             out_from       # up to here the answers belong to `waiting`
        list               waiting        # connections whose answers are formed and not sent yet, in order
        size_t            *ends           # where the answers of each of them end in `out`
        Py_ssize_t         ends_cap
        object             call_soon
        bint               called         # send_waiting will run
        char               date[48]
        size_t             date_n

    cdef int put(self, const char *p, size_t n) except -1
    cdef int put_bytes(self, bytes b) except -1
    cdef int queue(self, Connection connection) except -1
    cdef int send_all(self) except -1
    cdef Head find(self, const char *p, size_t n)
    cdef int keep(self, Head head) except -1


cdef class Connection:
    cdef:
        HttpServer  server
        object      transport
        object      parser         # llhttp, made for the first head that is not a repeat
        bytes       pending        # received while the peer does not read our answers
        bytearray   tail           # of a head: all of it so far; of a chunked body: its last three bytes
        object      body           # None, bytes, or a bytearray once a second part came
        bytes       url
        tuple       refusal        # (status, code, message, path), answered once the body has been read
        Head        head
        int64_t     body_n         # bytes of body so far
        int64_t     body_left      # Content-Length: bytes to come; chunked: bytes on the wire so far
        int64_t     since          # when the current phase began; the sweep compares it with the timeouts
        int64_t     started        # when the read being worked on began
        int64_t     blocked_since  # since when the peer has taken nothing of blocked_bytes
        int64_t     blocked_bytes
        int64_t     discarded
        int         fd
        int         state
        int         begun          # llhttp: message begins, heads and ends seen in this feed
        int         headed
        int         ended
        bint        keep_alive
        bint        cacheable
        bint        last           # nothing follows this message in what was read
        bint        spilled        # the transport holds bytes of ours: later ones must queue behind them
        bint        paused
        bint        closing
        bint        linger
        bint        half_closed

    cdef int consume(self, bytes data) except -1
    cdef Py_ssize_t parse(self, bytes data, Py_ssize_t pos) except -1
    cdef Py_ssize_t piece_end(self, bytes data, Py_ssize_t pos) except -2
    cdef int feed(self, bytes piece) except -1
    cdef int head_done(self, bytes raw) except -1
    cdef int message_done(self) except -1
    cdef int answer(self, Head head, bytes body) except -1
    cdef int respond(self, Head head, int status, bytes kind, bytes payload, bytes extra) except -1
    cdef int refuse(self, Head head, int status, str code, str message, str path, bytes extra) except -1
    cdef int refuse_for(self, Head head, object error) except -1
    cdef int hang_up(self, int status, str code, str message) except -1
    cdef int send(self, const char *p, size_t n) except -1
    cdef int finish(self) except -1
