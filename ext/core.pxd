# core.pxd: the engine core. See core.pyx.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from penstock._ext.decision cimport Decision, IdSource, Verdict
from penstock._ext.log cimport EventLog, ps_log, ps_log_api
from penstock._ext.row cimport ps_slot
from penstock._ext.steps cimport KeyRef, ModelRun, Pipe, PipeC, Read, RowKeys, Rows, Source, SourceC
from penstock._ext.windows cimport ps_arena, ps_event, ps_handle, ps_store_api


cdef enum:
    BLOCK_ROWS = 32           # events that are scored together

# What is known of an event between its start and its conclusion.
ctypedef struct Start:
    int64_t now
    int mode                  # as advance() takes it


# A block as run_block() is given it.
ctypedef struct BlockParts:
    void *block
    void *core
    void *rows


cdef inline bint undecided(const PipeC *pipe, const Verdict *verdict) noexcept nogil:
    """Whether something failed and no fallback stands in for it: an error, and no decision."""
    return verdict.failed >= 0 and verdict.failed != pipe.degraded_failure and pipe.fallback < 0

cdef list by_time(list times)

cdef class Core


cdef class Block:
    cdef:
        BlockParts parts
        Rows rows
        Start *starts
        int *which            # rows whose models are to run: all
        int n
        list answers          # per event: Decision, exception, or None while its models have not run
        list ids
        dict errors
        Pipe pipe
        Core core
        bint ingest
        bint explain
        PipeC c               # of begin_apart: the models as they were
        bint own_models
        object keep


cdef void run_block(void *arg) noexcept nogil


cdef class Core:
    cdef:
        readonly list sources
        readonly list pipes
        list stores
        list keep
        Rows single
        ps_arena spare            # strings of an event that a read is asked to count in
        bytes constants
        object started_id         # the event id that start() read
        set under_way             # ids of events that were started and not concluded
        IdSource ids
        int64_t last_now
        int64_t sequence
        readonly EventLog log
        ps_log *log_ptr           # NULL: no log
        const ps_log_api *log_api
        int64_t log_id
        const ps_store_api *store_api
        uint64_t score_share      # of 2^32: keys whose scores are logged
        uint64_t scores_lost
        bint wait_here            # calls wait for the sync
        bint log_closed
        bint event_clock
        unsigned long owner
        bint forked
        void *mutex
        object __weakref__

    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef int64_t now(self) noexcept nogil
    cdef int prepare_keys(self, const KeyRef *refs, int n, ps_slot *slots, ps_arena *arena, RowKeys *keys) noexcept nogil
    cdef int advance(self, SourceC *source, PipeC *pipe, void *pipe_object, ps_slot *slots, uint8_t *status, ps_arena *arena,
                     RowKeys *keys, int ingest, Verdict *verdict) noexcept nogil
    cdef int append_event(self, SourceC *source, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena,
                          RowKeys *keys, int outcome, bint applied, ps_handle *handles) noexcept nogil
    cdef void append_score(self, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena, RowKeys *keys,
                           const Verdict *verdict, const char *id, int64_t as_of) noexcept nogil
    cdef int check_open(self) except -1
    cdef object not_ingested(self, int code, str what)
    cdef int wait_for_log(self) except -1
    cdef int read_views(self, PipeC *pipe, RowKeys *keys, ps_handle *handles, const ps_event *events, int applied,
                        int with_event, int64_t as_of, ps_slot *slots, uint8_t *status, ps_arena *arena,
                        Verdict *verdict) noexcept nogil
    cdef void run_models(self, PipeC *pipe, Rows rows, const int *which, int n) noexcept nogil
    cdef void decide(self, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena, Verdict *verdict) noexcept nogil
    cdef Decision finish(self, Pipe pipe, Rows rows, int row, int64_t now, bint explain)
    cdef void take_score(self, PipeC *pipe, ModelRun *run, int m, Rows rows, int row, const double *scores, int code) noexcept nogil
    cdef void sweep(self, SourceC *source) noexcept nogil
    cdef object id_of(self, Source source, ps_slot *slots, ps_arena *arena)
    cdef void hash_keys(self, int n_keys, Read *reads, int n_reads, SourceC *source, RowKeys *keys) noexcept nogil
    cdef int check(self, Source source, list events, Py_ssize_t first, Py_ssize_t last, list times=*) except -1
    cdef int validate(self, Source source, list events, Py_ssize_t first, Py_ssize_t last, list times) except -1
    cdef int ingest_one(self, Source source, object event) except -1
    cdef Decision start(self, Pipe pipe, Rows rows, int row, object event, bint ingest, Start *start)
    cdef Decision conclude(self, Pipe pipe, Rows rows, int row, const Start *start, object id, object error, bint ingest,
                           bint explain)
    cdef Py_ssize_t start_block(self, Pipe pipe, Block block, list events, Py_ssize_t at) except -1
    cdef list conclude_block(self, Pipe pipe, Block block)
    cdef Block new_block(self, Pipe pipe, int rows, bint ingest, bint explain)
    cdef list score_together(self, Pipe pipe, list events, bint ingest, bint explain)
    cdef Block begin_apart(self, Pipe pipe, list events, bint ingest, bint explain)
    cdef list end_apart(self, Block block)
    cdef Decision score_one(self, Pipe pipe, object event, bint ingest, bint explain)
    cpdef Decision score(self, Py_ssize_t pipeline, object event, bint ingest=*, bint explain=*)
    cpdef list score_many(self, Py_ssize_t pipeline, list events, bint ingest=*, bint explain=*)
