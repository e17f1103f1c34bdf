# infer.pxd (hot path): one inference of the Open Inference Protocol; see infer.pyx.

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from penstock._ext.flow cimport Lane
from penstock._ext.model cimport ps_model
from penstock._ext.onnx cimport OnnxTensors, ps_onnx_result, ps_tensor


cdef extern from "infer_request.h" nogil:
    ctypedef struct ps_port:
        const char *name
        size_t name_n
        const char *json
        size_t json_n
        int64_t dims[8]
        uint8_t dtype
        uint8_t rank
        uint8_t any_shape

    ctypedef struct ps_ports:
        ps_port *inputs "in"
        ps_port *outputs "out"
        int n_in
        int n_out
        int any_number
        int batched

    ctypedef struct ps_input:
        int64_t dims[8]
        int64_t count
        size_t bytes
        size_t at
        uint8_t dtype
        uint8_t rank
        uint8_t given
        uint8_t inside

    ctypedef struct ps_wanted:
        int32_t port
        int8_t binary
        int64_t classes

    ctypedef struct ps_request:
        ps_input *inputs "in"
        ps_wanted *outputs "out"
        int n_out
        int any_binary
        int any_json
        int any_classes
        int look
        size_t binary_bytes
        int64_t rows
        int64_t timeout_us
        int priority
        const char *id
        size_t id_n
        char *values


cdef enum:
    REMEMBERED = 64           # request headers that a model remembers
    BATCH_SIZES = 32          # batch sizes with counters of their own; those beyond are not listed


cdef struct BatchCount:
    int64_t rows
    int64_t count
    int64_t input
    int64_t infer
    int64_t output


cdef class Port:
    """One input or output: its name, OIP datatype, and shape, where -1 is any size."""
    cdef:
        readonly str name
        readonly str datatype
        readonly tuple shape


cdef class Request:
    """A request's JSON header, read. One that holds no values is remembered, and many calls share it."""
    cdef:
        ps_request  *c
        uint64_t     hash
        bytes        source           # what was read (all of the header, or what follows an id that stands first)
        ps_tensor   *shapes           # the outputs that `answer` describes
        bytes        answer           # header of an answer whose parts are all binary, after its brace
        bytes        whole            # the same with the brace


cdef class ServedModel:
    """A model that answers inference requests. Immutable but for its counters; any thread may run its calls."""
    cdef:
        readonly str     name
        readonly str     version
        readonly str     platform     # penstock_trees or onnxruntime_onnx
        readonly tuple   inputs       # of Port
        readonly tuple   outputs
        readonly int64_t row_ns       # fastest single row seen while warming
        readonly int64_t nbytes       # of its tables, or of its file, as far as known
        readonly bint    batched      # the first dimension of every input is the row

        object           runtime      # keeps alive what `trees` points at
        const ps_model  *trees        # NULL: the session runs
        OnnxTensors      session
        ps_ports         ports
        list             texts        # of the names that `ports` points at
        int32_t         *place_of     # of each output, its place among all that the graph has
        int              label_port   # output of a tree classifier that gives the class, or -1
        bint             fixed_shapes # the request's shapes fix the answer's, bytes included
        list             class_texts  # raw form of each class
        const char     **classes      # where they begin
        size_t           class_bytes  # of the longest
        bytes            label        # "model_name":...,"model_version":...,"outputs":
        list             remembered   # of Request or None, by hash

        # Since construction, times in ticks; touched with the GIL only.
        int64_t          n_success, n_fail, n_rows, n_runs, last
        int64_t          t_success, t_fail, t_queue, t_input, t_infer, t_output
        BatchCount       batches[BATCH_SIZES]
        int              n_batches

    cdef int set_classes(self, list labels) except -1
    cdef int set_port(self, ps_port *c, Port port, bint any_shape) except -1
    cdef int warm(self) except -1
    cdef int refused(self, int64_t ns) except -1      # one that was turned away counts as failed
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
        readonly bytes   json_head    # after finish(): the answer's JSON, or its header where parts follow
        readonly bint    binary       # raw parts follow json_head
        readonly int     n_parts

        ServedModel      model
        Request          request
        object           owner        # what the inputs lie in, where the caller gave objects
        const char      *id           # JSON text between the quotes, or NULL
        size_t           id_n
        bint             plain        # no JSON is made of the answer
        char            *scratch      # one block: data, out, and what run() needs
        size_t           scratch_cap
        const char     **data         # where each input begins
        ps_tensor       *out          # one per wanted output
        char            *work         # the rest of the block
        ps_onnx_result  *result
        char            *text         # why it failed
        int64_t          begun, decoded, started, ended

    @staticmethod
    cdef InferCall of_http(ServedModel model, const char *body, size_t n, int64_t header_length)
    @staticmethod
    cdef InferCall of_raw(ServedModel model, const char *data, size_t n)
    @staticmethod
    cdef InferCall of_parts(ServedModel model, list inputs, list outputs)
    cdef int settle(self, ServedModel model, Request request) except -1
    cdef int look(self) except -1
    cdef void run(self) noexcept nogil
    cdef int run_trees(self) noexcept nogil
    cdef bint wants_label(self) noexcept nogil
    cdef void put_scores(self, ps_tensor *out, uint8_t dtype, double *scores) noexcept nogil
    cdef void put_labels(self, ps_tensor *out, const int32_t *labels, char *texts) noexcept nogil
    cdef int run_session(self) noexcept nogil
    cdef int fail(self, int status, const char *text) noexcept nogil
    cdef int finish(self) except -1
    cdef int classify(self) except -1
    cdef bytes describe(self)
    cdef int answer(self) except -1
    cdef const char *part(self, int i, size_t *n) noexcept nogil
    cdef list parts_list(self)
