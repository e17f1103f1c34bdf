# history.pxd: the event log through the engine core. See history.pyx.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from penstock._ext.batch cimport BatchRun
from penstock._ext.decision cimport Verdict
from penstock._ext.event_record cimport ps_record, ps_score
from penstock._ext.row cimport ps_slot
from penstock._ext.steps cimport Pipe, RowKeys, Rows
from penstock._ext.windows cimport ps_arena

cdef enum:
    PENDING = 1024            # scores that wait for their events' block


cdef class EventMapping:
    cdef:
        int source
        int n
        int *fields
        uint8_t *types
        ps_slot *values
        uint8_t *status
        list texts
        const char **text_of
        bint same                 # the record's fields are the app's

    cdef int read(self, const ps_record *r, ps_slot *slots, uint8_t *status, ps_arena *arena,
                  uint64_t *erased) noexcept nogil


cdef class ScoreMapping:
    cdef:
        readonly int pipe
        int n
        int *slots
        uint8_t *strings
        int *keys
        int64_t *since
        int n_models
        int *models
        readonly bint same_plan
        readonly bint same_words

    cdef int model_of(self, int number) noexcept nogil


cdef class HistoryRun(BatchRun):
    cdef:
        int want
        int64_t expected
        bint restore_ids
        Py_ssize_t capacity
        Py_ssize_t written
        list blocks
        ps_slot *slots_of[2]
        uint8_t *status_of[2]
        ps_arena *arena_of[2]
        RowKeys *keys_of[2]
        Verdict *verdicts_of[2]
        int width
        int current
        int counts[2]
        int ran                   # rows of the current block that were run
        uint8_t block_table[2][256]
        int64_t sequence[2][256]
        uint64_t erased[2][256]   # fields whose value was erased
        const ps_record *pending[PENDING]
        void *pending_mapping[PENDING]
        int n_pending
        int64_t events, scores, orphans, reported, newest_ingest
        dict compared_slots
        list ids_out
        object places
        int64_t *out_sequence
        int64_t *out_ingest
        uint8_t *out_outcome

    cdef void place(self, const ps_record *r, int source, uint64_t erased) noexcept nogil
    cdef int begin_block(self) except -1
    cdef void shift(self, Rows rows, int by) noexcept nogil
    cdef int flush(self) except -1
    cdef int find(self, int64_t sequence, int *block, int *row) noexcept nogil
    cdef int remember_ids(self, Rows rows, int n) except -1
    cdef int settle(self, const ps_record *r, ScoreMapping mapping) except -1
    cdef int restore_decision(self, Pipe pipe, Rows rows, int row, int table, const ps_record *r,
                              ScoreMapping mapping) except -1
    cdef int compare(self, const ps_record *r, const ps_score *score, ScoreMapping mapping, Rows rows, int row,
                     int block) except -1


cdef class Tally:
    cdef:
        ScoreMapping mapping
        int64_t *counts
        int64_t decision_counts[4]
        int64_t rows
        int64_t erased_rows
        bint decisions
        list examples
