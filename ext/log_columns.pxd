# log_columns.pxd: records of the event log as columns, and back. See log_columns.pyx.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from penstock._ext.event_record cimport ps_record
from penstock._ext.log cimport RecordSchemas


cdef class SchemaColumns:
    cdef:
        readonly bint is_score
        readonly int n
        int time_field
        uint8_t *types
        # counted
        readonly int64_t rows
        int64_t versions, wides, raw_bytes
        readonly int64_t raws
        int64_t *texts                # bytes per string field
        # filled
        int64_t row, version, wide, raw
        int64_t *text
        # where to: memory of the arrays
        dict arrays
        int64_t *sequence
        int64_t *ingest
        int64_t *order
        int32_t *day
        uint8_t *outcome
        uint8_t *status
        int64_t *version_at
        uint64_t *version_data
        int64_t *wide_at
        double *wide_data
        int64_t *raw_at
        uint8_t *raw_data
        uint8_t *has_raw
        void **data
        uint8_t **valid
        int64_t **text_at
        # scores
        char *id
        uint8_t *has_id
        int64_t *as_of
        double *score
        uint8_t *has_score
        uint64_t *fired
        uint8_t *codes

    cdef bint text_of(self, const ps_record *r, int i, const char **text, int64_t *size) noexcept nogil
    cdef bint canonical(self, const ps_record *r) noexcept nogil
    cdef void count(self, const ps_record *r) noexcept nogil
    cdef void take(self, const ps_record *r, int64_t order) noexcept nogil
    cdef object array(self, str name, int64_t size, str dtype)
    cdef int allocate(self) except -1


cdef class RecordColumns:
    cdef:
        list schemas
        RecordSchemas checked
        void *found[256]
        int n
        int64_t records
        bint allocated

    cdef object run(self, const uint8_t[::1] data, int64_t log_id, uint64_t number, uint64_t start, uint64_t end,
                    bint take)
