# split.pxd: the C interface of the splitter (split.h) and the Python object that owns one compiled experiment.
# Another extension cimports Assigner and calls `assigner.api.assign(assigner.ptr, unit, length)` without the GIL.

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "split.h" nogil:
    enum ps_algorithm:
        PS_FNV1A_32
        PS_FNV1A_32_TWICE
        PS_MURMUR3_32
        PS_SHA1_60
        PS_MD5_32
        PS_SHA256_64

    ctypedef struct ps_hash_key:
        uint32_t algorithm

    ctypedef struct ps_experiment:
        ps_hash_key split
        ps_hash_key cover
        int has_cover
        uint64_t cover_bound
        uint32_t n_bounds
        uint64_t *bounds
        int16_t *arms

    ctypedef struct ps_split_api:
        int (*assign)(const ps_experiment *, const char *unit, size_t len) noexcept nogil
        int (*assign_int)(const ps_experiment *, int64_t unit) noexcept nogil
        void (*assign_batch)(const ps_experiment *, const char *data, const int32_t *offsets, size_t n,
                             int16_t *out) noexcept nogil
        void (*assign_batch_int)(const ps_experiment *, const int64_t *units, size_t n, int16_t *out) noexcept nogil

    const ps_split_api ps_split

    int ps_hash_key_init(ps_hash_key *key, uint32_t algorithm, uint32_t seed, uint32_t modulus, const char *prefix,
                         size_t prefix_len, const char *suffix, size_t suffix_len)
    void ps_hash_key_clear(ps_hash_key *key)
    uint64_t ps_hash(const ps_hash_key *key, const char *unit, size_t len)
    size_t ps_decimal(int64_t v, char *out)


cdef class Assigner:
    cdef:
        ps_experiment *ptr
        const ps_split_api *api
        readonly str name
        readonly tuple arms
        tuple _answers  # arms, then None: index -1 is "not in the experiment"

    cdef _assign_arrow(self, data, offsets)
    cdef _assign_ints(self, units)
    cdef _assign_list(self, list units)
