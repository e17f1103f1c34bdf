# onnx.pyx (hot path): OnnxModel, an ONNX Runtime session behind the ps_model interface.
#
# The C API of the wheel's own library does the work (onnx_session.c); the onnxruntime package is not even imported,
# which saves a quarter of a second of start-up. Where that library is not reached, InferenceSession.run() answers
# through the GIL with the same bits. A row has the same bits alone and in a batch, unless batched=True is asked for.

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
)
from libc.math cimport isfinite
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free

import json
import os

import numpy as np


cdef extern from "onnx_session.h" nogil:
    enum:
        PS_ONNX_ERROR_BYTES
        PS_ONNX_KIND_TENSOR
    ctypedef struct ps_onnx_port:
        char *name
        int32_t kind
        int32_t type
        size_t rank
        int64_t dims[8]
        size_t columns
    ctypedef struct ps_onnx_options:
        int arena
        int mem_pattern
        const char *external_folder

    const char *ps_onnx_open_library(const char *path, uint32_t api_version, char *error)
    ps_onnx *ps_onnx_create(const char *path, const void *data, size_t length, const ps_onnx_options *options,
                            char *error)
    void ps_onnx_destroy(ps_onnx *self)
    size_t ps_onnx_input_count(const ps_onnx *self)
    size_t ps_onnx_output_count(const ps_onnx *self)
    const ps_onnx_port *ps_onnx_input(const ps_onnx *self, size_t index)
    const ps_onnx_port *ps_onnx_output(const ps_onnx *self, size_t index)
    char *ps_onnx_metadata(const ps_onnx *self, const char *key)
    int ps_onnx_bind(ps_onnx *self, const size_t *columns, const uint32_t *gather, size_t output, int batched,
                     char *error)
    size_t ps_onnx_n_outputs(const ps_onnx *self)
    double ps_onnx_row_seconds(const ps_onnx *self)
    int ps_onnx_predict(const ps_model *model, const double *x, size_t rows, size_t stride, double *out) noexcept
    void ps_onnx_last_error(ps_onnx *self, char *error)
    int ps_onnx_run(const ps_onnx *self, const ps_tensor *tensors, const int32_t *outputs, size_t n_out, ps_tensor *out,
                    ps_onnx_result **result, char *error)
    void ps_onnx_result_free(ps_onnx_result *result)


# The version asked for: the oldest onnxruntime that the `onnx` extra allows. Every slot used is older.
cdef uint32_t API_VERSION = 20
# Longer than this per call, others may run meanwhile; shorter, handing the GIL over costs more than it gives.
cdef double LONG_CALL_SECONDS = 50e-6

_INPUT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 11: "float64"}
_OUTPUT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 11: "float64"}
_TYPE_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}
_PYTHON_TYPES = {
    "tensor(float)": 1, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(string)": 8, "tensor(bool)": 9,
    "tensor(float16)": 10, "tensor(double)": 11,
}


class OnnxError(RuntimeError):
    """ONNX Runtime refused a model or failed on a row; the text is its own, with the model in front."""


def library_path():
    """Path of the shared library inside the installed onnxruntime package, or None. Imports nothing of it."""
    import importlib.util

    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return None
    for root in spec.submodule_search_locations:
        folder = os.path.join(root, "capi")
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.startswith("libonnxruntime.") and (".so" in name or name.endswith(".dylib")):
                return os.path.join(folder, name)
    return None


cdef dict _port(const ps_onnx_port *port):
    cdef size_t d
    return {
        "name": port.name.decode(),
        "tensor": port.kind == PS_ONNX_KIND_TENSOR,
        "kind": port.kind,
        "type": port.type,
        "rank": port.rank,
        "dims": [port.dims[d] for d in range(min(port.rank, <size_t>8))],
    }


def _python_port(argument):
    tensor = argument.type.startswith("tensor(")
    shape = list(argument.shape or []) if tensor else []
    return {
        "name": argument.name,
        "tensor": tensor,
        "kind": 1 if tensor else 2,
        "type": _PYTHON_TYPES.get(argument.type, 0) if tensor else -1,
        "rank": len(shape),
        "dims": [d if isinstance(d, int) else -1 for d in shape],
    }


def _describe(port):
    if not port["tensor"]:
        return f"{port['name']} (a sequence or map)"
    dims = " x ".join("?" if d < 0 else str(d) for d in port["dims"])
    return f"{port['name']} ({_TYPE_NAMES.get(port['type'], 'type ' + str(port['type']))} {dims or 'scalar'})"


