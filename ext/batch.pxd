# batch.pxd: tables through the engine core. See batch.pyx.

from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t, uint64_t

from penstock._ext.core cimport Core
from penstock._ext.events cimport Column
from penstock._ext.steps cimport Pipe, Rows, SourceC


# One output column of a table run.
ctypedef struct OutColumn:
    int slot
    int kind
    char *data
    uint8_t *absent


cdef class VerdictColumns:
    cdef:
        char *ids
        int16_t *action
        int16_t *model
        int16_t *failed
        double *score
        uint64_t *fired
        int8_t *arms
        uint8_t *outcome
        uint8_t *degraded
        object keep


cdef class BatchRun:
    cdef:
        Core core
        list tables
        list sets
        Pipe pipe
        int n_tables
        SourceC *sources[32]
        const Column *columns[32]
        void *readers[32]
        uint8_t scored[32]
        uint8_t *order_table
        int64_t *order_row
        Py_ssize_t total
        OutColumn *out
        int n_out
        list texts
        bint ingest
        VerdictColumns verdicts
        object progress
        object keep
        bint any_id
        int advanced              # rows of the slice that were ingested

    cdef int use_output(self, list out) except -1
    cdef int table_of(self, Py_ssize_t i) noexcept nogil
    cdef Py_ssize_t row_of(self, Py_ssize_t i) noexcept nogil
    cdef int decode(self, Rows rows, Py_ssize_t start, int n, int64_t now) noexcept nogil
    cdef void prepare(self, Rows rows, Py_ssize_t start, int n) noexcept nogil
    cdef list look_up(self, Rows rows, Py_ssize_t start, int n, int64_t now, int *modes)
    cdef int forget(self, list ids, const int *modes, int n) except -1
    cdef int step(self, Rows rows, Py_ssize_t start, int n, const int *modes, bint have_modes, int *which) noexcept nogil
    cdef int write(self, Rows rows, const int *which, int scored, Py_ssize_t written) except -1
    cdef int remember(self, Rows rows, Py_ssize_t start, const int *which, int scored, Py_ssize_t written, list ids) except -1
