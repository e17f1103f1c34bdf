# http.pxd: the layout of the server's native classes.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from penstock._ext.core cimport Block, Core
from penstock._ext.flow cimport Lane, Work
from penstock._ext.infer cimport InferCall, Target
from penstock._ext.steps cimport Pipe
from penstock._ext.wire cimport WireConnection, WireServer


cdef enum:
    N_BUCKETS = 17
    N_STATUSES = 16
    N_HEADS = 1024


cdef class Route:
    cdef:
        readonly str      label
        readonly str      kind
        readonly tuple    methods
        readonly Lane     lane           # None: answered at once, whatever the load
        readonly Target   target         # of "infer"
        readonly Route    counts         # whose counters count its requests; None: its own
        int               native
        int               index
        Core              core
        Pipe              pipe           # of "score"
        object            decode_one
        object            decode_many
        object            handler
        bint              oip            # errors are {"error": "text"}
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
        int64_t  inference       # Inference-Header-Content-Length, or -1
        int64_t  timeout_us
        int      priority
        int      encoding
        int      accepts
        bint     keep_alive
        bint     http10
        bint     head_only
        bint     ingest
        bint     explain


cdef class Connection
cdef class HttpWork


cdef class HttpServer(WireServer):
    cdef:
        dict               routes
        dict               resolved       # path -> Route that `resolve` gave
        object             resolve
        public object      after_tick     # for whoever measures the loop: what to call after each tick
        list               heads
        object             not_found
        object             event_error
        object             log
        dict               errors
        set                tasks          # handlers that are awaited
        Route              unmatched
        Route              unmatched_oip
        public object      trace          # called with the times of every inference, or None
        int64_t            clock_ns       # the same moment by two clocks
        int64_t            clock_ticks

        readonly int64_t   max_body
        readonly int64_t   max_tensors
        readonly int64_t   max_head
        readonly uint32_t  max_fields
        int64_t            head_timeout
        int64_t            body_timeout
        int64_t            idle_timeout
        public bint        reuse_heads
        readonly uint64_t  head_hits
        readonly uint64_t  head_misses

        char              date[48]
        size_t             date_n

    cdef Head find(self, const char *p, size_t n)
    cdef int keep(self, Head head) except -1
    cdef Route route_of(self, str path)
    cdef Route stranger(self, str path)
    cdef int64_t most_body(self, Head head)


cdef class Connection(WireConnection):
    cdef:
        HttpServer  server
        object      parser         # llhttp, made for the first head that is not a repeat
        bytearray   tail           # of a head: all of it so far; of a chunked body: its last three bytes
        object      body           # None, bytes, or a bytearray once a second part came
        bytes       url
        tuple       refusal        # (status, code, message, path), answered once the body has been read
        Head        head
        int64_t     body_n         # bytes of body so far,
        int64_t     most           # and how many there may be
        int64_t     body_left      # Content-Length: bytes to come; chunked: bytes on the wire so far
        int         state
        int         begun          # llhttp: message begins, heads and ends seen in this feed
        int         headed
        int         complete
        bint        keep_alive
        bint        cacheable
        bint        last           # nothing follows this message in what was read
        bint        consuming      # inside consume(): what is released meanwhile is read on there

    cdef Py_ssize_t parse(self, bytes data, Py_ssize_t pos) except -1
    cdef Py_ssize_t piece_end(self, bytes data, Py_ssize_t pos) except -2
    cdef int feed(self, bytes piece) except -1
    cdef int head_done(self, bytes raw) except -1
    cdef int message_done(self) except -1
    cdef int answer(self, Head head, const char *p, size_t n, bytes held) except -1
    cdef int score(self, Head head, const char *p, size_t n, bytes held) except -1
    cdef int infer(self, Head head, const char *p, size_t n, bytes held) except -1
    cdef int call(self, Head head, bytes body) except -1
    cdef int answer_events(self, Head head, bytes body) except -1
    cdef int answer_event(self, Head head, object event) except -1
    cdef int answer_many(self, Head head, list answers) except -1
    cdef int wait_for(self, HttpWork work) except -1
    cdef int released(self) except -1
    cdef bytes inflate(self, Head head, const char *p, size_t n)
    cdef int start_line(self, Head head, int status, bytes kind) except -1
    cdef int end_head(self, Head head, int64_t length, bytes extra) except -1
    cdef int end_fields(self, Head head, bytes extra) except -1
    cdef int count(self, Head head, int status) except -1
    cdef int respond(self, Head head, int status, bytes kind, bytes payload, bytes extra) except -1
    cdef int respond_infer(self, Head head, InferCall call) except -1
    cdef int traced(self, InferCall call, int64_t arrival) except -1
    cdef int respond_compressed(self, Head head, InferCall call) except -1
    cdef int overloaded(self, Head head, int why) except -1
    cdef int refuse(self, Head head, int status, str code, str message, object path, bytes extra) except -1
    cdef int refuse_for(self, Head head, object error) except -1
    cdef Route begun_route(self)
    cdef int hang_up(self, int status, str code, str message) except -1


cdef class HttpWork(Work):
    cdef:
        Connection  connection
        Head        head
        bytes       body
        InferCall   inference
        Block       block
        list        events         # of an array: what is still to be done with them, a part at a time
        list        answers
        list        times          # of events that are only ingested
        Py_ssize_t  at
        int         stage

    cdef int ready(self) except -1
    cdef int done(self) except -1
    cdef int fail(self, object error) except -1
    cdef int begin_score(self) except -1
    cdef object join(self, int64_t now, list works, list events)
    cdef int answer(self, object answer) except -1
    cdef int finish_score(self) except -1
    cdef int begin_many(self) except -1
    cdef int begin_part(self) except -1
    cdef int take_part(self) except -1
    cdef int begin_infer(self) except -1
