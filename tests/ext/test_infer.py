"""ServedModel: the Open Inference Protocol's bytes, against the oracle, tritonclient's own coding, and the models."""

import contextlib
import json
import math
import random
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from oracles.inference import DTYPES, Model, Refused, to_raw  # noqa: E402
from penstock._ext.infer import InferError, ServedModel, Target  # noqa: E402
from penstock.models.runtime import load  # noqa: E402

ELEMENTS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16, "BYTES": TensorProto.STRING,
}  # fmt: skip
RNG = np.random.default_rng(11)


def build(path, nodes, inputs, outputs, weights=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def copies(path, ports):
    """A model that gives each input back, as "<name>_out". ports: (name, datatype, shape)."""
    free = [
        (name, ELEMENTS[datatype], [f"{name}{i}" if d < 0 else d for i, d in enumerate(shape)])
        for name, datatype, shape in ports
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in free]
    return build(path, nodes, free, [(f"{name}_out", element, shape) for name, element, shape in free])


def served_copies(path, ports, name="copies"):
    """The model, and the oracle's."""
    copies(path, ports)
    outputs = [(f"{port}_out", datatype, shape) for port, datatype, shape in ports]
    oracle = Model(name, "1", ports, outputs, lambda feed: {f"{port}_out": feed[port] for port, _, _ in ports})
    return ServedModel(name, "1", None, path=path), oracle


ALL = [(f"in_{datatype.lower()}", datatype, (-1, -1)) for datatype in DTYPES]
FEW = [("x", "FP32", (-1, 3)), ("n", "INT64", (-1,)), ("flag", "BOOL", (2, -1)), ('word "é"', "BYTES", (-1, 1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("infer")


@pytest.fixture(scope="module")
def all_types(folder):
    return served_copies(folder / "all.onnx", ALL)


@pytest.fixture(scope="module")
def few(folder):
    return served_copies(folder / "few.onnx", FEW, 'a "name"')


def random_values(datatype, shape, rng):
    n = math.prod(shape)
    if datatype == "BYTES":
        pool = [b"", b"abc", "é\u2028\U0001f600".encode(), b'q"\\\n\x01\x7f', b"\x00", b"\xff\xfe", b"a\x00b"]
        out = np.empty(n, object)
        for i in range(n):
            out[i] = pool[rng.integers(len(pool))]
        return out.reshape(shape)
    if datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = np.dtype(DTYPES[datatype])
    values = np.frombuffer(rng.bytes(n * dtype.itemsize), dtype).reshape(shape)
    if datatype in ("FP32", "FP64", "FP16", "BF16") and rng.integers(2):
        with np.errstate(all="ignore"):
            values = rng.normal(size=shape).astype(dtype)
    return values


def nested_or_flat(values, datatype, nested):
    def plain(value):
        if datatype == "BYTES":
            return value.decode()
        if datatype == "BOOL":
            return bool(value)
        if datatype in ("FP32", "FP64"):
            return float(value) if math.isfinite(value) else None
        return int(value)

    def level(part):
        return [plain(v) for v in part] if part.ndim == 1 else [level(p) for p in part]

    return level(values) if nested and values.ndim else [plain(v) for v in values.ravel()]


def has_json(values, datatype):
    if datatype in ("FP16", "BF16"):
        return False
    if datatype == "BYTES":
        try:
            return all(isinstance(v.decode(), str) for v in values.ravel())
        except UnicodeDecodeError:
            return False
    return True


def random_request(ports, seed):
    """(body, header length) of a valid request: JSON and binary inputs, any order of keys."""
    rng, shuffle = np.random.default_rng(seed), random.Random(seed)
    request, tail = {}, b""
    if rng.integers(2):
        request["id"] = shuffle.choice(["a", "", 'é\n"', "7" * 50])
    request["inputs"] = []
    for name, datatype, dims in shuffle.sample(ports, len(ports)):
        shape = [int(rng.integers(0, 4)) if d < 0 else d for d in dims]
        values = random_values(datatype, shape, rng)
        entry = {"name": name, "shape": shape, "datatype": datatype}
        if has_json(values, datatype) and rng.integers(2):
            entry["data"] = nested_or_flat(values, datatype, rng.integers(2))
            if rng.integers(2):
                entry["parameters"] = {"mine": [1, {"a": None}]}
        else:
            raw = to_raw(values, datatype)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        request["inputs"].append(dict(shuffle.sample(list(entry.items()), len(entry))))
    if rng.integers(2):
        chosen = shuffle.sample(ports, int(rng.integers(1, len(ports) + 1)))
        request["outputs"] = []
        for name, datatype, _ in chosen:
            entry = {"name": f"{name}_out"}
            binary = datatype in ("FP16", "BF16", "BYTES") or bool(rng.integers(2))
            entry["parameters"] = {"binary_data": binary}
            if datatype != "BYTES" and rng.integers(4) == 0:
                entry["parameters"]["classification"] = int(rng.integers(1, 4))
            request["outputs"].append(entry)
    request["parameters"] = {"binary_data_output": True, "sequence_id": 7, "timeout": 100, "priority": 2}
    request = dict(shuffle.sample(list(request.items()), len(request)))
    text = json.dumps(request, ensure_ascii=bool(rng.integers(2)), indent=shuffle.choice([None, 1]))
    return text.encode() + tail, len(text.encode()) if tail or rng.integers(2) else -1


def compare(served, oracle, body, header_length):
    """Both give the same answer, or both refuse. True where they answer."""
    try:
        expected = oracle.answer(body, header_length)
    except Refused as refused:
        expected, reason = None, str(refused)
    if expected is None:
        with pytest.raises(InferError) as error:
            served.infer_http(body, header_length)
            pytest.fail(f"answered, the oracle refuses: {reason}: {body!r}, {header_length}")
        assert error.value.status in (400, 413)
        assert error.value.message
        return False
    head, parts = served.infer_http(body, header_length)
    assert json.loads(head) == expected[0]
    assert parts == expected[1]
    return True


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63))
def test_every_datatype_as_the_oracle(all_types, seed):
    assert compare(*all_types, *random_request(ALL, seed))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63))
