"""OnnxModel: the C API against InferenceSession.run, bit for bit; shapes, names, errors, threads."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import penstock  # noqa: E402
from penstock._ext.onnx import OnnxError, OnnxModel, library_path, predict_abi  # noqa: E402

RNG = np.random.default_rng(7)
FLOAT, DOUBLE, INT64, INT32, BOOL, STRING = (
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING,
)  # fmt: skip


def build(nodes, inputs, outputs, weights=None, metadata=None):
    """Bytes of a model. inputs and outputs: (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9
    )
    if metadata:
        helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def network(n=5, hidden=8, outputs=3, type_=FLOAT, rows="N", metadata=None):
    dtype = np.float32 if type_ == FLOAT else np.float64
    weights = {
        "w1": RNG.normal(size=(n, hidden)).astype(dtype),
        "b1": RNG.normal(size=hidden).astype(dtype),
        "w2": RNG.normal(size=(hidden, outputs)).astype(dtype),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"]),
        helper.make_node("Add", ["h0", "b1"], ["h1"]),
        helper.make_node("Tanh", ["h1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["h3"]),
        helper.make_node("Softmax", ["h3"], ["p"], axis=1),
    ]
    return build(nodes, [("x", type_, [rows, n])], [("p", type_, [rows, outputs])], weights, metadata)


def run(model, feed, output="p"):
    """The reference: one thread, one row at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rows = len(next(iter(feed.values())))
    return np.vstack([session.run([output], {k: v[i : i + 1] for k, v in feed.items()})[0] for i in range(rows)])


def test_the_c_api_is_reached_without_importing_the_package():
    assert library_path() is not None
    program = (
        "import sys; from penstock._ext.onnx import OnnxModel;"
        "m = OnnxModel(sys.stdin.buffer.read()); print(m.api, m.version, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=network(),
        capture_output=True,
        check=True,
        env={"PYTHONPATH": str(Path(penstock.__file__).parent.parent)},
    )
    assert done.stdout.decode().split() == ["c", onnxruntime.__version__, "False"]


@pytest.mark.parametrize("type_", [FLOAT, DOUBLE])
@pytest.mark.parametrize("rows", ["N", 1])
@pytest.mark.parametrize("api", ["c", "python"])
def test_the_bits_of_run(type_, rows, api):
    model = network(type_=type_, rows=rows)
    x = RNG.normal(size=(50, 5)) * 10.0 ** RNG.integers(-3, 3, size=(50, 5))
    x[3, 2] = np.nan
    x[4, 0] = np.inf
    x[5, 1] = 1e300  # beyond float32
    ours = OnnxModel(model, api=api)
    assert ours.api == api
    assert (ours.n_inputs, ours.n_outputs, ours.output, ours.inputs) == (5, 3, "p", None)
    with np.errstate(over="ignore"):
        expected = run(model, {"x": x.astype(np.float32 if type_ == FLOAT else np.float64)}).astype(np.float64)
    got = ours.predict(x)
    assert got.dtype == np.float64
    assert got.tobytes() == expected.tobytes()
    for i in (0, 3, 49):
        assert ours.predict(x[i]).tobytes() == expected[i : i + 1].tobytes()
    assert predict_abi(ours.abi, x).tobytes() == expected.tobytes()
    assert ours.predict(x[:0]).shape == (0, 3)
    assert ours.predict(x[::2]).tobytes() == expected[::2].tobytes()


def test_a_row_scores_the_same_alone_and_in_a_batch():
    """The case where ONNX Runtime itself differs: skl2onnx's logistic regression."""
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    x = RNG.normal(size=(500, 15))
    classifier = LogisticRegression().fit(x, x[:, 0] + x[:, 1] ** 2 > 1)
    model = to_onnx(classifier, x[:1].astype(np.float32), options={"zipmap": False}).SerializeToString()
    ours = OnnxModel(model)
    assert (ours.output, ours.n_outputs) == ("probabilities", 2)
    whole = ours.predict(x)
    assert whole.tobytes() == b"".join(ours.predict(row).tobytes() for row in x)
    assert whole.tobytes() == run(model, {"X": x.astype(np.float32)}, "probabilities").astype(np.float64).tobytes()
    assert whole.tobytes() == OnnxModel(model, api="python").predict(x).tobytes()
    batched = OnnxModel(model, batched=True)
    np.testing.assert_allclose(batched.predict(x), whole, atol=1e-6)
    assert batched.predict(x[:0]).shape == (0, 2)
    # Batches beyond one chunk are cut, and come back in order.
    many = np.vstack([x] * 5)
    np.testing.assert_allclose(batched.predict(many), np.vstack([whole] * 5), atol=1e-6)


def one_input_per_feature(types=(FLOAT, DOUBLE, INT64, INT32, BOOL), shape=("N", 1)):
    names = ["amount", "mean", "count", "hour", "night"]
    nodes = [helper.make_node("Cast", [name], [name + "_"], to=DOUBLE) for name in names]
    if len(shape) == 1:
        nodes += [helper.make_node("Unsqueeze", [name + "_", "one"], [name + "__"]) for name in names]
    suffix = "_" if len(shape) == 2 else "__"
    nodes.append(helper.make_node("Concat", [name + suffix for name in names], ["p"], axis=1))
    weights = {"one": np.array([1])} if len(shape) == 1 else None
    inputs = [(name, type_, list(shape)) for name, type_ in zip(names, types)]
    return build(nodes, inputs, [("p", DOUBLE, ["N", 5])], weights)


@pytest.mark.parametrize("api", ["c", "python"])
@pytest.mark.parametrize("shape", [("N", 1), ("N",)])
def test_one_input_per_feature_is_bound_by_name(api, shape):
    model = one_input_per_feature(shape=shape)
    x = np.array([[0.1, 0.2, 3.0, -4.0, 1.0], [np.nan, np.inf, 2.0**52, 2.0**31 - 1, 0.0]])
    expected = x.copy()
    expected[:, 0] = x[:, 0].astype(np.float32)
    ours = OnnxModel(model, api=api)
    assert ours.inputs == ("amount", "mean", "count", "hour", "night")
    assert ours.predict(x).tobytes() == expected.tobytes()
    order = ["night", "hour", "count", "mean", "amount"]
    turned = OnnxModel(model, inputs=order, api=api)
    assert turned.inputs == tuple(order)
    assert turned.predict(x[:, ::-1]).tobytes() == expected.tobytes()
    other = OnnxModel(model, inputs=list("abcde"), api=api)  # no name in common: by place
    assert other.predict(x).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="missing: night; surplus: day"):
        OnnxModel(model, inputs=["amount", "mean", "count", "hour", "day"], api=api)
    with pytest.raises(ValueError, match="missing: night"):
        OnnxModel(model, inputs=["amount", "mean", "count", "hour"], api=api)


@pytest.mark.parametrize("api", ["c", "python"])
@pytest.mark.parametrize(
    ("column", "value", "type_"),
    [(2, np.nan, "int64"), (2, 2.0**63, "int64"), (3, -(2.0**31) - 1, "int32"), (4, 0.5, "bool"), (4, np.nan, "bool")],
)
def test_a_null_in_an_integer_input_is_a_failure_that_says_so(api, column, value, type_):
    ours = OnnxModel(one_input_per_feature(), api=api)
    x = np.array([[0.0, 0.0, 1.0, 1.0, 1.0]])
    good = ours.predict(x)
    bad = x.copy()
    bad[0, column] = value
    with pytest.raises(OnnxError, match=f"is {type_}: a null, or a value out of its range"):
        ours.predict(bad)
    assert ours.predict(x).tobytes() == good.tobytes()


def test_feature_names_in_the_metadata():
    names = ["a", "b", "c", "d", "e"]
    model = network(metadata={"feature_names": json.dumps(names)})
    x = RNG.normal(size=(7, 5))
    for api in ("c", "python"):
        ours = OnnxModel(model, api=api)
        assert ours.inputs == tuple(names)
        turned = OnnxModel(model, inputs=names[::-1], api=api)
        assert turned.predict(x[:, ::-1].copy()).tobytes() == ours.predict(x).tobytes()
        with pytest.raises(ValueError, match="missing: e; surplus: f"):
            OnnxModel(model, inputs=["a", "b", "c", "d", "f"], api=api)
    with pytest.raises(ValueError, match="has 1 names; the model takes 5"):
        OnnxModel(network(metadata={"feature_names": '["a"]'}))
    assert OnnxModel(network(metadata={"feature_names": "not json"})).inputs is None


def test_the_number_of_features_may_be_left_open():
    node = helper.make_node("ReduceSum", ["x", "axis"], ["p"])
    model = build([node], [("x", FLOAT, ["N", "M"])], [("p", FLOAT, ["N", 1])], {"axis": np.array([1])})
    with pytest.raises(ValueError, match=r"give inputs=\[...\]"):
        OnnxModel(model)
    ours = OnnxModel(model, inputs=["a", "b", "c"])
    assert ours.predict([[1, 2, 3.5]]).tolist() == [[6.5]]


def test_outputs_of_other_shapes_and_types():
    def identity(type_, shape, name="p", value=None):
        nodes = [helper.make_node("Cast", ["x"], ["y"], to=type_)]
        nodes.append(helper.make_node("Reshape", ["y", "shape"], [name]))
        weights = {"shape": np.array(value)}
        return build(nodes, [("x", FLOAT, ["N", 4])], [(name, type_, shape)], weights)

    x = np.array([[1.0, 0.0, 3.0, 1.0], [5.0, 6.0, 7.0, 8.0]])
    for type_, expected in [(FLOAT, x), (DOUBLE, x), (INT64, x), (INT32, x), (BOOL, x != 0)]:
        ours = OnnxModel(identity(type_, ["N", 2, 2], value=[-1, 2, 2]))
        assert ours.n_outputs == 4
        assert ours.predict(x).tolist() == expected.astype(float).tolist()
    with pytest.raises(OnnxError, match="4 rows for 1 rows in"):
        OnnxModel(identity(FLOAT, ["M", 1], value=[-1, 1]))
    with pytest.raises(ValueError, match="expected numbers"):
        OnnxModel(identity(STRING, ["N", 4], value=[-1, 4]))
    flat = build([helper.make_node("ReduceMax", ["x"], ["p"], axes=[1], keepdims=0)], [("x", FLOAT, ["N", 4])],
                 [("p", FLOAT, ["N"])])  # fmt: skip
    assert OnnxModel(flat).predict(x).tolist() == [[3.0], [8.0]]
    assert OnnxModel(flat, api="python").predict(x).tolist() == [[3.0], [8.0]]


def test_the_choice_of_the_output():
    nodes = [helper.make_node("Neg", ["x"], ["negative"]), helper.make_node("Abs", ["x"], ["absolute"])]
    nodes.append(helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0))
    ports = [("label", INT64, ["N"]), ("negative", FLOAT, ["N", 2]), ("absolute", FLOAT, ["N", 2])]
    model = build(nodes, [("x", FLOAT, ["N", 2])], ports)
    with pytest.raises(ValueError, match=r"which output.*label \(int64 \?\), negative \(float32 \? x 2\), absolute"):
        OnnxModel(model)
    assert OnnxModel(model, output="absolute").predict([-1.0, 2.0]).tolist() == [[1.0, 2.0]]
    assert OnnxModel(model, output="label").predict([-1.0, 2.0]).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="no output named 'score'; the model has label"):
        OnnxModel(model, output="score")
    assert OnnxModel(build(nodes[:1] + nodes[2:], [("x", FLOAT, ["N", 2])], ports[:2])).output == "negative"


