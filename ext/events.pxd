from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t


from penstock._ext.row cimport (
    PS_BOOL, PS_FLOAT64, PS_INT64, PS_INVALID, PS_NOT_FOUND, PS_NULL_VALUE, PS_OUTSIDE_MAX_AGE, PS_PRESENT, PS_STR,
    PS_STRING, PS_STR_LENGTH, PS_STR_OFFSET, PS_TIMESTAMP, PS_WIDE, ps_slot,
)
from penstock._ext.windows cimport ps_arena


cdef extern from "arena.h" nogil:
    int ps_arena_append(ps_arena *arena, const char *bytes, size_t length, uint64_t *out)


# One column of an Arrow table, as the reader sees it: contiguous, offset already taken into account where it can be.
ctypedef struct Column:
    const char *data            # values; for strings the bytes
    const uint8_t *validity     # bitmap, or NULL where nothing is null
    int64_t validity_offset     # bits to skip
    const void *offsets         # strings: int32 or int64 offsets
    int64_t scale               # timestamps given as integers: multiply by this (or divide, where negative)
    uint8_t wide_offsets        # offsets are int64
    uint8_t bits                # bool: values are a bitmap with validity_offset bits to skip


cdef class ColumnSet:
    cdef:
        Column *columns
        Py_ssize_t n_columns
        readonly Py_ssize_t rows
        list keep               # the buffers' owners


cdef class EventReader:
    cdef:
        int n
        int time_field
        int id_field
        uint8_t *types
        uint8_t *optional
        uint8_t *finite         # floats: an infinity is refused (S11)
        uint8_t *key            # strings: at most KEY_BYTES long
        int64_t *scale          # timestamps: microseconds per unit of an integer; -1000 for nanoseconds
        Py_ssize_t *user_offsets
        Py_ssize_t *wire_offsets
        readonly object user_type
        readonly object wire_type
        tuple names
        tuple defaults
        tuple required
        str event_name

    cdef int read_object(self, object event, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1
    cdef int read_fields(self, char *base, Py_ssize_t *offsets, ps_slot *slots, uint8_t *status, ps_arena *arena,
                         str prefix) except -1
    cdef int read_dict(self, dict event, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1
    cdef int put(self, int i, object value, ps_slot *slots, uint8_t *status, ps_arena *arena, str prefix) except -1
    cdef int put_time(self, int i, object value, ps_slot *slots, uint8_t *status, str prefix) except -1
    cdef int put_null(self, int i, str what, ps_slot *slots, uint8_t *status, str prefix) except -1
    cdef int read_row(self, const Column *columns, Py_ssize_t row, ps_slot *slots, uint8_t *status,
                      ps_arena *arena) noexcept nogil
