# infer.pyx (hot path): one inference of the Open Inference Protocol, bytes in, bytes out.
#
# A request's JSON header is read by infer_request.h and remembered by its bytes: a client that sends the same header
# again pays a hash and a comparison. Tensors are read where they lie. Tree ensembles run in our kernel, rows of doubles
# in and out; other ONNX graphs run as they are, the whole batch in one session run. What must stay true: a pointer into
# a request's bytes is used only between of_http() and the end of the call; run() touches no Python object.
#
# NaN and infinities have no JSON form: in JSON data they are null; binary data has all bits.
"""Models behind the Open Inference Protocol: ServedModel answers requests, InferCall is one of them."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM
from libc.stdint cimport INT64_MAX, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

import json
import os
import time

from penstock._ext.trees cimport tree_labels, tree_labels_literal

from penstock.errors import PenstockError


cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t n)

cdef extern from "shortest.h" nogil:
    enum:
        PS_POWER_MIN
        PS_POWER_MAX
    void ps_shortest_set(int k, uint64_t high, uint64_t low)

cdef extern from "http_head.h" nogil:
    uint64_t ps_http_hash(const char *p, size_t n)

cdef extern from "onnx_session.h" nogil:
    enum:
        PS_ONNX_ERROR_BYTES

cdef extern from "tensor.h" nogil:
    enum:
        PS_TENSOR_RANK
        PS_DT_FP32
        PS_DT_FP64
        PS_DT_INT64
        PS_DT_BYTES
    ctypedef struct dtype_info:
        const char *name
        uint8_t n
        uint8_t size
        uint8_t onnx
    dtype_info *ps_dtypes
    ctypedef struct ps_writer:
        char *p
        size_t n
        size_t cap
    int ps_dtype_of_name(const char *p, size_t n)
    int ps_dtype_of_onnx(int32_t type)
    int64_t ps_ticks()
    int64_t ps_to_doubles(int dtype, const char *source, int64_t n, double *to)
    void ps_to_floats(double *x, int64_t n)
    int ps_write(ps_writer *w, const char *p, size_t n)
    int64_t ps_write_int(ps_writer *w, int64_t value)
    int ps_write_values(ps_writer *w, const ps_tensor *t)
    int ps_classify(const ps_tensor *source, int64_t rows, int64_t k, int batched, ps_tensor *to)

cdef extern from "infer_request.h" nogil:
    ctypedef struct ps_fault:
        int status
        char text[600]
    ps_request *ps_request_new(const ps_ports *ports)
    void ps_request_free(ps_request *r)
    int ps_request_read(const ps_ports *ports, ps_request *r, const char *begin, const char *p, const char *end,
                        int opened, ps_fault *fault)
    int ps_request_raw(const ps_ports *ports, ps_request *r, const char *data, size_t n, ps_fault *fault)
    int ps_request_settle(const ps_ports *ports, ps_request *r, int binary_default, ps_fault *fault)
    int ps_request_look(const ps_ports *ports, const ps_request *r, const char **data, ps_fault *fault)
    int ps_check_shape(const ps_ports *ports, const ps_port *port, ps_input *tensor, int index, ps_fault *fault)
    int ps_check_dtype(const ps_ports *ports, const ps_port *port, int dtype, int index, ps_fault *fault)


cdef enum:
    REMEMBERED_BYTES = 4096       # a longer header is not remembered
    BLOCKS = 64                   # blocks kept between calls
    BLOCK_BYTES = 8192            # the least that a block holds
    BLOCK_KEPT = 1048576          # a larger one is given back
    CHUNK_DOUBLES = 32768         # of input rows that are converted at a time

cdef size_t MOST_BYTES = <size_t>1 << 31    # that one call may need beside its request
cdef double LONG_CALL_NS = 50000.0          # a longer call lets others run meanwhile (Python's infer)


def _make_powers():
    """10^k for shortest.h, of which every module that includes it has a table of its own; see decision.pyx."""
    for k in range(PS_POWER_MIN, PS_POWER_MAX + 1):
        power = 10 ** abs(k)
        if k >= 0:
            shift = power.bit_length() - 128
            scaled = -(-power >> shift) if shift > 0 else power << -shift
        else:
            scaled = (1 << (127 + power.bit_length())) // power + 1
        ps_shortest_set(k, scaled >> 64, scaled & 0xFFFFFFFFFFFFFFFF)


_make_powers()

# What a tick is worth, by the clock: the longer the process lives, the more exact.
cdef int64_t FIRST_TICK = ps_ticks()
cdef int64_t FIRST_NS = time.monotonic_ns()


def nanoseconds_per_tick():
    """What one unit of the models' sums of time is worth."""
    return tick_ns()


cdef double tick_ns():
    cdef int64_t ticks = ps_ticks() - FIRST_TICK
    cdef int64_t ns = time.monotonic_ns() - FIRST_NS
    if ns < 20000000:
        time.sleep(0.02)
        ticks = ps_ticks() - FIRST_TICK
        ns = time.monotonic_ns() - FIRST_NS
    return <double>ns / <double>ticks


