# trees.pyx (hot path): the Python face of tree_kernel.c; one row scored from Python costs little more than the kernel.
#
# A TreeModel is immutable: any thread may score, and the ps_model it holds lives as long as it does.
"""Tree ensembles, scored bit for bit as the library that trained them."""

import numpy as np

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uintptr_t

cdef object empty = np.empty
cdef dict LAYOUTS = {"auto": 0, "plain": 1, "walk": 2, "masks": 3}
cdef dict SIMD = {"auto": 0, "portable": 1, "avx2": 2}


cdef object array_of(object form, str name, object dtype, Py_ssize_t size):
    array = np.ascontiguousarray(getattr(form, name), dtype=dtype)
    if array.ndim != 1 or array.shape[0] != size:
        raise ValueError(f"{name}: expected {size} values, got {array.shape}")
    return array


cdef const void *take(list keep, object array) except? NULL:
    """Where an array's values stand; NULL where it has none."""
    cdef const uint8_t[::1] view
    keep.append(array)
    if not array.shape[0]:
        return NULL
    view = array.view(np.uint8)
    return &view[0]


cdef list read_form(object form, ps_trees_form *f):
    """The C form of a TreeEnsemble. Returns what its pointers point into."""
    cdef Py_ssize_t n = len(form.feature), leaves = len(form.weight_begin) - 1
    cdef list keep = []
    if leaves < 1:
        raise ValueError("weight_begin: expected one more value than there are leaves")
    f.n_trees = len(form.roots)
    f.n_nodes = n
    f.n_leaves = leaves
    f.n_inputs = form.n_inputs
    f.n_raw = form.n_raw
    f.n_outputs = form.n_outputs
    f.n_weights = len(form.weight_target)
    f.n_base = len(form.base)
    f.roots = <const int32_t *>take(keep, array_of(form, "roots", np.int32, len(form.roots)))
    f.feature = <const int32_t *>take(keep, array_of(form, "feature", np.int32, n))
    f.threshold = <const double *>take(keep, array_of(form, "threshold", np.float64, n))
    f.yes = <const int32_t *>take(keep, array_of(form, "yes", np.int32, n))
    f.no = <const int32_t *>take(keep, array_of(form, "no", np.int32, n))
    f.nan_yes = <const uint8_t *>take(keep, array_of(form, "nan_yes", np.uint8, n))
    steps_begin = array_of(form, "steps_begin", np.int32, n + 1)
    f.steps_begin = <const int32_t *>take(keep, steps_begin)
    f.steps = <const double *>take(keep, array_of(form, "steps", np.float64, int(steps_begin[n])))
    f.steps_first = <const uint8_t *>take(keep, array_of(form, "steps_first", np.uint8, n))
    f.weight_begin = <const int32_t *>take(keep, array_of(form, "weight_begin", np.int32, leaves + 1))
    f.weight_target = <const int32_t *>take(keep, array_of(form, "weight_target", np.int32, f.n_weights))
    f.weight = <const double *>take(keep, array_of(form, "weight", np.float64, f.n_weights))
    f.base = <const double *>take(keep, array_of(form, "base", np.float64, f.n_base))
    f.round_input = form.round_input
    f.accumulate32 = form.accumulate32
    f.base_first = form.base_first
    f.aggregate = form.aggregate
    f.transform = form.transform
    f.onnx_post = form.onnx_post
    f.onnx_binary = form.onnx_binary
    f.onnx_all_positive = form.onnx_all_positive
    f.onnx_output32 = form.onnx_output32
    f.slope = form.slope
    f.divisor = form.divisor
    return keep


def compile_form(form):
    """A TreeEnsemble as one block of bytes (tree_form.h), from which a TreeModel is built without reading Python values."""
    cdef ps_trees_form f
    cdef size_t size
    cdef list keep = read_form(form, &f)
    cdef bytes names = b"".join([name.encode() + b"\0" for name in form.feature_names or ()])
    cdef bytes block
    if any("\0" in name for name in form.feature_names or ()):
        raise ValueError("feature_names: a name holds a zero character")
    size = ps_trees_form_size(&f, PyBytes_GET_SIZE(names))
    block = PyBytes_FromStringAndSize(NULL, size)
    ps_trees_form_write(&f, PyBytes_AS_STRING(names), PyBytes_GET_SIZE(names), PyBytes_AS_STRING(block))
    return block


