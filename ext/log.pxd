# log.pxd (hot path): the event log for the engine core. See event_log.h, log.pyx.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from penstock._ext.event_record cimport (
    PS_ERASED, PS_MOST_EXPERIMENTS, PS_RECORD_EVENT, PS_RECORD_HEAD, PS_RECORD_MARK, PS_RECORD_MISFIT, PS_RECORD_MOST,
    PS_RECORD_SCHEMA, PS_RECORD_SCORE, PS_REQUIRED_TIME, ps_pad8, ps_record, ps_record_check, ps_record_crc, ps_record_fixed,
    ps_record_misfit, ps_record_read, ps_record_resync, ps_record_schema, ps_record_schemas, ps_record_seed,
    ps_record_slots, ps_record_status, ps_record_strings, ps_record_versions, ps_score,
)

cdef extern from "event_log.h" nogil:
    enum:
        PS_LOG_FORMAT
        PS_SEGMENT_HEAD
        PS_LOG_OK
        PS_LOG_GONE

    uint64_t PS_LOG_MAGIC

    ctypedef struct ps_segment_head:
        uint64_t magic
        uint32_t format
        uint32_t crc
        uint64_t log_id
        uint64_t number
        int64_t first_sequence
        int64_t created
        uint64_t capacity

    ctypedef struct ps_segment_mark:
        uint64_t turn
        uint64_t synced
        uint64_t end
        int64_t last_sequence

    ctypedef struct ps_log:
        pass

    ctypedef struct ps_log_stats:
        uint64_t position
        uint64_t synced
        uint64_t segments
        uint64_t number
        uint64_t syncs
        uint64_t rolls
        uint64_t waits
        uint64_t longest_sync_us
        uint64_t clock_steps
        int64_t last_step_us
        int state
        int error
        int spare_error
        int64_t unsynced_us
        int64_t longest_unsynced_us
        uint64_t late_syncs
        int64_t last_late_us

    ctypedef struct ps_log_api:
        ps_record *(*reserve)(ps_log *, uint32_t, uint32_t) noexcept nogil
        void (*commit)(ps_log *, ps_record *, uint32_t) noexcept nogil
        uint64_t (*position)(const ps_log *) noexcept nogil

    const ps_log_api *ps_log_get_api()
    ps_log *ps_log_open(const char *, const char *const *, int, uint64_t, uint64_t, int64_t, uint64_t, int64_t, int64_t,
                        const char *const *, const uint32_t *, int, int64_t *const *, int, int *)
    void ps_log_stop(ps_log *)
    int ps_log_free(ps_log *)
    void ps_log_abandon(ps_log *)
    int ps_log_state(const ps_log *)
    void ps_log_look(ps_log *)
    int ps_log_error(const ps_log *)
    int ps_log_refused(const ps_log *)
    int ps_log_wait(ps_log *, uint64_t)
    int ps_log_begin(ps_log *)
    int ps_log_set_prelude(ps_log *, const char *const *prelude, const uint32_t *prelude_bytes, int n_prelude)
    int ps_log_has_spare(ps_log *)
    void ps_log_roll(ps_log *)
    void ps_log_get_stats(ps_log *, ps_log_stats *)
    int ps_segment_last_mark(const char *, ps_segment_mark *)
    void ps_segment_put_mark(char *, uint64_t turn, uint64_t synced, uint64_t end, int64_t last_sequence)
    uint32_t ps_segment_head_crc(const ps_segment_head *)


cdef class EventLog:
    cdef:
        ps_log *ptr
        const ps_log_api *api
        readonly int64_t log_id
        readonly int64_t sync_us
        readonly str folder
        int pid
        int users             # inside ps_log_wait; counted with the GIL held
        int failed            # errno of close()
        bint closing
        uint64_t segment_bytes
        list sources

    cdef int check_owner(self) except -1
    cdef str why(self, int error)


cdef class RecordSchemas:
    cdef:
        ps_record_schemas c
        ps_record_schema *all
        list keep             # what the schemas point to
        list fields           # per schema, names of its fields
        readonly int n

    cdef object refusal(self, const ps_record *r, uint64_t offset)
