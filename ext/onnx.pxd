# onnx.pxd: the layout of OnnxModel. The engine core takes &model.model and calls it without the GIL.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from penstock._ext.model cimport ps_model

cdef extern from "shortest.h" nogil:  # named, so that the build takes it along with tensor.h
    pass

cdef extern from "tensor.h" nogil:
    ctypedef struct ps_tensor:
        const char *data
        size_t bytes
        int64_t count
        int64_t dims[8]
        uint8_t dtype
        uint8_t rank

cdef extern from "onnx_session.h" nogil:
    ctypedef struct ps_onnx:
        pass

    ctypedef struct ps_onnx_result:
        pass


cdef class OnnxModel:
    cdef:
        ps_model model
        ps_onnx *session
        object python_session     # onnxruntime.InferenceSession where the C API was not reached
        list python_inputs        # (name, dtype, columns of x, rank), one per input
        str python_error
        bint release_gil          # a call long enough to let others run

        readonly str source       # the path, or "<bytes>"
        readonly str api          # "c" or "python"
        readonly str version      # ONNX Runtime's own
        readonly tuple inputs     # feature names in the order of x, or None
        readonly str output       # name of the output that is read
        readonly bint batched


cdef class OnnxTensors:
    """A whole graph, run on tensors as they are."""
    cdef:
        ps_onnx *session
        readonly str source

    cdef int run(self, const ps_tensor *tensors, const int32_t *outputs, size_t n_out, ps_tensor *out,
                 ps_onnx_result **result, char *error) noexcept nogil
    cdef void release(self, ps_onnx_result *result) noexcept nogil
