# row.pxd: row.h for Cython. Every extension takes the row's types from here, so that they are the same types.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "row.h" nogil:
    ctypedef union ps_slot:
        double f
        int64_t i
        uint64_t u

    enum:
        PS_FLOAT64
        PS_INT64
        PS_BOOL
        PS_TIMESTAMP
        PS_STRING
        PS_INVALID
        PS_PRESENT
        PS_NULL_VALUE
        PS_NOT_FOUND
        PS_OUTSIDE_MAX_AGE
        PS_WIDE
        PS_AGED

    uint32_t PS_STR_OFFSET(uint64_t)
    uint32_t PS_STR_LENGTH(uint64_t)
    uint64_t PS_STR(uint32_t, uint32_t)