cdef class TreeModel:
    """A scorer made of a models.tree_ensemble.TreeEnsemble (build one with models.trees.load_trees), or of what
    compile_form() made of one: bytes, or a mapped file; the GIL is then held for microseconds, and with `nice` a thread
    of that priority builds it."""

    def __cinit__(self, form, str layout="auto", str simd="auto", size_t table_bytes=0,
                  int nice=0):
        cdef ps_trees_form f
        cdef char error[256]
        cdef int wanted, instructions
        cdef Py_buffer block
        cdef const char *names = NULL
        cdef size_t n_names = 0
        cdef list keep
        if layout not in LAYOUTS or simd not in SIMD:
            raise ValueError(f"layout {layout}, simd {simd}: expected {', '.join(LAYOUTS)}; {', '.join(SIMD)}")
        wanted, instructions = LAYOUTS[layout], SIMD[simd]
        self.feature_names = None
        if PyObject_CheckBuffer(form):
            PyObject_GetBuffer(form, &block, PyBUF_SIMPLE)
            try:
                if <uintptr_t>block.buf % 8:
                    raise ValueError("a compiled form stands on a multiple of 8 bytes")
                with nogil:
                    self.trees = ps_trees_build_block(block.buf, block.len, wanted, instructions, table_bytes, nice, &f,
                                                      &names, &n_names, error)
                if self.trees != NULL and n_names:
                    self.feature_names = tuple(names[:n_names - 1].decode().split("\0"))
            finally:
                PyBuffer_Release(&block)
        else:
            keep = read_form(form, &f)
            with nogil:
                self.trees = ps_trees_build(&f, wanted, instructions, table_bytes, error)
            self.feature_names = tuple(form.feature_names) if form.feature_names else None
        if self.trees == NULL:
            raise ValueError((<bytes> error).decode())
        self.n_raw_scores = f.n_raw
        self.model.predict = ps_trees_model_predict
        self.model.state = self.trees
        self.model.n_inputs = f.n_inputs
        self.model.n_outputs = f.n_outputs

    def __dealloc__(self):
        # Large tables take a while to give back: others run meanwhile.
        if self.trees != NULL and ps_trees_bytes(self.trees) > (1 << 18):
            with nogil:
                ps_trees_free(self.trees)
        else:
            ps_trees_free(self.trees)

    @property
    def abi(self) -> int:
        """Address of the ps_model (ext/model.h); valid while this object lives."""
        return <uintptr_t> &self.model

    @property
    def n_inputs(self) -> int:
        return self.model.n_inputs

    @property
    def n_outputs(self) -> int:
        return self.model.n_outputs

    @property
    def n_raw(self) -> int:
        return self.n_raw_scores

    @property
    def layout(self) -> str:
        """The layout that was chosen: masks32, masks64, walk or plain."""
        cdef int layout = ps_trees_layout_of(self.trees)
        if layout == 3:
            return f"masks{ps_trees_mask_bits(self.trees)}"
        return "walk" if layout == 2 else "plain"

    @property
    def simd(self) -> str:
        """avx2 or portable."""
        return "avx2" if ps_trees_simd_of(self.trees) == 2 else "portable"

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, all layouts together."""
        return ps_trees_bytes(self.trees)

    cdef object score(self, object x, bint raw):
        cdef Py_buffer source, target
        cdef Py_ssize_t rows, stride
        cdef int failed
        if not PyObject_CheckBuffer(x):
            x = np.asarray(x, np.float64)
        PyObject_GetBuffer(x, &source, PyBUF_FORMAT | PyBUF_STRIDES)
        if (source.ndim != 2 or source.format[0] != c"d" or source.format[1] or source.strides[1] != 8
                or source.strides[0] < 0 or source.strides[0] % 8 or <uintptr_t> source.buf % 8):
            PyBuffer_Release(&source)
            x = np.require(x, np.float64, "CA")
            if x.ndim != 2:
                raise ValueError(f"X: expected shape (rows, {self.model.n_inputs}), got {x.shape}")
            PyObject_GetBuffer(x, &source, PyBUF_FORMAT | PyBUF_STRIDES)
        try:
            rows = source.shape[0]
            stride = source.strides[0] // 8
            if source.shape[1] != self.model.n_inputs:
                raise ValueError(f"X: expected shape (rows, {self.model.n_inputs}), got {np.shape(x)}")
            out = empty((rows, self.n_raw_scores if raw else self.model.n_outputs))
            PyObject_GetBuffer(out, &target, PyBUF_STRIDES | PyBUF_WRITABLE)
            if rows <= 4:
                failed = ps_trees_predict(self.trees, <double *> source.buf, rows, stride, <double *> target.buf, raw)
            else:
                with nogil:
                    failed = ps_trees_predict(self.trees, <double *> source.buf, rows, stride,
                                              <double *> target.buf, raw)
            PyBuffer_Release(&target)
        finally:
            PyBuffer_Release(&source)
        if failed:
            raise MemoryError(f"scoring {rows} rows of {self.model.n_inputs} inputs")
        return out

    def predict(self, x):
        """Transformed scores, (rows, n_outputs) float64. x: (rows, n_inputs) float64, NaN is missing.

        Raises ValueError for another shape.
        """
        return self.score(x, False)

    def predict_raw(self, x):
        """Scores before the transform, base values included, (rows, n_raw) float64."""
        return self.score(x, True)


def xgboost_margin(float base_score, int link):
    """The margin that XGBoost starts from, in its own float32 arithmetic. link: 0 none, 1 logit, 2 log, 3 softplus."""
    return ps_trees_xgboost_margin(base_score, link)


cdef int tree_labels(const ps_model *model, const double *x, size_t rows, size_t stride, double *out,
                     int32_t *labels) noexcept nogil:
    return ps_trees_labels(<const ps_trees *>model.state, x, rows, stride, out, labels)


cdef bint tree_labels_literal(const ps_model *model) noexcept nogil:
    return ps_trees_literal_labels(<const ps_trees *>model.state)