class InferError(PenstockError):
    """A request that is refused, or a model that failed: an HTTP status, and a text that says where and why."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status
        self.message = message


cdef object fault_error(ps_fault *fault):
    return InferError(fault.status, (<bytes>fault.text).decode(errors="replace"))


# ---- Blocks: what a call needs beside its request, kept from call to call. Touched with the GIL only. ----

cdef char *blocks[BLOCKS]
cdef size_t block_caps[BLOCKS]
cdef int n_blocks = 0
cdef ps_writer writer


cdef char *take_block(size_t n, size_t *cap) except NULL:
    global n_blocks
    cdef char *block
    if n_blocks > 0 and block_caps[n_blocks - 1] >= n:
        n_blocks -= 1
        cap[0] = block_caps[n_blocks]
        return blocks[n_blocks]
    if n > MOST_BYTES:
        raise InferError(413, f"the request needs {n} bytes of memory, more than {MOST_BYTES}")
    n = (max(n, <size_t>BLOCK_BYTES) + 4095) // 4096 * 4096
    block = <char *>aligned_alloc(64, n)
    if block == NULL:
        raise InferError(503, f"out of memory for {n} bytes")
    cap[0] = n
    return block


cdef void give_block(char *block, size_t cap) noexcept:
    global n_blocks
    if cap > BLOCK_KEPT or n_blocks == BLOCKS:
        free(block)
        return
    blocks[n_blocks] = block
    block_caps[n_blocks] = cap
    n_blocks += 1


cdef inline int put(const char *text) noexcept:
    return ps_write(&writer, text, strlen(text))


# ---- Models ----

@cython.final
cdef class Port:
    def __init__(self, str name, str datatype, tuple shape):
        self.name = name
        self.datatype = datatype
        self.shape = shape

    def __repr__(self):
        return f"Port({self.name!r}, {self.datatype!r}, {self.shape!r})"

    def as_dict(self):
        """As the protocol's metadata has it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@cython.final
@cython.no_gc
@cython.freelist(16)
cdef class Request:
    def __dealloc__(self):
        ps_request_free(self.c)
        free(self.shapes)


cdef str datatype_name(int dtype):
    return ps_dtypes[dtype].name.decode()


def _tree_ports(runtime, path):
    """Names, datatypes and shapes of a tree ensemble, by its file; or as its loader has found them."""
    from penstock.models.trees import tree_ports

    found = getattr(runtime, "ports", None)
    return tree_ports(path, runtime.n_inputs, runtime.n_outputs) if found is None else found


def _graph_ports(ports, label, what):
    """Those of a session that are tensors."""
    found = []
    for port in ports:
        dtype = ps_dtype_of_onnx(port["type"]) if port["tensor"] else -1
        if dtype < 0:
            if what == "input":
                raise ValueError(f"{label}: input {port['name']} is no tensor of a datatype that the protocol has")
            continue
        if port["rank"] > PS_TENSOR_RANK:
            raise ValueError(f"{label}: {what} {port['name']} has {port['rank']} dimensions, more than {PS_TENSOR_RANK}")
        found.append((port, Port(port["name"], datatype_name(dtype), tuple(port["dims"]))))
    return found


