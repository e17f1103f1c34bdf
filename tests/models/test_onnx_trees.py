"""ONNX tree ensembles against ONNX Runtime on one thread: random hand-made ones, converted ones, damaged files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.tree_rows import damaged, every_variant
from penstock._ext.infer import ServedModel
from penstock.models.folder import ModelError
from penstock.models.runtime import load
from penstock.models.trees import NotATreeModel, TreeModel, load_trees, read_ensemble

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper = onnx.helper

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")
POSTS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def save(path, nodes, n_inputs, double, outputs, opset=3):
    kind = onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("X", kind, [None, n_inputs])],
        [helper.make_tensor_value_info(name, k, None) for name, k in outputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def random_trees(rng, n_trees, n_inputs, modes, values, depth):
    """Flat nodes of ai.onnx.ml 1 to 3: one list per attribute, and the leaves as (tree, node)."""
    nodes = {k: [] for k in ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids",
                             "missing_value_tracks_true")}  # fmt: skip
    leaves = []
    for t in range(n_trees):
        todo, next_id = [(0, 0)], 1
        while todo:
            i, d = todo.pop(int(rng.integers(len(todo))))
            leaf = d >= depth or rng.random() < 0.2 * d
            nodes["treeids"].append(t)
            nodes["nodeids"].append(i)
            nodes["featureids"].append(0 if leaf else int(rng.integers(n_inputs)))
            nodes["modes"].append("LEAF" if leaf else modes[rng.integers(len(modes))])
            nodes["values"].append(0.0 if leaf else float(values[rng.integers(len(values))]))
            nodes["missing_value_tracks_true"].append(0 if leaf else int(rng.random() < 0.4))
            nodes["truenodeids"].append(0 if leaf else next_id)
            nodes["falsenodeids"].append(0 if leaf else next_id + 1)
            if leaf:
                leaves.append((t, i))
            else:
                todo += [(next_id, d + 1), (next_id + 1, d + 1)]
                next_id += 2
    return nodes, leaves


def attributes(nodes, double, tracks):
    attrs = {f"nodes_{k}": v for k, v in nodes.items() if tracks or k != "missing_value_tracks_true"}
    if double:
        values = attrs.pop("nodes_values")
        attrs["nodes_values_as_tensor"] = helper.make_tensor("v", onnx.TensorProto.DOUBLE, [len(values)], values)
    return attrs


def real(attrs, name, values, double):
    if double:
        attrs[f"{name}_as_tensor"] = helper.make_tensor(name, onnx.TensorProto.DOUBLE, [len(values)], values)
    else:
        attrs[name] = values


def rows_around(rng, values, n_inputs, double, n):
    """Values, their neighbours, zeros of both signs, infinities, NaN, the huge and the tiny."""
    kind = np.float64 if double else np.float32
    base = np.array([*values, 0.0, -0.0, 1e30, -1e30, 1e-40], kind)
    pool = [
        base,
        np.nextafter(base, kind(np.inf)),
        np.nextafter(base, kind(-np.inf)),
        [np.inf, -np.inf, np.nan, np.nan],
    ]
    return rng.choice(np.concatenate(pool).astype(kind), (n, n_inputs))


def check(path, x, columns=None):
    """Every layout and variant gives ONNX Runtime's scores, one by one and in a batch."""
    run = session(path)
    names = [o.name for o in run.get_outputs()]
    want = run.run([names[-1]], {"X": x})[0]
    want = want.reshape(len(x), -1).astype(np.float64)
    ones = np.vstack([run.run([names[-1]], {"X": x[i : i + 1]})[0].reshape(1, -1) for i in range(0, len(x), 7)])
    columns = columns or want.shape[1]
    want, ones = want[:, :columns], ones[:, :columns]
    np.testing.assert_array_equal(ones.astype(np.float64), want[::7])  # the reference does not depend on the batch
    form = read_ensemble(path)
    for model in every_variant(form, TreeModel):
        got = model.predict(x.astype(np.float64))[:, :columns]
        np.testing.assert_array_equal(got, want, err_msg=f"{model.layout} {model.simd}")
        each = np.vstack([model.predict(x[i : i + 1].astype(np.float64)) for i in range(0, len(x), 5)])
        np.testing.assert_array_equal(each[:, :columns], want[::5])


