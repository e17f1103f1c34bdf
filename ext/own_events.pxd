# own_events.pxd: which rows of a spine are the log's own events. See own_events.pyx.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from penstock._ext.event_record cimport ps_record
from penstock._ext.history cimport EventMapping
from penstock._ext.row cimport ps_slot


# A column of the spine beside a field of the event: 8 bytes per row (floats without NaN and -0.0), or a text.
ctypedef struct Compared:
    int field
    uint8_t type
    uint8_t near              # a key or the time: a row that equals an event in these is near it
    const int64_t *data       # of a text its offsets
    const char *bytes
    const uint8_t *state      # NULL_CELL, A_CELL, NO_CELL

# One value of an event, read where it lies in its record.
ctypedef struct Value:
    uint8_t present
    ps_slot slot
    const char *text
    uint64_t length

# Rows that are equal in what is compared: one of them, the next that gets an event, and the row that has the last event
# equal to them: one of them, or one that was told by its id.
ctypedef struct Equal:
    int32_t row
    int32_t turn
    int32_t last

# Rows that share key and time. differs: bit per compared column, in which an event with these was another.
ctypedef struct Near:
    int32_t row
    uint8_t met
    uint64_t differs


cdef class Look:
    cdef:
        readonly int source
        int n
        Compared *compared
        Value *values             # of the event that is looked at
        object keep
        int64_t rows
        const uint8_t *skip       # rows that this look is not for
        bint has_near
        uint64_t mask
        Equal *table
        int32_t *link             # row -> the next equal one, or -1
        Near *near_table
        uint64_t time_mask        # bits of a filter of the rows' times; 0: the time is not compared
        uint8_t *time_bits
        int time

    cdef void put_near(self, int64_t row) noexcept nogil
    cdef uint64_t row_hash(self, int64_t row, bint near) noexcept nogil
    cdef uint64_t event_hash(self, bint near) noexcept nogil
    cdef bint is_equal(self, int64_t a, int64_t b, bint near) noexcept nogil
    cdef uint64_t differing(self, int64_t row, bint near) noexcept nogil
    cdef void read(self, const ps_record *r, EventMapping mapping, int i) noexcept nogil
    cdef int64_t find(self, const ps_record *r, EventMapping mapping, const uint8_t *taken, int64_t by_id) noexcept nogil


cdef class SpineSearch:
    cdef:
        list looks
        object keep
        int64_t rows
        int64_t n_waiting         # rows that no event was found for
        int64_t n_bounded         # rows whose bound is known, in the order of their times
        const int64_t *times
        const int64_t *order
        int64_t *bounds           # NULL: rows are not bound by ingest time
        int64_t *sequence
        int64_t *event_time
        int64_t *ingest_time
        uint8_t *taken
        int64_t expected
        int64_t newest_ingest
        int64_t seen
        int64_t earliest
