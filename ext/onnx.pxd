# onnx.pxd: the layout of OnnxModel. The engine core takes &model.model and calls it without the GIL.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t

from penstock._ext.model cimport ps_model


cdef extern from "onnx_session.h" nogil:
    ctypedef struct ps_onnx:
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