def check_labels(path, x):
    """The class that a served model gives is ONNX Runtime's, integers and texts."""
    served = ServedModel("m", "1", load(path), path=path)
    label = served.outputs[0]
    want = session(path).run([label.name], {"X": x})[0]
    raw = x.tobytes()
    kind = "FP64" if x.dtype == np.float64 else "FP32"
    (name, datatype, shape, got), _ = served.infer([("X", kind, x.shape, raw)])
    assert (name, datatype, shape) == (label.name, "BYTES" if want.dtype == object else "INT64", (len(x),))
    if want.dtype == object:
        assert got == b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in want)
    else:
        np.testing.assert_array_equal(np.frombuffer(got, np.int64), want)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31), double=st.booleans(), kind=st.sampled_from(["regressor", "classifier", "binary"]),
    aggregate=st.sampled_from(["SUM", "AVERAGE", "MIN", "MAX"]), post=st.sampled_from(POSTS),
    same_mode=st.booleans(), tracks=st.booleans(), n_targets=st.integers(1, 4), base=st.integers(0, 2),
)  # fmt: skip
def test_random_ensembles_equal_onnxruntime(
    tmp_path_factory, seed, double, kind, aggregate, post, same_mode, tracks, n_targets, base
):
    rng = np.random.default_rng(seed)
    n_inputs = 3
    values = np.round(rng.normal(size=6), 1).astype(np.float32 if not double else np.float64)
    modes = [MODES[rng.integers(6)]] if same_mode else MODES
    nodes, leaves = random_trees(rng, int(rng.integers(1, 12)), n_inputs, modes, values, int(rng.integers(1, 6)))
    attrs = attributes(nodes, double, tracks)
    if kind == "regressor":
        prefix, n = "target", n_targets
        attrs |= {"n_targets": n, "aggregate_function": aggregate}
        sizes = (0, n)
    else:
        prefix, n = "class", 2 if kind == "binary" else n_targets + 1
        attrs["classlabels_int64s"] = list(range(n))
        sizes = (0, n) if n > 2 else (0, 1, 2)
    # One class only for the binary case: weights of either sign, or none negative.
    only = int(rng.integers(2)) if kind == "binary" else None
    rows = []
    for leaf in leaves:
        # Often the first target alone, so that rows come that never name the others.
        some = [0] if rng.random() < 0.5 else rng.permutation(n)[: int(rng.integers(1, n + 1))]
        targets = some if only is None else [only]
        rows += [(*leaf, int(k), float(np.float32(rng.normal() * 0.3))) for k in targets]
    order = rng.permutation(len(rows))
    rows = [rows[i] for i in order]
    weights = [row[3] for row in rows]
    if rng.random() < 0.4:
        weights = [abs(w) for w in weights]
    attrs |= {f"{prefix}_treeids": [r[0] for r in rows], f"{prefix}_nodeids": [r[1] for r in rows]}
    attrs[f"{prefix}_ids"] = [r[2] for r in rows]
    real(attrs, f"{prefix}_weights", weights, double)
    size = sizes[base % len(sizes)]
    if size:
        real(attrs, "base_values", [float(np.float32(v)) for v in rng.normal(size=size) * 0.2], double)
    op = "TreeEnsembleRegressor" if kind == "regressor" else "TreeEnsembleClassifier"
    outputs = [("Y", onnx.TensorProto.FLOAT)] if kind == "regressor" else [("L", 7), ("Y", 1)]
    node = helper.make_node(op, ["X"], [name for name, _ in outputs], domain="ai.onnx.ml", post_transform=post, **attrs)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    save(path, [node], n_inputs, double, outputs)
    # ONNX Runtime leaves the second column unset here: its bits change from call to call.
    unset = kind != "regressor" and n == 2 and only != 1 and size < 2 and (post == "PROBIT" or size == 1)
    x = rows_around(rng, values, n_inputs, double, 60)
    check(path, x, 1 if unset else None)
    if kind == "regressor":
        return
    texts = bool(rng.integers(2))
    attrs.pop("classlabels_int64s")
    if texts:
        attrs["classlabels_strings"] = ["a", "", "\u00e9", "dd", "e"][:n]
    else:
        attrs["classlabels_int64s"] = [9, -3, 5, 70, 1][:n]
    outputs[0] = ("L", 8 if texts else 7)
    node = helper.make_node(op, ["X"], ["L", "Y"], domain="ai.onnx.ml", post_transform=post, **attrs)
    save(path, [node], n_inputs, double, outputs)
    check_labels(path, x)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), double=st.booleans(), aggregate=st.integers(0, 3), post=st.integers(0, 4),
    tracks=st.booleans(), n_targets=st.integers(1, 3), members=st.booleans(),
)  # fmt: skip
def test_random_v5_ensembles_equal_onnxruntime(
    tmp_path_factory, seed, double, aggregate, post, tracks, n_targets, members
):
    """TreeEnsemble of ai.onnx.ml 5: leaves apart from nodes, modes as numbers, sets of members."""
    rng = np.random.default_rng(seed)
    kind = np.float64 if double else np.float32
    values = np.append(np.round(rng.normal(size=5), 1), [1, 2, 5]).astype(kind)
    n_inputs = 3
    names = "featureids splits modes truenodeids falsenodeids trueleafs falseleafs missing_value_tracks_true"
    columns = {k: [] for k in names.split()}
    leaves, roots, membership = [], [], []

    def leaf():
        leaves.append((int(rng.integers(n_targets)), float(kind(rng.normal() * 0.4))))
        return len(leaves) - 1

    def grow(depth):
        i = len(columns["modes"])
        mode = int(rng.integers(7 if members else 6))
        columns["featureids"].append(int(rng.integers(n_inputs)))
        columns["splits"].append(float(rng.choice(values)))
        columns["modes"].append(mode)
        columns["missing_value_tracks_true"].append(int(rng.random() < 0.4))
        for name in ("truenodeids", "falsenodeids", "trueleafs", "falseleafs"):
            columns[name].append(0)
        if mode == 6:
            # Whole numbers from 0 to 30, and others: ONNX Runtime has a way of its own for each. It takes no fractions.
            pool = [-3, 0, 1, 31, 40, 1000] if rng.random() < 0.5 else np.arange(8)
            membership.append([float(v) for v in rng.choice(pool, int(rng.integers(1, 5)), replace=False)])
        for side in ("true", "false"):
            is_leaf = depth == 0 or rng.random() < 0.3
            child = leaf() if is_leaf else grow(depth - 1)
            columns[f"{side}nodeids"][i], columns[f"{side}leafs"][i] = child, int(is_leaf)
        return i

    for _ in range(int(rng.integers(1, 8))):
        roots.append(grow(int(rng.integers(4))))
    real_kind = onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT

    def tensor(name, numbers, element=real_kind):
        return helper.make_tensor(name, element, [len(numbers)], numbers)

    attrs = {f"nodes_{k}": v for k, v in columns.items() if tracks or k != "missing_value_tracks_true"}
    attrs["nodes_splits"] = tensor("s", columns["splits"])
    attrs["nodes_modes"] = tensor("m", columns["modes"], onnx.TensorProto.UINT8)
    attrs |= {"tree_roots": roots, "n_targets": n_targets, "aggregate_function": aggregate, "post_transform": post}
    attrs |= {"leaf_targetids": [t for t, _ in leaves], "leaf_weights": tensor("w", [w for _, w in leaves])}
    if membership:
        flat = [v for group in membership for v in [*group, float("nan")]]
        attrs["membership_values"] = tensor("v", flat)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    node = helper.make_node("TreeEnsemble", ["X"], ["Y"], domain="ai.onnx.ml", **attrs)
    save(path, [node], n_inputs, double, [("Y", real_kind)], opset=5)
    check(path, rows_around(rng, [*values, *range(9), 31, 32, 40, 0.5, -1, -3], n_inputs, double, 60))


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 6)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).astype(int), (x[:, 0] > 0.5).astype(int) + (x[:, 1] > 0)