def test_several_shapes_as_the_oracle(few, seed):
    body, header = random_request(FEW, seed)
    compare(*few, body, header)
    compare(*few, body, header)  # remembered


def mutated(body, header, rng):
    """One to three small damages; the header length mostly stays where the JSON ends."""
    out = bytearray(body)
    for _ in range(rng.randint(1, 3)):
        end = header if 0 < header <= len(out) and rng.random() < 0.8 else len(out)
        if not end:
            break
        at = rng.randrange(end)
        what = rng.randrange(7)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at]
            header -= header > at
        elif what == 2:
            new = rng.choice(
                [b"0", b"-", b",", b"]", b"[", b"{", b"}", b'"', b"\\", b"9" * 20, b"1e400", b"null", b"NaN"]
            )
            out[at:at] = new
            header += len(new) * (header > at)
        elif what == 3:
            to = min(len(out), at + rng.randrange(40))
            piece = bytes(out[at:to])
            out[at:at] = piece
            header += len(piece) * (header > at)
        elif what == 4:
            out[at] = rng.choice(b'0123456789",:[]{}\\-.eE \x00\x1f\x80\xff')
        elif what == 5:
            del out[at:]
            header = min(header, len(out))
        else:
            header += rng.choice([-1, 1, 7, -header, 1 << 40])
    return bytes(out), header


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63))
def test_damaged_requests_are_refused_as_the_oracle_refuses_them(few, seed):
    rng = random.Random(seed)
    body, header = random_request(FEW, seed % 1000)
    for _ in range(10):
        damaged, length = mutated(body, header, rng)
        if length == 0:  # a raw request: the model has several inputs
            with pytest.raises(InferError):
                few[0].infer_http(damaged, 0)
            continue
        compare(*few, damaged, length)


def head(**changes):
    entry = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | changes.pop("entry", {})
    entry = {k: v for k, v in entry.items() if v is not ...}
    return {"inputs": [entry]} | changes