def choose_output(ports, wanted):
    """Index of the output to read: the one named, or the probabilities, or the only floating one.

    ports: descriptions with name, tensor, type and dims. Raises ValueError with the choice there is.
    """
    listing = ", ".join(_describe(port) for port in ports)
    if wanted is not None:
        for i, port in enumerate(ports):
            if port["name"] == wanted:
                break
        else:
            raise ValueError(f"no output named {wanted!r}; the model has {listing}")
    else:
        floats = [i for i, port in enumerate(ports) if port["tensor"] and port["type"] in (1, 11)]
        maps = [i for i, port in enumerate(ports) if not port["tensor"]]
        named = [i for i in floats if "prob" in ports[i]["name"].lower()]
        if len(named) == 1:
            i = named[0]
        elif len(floats) == 1 and not maps:
            i = floats[0]
        elif maps and not named:
            i = maps[0]
        elif not floats and len(ports) == 1:
            i = 0
        else:
            raise ValueError(f"which output holds the scores? Give output= one of {listing}")
        port = ports[i]
    if not port["tensor"]:
        raise ValueError(
            f"output {port['name']!r} is a sequence of maps (ZipMap); convert the model with zipmap=False "
            "(skl2onnx: options={'zipmap': False}), so that it gives a tensor of probabilities"
        )
    if port["type"] not in _OUTPUT_TYPES:
        raise ValueError(f"output {_describe(port)}: expected numbers")
    return i


def _layout(ports, inputs, metadata):
    """(columns per input, gather, feature names or None): how a row of x fills the input tensors."""
    for port in ports:
        if not port["tensor"] or port["type"] not in _INPUT_TYPES:
            raise ValueError(f"input {_describe(port)}: expected a float, double, int64, int32 or bool tensor")
        if port["rank"] not in (1, 2):
            raise ValueError(f"input {_describe(port)}: expected rows x features")
        if port["dims"][0] not in (-1, 0, 1):
            raise ValueError(f"input {_describe(port)}: the batch is fixed at {port['dims'][0]} rows; leave it free")
    if not ports:
        raise ValueError("the model has no inputs")
    own = metadata
    if len(ports) == 1:
        port = ports[0]
        width = port["dims"][1] if port["rank"] == 2 else 1
        if width < 0:
            names = inputs if inputs is not None else own
            if names is None:
                raise ValueError(f"input {_describe(port)} does not say how many features it takes; give inputs=[...]")
            width = len(names)
        if own is not None and len(own) != width:
            raise ValueError(f"metadata feature_names has {len(own)} names; the model takes {width} features")
        columns = [width]
    else:
        columns = []
        for port in ports:
            width = port["dims"][1] if port["rank"] == 2 else 1
            if width < 0:
                raise ValueError(f"input {_describe(port)} does not say how many columns it takes")
            columns.append(width)
        if own is None and all(width == 1 for width in columns):
            own = [port["name"] for port in ports]
    total = sum(columns)
    gather = list(range(total))
    if inputs is None:
        return columns, gather, None if own is None else tuple(own)
    if len(set(inputs)) != len(inputs):
        raise ValueError(f"inputs names a feature twice: {', '.join(inputs)}")
    if own is not None and set(own) & set(inputs):
        missing = [name for name in own if name not in inputs]
        surplus = [name for name in inputs if name not in own]
        if missing or surplus:
            raise ValueError(
                "inputs do not match the model's"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; surplus: {', '.join(surplus)}" if surplus else "")
            )
        place = {name: c for c, name in enumerate(inputs)}
        gather = [place[name] for name in own]
    elif len(inputs) != total:
        raise ValueError(f"inputs names {len(inputs)} features; the model takes {total}")
    return columns, gather, tuple(inputs)


def _feature_names(text):
    """Names from the model's custom metadata entry feature_names: a JSON list of strings."""
    if not text:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names


cdef int _predict_python(const ps_model *model, const double *x, size_t rows, size_t stride,
                         double *out) noexcept nogil:
    with gil:
        return _run_python(<OnnxModel>model.state, x, rows, stride, out)