def sklearn_models():
    ensemble = pytest.importorskip("sklearn.ensemble")
    tree = pytest.importorskip("sklearn.tree")
    return {
        "tree of depth 2": (tree.DecisionTreeClassifier(max_depth=2), 1),
        "unlimited tree": (tree.DecisionTreeClassifier(), 1),
        "forest": (ensemble.RandomForestClassifier(25, random_state=1), 1),
        "forest of classes": (ensemble.RandomForestClassifier(10, random_state=1), 2),
        "forest of numbers": (ensemble.RandomForestRegressor(10, random_state=1), 0),
        "boosting": (ensemble.GradientBoostingClassifier(n_estimators=10), 1),
        "boosting of classes": (ensemble.GradientBoostingClassifier(n_estimators=5), 2),
        "boosting of numbers": (ensemble.GradientBoostingRegressor(n_estimators=10), 0),
    }


KINDS = ["tree of depth 2", "unlimited tree", "forest", "forest of classes", "boosting", "boosting of classes"]


@pytest.mark.parametrize(
    ("name", "zipmap"),
    [*((k, z) for k in KINDS for z in (False, True)), ("forest of numbers", False), ("boosting of numbers", False)],
)
def test_converted_from_scikit_learn(tmp_path, table, name, zipmap):
    skl2onnx = pytest.importorskip("skl2onnx")
    estimator, label = sklearn_models()[name]
    x = table[0]
    estimator.fit(x, table[label] if label else x[:, 0] + x[:, 1])
    options = {} if label == 0 or zipmap else {"zipmap": False}
    path = tmp_path / "model.onnx"
    path.write_bytes(skl2onnx.to_onnx(estimator, x[:1], options=options).SerializeToString())
    if label:
        check_labels(path, x[:300])
    if not zipmap:
        check(path, x[:300])
        return
    run = session(path)
    want = [list(row.values()) for row in run.run([run.get_outputs()[-1].name], {"X": x[:300]})[0]]
    np.testing.assert_array_equal(load_trees(path).predict(x[:300].astype(float)), want)


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_converted_from_boosting_libraries(tmp_path, table, library, label):
    pytest.importorskip(library)
    tools = pytest.importorskip("onnxmltools")
    types = pytest.importorskip("onnxmltools.convert.common.data_types")
    x, y = table[0], table[label] if label else table[0][:, 0]
    if library == "lightgbm":
        import lightgbm

        kind = lightgbm.LGBMClassifier if label else lightgbm.LGBMRegressor
        model = kind(n_estimators=10, verbose=-1, n_jobs=1).fit(x, y)
        graph = tools.convert_lightgbm(model, initial_types=[("X", types.FloatTensorType([None, 6]))], zipmap=False)
    else:
        import xgboost

        kind = xgboost.XGBClassifier if label else xgboost.XGBRegressor
        model = kind(n_estimators=10, n_jobs=1).fit(x, y)
        graph = tools.convert_xgboost(model, initial_types=[("X", types.FloatTensorType([None, 6]))])
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    check(path, np.vstack([x[:300], rows_around(np.random.default_rng(0), x[:30, 0], 6, False, 100)]))


