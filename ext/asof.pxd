# asof.pxd: layout of the point-in-time join's Python face; the contract of the kernel is in asof_join.h.

from libc.stdint cimport int8_t, int64_t, uint8_t, uint32_t

cdef extern from "asof_join.h":
    enum:
        PS_ASOF_BLOCK
        PS_ASOF_MEMORY
        PS_ASOF_DAMAGED
        PS_ASOF_BEYOND_INT64
        PS_ASOF_ORDER
        PS_ASOF_DICTIONARY
    const uint32_t PS_ASOF_NO_ID, PS_ASOF_MOST_ROWS, PS_ASOF_AGED, PS_ASOF_NOT_FOUND

    ctypedef struct ps_key_column:
        int kind
        int64_t length, offset
        const uint8_t *validity
        const void *values
        const uint8_t *text
        int64_t text_bytes
        const uint32_t *ids
        int64_t n_ids
    ctypedef struct ps_keys:
        pass
    ps_keys *ps_keys_new() nogil
    void ps_keys_free(ps_keys *) nogil
    int64_t ps_keys_count(const ps_keys *) nogil
    int ps_keys_add(ps_keys *, const ps_key_column *, uint32_t *, int64_t *) nogil
    int ps_keys_find(const ps_keys *, const ps_key_column *, int64_t, int, uint32_t, uint32_t *, int64_t *) nogil

    ctypedef struct ps_segment:
        ps_key_column key
        const int64_t *event
        const int64_t *ingest
        int64_t first
    ctypedef struct ps_feature_rows:
        const ps_segment *segments
        int64_t n_segments, rows
        int has_ingest, cutoff
    int ps_times_ordered(const int64_t *, int64_t, int64_t *) nogil
    int64_t ps_times_outside(const int64_t *, int64_t, int64_t, int64_t) nogil
    int ps_rows_ordered(const ps_feature_rows *) nogil

    ctypedef struct ps_entry:
        int64_t at
        uint32_t row
    void ps_sort_entries(ps_entry *, int64_t) nogil

    ctypedef struct ps_merge:
        pass
    ps_merge *ps_merge_new(const ps_keys *, const ps_feature_rows *) nogil
    void ps_merge_free(ps_merge *) nogil
    int ps_merge_next(ps_merge *, const uint32_t *, const int64_t *, const ps_entry *, int64_t, uint32_t *,
                      int64_t *) nogil
    ctypedef struct ps_index:
        pass
    ps_index *ps_index_new(const ps_keys *, const ps_feature_rows *, int *, int64_t *) nogil
    void ps_index_free(ps_index *) nogil
    void ps_index_find(const ps_index *, const uint32_t *, const int64_t *, int64_t, uint32_t *) nogil
    void ps_apply_ttl(const ps_feature_rows *, const int64_t *, int64_t, int64_t, uint32_t *) nogil

    ctypedef struct ps_value_segment:
        int64_t first, length, offset
        const uint8_t *validity
        const void *values
        const uint8_t *text
        int64_t text_bytes
    ctypedef struct ps_values:
        const ps_value_segment *segments
        int64_t n_segments
        int width, nan
    int64_t ps_gather(const ps_values *, const uint32_t *, int64_t, void *, uint8_t *, int8_t *) nogil
    int64_t ps_gather_offsets(const ps_values *, const uint32_t *, int64_t, int64_t *, uint8_t *, int8_t *) nogil
    void ps_gather_text(const ps_values *, const uint32_t *, int64_t, const int64_t *, uint8_t *) nogil


cdef class KeyIndex:
    cdef:
        ps_keys *ptr
        bint fixed


cdef class SpineOrder:
    cdef:
        ps_entry *entries
        int64_t n


cdef class FeatureRows:
    cdef:
        KeyIndex keys
        ps_feature_rows c
        ps_segment *segments
        ps_merge *merge
        ps_index *index
        list keep
        readonly bint ordered
