# infer.pxd (hot path): one inference of the Open Inference Protocol; see infer.pyx.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from penstock._ext.flow cimport Lane
from penstock._ext.model cimport ps_model


cdef extern from "infer_request.h" nogil:
    ctypedef struct ps_request:
        pass

    ctypedef struct ps_tensor:
        pass

    ctypedef struct ps_ports:
        pass

cdef extern from "onnx_session.h" nogil:
    ctypedef struct ps_onnx:
        pass

    ctypedef struct ps_onnx_result:
        pass


cdef enum:
    REMEMBERED = 64           # request headers that a model remembers
    BATCH_SIZES = 32          # batch sizes that have counters of their own; the rest share the last


cdef class Port:
    """One input or output: its name, OIP datatype, and shape, where -1 is any size."""
    cdef:
        readonly str name
        readonly str datatype
        readonly tuple shape


cdef struct BatchCount:
    int64_t rows
    int64_t count
    int64_t input
    int64_t infer
    int64_t output


cdef class Request:
    """A request's JSON header, read. Where it holds no values of its own it is remembered, and many calls share it."""
    cdef:
        ps_request  *c
        uint64_t     hash
        bytes        source           # the header's bytes (from after an id that stands first), where it is remembered
        bytes        answer           # JSON header of the answer, from after the brace, for the tensors in `shapes`
        bytes        whole            # the same as a whole
        ps_tensor   *shapes


cdef class ServedModel:
    """A model that answers inference requests. Immutable but for its counters; any thread may run its calls."""
    cdef:
        readonly str    name
        readonly str    version
        readonly str    platform      # penstock_trees or onnxruntime_onnx
        readonly tuple  inputs        # of Port
        readonly tuple  outputs
        readonly int64_t row_ns       # fastest single row seen while warming
        readonly int64_t nbytes       # of its tables and file, as far as known
        readonly bint   batched       # the first dimension of every input is the row

        object          runtime       # keeps what `trees` points at alive
        const ps_model *trees         # or NULL: a session
        ps_onnx        *session
        ps_ports       *ports
        bytes           label         # "model_name":...,"model_version":... of an answer
        list            remembered    # of Request or None, by hash

        # Sums since construction, in ticks where they are times. Touched with the GIL only.
        int64_t         n_success, n_fail, n_rows, n_runs, last_ms
        int64_t         t_success, t_fail, t_queue, t_input, t_infer, t_output
        BatchCount      batches[BATCH_SIZES]

    cdef int refused(self, int64_t ns) except -1      # a request that was turned away counts as failed
    cpdef dict stats(self)


cdef class Target:
    """A model as clients name it. Assigning `model` swaps it between two requests."""
    cdef:
        readonly str name
        readonly str version          # "": the newest, or what the policy says
        public ServedModel model      # None: not loaded
        public Lane lane


cdef class InferCall:
    """One request. What `body` pointed at must stay until the answer has been taken.

    Made with the GIL, run() without it on any thread, finish() with it; then the answer stands in json_head and parts.
    """
    cdef:
        readonly int64_t rows
        readonly int64_t timeout_us   # 0: not given
        readonly int     priority     # 0: not given
        readonly int     failed       # after run(): 0, or an HTTP status
        readonly bytes   json_head    # after finish(): the answer's JSON, or its header where a part follows
        readonly bint    binary       # raw parts follow json_head
        readonly int     n_parts

        ServedModel      model
        Request          request
        object           owner        # what the inputs lie in, where the caller gave objects
        const char      *body         # after the JSON header
        const char      *id           # JSON text between the quotes, or NULL
        size_t           id_n
        bint             python       # answers as Python objects: no JSON is made
        char            *scratch      # block of the pool of blocks
        size_t           scratch_cap
        ps_tensor       *out          # one per wanted output, in `scratch`
        int              n_out
        ps_onnx_result  *result
        char            *text         # why it failed
        int64_t          begun, decoded, started, ended

    @staticmethod
    cdef InferCall of_http(ServedModel model, const char *body, size_t n, int64_t header_length)
    @staticmethod
    cdef InferCall of_raw(ServedModel model, const char *data, size_t n)
    @staticmethod
    cdef InferCall of_parts(ServedModel model, list inputs, list outputs)
    cdef void run(self) noexcept nogil
    cdef int finish(self) except -1
    cdef const char *part(self, int i, size_t *n) noexcept nogil
    cdef list parts_list(self)