def stump(**changed):
    attrs = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_values": [0.5, 0.0, 0.0], "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0], "target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0],
        "target_weights": [1.0, 2.0], "n_targets": 1,
    }  # fmt: skip
    return helper.make_node("TreeEnsembleRegressor", ["A"], ["B"], domain="ai.onnx.ml", **(attrs | changed))


def graph_of(path, before, after, dims, changed=None):
    nodes = [*before, stump(**(changed or {})), *after]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("X", (before[0].input[0] == "X" and 11) or 1, dims)],
        [helper.make_tensor_value_info("Y", 1, None)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


CAST = helper.make_node("Cast", ["X"], ["A"], to=1)
NEG = helper.make_node("Neg", ["X"], ["C"])
LAST = helper.make_node("Identity", ["B"], ["Y"])


def test_a_cast_before_and_an_identity_after_are_passed_over(tmp_path):
    path = tmp_path / "model.onnx"
    graph_of(path, [CAST], [LAST], [None, 2])
    x = np.array([[0.5, 9], [0.5000000001, 9], [0.50001, 9], [np.nan, 9]])
    want = session(path).run(None, {"X": x})[0]
    np.testing.assert_array_equal(load_trees(path).predict(x), want)


@pytest.mark.parametrize(
    ("before", "after", "dims", "changed", "says"),
    [
        ([NEG, helper.make_node("Cast", ["C"], ["A"], to=1)], [LAST], [None, 2], {}, "input is computed"),
        ([CAST], [helper.make_node("Neg", ["B"], ["Y"])], [None, 2], {}, "Neg changes the scores"),
        ([CAST], [helper.make_node("Cast", ["X"], ["Y"], to=1)], [None, 2], {}, "does not give the scores"),
        ([CAST], [LAST], [None, None], {}, "how many inputs"),
        ([CAST], [LAST], [None, 2], {"target_nodeids": [1, 1]}, "has no weight|several weights"),
        ([CAST], [LAST], [None, 2], {"nodes_treeids": [0, 1, 0], "target_treeids": [1, 0]}, "stand together|not exist"),
    ],
)  # fmt: skip
def test_another_graph_is_left_to_onnxruntime(tmp_path, before, after, dims, changed, says):
    path = tmp_path / "model.onnx"
    graph_of(path, before, after, dims, changed)
    with pytest.raises((NotATreeModel, ValueError), match=says):
        load_trees(path)


def test_a_graph_without_trees_is_left_to_onnxruntime(tmp_path):
    path = tmp_path / "model.onnx"
    save(path, [helper.make_node("Neg", ["X"], ["Y"])], 2, False, [("Y", 1)])
    with pytest.raises(NotATreeModel, match="0 tree ensembles"):
        load_trees(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"nodes_values": [0.5]}, "nodes_values: 1 values, expected 3"),
        ({"nodes_truenodeids": [7, 0, 0]}, "leads to node 7"),
        ({"nodes_truenodeids": [0, 0, 0]}, "node 0 leads back to itself"),
        ({"nodes_truenodeids": [0, 0, 0], "nodes_falsenodeids": [0, 0, 0]}, "node 0 leads back to itself"),
        ({"nodes_nodeids": [0, 1, 1]}, "node 1 stands twice"),
        ({"nodes_modes": ["BRANCH_UP", "LEAF", "LEAF"]}, "mode 'BRANCH_UP'"),
        ({"nodes_featureids": [2, 0, 0]}, "feature 2, expected one of 0 to 1"),
        ({"target_nodeids": [1, 9]}, "names node 9"),
        ({"target_ids": [0, 3]}, "target 3"),
        ({"n_targets": 0}, "0 targets"),
        ({"post_transform": "CUBE"}, "CUBE"),
        ({"base_values": [1.0, 2.0]}, "2 values for 1 targets"),
    ],
)
def test_a_damaged_ensemble_names_the_place(tmp_path, changed, says):
    path = tmp_path / "model.onnx"
    graph_of(path, [CAST], [LAST], [None, 2], changed)
    with pytest.raises(ValueError, match=says) as raised:
        load_trees(path)
    assert str(path) in str(raised.value)