cdef int _run_python(OnnxModel self, const double *x, size_t rows, size_t stride, double *out) noexcept:
    cdef size_t step = rows if self.batched else 1
    cdef size_t r = 0, k
    cdef size_t n = self.model.n_outputs
    cdef double[:, :] answer
    cdef size_t i
    try:
        if rows == 0:
            return 0
        view = np.asarray(<double[:rows, :stride]>(<double *>x))
        while r < rows:
            block = view[r:r + step]
            feed = {}
            for name, dtype, columns, rank in self.python_inputs:
                part = block[:, columns]
                if dtype in ("int64", "int32", "bool"):
                    low, high = {"int64": (-2.0**63, 2.0**63), "int32": (-2.0**31, 2.0**31), "bool": (0.0, 2.0)}[dtype]
                    inside = (part >= low) & (part < high)
                    if dtype == "bool":
                        inside &= (part == 0) | (part == 1)
                    if not inside.all():
                        self.python_error = (
                            f"input {name} is {dtype}: a null, or a value out of its range, cannot be given to it"
                        )
                        return 1
                with np.errstate(all="ignore"):
                    part = np.ascontiguousarray(part, dtype=dtype)
                feed[name] = part[:, 0] if rank == 1 else part
            got = np.asarray(self.python_session.run([self.output], feed)[0], dtype=np.float64)
            answer = got.reshape(len(block), -1)
            if <size_t>answer.shape[1] != n:
                raise OnnxError(f"output {self.output} has {answer.shape[1]} columns, {n} were expected")
            for i in range(<size_t>answer.shape[0]):
                for k in range(n):
                    out[(r + i) * n + k] = answer[i, k]
            r += step
        return 0
    except Exception as error:
        self.python_error = str(error)
        return 2


