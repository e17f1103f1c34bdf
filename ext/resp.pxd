# resp.pxd: the layout of the RESP server. See resp.pyx.

from libc.stdint cimport int64_t, uint64_t

from penstock._ext.core cimport Block, Core
from penstock._ext.flow cimport Lane, Work
from penstock._ext.infer cimport InferCall, Target
from penstock._ext.steps cimport Pipe, Source
from penstock._ext.wire cimport WireConnection, WireServer


cdef enum:
    BATCH = 32                 # single events that are scored together
    N_KINDS = 6

# A piece of what was received: where it begins, counted from its command's base, and how long it is.
ctypedef struct Slice:
    size_t at
    size_t n

# What the options of a command say.
ctypedef struct Options:
    int64_t timeout_us
    int priority
    bint ingest
    bint explain


cdef class Subject:
    """What a command names: a pipeline, or an event type (pipe None)."""
    cdef:
        readonly bytes name
        readonly Lane  lane
        Core           core
        Pipe           pipe
        Py_ssize_t     index
        object         decode_json
        object         decode_pack
        object         ingest_many


cdef class RespConnection(WireConnection)


cdef class RespServer(WireServer):
    cdef:
        dict            pipelines       # name as bytes -> Subject
        dict            events
        dict            models          # name as the client wrote it, bytes -> Target
        object          find_model      # (name, version) -> Target or None
        object          features        # (view, as_of, ints, statuses, keys) -> reply
        object          control         # (connection, name, arguments) -> reply
        object          log
        object          event_error
        object          infer_error
        public bytes    password        # None: everyone may
        readonly size_t max_body
        readonly size_t max_command
        readonly int64_t max_arguments
        public size_t   max_parts       # bytes that commands whose rest has not come may take, of all connections
        readonly size_t part_bytes      # and those they take
        int64_t         body_timeout
        int64_t         idle_timeout
        dict            errors
        uint64_t        kinds[N_KINDS]
        readonly uint64_t batches       # calls that scored single events together,
        readonly uint64_t batched       # and how many events they had
        int64_t         last_id

        Slice          *arguments       # of the command being read
        int64_t         room_arguments
        char           *line            # an inline command, unquoted
        size_t          line_cap
        list            decoded         # events of the batch being worked on
        Subject         last_pipeline

        # Single events that wait to be scored together; their bytes are in what is being read.
        Subject         batch_subject
        Options         batch_options
        const char     *batch_p[BATCH]
        size_t          batch_sizes[BATCH]
        int             batch_n
        int64_t         batch_number
        list            batch_connections   # whose they are
        list            batch_data          # what keeps their bytes
        RespConnection  current             # that is being read

    cdef int flush(self) except -1
    cdef int own_answers(self) except -1
    cdef int grow_arguments(self, int64_t n) except -1
    cdef int bulk(self, const char *p, size_t n) except -1
    cdef int head(self, char kind, int64_t n) except -1
    cdef int error(self, str kind, str code, str message) except -1
    cdef int fail(self, object error, Py_ssize_t place) except -1
    cdef int busy(self, Lane lane, int why, bint pooled) except -1
    cdef int reply(self, object value, int protocol) except -1
    cdef int decision(self, object answer, bint packed, bint explain) except -1
    cdef object decoded_event(self, Subject subject, const char *p, size_t n)
    cdef int score_batch(self, Subject subject, const Options *options, const char **p, const size_t *sizes, int n,
                         list connections) except -1
    cdef int score_several(self, Subject subject, const Options *options, const char *base, const Slice *payloads,
                           Py_ssize_t n) except -1
    cdef int ingest(self, Subject subject, const char *base, const Slice *payloads, Py_ssize_t n) except -1
    cdef int outcome(self, str outcome) except -1
    cdef list decode_several(self, Subject subject, const char *base, const Slice *payloads, Py_ssize_t n)
    cdef int tensors(self, InferCall call) except -1
    cdef Target model(self, const char *p, size_t n)


cdef class RespWork


cdef class RespConnection(WireConnection):
    cdef:
        RespServer      server
        char           *part            # the beginning of a command whose rest has not come
        size_t          part_n
        size_t          part_cap
        size_t          part_need       # before there are as many bytes nothing can go on
        Slice          *marks           # its arguments so far
        int64_t         marks_cap
        int64_t         want            # arguments it has in all; -1: not known yet
        int64_t         have
        size_t          at              # where its next argument begins
        int64_t         batch           # number of the last batch that has events of this connection
        const char     *base            # of the command being worked on
        public int      protocol
        public bint     authenticated
        public bint     refusing        # after a MULTI that was refused, until EXEC or DISCARD
        readonly int64_t id
        public bytes    name
        public dict     facts           # what CLIENT SETINFO said

    cdef int do_all(self, bytes data) except -1
    cdef int parse(self, const char *p, size_t n, size_t *used) except -2
    cdef int parse_bulks(self, const char *p, size_t n, size_t *used, Slice *slices) except -2
    cdef int parse_inline(self, const char *p, size_t n, size_t *used) except -2
    cdef int protocol_error(self, str message) except -2
    cdef int too_much(self) except -2
    cdef bint may_grow(self, size_t size, size_t more) noexcept
    cdef int give_back(self, size_t part, int64_t marks) except -1
    cdef int grow_marks(self, int64_t n) except -1
    cdef int keep(self, const char *p, size_t n, bint own) except -1
    cdef int append(self, const char *p, size_t n) except -1
    cdef int park(self, const char *p, size_t n) except -1
    cdef int execute(self, const Slice *a, int64_t n) except -1
    cdef int options(self, const Slice *a, int64_t *i, int64_t n, bint scoring, Options *options) except -1
    cdef int score(self, const Slice *a, int64_t n) except -1
    cdef int ingest(self, const Slice *a, int64_t n) except -1
    cdef int infer(self, const Slice *a, int64_t n) except -1
    cdef int features(self, const Slice *a, int64_t n) except -1
    cdef int ask_control(self, const Slice *a, int64_t n) except -1
    cdef int score_line(self, Subject subject, const Options *options, const Slice *payload) except -1
    cdef int refused(self, str kind, str message, str code=*) except -1
    cdef int flush(self) except -1
    cdef int wait_for(self, RespWork work) except -1


cdef class RespWork(Work):
    """One command, or some single events of one connection, that wait."""
    cdef:
        RespConnection connection
        Subject        subject
        Options        options
        int            kind
        bytes          payload         # what the slices lie in
        Slice         *slices
        Py_ssize_t     n
        int            stage
        Py_ssize_t     at              # events done in this stage
        list           events          # what could be decoded
        dict           failed          # place -> why it could not be
        list           answers
        list           times           # of events that are only ingested,
        list           order           # and their places by time
        Block          block
        InferCall      call

    cdef int copy(self, const char *base, const Slice *slices, Py_ssize_t n) except -1
    cdef int gather(self, const char **p, const size_t *sizes, int n) except -1
    cdef int begin_infer(self) except -1
    cdef int go_on(self) except -1
    cdef Source source(self)
    cdef int apart(self) except -1
    cdef int answer(self) except -1
    cdef int fail(self, object error) except -1
    cdef int fail_at(self, object error, Py_ssize_t place) except -1
    cdef int done(self) except -1