@cython.final
cdef class ServedModel:
    """A loaded model behind the Open Inference Protocol.

    runtime: what models.runtime.load gives; None for an ONNX file that is to run as it is, whatever its tensors are.
    path: the model's file; an ONNX graph that is no tree ensemble is opened from it, or from `data`, its bytes, whose
    external tensors are in `folder`. Raises ValueError or OnnxError.
    """

    def __init__(self, str name, str version, runtime, *, path=None, data=None, folder=None):
        if self.ports.inputs != NULL:
            raise RuntimeError("ServedModel is already made")
        self.name = name
        self.version = version
        self.runtime = runtime
        self.remembered = [None] * REMEMBERED
        self.texts = []
        path = None if path is None else os.fspath(path)
        label = f"model {name}"
        places = None
        self.label_port = -1
        if runtime is not None and runtime.kind == "trees":
            self.platform = "penstock_trees"
            self.trees = <const ps_model *><uintptr_t>runtime.abi
            found = _tree_ports(runtime, path)
            inputs = [Port(found.input[0], found.input[1], (-1, found.input[2]))]
            outputs = [Port(found.output[0], found.output[1], (-1, found.output[2]))]
            if found.label is not None:
                self.set_classes(list(found.labels))
                outputs.insert(0, Port(found.label, "BYTES" if isinstance(found.labels[0], str) else "INT64", (-1,)))
            self.fixed_shapes = outputs[0].datatype != "BYTES"
            self.nbytes = getattr(runtime.model, "nbytes", 0)
            self.batched = True
            shaped = [True]
        else:
            if path is None and data is None:
                raise ValueError(f"{label}: an ONNX model is opened from its file; give path=")
            self.platform = "onnxruntime_onnx"
            self.session = OnnxTensors(path if data is None else data, external_folder=folder, name=label)
            ports = self.session.ports()
            found = _graph_ports(ports["inputs"], label, "input")
            inputs = [port for _, port in found]
            shaped = [bool(port["rank"]) for port, _ in found]
            found = _graph_ports(ports["outputs"], label, "output")
            outputs = [port for _, port in found]
            places = [i for i, port in enumerate(ports["outputs"]) if any(port is p for p, _ in found)]
            if not outputs:
                raise ValueError(f"{label}: none of its outputs is a tensor")
            self.batched = bool(inputs) and all(port.shape and port.shape[0] == -1 for port in inputs)
            self.nbytes = os.stat(path).st_size if data is None else len(data)
            self.runtime = None
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.label = f'"model_name":{json.dumps(name)},"model_version":{json.dumps(version)},"outputs":['.encode()
        self.ports.n_in = len(inputs)
        self.ports.n_out = len(outputs)
        self.ports.any_number = self.trees != NULL
        self.ports.batched = self.batched
        self.ports.inputs = <ps_port *>calloc(len(inputs) + 1, sizeof(ps_port))
        self.ports.outputs = <ps_port *>calloc(len(outputs) + 1, sizeof(ps_port))
        self.place_of = <int32_t *>calloc(len(outputs) + 1, sizeof(int32_t))
        if self.ports.inputs == NULL or self.ports.outputs == NULL or self.place_of == NULL:
            raise MemoryError
        for i in range(len(inputs)):
            self.set_port(&self.ports.inputs[i], inputs[i], not shaped[i])
        for i in range(len(outputs)):
            self.set_port(&self.ports.outputs[i], outputs[i], False)
            self.place_of[i] = i if places is None else places[i]
        self.warm()

    cdef int set_port(self, ps_port *c, Port port, bint any_shape) except -1:
        cdef bytes name = port.name.encode()
        cdef bytes text = json.dumps(port.name, ensure_ascii=False).encode()
        cdef bytes datatype = port.datatype.encode()
        self.texts += [name, text]
        c.name = name
        c.name_n = len(name)
        c.json = text
        c.json_n = len(text)
        c.dtype = ps_dtype_of_name(datatype, len(datatype))
        c.rank = len(port.shape)
        c.any_shape = any_shape
        for i in range(len(port.shape)):
            c.dims[i] = port.shape[i] if port.shape[i] >= 0 else -1
        return 0

    cdef int set_classes(self, list labels) except -1:
        """What the label output says of each class."""
        cdef Py_ssize_t i
        if len(labels) != <Py_ssize_t>self.trees.n_outputs:
            raise ValueError(f"model {self.name}: {len(labels)} labels for {self.trees.n_outputs} classes")
        if not isinstance(labels[0], str):
            if tree_labels_literal(self.trees):
                labels = [0, 1]
            self.class_texts = [int(k).to_bytes(8, "little", signed=True) for k in labels]
        else:
            self.class_texts = [len(text).to_bytes(4, "little") + text for text in [k.encode() for k in labels]]
        self.classes = <const char **>calloc(len(labels), sizeof(char *))
        if self.classes == NULL:
            raise MemoryError
        for i in range(len(labels)):
            self.classes[i] = PyBytes_AS_STRING(self.class_texts[i])
        self.class_bytes = max([len(text) for text in self.class_texts])
        self.label_port = 0
        return 0

    def __dealloc__(self):
        free(self.classes)
        free(self.ports.inputs)
        free(self.ports.outputs)
        free(self.place_of)

    cdef int warm(self) except -1:
        """A few single rows of zeros: what is made lazily is made, and row_ns is known. A graph may refuse zeros."""
        cdef InferCall call
        cdef int i
        cdef int64_t start, took, best = INT64_MAX
        zeros = []
        for port in self.inputs:
            shape = [1 if d < 0 else d for d in port.shape]
            count = 1
            for d in shape:
                count *= d
            encoded = port.datatype.encode()
            size = ps_dtypes[ps_dtype_of_name(encoded, len(encoded))].size or 4
            if count * size > 1 << 28:
                return 0
            zeros.append((port.name, port.datatype, shape, bytes(count * size)))
        for i in range(5):
            call = InferCall.of_parts(self, zeros, None)
            with nogil:
                start = ps_ticks()
                call.run()
                took = ps_ticks() - start
            if call.failed:
                return 0
            best = min(best, took)
        self.row_ns = max(1, <int64_t>(<double>best * tick_ns()))
        return 0

    def infer(self, inputs, outputs=None):
        """inputs: [(name, datatype, shape, raw bytes)]; outputs: names, None for all.

        Returns [(name, datatype, shape, raw bytes)]. Raises InferError.
        """
        cdef InferCall call = InferCall.of_parts(self, list(inputs), None if outputs is None else list(outputs))
        run_here(call)
        return call.parts_list()

    def infer_http(self, bytes body, int64_t header_length=-1):
        """The answer's JSON, and the raw tensors that follow it. header_length as in Inference-Header-Content-Length."""
        cdef InferCall call = InferCall.of_http(self, PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), header_length)
        cdef size_t n
        cdef const char *p
        run_here(call)
        parts = []
        for i in range(call.n_parts):
            p = call.part(i, &n)
            parts.append(PyBytes_FromStringAndSize(p, n))
        return call.json_head, parts

    def infer_raw(self, bytes data):
        """One raw tensor in, all outputs as infer() gives them."""
        cdef InferCall call = InferCall.of_raw(self, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        run_here(call)
        return call.parts_list()

    def _repeat(self, list bodies, int64_t header_length):
        """One request after the other, bytes to bytes with no Python between: for the benchmark."""
        cdef InferCall call
        cdef bytes body
        cdef size_t n = 0
        for body in bodies:
            call = InferCall.of_http(self, PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), header_length)
            call.run()
            call.finish()
            if call.n_parts:
                call.part(0, &n)

    def _repeat_trees(self, list rows):
        """The trees alone, one row of doubles after the other: the floor of _repeat."""
        cdef bytes row
        cdef double out[64]
        if self.trees == NULL or self.trees.n_outputs > 64:
            raise ValueError("a tree ensemble of up to 64 outputs was expected")
        for row in rows:
            if <size_t>PyBytes_GET_SIZE(row) != 8 * self.trees.n_inputs:
                raise ValueError("a row of doubles was expected")
            self.trees.predict(self.trees, <const double *>PyBytes_AS_STRING(row), 1, self.trees.n_inputs, out)

    cdef int refused(self, int64_t ns) except -1:
        self.n_fail += 1
        self.t_fail += <int64_t>(<double>ns / tick_ns())
        return 0

    cpdef dict stats(self):
        """The model's entry in the answer of the statistics extension."""
        cdef double ns = tick_ns()
        cdef int i
        ago = <double>(ps_ticks() - self.last) * ns / 1e6
        batches = []
        for _, i in sorted([(self.batches[i].rows, i) for i in range(self.n_batches)]):
            batches.append({
                "batch_size": self.batches[i].rows,
                "compute_input": counted(self.batches[i].count, self.batches[i].input, ns),
                "compute_infer": counted(self.batches[i].count, self.batches[i].infer, ns),
                "compute_output": counted(self.batches[i].count, self.batches[i].output, ns),
            })
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": 0 if self.last == 0 else max(0, int(time.time() * 1000 - ago)),
            "inference_count": self.n_rows,
            "execution_count": self.n_runs,
            "inference_stats": {
                "success": counted(self.n_success, self.t_success, ns),
                "fail": counted(self.n_fail, self.t_fail, ns),
                "queue": counted(self.n_success, self.t_queue, ns),
                "compute_input": counted(self.n_success, self.t_input, ns),
                "compute_infer": counted(self.n_success, self.t_infer, ns),
                "compute_output": counted(self.n_success, self.t_output, ns),
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "response_stats": {},
            "batch_stats": batches,
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": self.nbytes}] if self.nbytes else [],
        }