MALFORMED = [
    ("{", "ends where a key is expected"),
    ("[]", "expected an object, got '['"),
    ("", "ends where an object is expected"),
    ("{}", "inputs: missing"),
    ('{"inputs":{}}', "inputs: expected an array"),
    ('{"inputs":[]}', 'inputs: "x" is missing'),
    ('{"inputs":[3]}', "inputs[0]: expected an object"),
    ('{"inputs":[],"inputs":[]}', "inputs: given twice"),
    (head(id=3), "id: expected a string"),
    (head(entry={"name": "y"}), 'inputs[0].name: no input is called "y"; expected "x"'),
    (head(entry={"name": 3}), "inputs[0].name: expected a string"),
    (head(entry={"name": ...}), "inputs[0].name: missing"),
    (head(entry={"datatype": ...}), "inputs[0].datatype: missing"),
    (head(entry={"datatype": "FP31"}), 'inputs[0].datatype: there is no "FP31"'),
    (head(entry={"datatype": "FP64"}), "inputs[0].datatype: expected FP32, got FP64"),
    (head(entry={"shape": ...}), "inputs[0].shape: missing"),
    (head(entry={"shape": [1, 3]}), "inputs[0].shape: expected [-1, 2], got [1, 3]"),
    (head(entry={"shape": [2]}), "inputs[0].shape: expected [-1, 2], got [2]"),
    (head(entry={"shape": [-1, 2]}), "inputs[0].shape: expected an integer of 0 or more"),
    (head(entry={"shape": [1.0, 2]}), "inputs[0].shape: expected an integer of 0 or more"),
    (head(entry={"shape": [2**62, 2]}), "inputs[0].shape: [4611686018427387904, 2] is more than memory holds"),
    (head(entry={"shape": [2**70, 2]}), "inputs[0].shape: expected an integer of 0 or more"),
    (head(entry={"shape": [1] * 9}), "inputs[0].shape: more than 8 dimensions"),
    (head(entry={"shape": [2**40, 2]}), "inputs[0].data: expected 2199023255552 values, the header is too short"),
    (head(entry={"data": ...}), "inputs[0].data: missing"),
    (head(entry={"data": 3}), "inputs[0].data: expected an array"),
    (head(entry={"data": [1]}), "inputs[0].data: expected 2 values for shape [1, 2], got 1"),
    (head(entry={"data": [1, 2, 3]}), "inputs[0].data: expected 2 values for shape [1, 2], got more than 2"),
    (head(entry={"data": [[1, 2], [3, 4]]}), "inputs[0].data: expected 1 at depth 1 for shape [1, 2], got more than 1"),
    (head(entry={"data": [[1]]}), "inputs[0].data: expected 2 at depth 2 for shape [1, 2], got 1"),
    (head(entry={"data": [1, "2"]}), 'inputs[0].data: element 1 (byte 75 of the JSON header): expected a number'),
    (head(entry={"data": [1, "2"]}), 'expected a number or null, got "2"'),
    (head(entry={"data": [1, True]}), "expected a number or null, got true"),
    ('{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[NaN,1]}]}', "expected a number or null, got NaN"),
    ('{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1e39,1]}]}', "expected a number within FP32"),
    ('{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[01,1]}]}', "expected a number or null, got 01"),
    ('{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,1,]}]}', "got more than 2"),
    (head(entry={"parameters": {"binary_data_size": 8}}), "inputs[0]: both data and binary_data_size"),
    (head(entry={"data": ..., "parameters": {"binary_data_size": 7}}), "size: expected 8 for FP32 [1, 2], got 7"),
    (head(entry={"data": ..., "parameters": {"binary_data_size": "8"}}), "binary_data_size: expected an integer"),
    (head(entry={"data": ..., "parameters": {"binary_data_size": 8}}), "Inference-Header-Content-Length is missing"),
    (head(entry={"parameters": {"shared_memory_region": "r"}}), "inputs[0].parameters: shared memory is not offered"),
    (head(outputs=[{"name": "y"}, {"name": "y"}]), 'outputs[1].name: "y" is asked for twice'),
    (head(outputs=[{"name": "z"}]), 'outputs[0].name: no output is called "z"; expected "y"'),
    (head(outputs=[{}]), "outputs[0].name: missing"),
    (head(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "outputs[0].parameters.binary_data: expected tr"),
    (head(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory is not offered"),
    (head(parameters={"timeout": "soon"}), "parameters.timeout: expected an integer of 0 or more"),
    (head(parameters={"priority": -1}), "parameters.priority: expected an integer of 0 or more"),
    (head(parameters={"binary_data_output": 1}), "parameters.binary_data_output: expected true or false"),
    (head(parameters=[]), "parameters: expected an object"),
    ('{"inputs":' + "[" * 100000, "inputs[0]: expected an object"),
    ('{"deep":' + "[" * 100000, "nested deeper than 64"),
    ('{"a":"\ud800"}'.encode("utf-8", "surrogatepass"), "expected UTF-8"),
    ('{"a":"\\ud800"}', "the second half of a surrogate pair"),
    ('{"a":"\\x"}', "expected an escape that JSON has"),
    ('{"a":"\n"}', "no control character"),
    ('{"a":tru}', "expected true"),
    (json.dumps(head()) + "x", "expected the end of the header, got 'x'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(folder):
    path = build(
        folder / "pair.onnx", [helper.make_node("Neg", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 2])], [("y", TensorProto.FLOAT, ["N", 2])],
    )  # fmt: skip
    return ServedModel("pair", "3", None, path=path)


@pytest.mark.parametrize(("request_", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_say_where(pair, request_, message):
    if isinstance(request_, dict):
        request_ = json.dumps(request_)
    body = request_ if isinstance(request_, bytes) else request_.encode()
    with pytest.raises(InferError) as error:
        pair.infer_http(body)
    assert message in error.value.message
    assert error.value.status == 400


def test_the_body_is_as_long_as_the_header_says(pair):
    text = json.dumps(head(entry={"data": ..., "parameters": {"binary_data_size": 8}})).encode()
    raw = np.array([1, 2], np.float32).tobytes()
    assert json.loads(pair.infer_http(text + raw, len(text))[0])["outputs"][0]["data"] == [-1, -2]
    n = len(text)
    for body, length, message in [
        (text + raw[:7], n, f"body: expected 8 bytes of binary data after the JSON header of {n}, got 7"),
        (text + raw + b"x", n, f"body: expected 8 bytes of binary data after the JSON header of {n}, got 9"),
        (text + raw, n + 9, f"Inference-Header-Content-Length: {n + 9}, of a body of {n + 8} bytes"),
        (json.dumps(head()).encode() + b"y", len(json.dumps(head())), "expected 0 bytes of binary data"),
    ]:  # fmt: skip
        with pytest.raises(InferError) as error:
            pair.infer_http(body, length)
        assert message in error.value.message


def test_null_is_nan_and_what_is_not_finite_is_null(pair):
    answer = json.loads(pair.infer_http(json.dumps(head(entry={"data": [None, 1e-3]})).encode())[0])
    assert answer["outputs"][0]["data"] == [None, -0.001]
    raw = np.array([np.inf, np.nan], np.float32).tobytes()
    text = json.dumps(head(entry={"data": ..., "parameters": {"binary_data_size": 8}})).encode()
    assert json.loads(pair.infer_http(text + raw, len(text))[0])["outputs"][0]["data"] == [None, None]


def test_raw_binary_requests(pair, few, folder):
    """Header length 0: the one input, its free dimension by the length; outputs come back binary."""
    values = np.arange(6, dtype=np.float32)
    answer, parts = pair.infer_http(values.tobytes(), 0)
    assert json.loads(answer)["outputs"][0] == {
        "name": "y", "datatype": "FP32", "shape": [3, 2], "parameters": {"binary_data_size": 24},
    }  # fmt: skip
    assert parts == [(-values).tobytes()]
    assert pair.infer_raw(values.tobytes()) == [("y", "FP32", (3, 2), (-values).tobytes())]
    with pytest.raises(InferError, match="20 bytes are no FP32 tensor of shape"):
        pair.infer_raw(values.tobytes()[:20])
    with pytest.raises(InferError, match="the model has 4 inputs"):
        few[0].infer_raw(b"")
    words, _ = served_copies(folder / "words.onnx", [("w", "BYTES", (-1,))])
    raw = struct.pack("<I", 2) + b"ab" + struct.pack("<I", 0)
    assert words.infer_raw(raw) == [("w_out", "BYTES", (2,), raw)]
    with pytest.raises(InferError, match="a length reaches beyond"):
        words.infer_raw(raw[:-1])
    two, _ = served_copies(folder / "two.onnx", [("w", "INT8", (-1, -1))])
    assert two.infer_raw(b"abc") == [("w_out", "INT8", (1, 3), b"abc")]


def test_tensors_that_are_not_aligned(few, all_types):
    """The header's length decides where a tensor begins; every place gives the same."""
    served, _ = all_types
    for pad in range(17):
        values = {name: random_values(datatype, (2, 3), RNG) for name, datatype, _ in ALL}
        raws = {name: to_raw(values[name], datatype) for name, datatype, _ in ALL}
        request = {
            "pad": " " * pad,
            "inputs": [
                {
                    "name": name,
                    "shape": [2, 3],
                    "datatype": datatype,
                    "parameters": {"binary_data_size": len(raws[name])},
                }
                for name, datatype, _ in ALL
            ],
            "parameters": {"binary_data_output": True},
        }
        text = json.dumps(request).encode()
        assert served.infer_http(text + b"".join(raws.values()), len(text))[1] == list(raws.values())


def test_any_rank_and_a_scalar(folder):
    ports = [("s", "FP64", ()), ("deep", "INT32", (1, -1, 2, -1, 1, 1, 1, 2))]
    served, oracle = served_copies(folder / "ranks.onnx", ports)
    deep = np.arange(24).reshape(1, 3, 2, 2, 1, 1, 1, 2)
    inputs = [
        {"name": "s", "shape": [], "datatype": "FP64", "data": [0.1]},
        {"name": "deep", "shape": list(deep.shape), "datatype": "INT32", "data": deep.tolist()},
    ]
    assert compare(served, oracle, json.dumps({"inputs": inputs}).encode(), -1)
    assert not served.batched


def test_an_unspecified_shape_is_taken_as_it_comes(folder):
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    path = folder / "loose.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    served = ServedModel("loose", "1", None, path=path)
    x = np.full((2, 3), -1, np.float32)
    assert served.infer([("x", "FP32", [2, 3], x.tobytes())]) == [("y", "FP32", (2, 3), (-x).tobytes())]


def test_what_the_graph_refuses_is_told(folder):
    """ONNX Runtime's own refusal, as an error of the request; the next request is served."""
    path = build(
        folder / "gather.onnx", [helper.make_node("Gather", ["t", "i"], ["y"])],
        [("i", TensorProto.INT64, ["N"])], [("y", TensorProto.FLOAT, ["N"])], {"t": np.arange(4, dtype=np.float32)},
    )  # fmt: skip
    served = ServedModel("gather", "1", None, path=path)
    with pytest.raises(InferError, match="indices element out of data bounds") as error:
        served.infer([("i", "INT64", [1], np.array([9]).tobytes())])
    assert error.value.status == 400
    assert served.infer([("i", "INT64", [1], np.array([2]).tobytes())])[0][3] == np.float32(2).tobytes()
    assert served.stats()["inference_stats"]["fail"]["count"] == 1


def test_parts_of_grpc(few):
    """infer(): names, datatypes, shapes, buffers; the same refusals."""
    served, _ = few
    values = {name: random_values(datatype, [2 if d < 0 else d for d in shape], RNG) for name, datatype, shape in FEW}
    inputs = [(name, datatype, values[name].shape, to_raw(values[name], datatype)) for name, datatype, _ in FEW]
    expected = [(f"{name}_out", datatype, shape, raw) for name, datatype, shape, raw in inputs]
    assert served.infer(inputs) == expected
    assert served.infer([(n, d, s, bytearray(r)) for n, d, s, r in inputs], ["n_out", "x_out"]) == [
        expected[1],
        expected[0],
    ]
    for bad, outputs, message in [
        (inputs[1:], None, 'inputs: "x" is missing'),
        ([*inputs, inputs[0]], None, "inputs[4].name: 'x' is given twice"),
        ([("y", *inputs[0][1:])], None, "no input is called 'y'"),
        ([("x", "FP32", (2, 3), b"")], None, "inputs[0]: expected 24 bytes for FP32 [2, 3], got 0"),
        ([("x", "FP32", (2, -3), b"")], None, "inputs[0].shape: expected an integer of 0 or more"),
        ([("x", "FP31", (2, 3), b"")], None, "there is no 'FP31'"),
        ([("x", "FP32", (2, 4), b"")], None, "inputs[0].shape: expected [-1, 3], got [2, 4]"),
        ([*inputs[:2], ("flag", "BOOL", (2, 1), b"\1\2"), inputs[3]], None, "element 1: expected 0 or 1, got 2"),
        ([*inputs[:3], (FEW[3][0], "BYTES", (2, 1), b"\1\0\0\0a")], None, "expected 2 elements, got 1"),
        (
            [*inputs[:3], (FEW[3][0], "BYTES", (1, 1), b"\xff\xff\xff\xffa")],
            None,
            "a length reaches beyond its 5 bytes",
        ),
        (inputs, ["z"], "outputs[0].name: no output is called 'z'"),
        (inputs, ["n_out", "n_out"], "outputs[1].name: 'n_out' is asked for twice"),
    ]:
        with pytest.raises(InferError) as error:
            served.infer(bad, outputs)
        assert message in error.value.message


# ---- tritonclient's own coding ----


def test_tritonclient_encodes_and_decodes(all_types):
    http = pytest.importorskip("tritonclient.http")
    served, _ = all_types
    for binary_in in (True, False):
        for binary_out in (True, False, None):
            wire_inputs, wire_outputs, values = [], [], {}
            for name, datatype, _ in ALL:
                value = random_values(datatype, (2, 3), RNG)
                if datatype == "BYTES":
                    value = np.array([[b"a", b"\x00b", "é".encode()], [b"", b"x" * 300, b'q"\\']], object)
                if datatype in ("FP32", "FP64"):
                    value = RNG.normal(size=(2, 3)).astype(value.dtype)
                values[name] = value
                tensor = http.InferInput(name, [2, 3], datatype)
                tensor.set_data_from_numpy(value, binary_data=binary_in or datatype in ("FP16", "BF16"))
                wire_inputs.append(tensor)
                wire_outputs.append(
                    http.InferRequestedOutput(f"{name}_out", binary_data=binary_out or datatype in ("FP16", "BF16"))
                )
            body, header = http.InferenceServerClient.generate_request_body(
                wire_inputs,
                outputs=None if binary_out is None else wire_outputs,
                request_id="r-1",
                priority=3,
                timeout=500,
            )
            head_, parts = served.infer_http(bytes(body), -1 if header is None else header)
            result = http.InferenceServerClient.parse_response_body(
                head_ + b"".join(parts), header_length=len(head_) if parts else None
            )
            assert result.get_response()["id"] == "r-1"
            for name, _datatype, _ in ALL:
                got = result.as_numpy(f"{name}_out")
                assert got.dtype == values[name].dtype or values[name].dtype == object
                if values[name].dtype == object:
                    got = np.array([v.encode() if isinstance(v, str) else v for v in got.ravel()], object).reshape(2, 3)
                np.testing.assert_array_equal(got, values[name])


# ---- Trees ----


@pytest.fixture(scope="module")
def tree_models(folder):
    lightgbm, xgboost = pytest.importorskip("lightgbm"), pytest.importorskip("xgboost")
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestClassifier

    x = RNG.normal(size=(500, 6)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.5).astype(int) + (x[:, 2] > 0.7)
    paths = {name: folder / f"trees.{name}" for name in ("txt", "json", "ubj", "onnx")}
    lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, lightgbm.Dataset(x, y > 0), 20).save_model(
        paths["txt"]
    )
    booster = xgboost.train({"objective": "multi:softprob", "num_class": 3}, xgboost.DMatrix(x, y), 10)
    booster.save_model(paths["json"])
    booster.save_model(paths["ubj"])
    forest = RandomForestClassifier(10, random_state=1).fit(x, y)
    paths["onnx"].write_bytes(to_onnx(forest, x[:1], options={"zipmap": False}).SerializeToString())
    models = {}
    for name, path in paths.items():
        runtime = load(path)
        assert runtime.kind == "trees"
        models[name] = (ServedModel(name, "1", runtime, path=path), runtime)
    return models


def test_trees_answer_as_predict_bit_for_bit(tree_models):
    for name, (served, runtime) in tree_models.items():
        assert served.platform == "penstock_trees"
        assert served.row_ns > 0
        assert served.batched
        port, out = served.inputs[0], served.outputs[-1]
        assert port.datatype == ("FP64" if name == "txt" else "FP32")
        assert port.shape == (-1, 6)
        assert out.shape == (-1, runtime.n_outputs)
        kind = DTYPES[out.datatype]
        for rows in (0, 1, 2, 3, 17, 6000):
            for datatype in (
                "FP32",
                "FP64",
                "FP16",
                "BF16",
                "INT8",
                "UINT8",
                "BOOL",
                "INT64",
                "UINT64",
                "INT32",
                "UINT16",
            ):
                values = (RNG.normal(size=(rows, 6)) * 3).astype(np.float32)
                if datatype.startswith("UINT"):
                    values = np.abs(values)
                values = values.astype(DTYPES[datatype])
                wanted = runtime.predict(values.astype(np.float64)).astype(kind)
                assert wanted.astype(np.float64).tobytes() == runtime.predict(values.astype(np.float64)).tobytes()
                raw = values.tobytes()
                assert served.infer([(port.name, datatype, (rows, 6), raw)], [out.name]) == [
                    (out.name, out.datatype, (rows, runtime.n_outputs), wanted.tobytes())
                ]
                if datatype in ("FP32", "FP64") and rows:
                    data = values.tolist()
                    body = {"inputs": [{"name": port.name, "shape": [rows, 6], "datatype": datatype, "data": data}]}
                    answer = json.loads(served.infer_http(json.dumps(body).encode())[0])
                    assert np.array(answer["outputs"][-1]["data"], kind).tobytes() == wanted.tobytes()


def test_trees_take_missing_values_and_refuse_what_no_double_equals(tree_models):
    served, runtime = tree_models["txt"]
    row = [[1.0, None, 0.5, None, 2.0, 0.0]]
    body = {"inputs": [{"name": "input", "shape": [1, 6], "datatype": "FP64", "data": row}]}
    answer = json.loads(served.infer_http(json.dumps(body).encode())[0])["outputs"][0]["data"]
    assert answer == [runtime.predict(np.array(row, float))[0, 0]]
    for datatype, values in (("INT64", [2**53 + 1] + [0] * 5), ("UINT64", [2**64 - 1] + [0] * 5)):
        raw = np.array([values], DTYPES[datatype]).tobytes()
        with pytest.raises(InferError, match="no exact double") as error:
            served.infer([("input", datatype, [1, 6], raw)])
        assert error.value.status == 400
    with pytest.raises(InferError, match="element 0: expected 0 or 1, got 2"):
        served.infer([("input", "BOOL", [1, 6], b"\2\0\0\0\0\0")])
    with pytest.raises(InferError, match="expected FP64 or another number, got BYTES"):
        served.infer([("input", "BYTES", [1, 6], b"")])


def test_trees_as_the_oracle(tree_models):
    """Requests for the trees, ids first and last, remembered or not."""
    for served, runtime in tree_models.values():
        port, out = served.inputs[0], served.outputs[-1]
        oracle = Model(
            served.name, "1", [(port.name, port.datatype, port.shape)],
            [(o.name, o.datatype, o.shape) for o in served.outputs],
            lambda feed, name=port.name, out=out, runtime=runtime: {
                out.name: runtime.predict(feed[name].astype(np.float64)).astype(DTYPES[out.datatype]),
                "label": runtime.predict(feed[name].astype(np.float64)).argmax(1),
            },
            any_number=True,
        )  # fmt: skip
        rng = random.Random(5)
        for i in range(300):
            rows = rng.randrange(1, 4)
            raw = RNG.normal(size=(rows, 6)).astype(np.float32).tobytes()
            entry = {
                "name": port.name,
                "shape": [rows, 6],
                "datatype": "FP32",
                "parameters": {"binary_data_size": len(raw)},
            }
            pairs = [("inputs", [entry]), ("parameters", {"binary_data_output": bool(i % 2)})]
            if i % 5 == 3:
                pairs.append(("outputs", [{"name": out.name, "parameters": {"classification": rng.randrange(1, 5)}}]))
            if i % 3:
                pairs.insert(0 if i % 3 == 1 else 2, ("id", rng.choice(["1", "abc", 'q"', "é", "a\\b", ""])))
            text = json.dumps(dict(pairs), separators=rng.choice([(",", ":"), (", ", ": ")])).encode()
            assert compare(served, oracle, text + raw, len(text))
            damaged, length = mutated(text + raw, len(text), rng)
            if length != 0:
                compare(served, oracle, damaged, length)


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_gives_its_label_too(folder, texts, classes):
    """As the file has it: integers or texts, one per row, the scores beside it."""
    import onnxruntime
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestClassifier

    x = RNG.normal(size=(300, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int) + (classes > 2) * (x[:, 1] > 0.5)
    names = np.array(["no", "perhaps é", "yes, of course"]) if texts else np.array([-4, 7, 12])
    forest = RandomForestClassifier(7, max_depth=4, random_state=1).fit(x, names[y])
    path = folder / f"labels{texts}{classes}.onnx"
    path.write_bytes(to_onnx(forest, x[:1], options={"zipmap": False}).SerializeToString())
    served = ServedModel("labels", "1", load(path), path=path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more of them sum in another order
    label, scores = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"X": x})
    kind = "BYTES" if texts else "INT64"
    assert [(p.name, p.datatype, p.shape) for p in served.outputs] == [
        ("label", kind, (-1,)), ("probabilities", "FP32", (-1, classes)),
    ]  # fmt: skip
    raw = to_raw(label, kind)
    assert served.infer([("X", "FP32", x.shape, x.tobytes())]) == [
        ("label", kind, (300,), raw), ("probabilities", "FP32", (300, classes), scores.tobytes()),
    ]  # fmt: skip
    assert served.infer([("X", "FP32", x.shape, x.tobytes())], ["label"]) == [("label", kind, (300,), raw)]
    body = {"inputs": [{"name": "X", "shape": [5, 4], "datatype": "FP32", "data": x[:5].tolist()}]}
    assert json.loads(served.infer_http(json.dumps(body).encode())[0])["outputs"][0]["data"] == label[:5].tolist()
    for k in range(20):  # a remembered header, labels of several lengths
        body = json.dumps({
            "inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        head_, parts = served.infer_http(body + x[k : k + 1].tobytes(), len(body))
        assert parts == [to_raw(label[k : k + 1], kind), scores[k].tobytes()]
        assert json.loads(head_)["outputs"][0]["parameters"]["binary_data_size"] == len(parts[0])


def test_classification_is_the_largest_first(tree_models):
    served, runtime = tree_models["json"]
    x = RNG.normal(size=(2, 6)).astype(np.float32)
    body = {
        "inputs": [{"name": "input", "shape": [2, 6], "datatype": "FP32", "data": x.tolist()}],
        "outputs": [{"name": "score", "parameters": {"classification": 2}}],
    }
    output = json.loads(served.infer_http(json.dumps(body).encode())[0])["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    scores = runtime.predict(x.astype(np.float64)).astype(np.float32)
    order = np.argsort(-scores, axis=1)[:, :2]
    assert output["data"] == [f"{scores[r, c]!s}:{c}" for r in range(2) for c in order[r]]


def test_many_threads_run_one_model(tree_models, few):
    served, runtime = tree_models["txt"]
    x = RNG.normal(size=(2000, 6))
    wanted = runtime.predict(x)
    words = [(name, datatype, [2 if d < 0 else d for d in shape]) for name, datatype, shape in FEW]
    failures = []

    def work(k):
        rng = np.random.default_rng(k)
        try:
            for _ in range(60):
                rows = rng.integers(0, 2000, int(rng.integers(1, 900)))
                got = served.infer([("input", "FP64", (len(rows), 6), x[rows].tobytes())])[0][3]
                assert got == wanted[rows].tobytes()
                inputs = [(n, d, s, to_raw(random_values(d, s, rng), d)) for n, d, s in words]
                assert [part[3] for part in few[0].infer(inputs)] == [part[3] for part in inputs]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_statistics_are_cumulative(folder):
    served, _ = served_copies(folder / "counted.onnx", [("x", "FP32", (-1, 2))])
    before = served.stats()
    for rows in (1, 1, 3):
        served.infer([("x", "FP32", (rows, 2), bytes(8 * rows))])
    after = served.stats()
    assert after["name"] == "copies"
    assert after["version"] == "1"
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 3
    for key in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][key]["count"] - before["inference_stats"][key]["count"] == 3
        assert after["inference_stats"][key]["ns"] >= before["inference_stats"][key]["ns"]
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    sizes = {b["batch_size"]: b["compute_infer"]["count"] for b in after["batch_stats"]}
    assert sizes[3] == 1
    assert after["last_inference"] > 1.6e12
    json.dumps(after)


def test_float32_texts_are_the_shortest(folder):
    """Every float reads back, with the digits that numpy finds the fewest."""
    served, _ = served_copies(folder / "floats.onnx", [("x", "FP32", (-1,)), ("d", "FP64", (-1,))])
    rng = np.random.default_rng(3)
    bits = np.concatenate([
        rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32),
        np.arange(0, 2**32, 2**23, dtype=np.uint64).astype(np.uint32), np.arange(64, dtype=np.uint32),
    ])  # fmt: skip
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    d = np.frombuffer(rng.bytes(8 * len(x)), np.float64)
    d = np.where(np.isfinite(d), d, 0.1)
    body = json.dumps({
        "inputs": [
            {"name": "x", "shape": [len(x)], "datatype": "FP32", "parameters": {"binary_data_size": 4 * len(x)}},
            {"name": "d", "shape": [len(x)], "datatype": "FP64", "parameters": {"binary_data_size": 8 * len(x)}},
        ]
    }).encode()  # fmt: skip
    text = served.infer_http(body + x.tobytes() + d.tobytes(), len(body))[0]
    got = json.loads(text, parse_float=str)["outputs"]
    assert got[1]["data"] == [repr(float(v)) for v in d]
    for mine, value in zip(got[0]["data"], x, strict=True):
        assert np.float32(mine) == value
        assert float(mine) == float(str(value)), (mine, str(value))
    back = json.dumps({
        "inputs": [
            {"name": "x", "shape": [len(x)], "datatype": "FP32", "data": [float(v) for v in got[0]["data"]]},
            {"name": "d", "shape": [len(d)], "datatype": "FP64", "data": d.tolist()},
        ],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    assert served.infer_http(back)[1] == [x.tobytes(), d.tobytes()]


def test_numbers_read_as_python_reads_them(folder):
    served, _ = served_copies(folder / "numbers.onnx", [("d", "FP64", (-1,))])
    rng = random.Random(2)
    texts = ["0", "-0", "0.0", "-0.0e5", "1e-400", "4.9e-324", "2.4703282292062327e-324", "1.7976931348623157e308",
             "9007199254740993", "9007199254740992.5", "0.500000000000000166533453693773481063544750213623046875",
             "1" + "0" * 300, "0." + "0" * 300 + "1", "123456789012345678901234567890",
             "1.00000000000000011102230246251565"]  # fmt: skip
    for _ in range(20000):
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randrange(1, 26))).lstrip("0") or "0"
        text = digits
        if rng.random() < 0.7:
            text += "." + "".join(rng.choice("0123456789") for _ in range(rng.randrange(1, 25)))
        if rng.random() < 0.5:
            text += rng.choice("eE") + rng.choice(["", "-", "+"]) + str(rng.randrange(0, 60))
        texts.append(rng.choice(["", "-"]) + text)
    head_ = (
        '{"inputs":[{"name":"d","shape":[%d],"datatype":"FP64","data":[%s]}],"parameters":{"binary_data_output":true}}'
    )
    raw = served.infer_http((head_ % (len(texts), ",".join(texts))).encode())[1][0]
    assert raw == np.array([float(t) for t in texts]).tobytes()


def test_a_remembered_header_is_not_another(pair):
    """Headers of one length that differ in one byte, many more than are remembered."""
    for k in range(300):
        name = f"{k:04d}"
        request = head(entry={"data": ..., "parameters": {"binary_data_size": 8}}, id=name, outputs=[{"name": "y"}])
        request["parameters"] = {"k": name, "binary_data_output": k % 2 == 0}
        text = json.dumps(request).encode()
        raw = np.array([k, 1], np.float32)
        for _ in range(2):
            answer, parts = pair.infer_http(text + raw.tobytes(), len(text))
            assert json.loads(answer)["id"] == name
            assert parts == ([(-raw).tobytes()] if k % 2 == 0 else [])


def test_memory_does_not_grow_and_no_garbage_is_tracked(pair):
    import gc
    import resource

    raw = np.zeros(2, np.float32).tobytes()
    text = json.dumps(head(entry={"data": ..., "parameters": {"binary_data_size": 8}})).encode()
    bodies = [(text + raw, len(text)), (json.dumps(head()).encode(), -1), (b"{" * 50, -1), (raw, 0)]

    def some(n):
        for i in range(n):
            with contextlib.suppress(InferError):
                pair.infer_http(*bodies[i % 4])

    some(2000)
    gc.collect()
    before, objects = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())
    some(200_000)
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4000
    assert len(gc.get_objects()) - objects < 50


def test_a_target_swaps_its_model(pair):
    target = Target("pair")
    assert (target.name, target.version, target.model, target.lane) == ("pair", "", None, None)
    target.model = pair
    assert target.model is pair
    with pytest.raises(TypeError):
        target.model = 3


def test_models_that_cannot_be_served_say_so(folder):
    with pytest.raises(ValueError, match="give path="):
        ServedModel("m", "1", None)
    (folder / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="model m: ONNX Runtime"):
        ServedModel("m", "1", None, path=folder / "broken.onnx")


def test_no_byte_is_read_past_the_end(few, tmp_path):
    """The reader alone, under the address and undefined-behaviour sanitizers, on damaged requests."""
    here = Path(__file__).resolve()
    program = tmp_path / "reader"
    built = subprocess.run(
        ["cc", "-g", "-O1", "-D_GNU_SOURCE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w",
         f"-I{here.parents[2] / 'ext'}", "-o", program, here.with_name("infer_reader.c"), "-lm"], capture_output=True,
    )  # fmt: skip
    if built.returncode:
        pytest.skip(f"no compiler with sanitizers: {built.stderr.decode()[-200:]}")
    rng, records, expected = random.Random(1), [], []
    for seed in range(3000):
        body, header = random_request(FEW, seed)
        if seed % 4:
            body, header = mutated(body, header, rng)
        header = min(max(len(body) if header < 0 else header, 1), len(body))
        records.append(struct.pack("<II", header, len(body)) + body)
        try:
            few[0].infer_http(body, header or -1)
            expected.append(True)
        except InferError:
            expected.append(False)
    done = subprocess.run([program], input=b"".join(records), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    # What the model answers the reader took; what it cannot write as JSON the reader took as well.
    assert all(line == b"0" or not answered for line, answered in zip(done.stdout.splitlines(), expected, strict=True))