def test_zipmap_is_refused_with_the_way_out():
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    x = RNG.normal(size=(50, 2)).astype(np.float32)
    model = to_onnx(LogisticRegression().fit(x, x[:, 0] > 0), x[:1]).SerializeToString()
    for api in ("c", "python"):
        with pytest.raises(ValueError, match="zipmap=False"):
            OnnxModel(model, api=api)


def test_inputs_that_are_refused():
    def of(type_, shape):
        return build([helper.make_node("Cast", ["x"], ["p"], to=FLOAT)], [("x", type_, shape)], [("p", FLOAT, shape)])

    for api in ("c", "python"):
        with pytest.raises(ValueError, match=r"input x \(string \? x 2\): expected a float, double"):
            OnnxModel(of(STRING, ["N", 2]), api=api)
        with pytest.raises(ValueError, match=r"input x \(float32 \? x 2 x 2\): expected rows x features"):
            OnnxModel(of(FLOAT, ["N", 2, 2]), api=api)
        with pytest.raises(ValueError, match="the batch is fixed at 16 rows"):
            OnnxModel(of(FLOAT, [16, 2]), api=api)
        with pytest.raises(ValueError, match="inputs names 3 features; the model takes 2"):
            OnnxModel(of(FLOAT, ["N", 2]), inputs=["a", "b", "c"], api=api)
        with pytest.raises(ValueError, match="a feature twice"):
            OnnxModel(of(FLOAT, ["N", 2]), inputs=["a", "a"], api=api)