cdef dict counted(int64_t count, int64_t ticks, double ns):
    return {"count": count, "ns": max(<int64_t>0, <int64_t>(<double>ticks * ns))}


cdef int run_here(InferCall call) except -1:
    if <double>call.model.row_ns * <double>call.rows > LONG_CALL_NS:
        with nogil:
            call.run()
    else:
        call.run()
    call.finish()
    return 0


@cython.final
cdef class Target:
    def __init__(self, str name, str version="", Lane lane=None):
        self.name = name
        self.version = version
        self.lane = lane

    def __repr__(self):
        return f"Target({self.name!r}, {self.version!r}, model={self.model!r})"


# ---- One request ----

cdef inline int score_rows(const ps_model *trees, const double *x, size_t rows, size_t stride, double *out,
                           int32_t *labels) noexcept nogil:
    if labels == NULL:
        return trees.predict(trees, x, rows, stride, out)
    return tree_labels(trees, x, rows, stride, out, labels)


cdef object bad_body(size_t n, int64_t header, ps_request *r, bint given):
    if not given:
        return InferError(400, f"binary_data_size names {r.binary_bytes} bytes, and the header field "
                               "Inference-Header-Content-Length is missing")
    return InferError(400, f"body: expected {r.binary_bytes} bytes of binary data after the JSON header of {header}, "
                           f"got {n - header}")


