# event_ids.pxd (hot path): the C interface of event ids and kept decisions, and the classes whose ptr and api other
# extensions call.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "id_table.h" nogil:
    ctypedef struct ps_hash128:
        uint64_t lo
        uint64_t hi

    ctypedef struct ps_ids:
        pass

    ctypedef struct ps_id_entry:
        uint64_t position
        uint16_t pipeline
        uint8_t has_decision

    ctypedef struct ps_ids_stats:
        uint64_t ids
        uint64_t bytes
        uint64_t forgotten
        uint64_t forgotten_early
        uint64_t limit
        uint64_t floor

    enum:
        PS_ID_UNKNOWN
        PS_ID_SEEN
        PS_ID_DECIDED

    uint32_t PS_IDS_PIPELINES
    uint64_t PS_IDS_POSITIONS
    uint64_t PS_IDS_LEAST
    uint64_t PS_IDS_MOST
    uint64_t PS_KEEP_LEAST

    ctypedef struct ps_ids_api:
        ps_hash128 (*hash_text)(const ps_ids *, const char *, uint64_t) noexcept nogil
        ps_hash128 (*hash_int)(const ps_ids *, int64_t) noexcept nogil
        void (*prefetch)(const ps_ids *, const ps_hash128 *) noexcept nogil
        int (*find)(const ps_ids *, const ps_hash128 *, uint32_t, ps_id_entry *) noexcept nogil
        int (*find_all)(const ps_ids *, const ps_hash128 *, ps_id_entry *, int) noexcept nogil
        void (*put)(ps_ids *, const ps_hash128 *, uint32_t, uint64_t, int) noexcept nogil
        void (*forget_before)(ps_ids *, uint64_t) noexcept nogil
        uint32_t (*tend)(ps_ids *, uint32_t) noexcept nogil
        void (*advance)(ps_ids *, int64_t, uint64_t, int64_t) noexcept nogil
        void (*stats)(const ps_ids *, ps_ids_stats *) noexcept nogil

    const ps_ids_api *ps_ids_get_api()
    ps_ids *ps_ids_create(const uint64_t *, uint64_t)
    void ps_ids_free(ps_ids *)
    const char *ps_ids_check(const ps_ids *)

    ctypedef struct ps_keep:
        pass

    ctypedef struct ps_keep_stats:
        uint64_t kept
        uint64_t bytes
        uint64_t limit
        uint64_t oldest

    ctypedef struct ps_keep_api:
        uint64_t (*put)(ps_keep *, const void *, uint64_t) noexcept nogil
        const void *(*get)(const ps_keep *, uint64_t, uint64_t *) noexcept nogil
        uint64_t (*next)(const ps_keep *) noexcept nogil
        void (*stats)(const ps_keep *, ps_keep_stats *) noexcept nogil

    const ps_keep_api *ps_keep_get_api()
    ps_keep *ps_keep_create(uint64_t)
    void ps_keep_free(ps_keep *)


cdef class EventIds:
    cdef:
        ps_ids *ptr
        const ps_ids_api *api
        uint64_t _mask[2]       # of every hash: all ones, but in tests

    cdef int hash_of(self, object id, ps_hash128 *hash) except -1


cdef class KeptDecisions:
    cdef:
        ps_keep *ptr
        const ps_keep_api *api
