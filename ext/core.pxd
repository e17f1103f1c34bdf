# core.pxd: the engine core. See core.pyx.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from penstock._ext.decision cimport Decision, IdSource, Verdict
from penstock._ext.log cimport EventLog, ps_log, ps_log_api
from penstock._ext.row cimport ps_slot
from penstock._ext.steps cimport KeyRef, ModelRun, Pipe, PipeC, Read, RowKeys, Rows, Source, SourceC
from penstock._ext.windows cimport ps_arena, ps_event, ps_handle


cdef class Core:
    cdef:
        readonly list sources
        readonly list pipes
        list stores
        list keep
        Rows single
        ps_arena spare            # strings of an event that a read is asked to count in
        bytes constants
        IdSource ids
        int64_t last_now
        int64_t sequence
        readonly EventLog log
        ps_log *log_ptr           # NULL: no log
        const ps_log_api *log_api
        int64_t log_id
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
                        int with_event, int64_t as_of, ps_slot *slots, uint8_t *status, ps_arena *arena) noexcept nogil
    cdef void run_models(self, PipeC *pipe, Rows rows, const int *which, int n) noexcept nogil
    cdef void decide(self, PipeC *pipe, ps_slot *slots, uint8_t *status, ps_arena *arena, Verdict *verdict) noexcept nogil
    cdef Decision finish(self, Pipe pipe, Rows rows, int row, int64_t now, bint explain)
    cdef void take_score(self, PipeC *pipe, ModelRun *run, int m, Rows rows, int row, const double *scores, int code) noexcept nogil
    cdef void sweep(self, SourceC *source) noexcept nogil
    cdef object id_of(self, Source source, ps_slot *slots, ps_arena *arena)
    cdef void hash_keys(self, int n_keys, Read *reads, int n_reads, SourceC *source, RowKeys *keys) noexcept nogil
    cdef int validate(self, Source source, list events) except -1
    cdef int ingest_one(self, Source source, object event) except -1
    cdef Decision score_one(self, Pipe pipe, object event, bint ingest, bint explain)
    cpdef Decision score(self, Py_ssize_t pipeline, object event, bint ingest=*, bint explain=*)
    cpdef list score_many(self, Py_ssize_t pipeline, list events, bint ingest=*, bint explain=*)
