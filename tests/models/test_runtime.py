"""Choice of the runtime, names of inputs, and errors of models.runtime.load."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from penstock.models.folder import ModelError, resolve
from penstock.models.runtime import bind_inputs, load

OWN = ("amount", "mean", "count")


class FakeTrees:
    n_inputs, n_outputs, abi = 3, 1, 12345

    def __init__(self, feature_names):
        self.feature_names = feature_names

    def predict(self, x):
        return x.sum(axis=1, keepdims=True)


@pytest.fixture
def kernel(monkeypatch):
    """Stands for penstock.models.trees: a file that says `trees` is an ensemble, `broken` is damaged."""
    module = types.ModuleType("penstock.models.trees")

    class NotATreeModel(Exception):
        pass

    def load_trees(path):
        text = path.read_bytes()
        if text == b"broken":
            raise ValueError(f"{path}: byte 3 is wrong")
        if not text.startswith(b"trees"):
            raise NotATreeModel(f"{path} holds no tree ensemble")
        return FakeTrees(OWN if b"named" in text else None)

    module.NotATreeModel, module.load_trees = NotATreeModel, load_trees
    monkeypatch.setitem(sys.modules, "penstock.models.trees", module)


def put(tmp_path, file, content, version="2"):
    folder = tmp_path / "fraud" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    return folder / file


def network():
    helper = pytest.importorskip("onnx").helper
    nodes = [helper.make_node("Tanh", ["x"], ["p"])]
    ports = [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in "xp"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:1], ports[1:]), ir_version=9, opset_imports=[helper.make_opsetid("", 17)]
    )
    return model.SerializeToString()


@pytest.mark.parametrize("file", ["model.txt", "model.json", "model.ubj", "model.onnx"])
def test_tree_ensembles_go_to_the_kernel(kernel, tmp_path, file):
    model = load(put(tmp_path, file, b"trees named"))
    assert (model.kind, model.inputs, model.n_inputs, model.n_outputs) == ("trees", OWN, 3, 1)
    assert (model.abi, model.output_names) == (12345, ("score",))
    model.warm()
    assert model.predict([[1, 2, 3]]).tolist() == [[6.0]]


def test_other_graphs_go_to_onnx_runtime(kernel, tmp_path):
    path = put(tmp_path, "model.onnx", network())
    model = load(resolve(tmp_path, "fraud@2").path, inputs=OWN)
    assert (model.kind, model.inputs, model.n_inputs, model.n_outputs) == ("onnx", OWN, 3, 3)
    assert model.output_names == ("p[0]", "p[1]", "p[2]")
    assert model.abi
    model.warm()
    x = np.array([[0.5, 0.25, -1.0]])
    np.testing.assert_allclose(model.predict(x), np.tanh(x), rtol=1e-6)
    with pytest.raises(ModelError, match="model fraud@2: no output named 'q'"):
        load(path, output="q")
    with pytest.raises(ModelError, match="model fraud@2: inputs names 1 features; the model takes 3"):
        load(path, inputs=["a"])


def test_errors_name_the_model(kernel, tmp_path):
    with pytest.raises(ModelError, match=r"model fraud@2: .*byte 3 is wrong"):
        load(put(tmp_path, "model.txt", b"broken"))
    with pytest.raises(ModelError, match=r"model fraud@3: .*holds no tree ensemble"):
        load(put(tmp_path, "model.json", b"{}", "3"))
    with pytest.raises(ModelError, match=r"model scores@9: .* is no model file; expected one of \.onnx"):
        load(put(tmp_path, "model.pkl", b""), name="scores@9")
    with pytest.raises(ModelError, match="there is no file"):
        load(tmp_path / "none.txt")
    with pytest.raises(ModelError, match="model fraud@2: ONNX Runtime: "):
        load(put(tmp_path, "model.onnx", b"nonsense"))


def test_a_missing_extra_is_named(kernel, tmp_path, monkeypatch):
    path = put(tmp_path, "model.onnx", b"\x00")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(ModelError, match=r"^model fraud@2 needs onnxruntime: pip install 'penstock\[onnx\]'$"):
        load(path)


def test_bind_inputs():
    assert bind_inputs(OWN, None, 3, "m") == OWN
    assert bind_inputs(OWN, ["count", "amount", "mean"], 3, "m") == OWN
    assert bind_inputs(None, ["a", "b"], 2, "m") == ("a", "b")
    assert bind_inputs(None, None, 2, "m") is None
    assert bind_inputs(["Column_0", "Column_1"], ["a", "b"], 2, "m") == ("a", "b")
    assert bind_inputs(["f0", "f1"], None, 2, "m") is None
    assert bind_inputs(["f0", "f1"], ["f1", "f0"], 2, "m") == ("f0", "f1")
    with pytest.raises(ModelError, match="m: inputs do not match the model's; missing: count; surplus: day, hour"):
        bind_inputs(OWN, ["amount", "mean", "day", "hour"], 3, "m")
    with pytest.raises(ModelError, match=r"missing: count$"):
        bind_inputs(OWN, ["amount", "mean"], 3, "m")
    with pytest.raises(ModelError, match="takes 2 inputs, 3 are named: a, b, c"):
        bind_inputs(None, ["a", "b", "c"], 2, "m")
    with pytest.raises(ModelError, match="inputs names a twice"):
        bind_inputs(None, ["a", "a"], 2, "m")