def test_errors_carry_onnx_runtimes_own_words(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    for api in ("c", "python"):
        with pytest.raises(OnnxError, match=r"model\.onnx: ONNX Runtime: .*(?i:protobuf)"):
            OnnxModel(path, api=api)
    with pytest.raises(FileNotFoundError, match="no model file"):
        OnnxModel(tmp_path / "none.onnx")
    # A failure while running: 7 columns cannot become rows of 2 for every row.
    nodes = [helper.make_node("Cast", ["x"], ["i"], to=INT64), helper.make_node("Gather", ["table", "i"], ["p"])]
    model = build(nodes, [("x", FLOAT, ["N", 1])], [("p", FLOAT, ["N", 1])], {"table": np.arange(3, dtype=np.float32)})
    for api in ("c", "python"):
        ours = OnnxModel(model, api=api)
        assert ours.predict([2.0]).tolist() == [[2.0]]
        with pytest.raises(OnnxError, match="indices element out of data bounds"):
            ours.predict([9.0])
        assert "out of data bounds" in ours.error
        assert ours.predict([1.0]).tolist() == [[1.0]]
    with pytest.raises(ValueError, match=r"expected \(rows, 1\) or \(1,\) numbers, got \(1, 2\)"):
        ours.predict([[1.0, 2.0]])


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_errors(seed):
    rng = np.random.default_rng(seed)
    whole = network()
    refused = 0
    for _ in range(40):
        data = bytearray(whole)
        if rng.random() < 0.5:
            data = data[: rng.integers(len(data))]
        else:
            for at in rng.integers(len(data), size=3):
                data[at] ^= 1 << rng.integers(8)
        try:
            OnnxModel(bytes(data)).predict(np.zeros(5))
        except (OnnxError, ValueError):
            refused += 1
    assert refused > 10  # a flipped bit of a weight is another model, a cut file is none


def test_many_threads():
    model = network()
    ours = OnnxModel(model)
    x = RNG.normal(size=(64, 5))
    expected = ours.predict(x)
    wrong = []

    def work(k):
        for i in range(200):
            n = 1 + (i * 7 + k) % 20
            if predict_abi(ours.abi, x[k : k + n]).tobytes() != expected[k : k + n].tobytes():
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(24)]  # more than the pool of calls
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_threads_are_started_and_no_memory_is_lost():
    """The options are set by their place in a table: one thread means that no other one appears."""
    resource = pytest.importorskip("resource")
    model = network(n=64, hidden=512, outputs=8)
    x = RNG.normal(size=(8, 64))
    tasks = Path("/proc/self/task")
    OnnxModel(model).predict(x)  # the library's own environment, once a process, has a thread
    before = {task.name for task in tasks.iterdir()} if tasks.exists() else set()
    kept = [OnnxModel(model) for _ in range(4)]
    for ours in kept:
        ours.predict(x)
    # Threads of other tests may end meanwhile; none may appear.
    assert not ({task.name for task in tasks.iterdir()} if tasks.exists() else set()) - before
    for _ in range(20):
        OnnxModel(model).predict(x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        OnnxModel(model).predict(x)
    for _ in range(2000):
        kept[0].predict(x)
    # A model holds 150 kB of weights: 300 of them lost would be 45 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 15_000


def test_options_and_reload_change_no_bit():
    model = network()
    x = RNG.normal(size=(20, 5))
    expected = OnnxModel(model).predict(x).tobytes()
    for arena in (False, True):
        for pattern in (False, True):
            assert OnnxModel(model, arena=arena, mem_pattern=pattern).predict(x).tobytes() == expected
    with pytest.raises(RuntimeError, match="already loaded"):
        OnnxModel(model).__init__(model)
    with pytest.raises(ValueError, match="expected 'c' or 'python'"):
        OnnxModel(model, api="java")


def test_the_fallback_is_taken_when_the_library_is_not_found(monkeypatch):
    from penstock._ext import onnx as module

    model = network()
    x = RNG.normal(size=(20, 5))
    expected = OnnxModel(model).predict(x).tobytes()
    monkeypatch.setattr(module, "library_path", lambda: None)
    ours = OnnxModel(model)
    assert ours.api == "python"
    assert ours.predict(x).tobytes() == expected
    assert predict_abi(ours.abi, x).tobytes() == expected
    with pytest.raises(OnnxError, match="the C API of ONNX Runtime was not reached"):
        OnnxModel(model, api="c")
