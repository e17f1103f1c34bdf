# expressions.pxd: the C interface of the expression evaluator (expression.h) and the Python object that owns a program.
# Another extension cimports Program and calls `program.api.test(program.ptr, slots, status, arena)` without the GIL.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


from penstock._ext.row cimport ps_slot


cdef extern from "expression.h" nogil:
    ctypedef struct ps_instruction:
        uint16_t op
        uint16_t dst
        uint16_t a
        uint16_t b
        ps_slot k

    ctypedef struct ps_program:
        ps_instruction *code
        uint32_t n_code
        uint32_t type
        char *text
        double *floats
        int64_t *ints
        uint64_t *strings

    ctypedef struct ps_expression_api:
        int (*test)(const ps_program *, const ps_slot *slots, const uint8_t *status, const char *arena) noexcept nogil
        void (*value)(const ps_program *, const ps_slot *slots, const uint8_t *status, const char *arena, ps_slot *out,
                      uint8_t *out_status) noexcept nogil

    const ps_expression_api ps_expression
    const char *ps_opcode_names[]
    int PS_OP_COUNT
    int PS_MAX_REGISTERS


cdef class Program:
    cdef:
        ps_program *ptr
        const ps_expression_api *api
        readonly str type      # of the result: float64, int64, bool, timestamp
        readonly Py_ssize_t n_slots  # the row must have at least this many

    cdef tuple _rows(self, slots, status)