cdef Request read_request(ServedModel model, const char *body, size_t n, const char *at, bint opened):
    cdef Request request = Request.__new__(Request)
    cdef ps_fault fault
    request.c = ps_request_new(&model.ports)
    if request.c == NULL:
        raise InferError(503, "out of memory")
    if ps_request_read(&model.ports, request.c, body, at, body + n, opened, &fault):
        raise fault_error(&fault)
    return request


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class InferCall:
    def __dealloc__(self):
        if self.result != NULL:
            self.model.session.release(self.result)
        if self.scratch != NULL:
            give_block(self.scratch, self.scratch_cap)
        free(self.text)

    @staticmethod
    cdef InferCall of_http(ServedModel model, const char *body, size_t n, int64_t header_length):
        cdef InferCall call
        cdef Request request
        cdef const char *at = body
        cdef const char *p
        cdef const char *start = NULL
        cdef size_t header = n
        cdef size_t length
        cdef uint64_t hash
        cdef bint opened = False
        cdef int64_t begun = ps_ticks()
        cdef int i
        if header_length >= 0:
            if <uint64_t>header_length > n:
                raise InferError(400, f"Inference-Header-Content-Length: {header_length}, of a body of {n} bytes")
            if header_length == 0:
                call = InferCall.of_raw(model, body, n)
                call.plain = False
                call.begun = begun
                return call
            header = header_length
        # An id that stands first is told apart from the rest, which then is the same from request to request.
        if header > 10 and memcmp(body, b'{"id":', 6) == 0:
            p = body + 6 + (body[6] == c" ")
            start = p + 1
            p = start if p[0] == c'"' else body + header - 2
            while p < body + header - 2 and 32 <= p[0] < 127 and p[0] != c'"' and p[0] != c'\\':
                p += 1
            if p[0] == c'"' and p[1] == c',' and p < body + header - 2:
                opened = True
                at = p + 2
        length = body + header - at
        hash = 0
        if length <= REMEMBERED_BYTES:
            hash = ps_http_hash(at, length) ^ opened   # without its beginning the same text would be no request
            request = <Request>PyList_GET_ITEM(model.remembered, <Py_ssize_t>(hash % REMEMBERED))
            if (request is None or request.hash != hash or <size_t>PyBytes_GET_SIZE(request.source) != length
                    or memcmp(PyBytes_AS_STRING(request.source), at, length) != 0):
                request = None
        else:
            request = None
        if request is None:
            request = read_request(model, body, header, at, opened)
            if request.c.values == NULL and length <= REMEMBERED_BYTES:
                request.source = PyBytes_FromStringAndSize(at, length)
                request.hash = hash
                if request.c.id != NULL:
                    request.c.id = PyBytes_AS_STRING(request.source) + (request.c.id - at)
                model.remembered[hash % REMEMBERED] = request
        if n - header != request.c.binary_bytes:
            raise bad_body(n, header, request.c, header_length >= 0)
        call = InferCall.__new__(InferCall)
        call.begun = begun
        call.settle(model, request)
        for i in range(model.ports.n_in):
            if request.c.inputs[i].inside:
                call.data[i] = request.c.values + request.c.inputs[i].at
            else:
                call.data[i] = body + header + request.c.inputs[i].at
        if opened:
            call.id = start
            call.id_n = at - 2 - start
        else:
            call.id = request.c.id
            call.id_n = request.c.id_n
        if request.c.look:
            call.look()
        call.decoded = ps_ticks()
        return call

    @staticmethod
    cdef InferCall of_raw(ServedModel model, const char *data, size_t n):
        cdef InferCall call = InferCall.__new__(InferCall)
        cdef Request request = Request.__new__(Request)
        cdef ps_fault fault
        call.begun = ps_ticks()
        request.c = ps_request_new(&model.ports)
        if request.c == NULL:
            raise InferError(503, "out of memory")
        if ps_request_raw(&model.ports, request.c, data, n, &fault):
            raise fault_error(&fault)
        call.settle(model, request)
        call.data[0] = data
        if request.c.look:
            call.look()
        call.plain = True
        call.decoded = ps_ticks()
        return call

    @staticmethod
    cdef InferCall of_parts(ServedModel model, list inputs, list outputs):
        cdef InferCall call = InferCall.__new__(InferCall)
        cdef Request request = Request.__new__(Request)
        cdef ps_fault fault
        cdef ps_ports *ports = &model.ports
        cdef ps_input *c
        cdef ps_request *r
        cdef bytes text, raw
        cdef int i, k, d, dtype
        cdef size_t size
        call.begun = ps_ticks()
        request.c = r = ps_request_new(ports)
        if r == NULL:
            raise InferError(503, "out of memory")
        kept = [None] * ports.n_in
        for k, (name, datatype, shape, data) in enumerate(inputs):
            i = port_of(ports.inputs, ports.n_in, name)
            if i < 0:
                raise InferError(400, f"inputs[{k}].name: no input is called {name!r}; expected "
                                      f"{', '.join(port.name for port in model.inputs)}")
            c = &r.inputs[i]
            if c.given:
                raise InferError(400, f"inputs[{k}].name: {name!r} is given twice")
            text = str(datatype).encode(errors="replace")
            dtype = ps_dtype_of_name(text, len(text))
            if dtype < 0:
                raise InferError(400, f"inputs[{k}].datatype: there is no {datatype!r}")
            if len(shape) > PS_TENSOR_RANK:
                raise InferError(400, f"inputs[{k}].shape: more than {PS_TENSOR_RANK} dimensions")
            c.dtype = dtype
            c.rank = len(shape)
            for d in range(c.rank):
                if not 0 <= shape[d] <= INT64_MAX:
                    raise InferError(400, f"inputs[{k}].shape: expected an integer of 0 or more")
                c.dims[d] = shape[d]
            if ps_check_dtype(ports, &ports.inputs[i], dtype, k, &fault) or ps_check_shape(ports, &ports.inputs[i], c, k, &fault):
                raise fault_error(&fault)
            raw = data if type(data) is bytes else bytes(data)
            size = ps_dtypes[dtype].size
            if size and <size_t>PyBytes_GET_SIZE(raw) != <size_t>c.count * size:
                raise InferError(400, f"inputs[{k}]: expected {c.count * size} bytes for {datatype} {list(shape)}, "
                                      f"got {len(raw)}")
            c.bytes = PyBytes_GET_SIZE(raw)
            c.given = 1
            if size == 0 or ps_dtypes[dtype].name[0] == c"B" and size == 1:
                r.look = 1
            kept[i] = raw
        for k, name in enumerate(outputs or ()):
            i = port_of(ports.outputs, ports.n_out, name)
            if i < 0:
                raise InferError(400, f"outputs[{k}].name: no output is called {name!r}; expected "
                                      f"{', '.join(port.name for port in model.outputs)}")
            for d in range(r.n_out):
                if r.outputs[d].port == i:
                    raise InferError(400, f"outputs[{k}].name: {name!r} is asked for twice")
            r.outputs[r.n_out].port = i
            r.outputs[r.n_out].binary = 1
            r.n_out += 1
        if ps_request_settle(ports, r, 1, &fault):
            raise fault_error(&fault)
        call.owner = kept
        call.settle(model, request)
        for i in range(ports.n_in):
            call.data[i] = PyBytes_AS_STRING(kept[i])
        if r.look:
            call.look()
        call.plain = True
        call.decoded = ps_ticks()
        return call

    cdef int settle(self, ServedModel model, Request request) except -1:
        """Takes a block for the call: data, out, then what run() needs."""
        cdef ps_request *r = request.c
        cdef ps_ports *ports = &model.ports
        cdef size_t n_in = ports.n_in, n_out = r.n_out
        cdef size_t start = (n_in * sizeof(char *) + n_out * sizeof(ps_tensor) + 63) // 64 * 64
        cdef size_t need = start
        cdef size_t width, rows, chunk
        cdef size_t i
        self.model = model
        self.request = request
        self.rows = r.rows
        self.timeout_us = r.timeout_us
        self.priority = r.priority
        if model.trees != NULL:
            rows = r.rows
            width = model.trees.n_outputs
            if rows > MOST_BYTES // 8 // max(width, <size_t>1):
                raise InferError(413, f"{rows} rows: their answer is more than {MOST_BYTES} bytes")
            need += (rows * width * 8 + 63) // 64 * 64
            if self.wants_label():
                if rows > MOST_BYTES // (self.model.class_bytes + 4):
                    raise InferError(413, f"{rows} rows: their labels are more than {MOST_BYTES} bytes")
                need += (rows * 4 + 63) // 64 * 64 + (rows * self.model.class_bytes + 63) // 64 * 64
            chunk = max(<size_t>1, CHUNK_DOUBLES // max(model.trees.n_inputs, <uint32_t>1))
            need += min(rows, chunk) * model.trees.n_inputs * 8
        else:
            need += (n_in * sizeof(ps_tensor) + n_out * sizeof(int32_t) + 63) // 64 * 64
            for i in range(n_in):
                if r.inputs[i].dtype != PS_DT_BYTES:
                    need += (r.inputs[i].bytes + 63) // 64 * 64
        self.scratch = take_block(need, &self.scratch_cap)
        self.data = <const char **>self.scratch
        self.out = <ps_tensor *>(self.scratch + n_in * sizeof(char *))
        self.work = self.scratch + start
        return 0

    cdef bint wants_label(self) noexcept nogil:
        cdef int i
        if self.model.label_port >= 0:
            for i in range(self.request.c.n_out):
                if self.request.c.outputs[i].port == self.model.label_port:
                    return True
        return False

    cdef int look(self) except -1:
        cdef ps_fault fault
        if ps_request_look(&self.model.ports, self.request.c, self.data, &fault):
            raise fault_error(&fault)
        return 0

    cdef void run(self) noexcept nogil:
        self.started = ps_ticks()
        if self.model.trees != NULL:
            self.run_trees()
        else:
            self.run_session()
        self.ended = ps_ticks()

    cdef int run_trees(self) noexcept nogil:
        cdef const ps_model *trees = self.model.trees
        cdef ps_input *source = &self.request.c.inputs[0]
        cdef size_t rows = self.rows, n = trees.n_inputs, width = trees.n_outputs
        cdef double *scores = <double *>self.work
        cdef char *rest = self.work + (rows * width * 8 + 63) // 64 * 64
        cdef int32_t *labels = NULL
        cdef char *texts = NULL
        cdef double *x
        cdef const char *data = self.data[0]
        cdef size_t size = ps_dtypes[source.dtype].size
        cdef size_t done = 0, some, chunk
        cdef int code = 0, i
        cdef int64_t bad
        if self.wants_label():
            labels = <int32_t *>rest
            texts = rest + (rows * 4 + 63) // 64 * 64
            rest = texts + (rows * self.model.class_bytes + 63) // 64 * 64
        x = <double *>rest
        if source.dtype == PS_DT_FP64 and <uintptr_t>data % 8 == 0:
            if rows:
                code = score_rows(trees, <const double *>data, rows, n, scores, labels)
        else:
            chunk = max(<size_t>1, CHUNK_DOUBLES // max(n, <size_t>1))
            while done < rows and code == 0:
                some = min(rows - done, chunk)
                bad = ps_to_doubles(source.dtype, data + done * n * size, some * n, x)
                if bad >= 0:
                    return self.fail(400, b"an element of the input has no exact double: expected BOOL of 0 or 1, "
                                          b"integers up to 2^53")
                code = score_rows(trees, x, some, n, scores + done * width, NULL if labels == NULL else labels + done)
                done += some
        if code != 0:
            return self.fail(503, b"out of memory while scoring")
        for i in range(self.request.c.n_out):
            if self.request.c.outputs[i].port == self.model.label_port:
                self.put_labels(&self.out[i], labels, texts)
            else:
                self.put_scores(&self.out[i], self.model.ports.outputs[self.request.c.outputs[i].port].dtype, scores)
        return 0

    cdef void put_scores(self, ps_tensor *out, uint8_t dtype, double *scores) noexcept nogil:
        cdef size_t width = self.model.trees.n_outputs, count = self.rows * width
        if dtype == PS_DT_FP32:
            ps_to_floats(scores, count)
        out.dtype = dtype
        out.data = <const char *>scores
        out.count = count
        out.bytes = count * ps_dtypes[dtype].size
        out.rank = 2
        out.dims[0] = self.rows
        out.dims[1] = width

    cdef void put_labels(self, ps_tensor *out, const int32_t *labels, char *texts) noexcept nogil:
        cdef const char **classes = self.model.classes
        cdef bint text = not self.model.fixed_shapes
        cdef char *to = texts
        cdef uint32_t length
        cdef size_t n = 8
        cdef int64_t r
        for r in range(self.rows):
            if text:
                memcpy(&length, classes[labels[r]], 4)
                n = 4 + <size_t>length
            memcpy(to, classes[labels[r]], n)
            to += n
        out.dtype = PS_DT_BYTES if text else PS_DT_INT64
        out.data = texts
        out.count = self.rows
        out.bytes = to - texts
        out.rank = 1
        out.dims[0] = self.rows

    cdef int run_session(self) noexcept nogil:
        cdef char error[PS_ONNX_ERROR_BYTES]
        cdef size_t n_in = self.model.ports.n_in, n_out = self.request.c.n_out, i
        cdef ps_tensor *tensors = <ps_tensor *>self.work
        cdef int32_t *places = <int32_t *>(self.work + n_in * sizeof(ps_tensor))
        cdef char *copies = self.work + (n_in * sizeof(ps_tensor) + n_out * sizeof(int32_t) + 63) // 64 * 64
        cdef ps_input *source
        cdef size_t size
        cdef int code
        for i in range(n_in):
            source = &self.request.c.inputs[i]
            tensors[i].data = self.data[i]
            tensors[i].bytes = source.bytes
            tensors[i].count = source.count
            memcpy(tensors[i].dims, source.dims, sizeof(source.dims))
            tensors[i].dtype = source.dtype
            tensors[i].rank = source.rank
            size = ps_dtypes[source.dtype].size
            if size > 1 and <uintptr_t>self.data[i] % size:
                memcpy(copies, self.data[i], source.bytes)
                tensors[i].data = copies
                copies += (source.bytes + 63) // 64 * 64
        for i in range(n_out):
            places[i] = self.model.place_of[self.request.c.outputs[i].port]
        code = self.model.session.run(tensors, places, n_out, self.out, &self.result, error)
        if code != 0:
            return self.fail(code, error)
        return 0

    cdef int fail(self, int status, const char *text) noexcept nogil:
        cdef size_t n = strlen(text)
        self.failed = status
        self.text = <char *>malloc(n + 1)
        if self.text != NULL:
            memcpy(self.text, text, n + 1)
        return -1

    cdef int finish(self) except -1:
        cdef ServedModel model = self.model
        cdef ps_request *r = self.request.c
        cdef BatchCount *batch
        cdef int64_t start = ps_ticks(), now
        cdef int i
        model.n_runs += 1
        model.last = start
        try:
            if self.failed:
                message = "out of memory" if self.text == NULL else (<bytes>self.text).decode(errors="replace")
                raise InferError(self.failed, message)
            if r.any_classes:
                self.classify()
            self.answer()
        except BaseException:
            model.n_fail += 1
            model.t_fail += ps_ticks() - self.begun
            raise
        now = ps_ticks()
        model.n_success += 1
        model.n_rows += max(self.rows, <int64_t>1)
        model.t_success += now - self.begun
        model.t_queue += self.started - self.decoded
        model.t_input += self.decoded - self.begun
        model.t_infer += self.ended - self.started
        model.t_output += now - start
        for i in range(model.n_batches):
            if model.batches[i].rows == self.rows:
                break
        else:
            i = model.n_batches
            if i == BATCH_SIZES:
                return 0
            model.n_batches += 1
            model.batches[i].rows = self.rows
        batch = &model.batches[i]
        batch.count += 1
        batch.input += self.decoded - self.begun
        batch.infer += self.ended - self.started
        batch.output += now - start
        return 0

    cdef int classify(self) except -1:
        """Puts texts "value:index" in the place of the outputs that ask for them."""
        cdef ps_request *r = self.request.c
        cdef ps_tensor made
        cdef int64_t rows
        cdef bint batched
        cdef int i
        cdef bytes text
        cdef list kept = []
        for i in range(r.n_out):
            if r.outputs[i].classes == 0 or self.out[i].dtype == PS_DT_BYTES:
                continue
            batched = self.model.batched and self.out[i].rank > 1
            rows = self.out[i].dims[0] if batched else 1
            if ps_classify(&self.out[i], rows, r.outputs[i].classes, batched, &made):
                raise InferError(503, "out of memory")
            text = PyBytes_FromStringAndSize(made.data, made.bytes)
            free(<void *>made.data)
            kept.append(text)
            made.data = PyBytes_AS_STRING(text)
            self.out[i] = made
        self.owner = (self.owner, kept)
        return 0

    cdef int answer(self) except -1:
        """Makes json_head, or takes it from the request where it is remembered for the same shapes."""
        cdef Request request = self.request
        cdef ps_request *r = request.c
        cdef bytes rest
        cdef int i
        cdef bint same
        cdef char *to
        if self.plain:
            self.n_parts = r.n_out
            self.binary = True
            return 0
        self.binary = r.any_binary
        if r.any_json or r.any_classes:
            rest = self.describe()
            for i in range(r.n_out):
                self.n_parts += r.outputs[i].binary
        else:
            self.n_parts = r.n_out
            same = request.answer is not None
            if same and not self.model.fixed_shapes:
                for i in range(r.n_out):
                    same = same and (self.out[i].rank == request.shapes[i].rank
                                     and self.out[i].bytes == request.shapes[i].bytes
                                     and memcmp(self.out[i].dims, request.shapes[i].dims, self.out[i].rank * 8) == 0)
            if not same:
                if request.shapes == NULL:
                    request.shapes = <ps_tensor *>malloc(r.n_out * sizeof(ps_tensor))
                    if request.shapes == NULL:
                        raise InferError(503, "out of memory")
                request.answer = self.describe()
                request.whole = b"{" + request.answer
                memcpy(request.shapes, self.out, r.n_out * sizeof(ps_tensor))
            if self.id == NULL:
                self.json_head = request.whole
                return 0
            rest = request.answer
        if self.id == NULL:
            self.json_head = b"{" + rest
            return 0
        self.json_head = PyBytes_FromStringAndSize(NULL, 9 + self.id_n + PyBytes_GET_SIZE(rest))
        to = PyBytes_AS_STRING(self.json_head)
        memcpy(to, b'{"id":"', 7)
        memcpy(to + 7, self.id, self.id_n)
        memcpy(to + 7 + self.id_n, b'",', 2)
        memcpy(to + 9 + self.id_n, PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))
        return 0

    cdef bytes describe(self):
        """The answer's JSON after its brace (and id)."""
        cdef ps_request *r = self.request.c
        cdef ps_tensor *t
        cdef ps_port *port
        cdef bytes text
        cdef int i, d, code
        cdef int64_t bad = 0
        writer.n = 0
        bad |= ps_write(&writer, PyBytes_AS_STRING(self.model.label), PyBytes_GET_SIZE(self.model.label))
        for i in range(r.n_out):
            t = &self.out[i]
            port = &self.model.ports.outputs[r.outputs[i].port]
            bad |= put(b',{"name":') if i else put(b'{"name":')
            bad |= ps_write(&writer, port.json, port.json_n)
            bad |= put(b',"datatype":"')
            bad |= put(ps_dtypes[t.dtype].name)
            bad |= put(b'","shape":[')
            for d in range(t.rank):
                if d:
                    bad |= put(b",")
                bad |= ps_write_int(&writer, t.dims[d])
            if r.outputs[i].binary:
                bad |= put(b'],"parameters":{"binary_data_size":')
                bad |= ps_write_int(&writer, t.bytes)
                bad |= put(b"}}")
                continue
            bad |= put(b'],"data":')
            code = ps_write_values(&writer, t)
            if code == -2:
                raise InferError(400, f"outputs[{i}]: {port.name.decode()!r} holds bytes that are no UTF-8 text; "
                                      "ask for it with binary_data")
            bad |= code
            bad |= put(b"}")
        bad |= put(b"]}")
        if bad:
            raise InferError(503, "out of memory")
        text = PyBytes_FromStringAndSize(writer.p, writer.n)
        if writer.cap > BLOCK_KEPT:
            free(writer.p)
            memset(&writer, 0, sizeof(writer))
        return text

    cdef const char *part(self, int i, size_t *n) noexcept nogil:
        cdef int k
        cdef ps_request *r = self.request.c
        if self.n_parts != r.n_out:
            for k in range(r.n_out):
                if r.outputs[k].binary:
                    if i == 0:
                        i = k
                        break
                    i -= 1
        n[0] = self.out[i].bytes
        return self.out[i].data

    cdef list parts_list(self):
        cdef int i, d
        cdef list found = []
        cdef ps_tensor *t
        for i in range(self.request.c.n_out):
            t = &self.out[i]
            port = <Port>self.model.outputs[self.request.c.outputs[i].port]
            found.append((port.name, datatype_name(t.dtype), tuple([t.dims[d] for d in range(t.rank)]),
                          PyBytes_FromStringAndSize(t.data, t.bytes)))
        return found


cdef int port_of(ps_port *ports, int n, name) except -2:
    cdef bytes text = str(name).encode(errors="replace")
    cdef int i
    for i in range(n):
        if ports[i].name_n == <size_t>len(text) and memcmp(ports[i].name, PyBytes_AS_STRING(text), ports[i].name_n) == 0:
            return i
    return -1
