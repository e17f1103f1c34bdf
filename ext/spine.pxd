# spine.pxd: rows of a user's own spine, merged with the event log. See spine.pyx.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from penstock._ext.core cimport Core
from penstock._ext.decision cimport Verdict
from penstock._ext.event_record cimport ps_record
from penstock._ext.events cimport Column, ColumnSet, EventReader
from penstock._ext.history cimport EventMapping
from penstock._ext.row cimport ps_slot
from penstock._ext.steps cimport KeyRef, Pipe, RowKeys, Source, SourceC, Use
from penstock._ext.windows cimport WindowStore, ps_arena, ps_event


cdef enum:
    OPS = 32                  # steps whose entities are on their way
    # kinds of a row (offline/own_events.py)
    AS_OF = 0                 # as of its time
    OWN = 1                   # one of the log's events: what that saw
    SERVED = 2                # by a sequence that was given
    COUNTED = 3               # by a sequence, and its own event is not to be counted on top
    # parts of a row that are read at once
    WHOLE = 0
    BEFORE = 1                # views that do not count its own event
    BEHIND = 2                # those that do, when it is applied


# A step in the order of the log: an event to apply, or a row to read, and where the watermark stands before it.
ctypedef struct SpineOp:
    int64_t row               # -1: an event
    int part
    int64_t watermark
    uint64_t hash
    ps_slot *slots
    uint8_t *status
    ps_arena *arena

# One output of a view: where its values go, by place in the partition.
ctypedef struct SpineOutput:
    ps_slot *data
    uint8_t *status
    uint8_t is_string
    uint8_t counts            # 0 where there is nothing
    uint8_t has_default
    ps_slot value             # the default; of a string its length
    const char *text

# One view that is read: a group of the store, and its outputs (index -1: not asked for).
ctypedef struct SpineGroup:
    uint32_t group
    uint8_t with_own          # the row's own event counts (S8)
    uint8_t with_row          # a row that is none of the log's events counts as the newest one
    int n
    int *outputs


cdef class SpineRun:
    cdef:
        Core core
        Source source
        WindowStore store
        EventReader reader
        ColumnSet columns
        object keep
        KeyRef key
        bint keyed                # the key may be null: its status is looked at
        int parts
        int part
        int mode
        int64_t lateness
        uint64_t budget
        # the partition's rows, by bound
        int64_t n_rows
        int64_t next_row
        const int64_t *rows
        const int64_t *places
        const int64_t *times
        const uint8_t *kinds
        const int64_t *bounds
        const int64_t *bound_times
        uint64_t *hashes
        uint8_t *beyond
        uint8_t *anything
        int64_t n_beyond
        SpineGroup *groups
        int n_groups
        bint any_own
        SpineOutput *outputs
        int n_outputs
        ps_slot *out
        uint8_t *out_status
        ps_arena found            # strings of one read
        list texts
        ps_arena *kept_texts      # per output: strings in the order in which rows are read
        # steps that wait, and the memory of their events
        SpineOp ops[OPS]
        int n_ops
        int64_t watermark         # behind the last of them
        ps_slot *block_slots
        uint8_t *block_status
        ps_arena block
        # one event, or one row of the spine
        int width
        ps_slot *slots
        uint8_t *status
        ps_arena arena
        RowKeys keys
        Verdict verdict
        int64_t expected
        int64_t events
        int64_t applied
        uint64_t one_key          # key_partition of the partition's first event
        bint any_key
        bint many_keys
        bint hopeless             # fewer keys would not make it fit
        # backfill: the partition's events, to be sorted
        int64_t n_kept
        int64_t room
        ps_slot *kept_slots
        uint8_t *kept_status
        int64_t *kept_time
        int64_t *kept_place       # sequence; ~sequence of one that was not applied
        ps_arena kept

    cdef int partition_of(self, uint64_t partition) noexcept nogil
    cdef uint64_t key_hash(self) noexcept nogil
    cdef uint64_t key_partition(self) noexcept nogil
    cdef int large(self) noexcept nogil
    cdef void note_key(self, uint64_t partition) noexcept nogil
    cdef int take(self, const ps_record *r, EventMapping mapping) noexcept nogil
    cdef int keep_event(self, const ps_record *r, EventMapping mapping) noexcept nogil
    cdef int queue(self, int64_t row, int part, uint64_t hash, ps_slot *slots, uint8_t *status,
                   ps_arena *arena) noexcept nogil
    cdef int run_queue(self) noexcept nogil
    cdef int apply(self, ps_slot *slots, uint8_t *status, ps_arena *arena, uint64_t hash) noexcept nogil
    cdef int read_until(self, int64_t bound, int64_t own) noexcept nogil
    cdef bint is_own(self, int64_t i, int64_t sequence) noexcept nogil
    cdef bint waits(self, int64_t first, int64_t sequence, bint here) noexcept nogil
    cdef int read_behind(self, int64_t first, const ps_record *r, EventMapping mapping) noexcept nogil
    cdef int read_row(self, int64_t index, int part, ps_slot *own_slots, uint8_t *own_status,
                      ps_arena *own_arena) noexcept nogil
    cdef void as_event(self, int64_t at, ps_slot *slots, uint8_t *status, ps_arena *arena, ps_slot *values,
                       uint8_t *statuses, ps_event *event) noexcept nogil
    cdef bint stands_before(self, int64_t row, int64_t k, int64_t sequence) noexcept nogil
    cdef int replay(self, const int64_t *order) noexcept nogil


cdef class FunctionRun:
    cdef:
        Core core
        Pipe pipe
        EventReader reader
        ColumnSet columns
        object keep
        int width
        ps_slot *slots
        uint8_t *status
        ps_arena arena
        RowKeys keys
        Verdict verdict

    cdef int run_row(self, int64_t row) noexcept nogil