cdef class OnnxModel:
    """A model that ONNX Runtime runs: one thread, sequential, no spinning.

    source: path of a .onnx file, or its bytes (a mapped file too). inputs: feature names in the order of the columns of x; matched by name
    with the model's own where it has any (one input per feature, or a metadata entry feature_names), else by place.
    output: the output to read; default the probabilities, or the only floating one. batched: run a batch in one call,
    faster per row, but a row's last bits may then depend on the batch. api: None (C, else Python), "c" or "python".
    Raises ValueError for a model of the wrong shape, OnnxError with ONNX Runtime's text, ImportError without it.
    """

    def __cinit__(self):
        self.session = NULL

    def __init__(self, source, inputs=None, output=None, *, batched=False, api=None, arena=False, mem_pattern=False,
                 external_folder=None, name=None):
        if self.session != NULL or self.python_session is not None:
            raise RuntimeError("OnnxModel is already loaded")
        if api is not None and api != "c" and api != "python":
            raise ValueError(f"api: expected 'c' or 'python', got {api!r}")
        data = source if PyObject_CheckBuffer(source) else None
        self.source = "<bytes>" if data is not None else os.fspath(source)
        label = name or self.source
        if data is None and not os.path.isfile(self.source):
            raise FileNotFoundError(f"{label}: no model file at {self.source}")
        self.batched = batched
        inputs = None if inputs is None else list(inputs)
        reason = "asked for"
        if api != "python":
            reason = self._open_c(data, inputs, output, label, arena, mem_pattern, external_folder)
            if reason is None:
                return
            if api == "c":
                raise OnnxError(f"{label}: the C API of ONNX Runtime was not reached: {reason}")
        self._open_python(data, inputs, output, label, external_folder)

    def __dealloc__(self):
        if self.session != NULL:
            with nogil:  # it may take a while
                ps_onnx_destroy(self.session)

    def _open_c(self, data, inputs, output, label, arena, mem_pattern, external_folder):
        """None, or why the C API cannot be used. A model that cannot be loaded raises."""
        cdef char error[PS_ONNX_ERROR_BYTES]
        cdef const char *version
        cdef ps_onnx *session
        cdef ps_onnx_options options
        cdef const char *path = NULL
        cdef const char *bytes_at = NULL
        cdef size_t length = 0
        cdef Py_buffer view
        library = library_path()
        if library is None:
            return "no libonnxruntime in an installed onnxruntime"
        library = os.fsencode(library)
        path = <const char *>library
        with nogil:
            version = ps_onnx_open_library(path, API_VERSION, error)
        if version == NULL:
            return (<bytes>error).decode(errors="replace")
        self.version = version.decode()
        self.api = "c"
        folder = None if external_folder is None else os.fsencode(external_folder)
        options.arena = arena
        options.mem_pattern = mem_pattern
        options.external_folder = NULL
        if folder is not None:
            options.external_folder = folder
        encoded = os.fsencode(self.source)
        path = encoded
        if data is not None:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            bytes_at = <const char *>view.buf
            length = view.len
        with nogil:
            session = ps_onnx_create(path, bytes_at, length, &options, error)
        if data is not None:
            PyBuffer_Release(&view)
        if session == NULL:
            raise OnnxError(f"{label}: {(<bytes>error).decode(errors='replace')}")
        self.session = session
        ports = self.ports()
        cdef char *text = ps_onnx_metadata(session, b"feature_names")
        try:
            metadata = _feature_names(None if text == NULL else (<bytes>text).decode(errors="replace"))
        finally:
            free(text)
        columns, gather, names, chosen = self._plan(ports, inputs, output, metadata, label)

        cdef size_t total = len(gather), i
        cdef size_t n_in = len(columns), out_index = chosen
        cdef int batched = self.batched, ok
        cdef size_t *widths = <size_t *>calloc(n_in + 1, sizeof(size_t))
        cdef uint32_t *places = <uint32_t *>calloc(total + 1, sizeof(uint32_t))
        if widths == NULL or places == NULL:
            free(widths)
            free(places)
            raise MemoryError
        for i in range(n_in):
            widths[i] = columns[i]
        for i in range(total):
            places[i] = gather[i]
        with nogil:
            ok = ps_onnx_bind(session, widths, places, out_index, batched, error)
        free(widths)
        free(places)
        if not ok:
            raise OnnxError(f"{label}: {(<bytes>error).decode(errors='replace')}")
        if ps_onnx_n_outputs(session) == 0:
            raise ValueError(f"{label}: output {self.output} holds no value per row")
        self.model.predict = ps_onnx_predict
        self.model.state = session
        self.model.n_inputs = total
        self.model.n_outputs = ps_onnx_n_outputs(session)
        self.release_gil = ps_onnx_row_seconds(session) > LONG_CALL_SECONDS
        return None

    def _open_python(self, data, inputs, output, label, external_folder):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"{label} needs onnxruntime: pip install 'penstock[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if external_folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", external_folder)
        try:
            session = onnxruntime.InferenceSession(
                self.source if data is None else bytes(data), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise OnnxError(f"{label}: ONNX Runtime: {error}") from None
        self.api = "python"
        self.version = onnxruntime.__version__
        ports = {
            "inputs": [_python_port(a) for a in session.get_inputs()],
            "outputs": [_python_port(a) for a in session.get_outputs()],
        }
        metadata = _feature_names(session.get_modelmeta().custom_metadata_map.get("feature_names"))
        columns, gather, names, chosen = self._plan(ports, inputs, output, metadata, label)
        self.python_inputs = []
        start = 0
        for port, width in zip(ports["inputs"], columns):
            self.python_inputs.append(
                (port["name"], _INPUT_TYPES[port["type"]], gather[start:start + width], port["rank"])
            )
            start += width
            if port["dims"][0] > 0:
                self.batched = False
        self.python_session = session
        feed = {
            name: np.zeros([1, len(places)][:rank], dtype)
            for name, dtype, places, rank in self.python_inputs
        }
        try:
            answer = np.asarray(session.run([self.output], feed)[0])
        except Exception as error:
            raise OnnxError(f"{label}: a row of zeros: {error}") from None
        if answer.ndim == 0 or answer.shape[0] != 1 or answer.size == 0:
            raise ValueError(f"{label}: output {self.output} has shape {answer.shape} for one row; expected one row")
        self.model.predict = _predict_python
        self.model.state = <void *>self
        self.model.n_inputs = len(gather)
        self.model.n_outputs = answer.size
        self.release_gil = False

    def _plan(self, ports, inputs, output, metadata, label):
        try:
            chosen = choose_output(ports["outputs"], output)
            columns, gather, self.inputs = _layout(ports["inputs"], inputs, metadata)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        self.output = ports["outputs"][chosen]["name"]
        return columns, gather, self.inputs, chosen

    def ports(self):
        """The model's inputs and outputs as ONNX Runtime describes them (C API only)."""
        cdef size_t i
        if self.session == NULL:
            return {"inputs": [], "outputs": []}
        return {
            "inputs": [_port(ps_onnx_input(self.session, i)) for i in range(ps_onnx_input_count(self.session))],
            "outputs": [_port(ps_onnx_output(self.session, i)) for i in range(ps_onnx_output_count(self.session))],
        }

    @property
    def n_inputs(self):
        return self.model.n_inputs

    @property
    def n_outputs(self):
        return self.model.n_outputs

    @property
    def abi(self):
        """Address of the ps_model; valid while this object lives."""
        return <uintptr_t>&self.model

    @property
    def error(self):
        """Text of the last failure of predict(), or ''."""
        cdef char text[PS_ONNX_ERROR_BYTES]
        if self.session == NULL:
            return self.python_error or ""
        ps_onnx_last_error(self.session, text)
        return (<bytes>text).decode(errors="replace")

    def predict(self, x):
        """x: (rows, n_inputs) or (n_inputs,) numbers, NaN for null. Returns (rows, n_outputs) float64."""
        return _predict_array(&self.model, self, x, self.release_gil)


cdef class OnnxTensors:
    """A whole ONNX graph, all of its inputs and outputs, run on tensors as they are; any thread may run it.

    source: path of a .onnx file, or its bytes, whose external tensors are in external_folder. Raises OnnxError with ONNX Runtime's text, ImportError without its C library.
    """

    def __init__(self, source, *, external_folder=None, name=None):
        cdef char error[PS_ONNX_ERROR_BYTES]
        cdef const char *at
        cdef const char *version
        cdef ps_onnx *session
        cdef ps_onnx_options options
        cdef const char *bytes_at = NULL
        cdef size_t length = 0
        cdef Py_buffer view
        if self.session != NULL:
            raise RuntimeError("OnnxTensors is already loaded")
        data = source if PyObject_CheckBuffer(source) else None
        self.source = "<bytes>" if data is not None else os.fspath(source)
        label = name or self.source
        library = library_path()
        if library is None:
            raise ImportError(f"{label} needs onnxruntime: pip install 'penstock[onnx]'")
        library = os.fsencode(library)
        at = <const char *>library
        with nogil:
            version = ps_onnx_open_library(at, API_VERSION, error)
        if version == NULL:
            raise ImportError(f"{label}: the C API of ONNX Runtime was not reached: {(<bytes>error).decode(errors='replace')}")
        options.arena = False
        options.mem_pattern = False
        options.external_folder = NULL
        folder = None if external_folder is None else os.fsencode(external_folder)
        if folder is not None:
            options.external_folder = folder
        encoded = os.fsencode(self.source)
        at = <const char *>encoded
        if data is not None:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            bytes_at = <const char *>view.buf
            length = view.len
        with nogil:
            session = ps_onnx_create(at, bytes_at, length, &options, error)
        if data is not None:
            PyBuffer_Release(&view)
        if session == NULL:
            raise OnnxError(f"{label}: {(<bytes>error).decode(errors='replace')}")
        self.session = session

    def __dealloc__(self):
        if self.session != NULL:
            with nogil:
                ps_onnx_destroy(self.session)

    def ports(self):
        """Inputs and outputs as ONNX Runtime describes them: name, tensor, type, rank, dims."""
        cdef size_t i
        return {
            "inputs": [_port(ps_onnx_input(self.session, i)) for i in range(ps_onnx_input_count(self.session))],
            "outputs": [_port(ps_onnx_output(self.session, i)) for i in range(ps_onnx_output_count(self.session))],
        }

    cdef int run(self, const ps_tensor *tensors, const int32_t *outputs, size_t n_out, ps_tensor *out,
                 ps_onnx_result **result, char *error) noexcept nogil:
        return ps_onnx_run(self.session, tensors, outputs, n_out, out, result, error)

    cdef void release(self, ps_onnx_result *result) noexcept nogil:
        ps_onnx_result_free(result)


cdef _predict_array(const ps_model *model, OnnxModel owner, x, bint release_gil):
    cdef Py_buffer view, answer
    cdef size_t rows, stride
    cdef int code
    if type(x) is not np.ndarray or x.dtype != _FLOAT64 or not x.flags.c_contiguous:
        x = np.ascontiguousarray(x, dtype=np.float64)
    PyObject_GetBuffer(x, &view, PyBUF_FORMAT | PyBUF_STRIDES)
    try:
        stride = model.n_inputs
        rows = 1
        if view.ndim == 2:
            rows = view.shape[0]
        if view.ndim not in (1, 2) or <size_t>view.shape[view.ndim - 1] != stride:
            raise ValueError(f"x: expected (rows, {stride}) or ({stride},) numbers, got {tuple(x.shape)}")
        out = _empty((rows, model.n_outputs))
        PyObject_GetBuffer(out, &answer, PyBUF_STRIDES)
        if release_gil or rows > 16:
            with nogil:
                code = model.predict(model, <const double *>view.buf, rows, stride, <double *>answer.buf)
        else:
            code = model.predict(model, <const double *>view.buf, rows, stride, <double *>answer.buf)
        PyBuffer_Release(&answer)
    finally:
        PyBuffer_Release(&view)
    if code != 0:
        raise OnnxError(f"{owner.source}: {owner.error}" if owner is not None else f"predict failed with code {code}")
    return out


def predict_abi(abi, x):
    """Calls a ps_model by its address, as the engine core does; x is (rows, n_inputs) float64."""
    cdef const ps_model *model = <const ps_model *><uintptr_t>abi
    return _predict_array(model, None, x, True)


cdef _empty = np.empty
cdef _FLOAT64 = np.dtype(np.float64)
