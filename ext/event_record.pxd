# event_record.pxd: event_record.h for Cython. See there.

from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from penstock._ext.row cimport ps_slot

cdef extern from "event_record.h" nogil:
    ctypedef struct ps_record:
        uint32_t crc
        uint32_t length
        uint8_t kind
        uint8_t outcome
        uint16_t schema
        uint16_t n_fields
        uint8_t n_versions
        uint8_t flags
        int64_t sequence
        int64_t ingest_time

    ctypedef struct ps_score:
        char id[26]
        int16_t action
        int16_t model
        int16_t failed
        double score
        uint64_t fired
        int64_t as_of
        int8_t arms[8]
        uint8_t has_score
        uint8_t outcome
        uint8_t pad[6]

    enum:
        PS_RECORD_SCHEMA
        PS_RECORD_MARK
        PS_RECORD_EVENT
        PS_RECORD_SCORE
        PS_RECORD_HEAD
        PS_RECORD_MOST
        PS_ERASED
        PS_RECORD_MISFIT
        PS_REQUIRED_TIME
        PS_MOST_EXPERIMENTS
        PS_LAST_OUTCOME

    uint32_t ps_pad8(uint32_t)
    uint32_t ps_record_fixed(int is_score, uint32_t n_versions, uint32_t n_fields)
    uint32_t ps_record_seed(uint64_t log_id, uint64_t segment, uint64_t offset)
    uint32_t ps_record_crc(const ps_record *, uint32_t length, uint32_t seed)
    int64_t ps_record_check(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment)
    uint64_t ps_record_resync(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment)
    const uint64_t *ps_record_versions(const ps_record *)
    const ps_slot *ps_record_slots(const ps_record *)
    const uint8_t *ps_record_status(const ps_record *)
    const char *ps_record_strings(const ps_record *)

    ctypedef struct ps_record_schema:
        uint8_t is_score
        uint8_t n_versions
        uint16_t n_fields
        const uint8_t *types
        const uint8_t *required
        const uint16_t *checked
        uint16_t n_checked
        uint16_t n_actions
        uint16_t n_models
        uint16_t n_failures
        uint8_t n_reasons
        uint8_t n_experiments
        uint8_t n_arms[8]

    ctypedef struct ps_record_schemas:
        const ps_record_schema *all
        int n
        uint64_t prelude

    const char *ps_record_misfit(const ps_record *, uint64_t offset, const ps_record_schemas *, int *field)
    int64_t ps_record_read(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment,
                           const ps_record_schemas *)
