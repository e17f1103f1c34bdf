"""Cutting a model to one output: the same bits, fewer nodes; damaged bytes are errors."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402

from penstock._ext.onnx import choose_output  # noqa: E402
from penstock.models.onnx_graph import GraphError, TooDeep, only_output, with_tensors  # noqa: E402
from penstock.models.onnx_runtime import OnnxRuntime  # noqa: E402
from penstock.models.repository import ModelRepository  # noqa: E402
from penstock.models.runtime import load  # noqa: E402

RNG = np.random.default_rng(11)


def classifier(zipmap, estimator=None):
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = RNG.normal(size=(200, 4))
    y = np.digitize(x[:, 0] + x[:, 1], [-0.5, 0.5])
    fitted = make_pipeline(StandardScaler(), estimator or LogisticRegression()).fit(x, y)
    return to_onnx(fitted, x[:1].astype(np.float32), options={"zipmap": zipmap}).SerializeToString(), x


@pytest.mark.parametrize("zipmap", [False, True])
def test_probabilities_have_the_bits_of_the_whole_model(zipmap, tmp_path):
    model, x = classifier(zipmap)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_outputs()[1].name
    rows = [session.run([name], {"X": row[None].astype(np.float32)})[0] for row in x]
    if zipmap:
        expected = np.array([[row[0][k] for k in (0, 1, 2)] for row in rows], dtype=np.float64)
    else:
        expected = np.vstack(rows).astype(np.float64)
    cut, shown = only_output(model, None, choose_output)
    assert shown == name
    onnx.checker.check_model(onnx.load_from_string(cut))
    ops = [node.op_type for node in onnx.load_from_string(cut).graph.node]
    assert "ZipMap" not in ops
    assert len(ops) < len(onnx.load_from_string(model).graph.node) or not zipmap
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    for api in ("c", "python"):
        ours = OnnxRuntime(path, None, None, "m@1", api)
        assert ours.output_names == tuple(f"{name}[{k}]" for k in range(3))
        assert ours.predict(x).tobytes() == expected.tobytes()
    named = OnnxRuntime(path, None, "label" if not zipmap else "output_label", "m@1")
    assert named.output_names == ("label" if not zipmap else "output_label",)
    assert (named.predict(x)[:, 0] == expected.argmax(1)).all()


def test_what_the_output_does_not_need_is_left_out():
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"]),
        helper.make_node("Exp", ["x"], ["c"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in ("x", "b", "c")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)], producer_name="p")
    cut, shown = only_output(model.SerializeToString(), "b", choose_output)
    got = onnx.load_from_string(cut)
    assert shown == "b"
    assert [node.op_type for node in got.graph.node] == ["Neg", "Abs"]
    assert [port.name for port in got.graph.output] == ["b"]
    assert (got.producer_name, got.ir_version, got.opset_import[0].version) == ("p", 9, 17)
    with pytest.raises(ValueError, match="no output named 'z'; the model has b"):
        only_output(model.SerializeToString(), "z", choose_output)


def test_a_subgraph_keeps_what_it_reads_from_outside():
    inner = [helper.make_node("Add", ["y", "y"], ["then"])], [helper.make_node("Identity", ["y"], ["else"])]
    branches = [
        helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
        for nodes, name in zip(inner, ("then", "else"))
    ]
    nodes = [
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("Exp", ["x"], ["unused"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["up"]),
        helper.make_node("If", ["up"], ["p"], then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 2])],
        [zero],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    cut, _ = only_output(model.SerializeToString(), None, choose_output)
    assert [node.op_type for node in onnx.load_from_string(cut).graph.node] == ["Neg", "ReduceSum", "Greater", "If"]
    for x in ([[1.0, 2.0]], [[-1.0, -2.0]]):
        feed = {"x": np.array(x, np.float32)}
        results = [
            onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(["p"], feed)[0].tolist()
            for m in (model.SerializeToString(), cut)
        ]
        assert results[0] == results[1]


def test_damaged_bytes():
    model, _ = classifier(False)
    for data in (b"", b"\xff" * 40, b"no model at all", model[: len(model) // 2]):
        with pytest.raises(GraphError):
            only_output(data, None, choose_output)
    for _ in range(300):
        data = bytearray(model)
        data[RNG.integers(len(data))] ^= 1 << RNG.integers(8)
        try:
            only_output(bytes(data), None, choose_output)
        except ValueError:
            continue


@pytest.mark.parametrize("texts", [False, True])
def test_a_list_of_maps_is_served_as_its_tensor(tmp_path, texts):
    """What skl2onnx makes of a classifier by default: a label, and a ZipMap that no protocol can carry."""
    ort = pytest.importorskip("onnxruntime")
    to_onnx = pytest.importorskip("skl2onnx").to_onnx
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4)).astype(np.float32)
    y = np.array(["no", "may", "yes"])[rng.integers(0, 3, 90)] if texts else rng.integers(0, 3, 90)
    model = to_onnx(LogisticRegression().fit(x, y), x).SerializeToString()
    labels, maps = ort.InferenceSession(model).run(None, {"X": x[:5]})
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model)
    repository = ModelRepository(tmp_path)
    repository.start()
    repository.loader.stop()
    served = repository.model("m")
    assert [(port.name, port.datatype, port.shape) for port in served.outputs] == [
        ("output_label", "BYTES" if texts else "INT64", (-1,)),
        ("output_probability", "FP32", (-1, 3)),
    ]
    answers = {name: (shape, data) for name, _, shape, data in served.infer([("X", "FP32", [5, 4], x[:5].tobytes())])}
    shape, data = answers["output_probability"]
    assert shape == (5, 3)
    classes = sorted(maps[0])
    assert np.frombuffer(data, np.float32).reshape(5, 3).tolist() == [[row[c] for c in classes] for row in maps]
    if not texts:
        assert np.frombuffer(answers["output_label"][1], np.int64).tolist() == labels.tolist()


def test_models_without_maps_stay_as_they_are():
    assert with_tensors(b"") is None
    assert with_tensors(b"\x00 no model") is None
    with pytest.raises(GraphError):
        with_tensors(b"ZipMap")


def test_graphs_in_one_another_end_somewhere():
    def nested(depth):
        graph = _message(1, _message(4, b"Identity") + _message(1, b"x") + _message(2, b"y"))
        for _ in range(depth):
            branch = _message(5, _message(1, b"b") + bytes([0xA0, 1, 5]) + _message(6, graph))
            graph = _message(1, _message(4, b"If") + _message(1, b"x") + _message(2, b"y") + branch)
        tensor = _message(1, bytes([8, 1]) + _message(2, _message(1, b"") + _message(1, bytes([8, 4]))))
        ends = _message(11, _message(1, b"x") + _message(2, tensor)) + _message(
            12, _message(1, b"y") + _message(2, tensor)
        )
        return bytes([8, 8]) + _message(7, graph + _message(2, b"g") + ends)

    assert only_output(nested(20), None, lambda ports, wanted: 0)[1] == "y"
    for depth in (40, 3000):
        with pytest.raises(TooDeep, match="33 graphs in one another"):
            only_output(nested(depth), None, lambda ports, wanted: 0)


def _message(number, body):
    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return varint(number << 3 | 2) + varint(len(body)) + body


def test_scores_of_another_shape_than_the_file_declares(tmp_path):
    """skl2onnx says of RidgeClassifier that it gives two columns; there is one."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import RidgeClassifier

    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    model = to_onnx(RidgeClassifier().fit(x, x[:, 0] > 0), x, options={"zipmap": False}).SerializeToString()
    (tmp_path / "model.onnx").write_bytes(model)
    runtime = load(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(model)
    right = np.concatenate([session.run(None, {"X": x[i : i + 1]})[1] for i in range(4)])
    assert right.shape == (4, 1)
    assert runtime.predict(x[:4]).astype(np.float32).tobytes() == right.tobytes()
