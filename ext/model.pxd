# model.pxd: model.h for Cython. Every runtime and the engine take ps_model from here, so that it is the same type.

from libc.stdint cimport uint32_t


cdef extern from "model.h" nogil:
    ctypedef struct ps_model:
        int (*predict)(const ps_model *self, const double *x, size_t rows, size_t stride, double *out) noexcept nogil
        void *state
        uint32_t n_inputs
        uint32_t n_outputs
