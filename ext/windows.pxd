# windows.pxd (hot path): the C interface of window state, and the class whose ptr and api other extensions call.

from libc.stdint cimport int16_t, int64_t, uint8_t, uint32_t, uint64_t

from penstock._ext.row cimport (
    PS_BOOL, PS_FLOAT64, PS_INT64, PS_INVALID, PS_NOT_FOUND, PS_NULL_VALUE, PS_OUTSIDE_MAX_AGE, PS_PRESENT, PS_STR,
    PS_STRING, PS_STR_LENGTH, PS_STR_OFFSET, PS_TIMESTAMP, PS_WIDE, ps_slot,
)

cdef extern from "window_state.h" nogil:
    ctypedef struct ps_store:
        pass

    ctypedef struct ps_key:
        const char *str
        int64_t i
        uint32_t len
        uint8_t is_int

    ctypedef struct ps_event:
        int64_t event_time
        int64_t ingest_time
        int64_t log_id
        int64_t sequence
        const ps_slot *values
        const uint8_t *status
        uint64_t where_mask
        const char *arena

    ctypedef struct ps_arena:
        char *data
        uint32_t used
        uint32_t capacity

    ctypedef uint64_t ps_handle

    ctypedef struct ps_store_stats:
        uint64_t entities
        uint64_t events
        uint64_t applied
        uint64_t bytes_used
        uint64_t bytes_mapped
        uint64_t strings
        int64_t watermark

    ctypedef struct ps_output:
        uint8_t function
        uint8_t closed
        int16_t column
        int16_t where
        int64_t length
        int64_t ttl

    ctypedef struct ps_layout:
        const uint8_t *columns
        uint32_t n_columns
        const ps_output *outputs
        uint32_t n_outputs
        const uint32_t *groups
        uint32_t n_groups
        uint32_t n_where
        int64_t lateness
        int64_t retention
        uint64_t fingerprint
        uint64_t max_bytes
        uint64_t seed[2]

    ctypedef struct ps_store_api:
        uint64_t (*hash)(const ps_store *, const ps_key *) noexcept nogil
        void (*prefetch)(const ps_store *, uint64_t) noexcept nogil
        void (*prefetch_blob)(const ps_store *, uint64_t) noexcept nogil
        ps_handle (*find)(ps_store *, const ps_key *, uint64_t) noexcept nogil
        ps_handle (*find_or_create)(ps_store *, const ps_key *, uint64_t) noexcept nogil
        int (*apply)(ps_store *, ps_handle, const ps_event *) noexcept nogil
        int (*read)(ps_store *, ps_handle, uint32_t, int64_t, const ps_event *, ps_slot *, uint8_t *,
                    ps_arena *) noexcept nogil
        uint64_t (*version)(const ps_store *, ps_handle) noexcept nogil
        int (*sweep)(ps_store *, int64_t, uint32_t) noexcept nogil
        void (*stats)(const ps_store *, ps_store_stats *) noexcept nogil
        void (*log_position)(const ps_store *, ps_handle, int64_t *, int64_t *) noexcept nogil
        void (*forget_unused)(ps_store *, ps_handle) noexcept nogil
        void (*miss_before)(ps_store *, int64_t) noexcept nogil
        int (*reserve)(ps_store *, ps_handle, const ps_event *) noexcept nogil
        void (*small_pages)(ps_store *) noexcept nogil
        int (*erase)(ps_store *, const ps_key *, uint64_t) noexcept nogil
        ps_handle (*next)(const ps_store *, ps_handle) noexcept nogil
        void (*key)(const ps_store *, ps_handle, ps_key *) noexcept nogil
        const void *(*bytes)(const ps_store *, uint64_t *) noexcept nogil
        int (*begin_load)(ps_store *, uint64_t, void **) noexcept nogil
        int (*commit_load)(ps_store *, uint64_t) noexcept nogil
        void (*cancel_load)(ps_store *) noexcept nogil
        int (*load_is_unfit)(const ps_store *) noexcept nogil
        uint64_t (*partition)(const ps_key *) noexcept nogil
        void (*seed)(const ps_store *, uint64_t *) noexcept nogil
        int (*reseed)(ps_store *, const uint64_t *) noexcept nogil

    enum:
        PS_LIFETIME
        PS_NO_TTL
        PS_NO_RETENTION
        PS_TIME_MIN
        PS_STORE_OK
        PS_STORE_MEMORY
        PS_STORE_LAYOUT_COLUMN
        PS_STORE_LAYOUT_TYPE
        PS_STORE_LAYOUT_SIZE
        PS_STORE_DUMP_SIZE

    const ps_store_api *ps_store_get_api()
    ps_store *ps_store_create(const ps_layout *, int *, uint32_t *)
    void ps_store_free(ps_store *)
    const void *ps_store_bytes(const ps_store *, uint64_t *)
    int ps_store_load(ps_store *, const void *, uint64_t)
    const char *ps_store_error_text(int)
    int ps_output_type(const ps_layout *, uint32_t)

    ctypedef struct ps_chunk_size:
        uint32_t bytes
        uint32_t head
        uint32_t capacity
        uint32_t full
    uint32_t ps_chunk_growth(uint32_t, uint32_t, ps_chunk_size *, uint32_t)
    int ps_format_1_damaged(uint32_t, uint32_t)


cdef class WindowStore:
    cdef:
        ps_store *ptr
        const ps_store_api *api
        readonly tuple columns
        readonly tuple outputs
        readonly tuple groups
        readonly tuple output_types
        readonly int64_t lateness
        readonly object retention
        readonly int n_where
        readonly uint64_t fingerprint
        list _starts
        ps_slot *_values
        uint8_t *_status
        ps_slot *_out
        uint8_t *_out_status
        ps_arena _arena

    cdef object _raise(self, int code)
    cdef int _fill_event(self, ps_event *e, bytearray arena, object event_time, object values, object where_mask,
                         object ingest_time, object log_id, object sequence) except -1