def test_damaged_bytes_never_crash(tmp_path, table):
    skl2onnx = pytest.importorskip("skl2onnx")
    sklearn = pytest.importorskip("sklearn.ensemble")
    x, y, _ = table
    path = tmp_path / "model.onnx"
    forest = sklearn.RandomForestClassifier(3, max_depth=4, random_state=1).fit(x, y)
    good = skl2onnx.to_onnx(forest, x[:1]).SerializeToString()
    rng = np.random.default_rng(11)
    refused = 0
    for copy in damaged(good, rng, 600):
        path.write_bytes(copy)
        try:
            model = load_trees(path)
        except NotATreeModel:
            continue
        except ValueError as error:
            refused += str(error).startswith(str(path))
        else:
            model.predict(np.zeros((3, model.n_inputs)))
    assert refused > 100


def test_an_attribute_that_the_kernel_does_not_know_is_left_to_onnx_runtime(tmp_path):
    nodes, leaves = random_trees(np.random.default_rng(3), 2, 3, MODES[:1], [0.5], 2)
    attrs = attributes(nodes, False, False)
    attrs |= {"target_treeids": [t for t, _ in leaves], "target_nodeids": [i for _, i in leaves]}
    attrs |= {"target_ids": [0] * len(leaves), "target_weights": [1.0] * len(leaves), "n_targets": 1}
    node = helper.make_node("TreeEnsembleRegressor", ["X"], ["Y"], domain="ai.onnx.ml", **attrs)
    save(tmp_path / "model.onnx", [node], 3, False, [("Y", onnx.TensorProto.FLOAT)])
    assert read_ensemble(tmp_path / "model.onnx").n_raw == 1
    node.attribute.append(helper.make_attribute("leaf_scale", 2.0))
    save(tmp_path / "model.onnx", [node], 3, False, [("Y", onnx.TensorProto.FLOAT)])
    with pytest.raises(NotATreeModel, match="'leaf_scale'"):
        read_ensemble(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="leaf_scale"):
        load(tmp_path / "model.onnx")
