"""LightGBM text models against LightGBM itself, bit for bit, and against an independent reading of the file."""

import itertools
import re

import numpy as np
import pytest

from oracles.tree_rows import damaged, every_variant, rows_at, ulps
from oracles.trees import lightgbm_raw
from penstock.models.trees import TreeModel, load_trees, read_ensemble

lgb = pytest.importorskip("lightgbm")

N, INPUTS, CATEGORIES = 1500, 6, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, INPUTS))
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, CATEGORIES] = rng.integers(0, 40, N)
    x[rng.random(N) < 0.2, 0] = 0
    x[:, 3] = np.abs(np.nan_to_num(x[:, 3]))  # without missing values
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1]) + np.sin(x[:, CATEGORIES]) > 0).astype(int)
    return x, y, rng.integers(0, 3, N)


def train(data, params, path, rounds=15, categorical=True):
    x, y, y3 = data
    classes = params.get("num_class", 1) > 1
    columns = [CATEGORIES] if categorical else []
    dataset = lgb.Dataset(x, y3 if classes else y, categorical_feature=columns)
    params = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, "deterministic": True, **params}
    lgb.train(params, dataset, rounds).save_model(path)
    return lgb.Booster(model_file=path)


def rows_for(form, data, rng, n=300):
    cuts = [t for t in form.threshold if np.isfinite(t)] + list(form.steps)
    x = rows_at(cuts, INPUTS, False, rng, n)
    x[: n // 2, CATEGORIES] = rng.integers(-3, 60, n // 2) + rng.choice([0.0, 0.5, 0.999], n // 2)
    return np.vstack([x, data[0][:100]])


CASES = [
    ({"objective": "binary", "num_leaves": 31}, True),
    ({"objective": "binary", "num_leaves": 31}, False),
    ({"objective": "binary", "num_leaves": 100, "sigmoid": 0.7}, True),
    ({"objective": "binary", "num_leaves": 63, "zero_as_missing": True}, True),
    ({"objective": "binary", "num_leaves": 200, "zero_as_missing": True}, False),
    ({"objective": "binary", "num_leaves": 20, "use_missing": False}, True),
    ({"objective": "binary", "max_cat_to_onehot": 100, "cat_smooth": 1}, True),
    ({"objective": "multiclass", "num_class": 3, "num_leaves": 20}, True),
    ({"objective": "multiclassova", "num_class": 3, "num_leaves": 20}, True),
    ({"objective": "regression", "num_leaves": 40}, True),
    ({"objective": "regression", "reg_sqrt": True}, True),
    ({"objective": "poisson", "boosting": "dart", "drop_rate": 0.5, "skip_drop": 0.1}, True),
    ({"objective": "binary", "boosting": "dart", "drop_rate": 0.5, "skip_drop": 0.1}, True),
    ({"objective": "binary", "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, True),
    ({"objective": "multiclass", "num_class": 3, "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, True),
    ({"objective": "tweedie"}, True),
    ({"objective": "cross_entropy"}, True),
    ({"objective": "cross_entropy_lambda"}, True),
    ({"objective": "quantile", "alpha": 0.9}, True),
    ({"objective": "binary", "num_leaves": 2}, True),
]


@pytest.mark.parametrize(("params", "categorical"), CASES, ids=lambda v: str(v))
def test_scores_equal_lightgbm(data, tmp_path, params, categorical):
    path = tmp_path / "model.txt"
    booster = train(data, params, path, categorical=categorical)
    form = read_ensemble(path)
    rng = np.random.default_rng(7)
    x = rows_for(form, data, rng)
    raw = booster.predict(x, raw_score=True).reshape(len(x), -1)
    out = booster.predict(x).reshape(len(x), -1)
    for model in every_variant(form, TreeModel):
        np.testing.assert_array_equal(model.predict_raw(x), raw, err_msg=f"{model.layout} {model.simd}")
        ones = np.vstack([model.predict_raw(row[None]) for row in x[::9]])
        np.testing.assert_array_equal(ones, raw[::9])
        assert ulps(model.predict(x), out) <= 1
    text = path.read_text()
    assert [lightgbm_raw(text, row) for row in x[:25]] == raw[:25].tolist()


def test_missing_modes_are_all_in_the_models(data, tmp_path):
    """The cases above mean something only while LightGBM writes every kind of node."""
    seen = set()
    for params, categorical in CASES[:6]:
        train(data, params, tmp_path / "m.txt", categorical=categorical)
        kinds = itertools.chain.from_iterable(
            line[14:].split()
            for line in (tmp_path / "m.txt").read_text().splitlines()
            if line.startswith("decision_type=")
        )
        seen |= {int(k) for k in kinds}
    assert {k >> 2 & 3 for k in seen if not k & 1} == {0, 1, 2}
    assert any(k & 1 for k in seen)
    assert {bool(k & 2) for k in seen if not k & 1} == {False, True}


# The last three stand at LightGBM's edge of zero and just outside of it.
STUMP_THRESHOLDS = ["0", "-0.0", "1.5", "-1.5", "1e-36", "-1e-36", "1e-35", "-1e-35", "inf", "-inf"]
STUMP_THRESHOLDS += ["1.0000000180025095e-35", "-1.0000000180025095e-35", "1.0000000180025097e-35"]


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("threshold", STUMP_THRESHOLDS)
def test_a_threshold_anywhere_with_any_missing_type(tmp_path, missing, left, threshold):
    """Hand-made stumps: LightGBM reads thresholds it would not write, zero's neighbourhood above all."""
    path = tmp_path / "model.txt"
    tree = (
        f"Tree=0\nnum_leaves=2\nnum_cat=0\nsplit_feature=0\nsplit_gain=1\nthreshold={threshold}\n"
        f"decision_type={missing << 2 | left}\nleft_child=-1\nright_child=-2\nleaf_value=-1 1\nleaf_weight=1 1\n"
        "leaf_count=1 1\ninternal_value=0\ninternal_weight=0\ninternal_count=2\nis_linear=0\nshrinkage=1\n\n\n"
    )
    path.write_text(
        "tree\nversion=v4\nnum_class=1\nnum_tree_per_iteration=1\nlabel_index=0\nmax_feature_idx=0\n"
        f"objective=regression\nfeature_names=a\nfeature_infos=[-9:9]\ntree_sizes={len(tree)}\n\n{tree}end of trees\n\n"
        "feature_importances:\n\nparameters:\nend of parameters\n\npandas_categorical:null\n"
    )
    rng = np.random.default_rng(0)
    zero = 1.0000000180025095e-35
    x = rows_at([float(threshold), zero, -zero, 1e-36], 1, False, rng, 200)
    want = lgb.Booster(model_file=path).predict(x)
    for model in every_variant(read_ensemble(path), TreeModel):
        np.testing.assert_array_equal(model.predict(x)[:, 0], want)


def test_names_inputs_and_outputs(data, tmp_path):
    path = tmp_path / "model.txt"
    train(data, {"objective": "multiclass", "num_class": 3}, path, rounds=2)
    model = load_trees(path)
    assert model.feature_names == tuple(f"Column_{k}" for k in range(INPUTS))
    assert (model.n_inputs, model.n_outputs, model.n_raw) == (INPUTS, 3, 3)
    assert model.nbytes > 0


def test_linear_trees_are_refused(data, tmp_path):
    path = tmp_path / "model.txt"
    train(data, {"objective": "regression", "linear_tree": True}, path, rounds=2)
    with pytest.raises(ValueError, match=r"model\.txt: Tree=\d: linear trees are not supported"):
        load_trees(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: "", "expected `tree`"),
        (lambda t: t.replace("objective=binary", "objective=mystery"), "objective mystery"),
        (lambda t: t.replace("max_feature_idx=5", "max_feature_idx=50"), "feature_names"),
        (lambda t: t.replace("num_tree_per_iteration=1", "num_tree_per_iteration=4"), "num_tree_per_iteration is 4"),
        (lambda t: t.replace("Tree=1", "Tree=7"), "Tree=7: expected Tree=1"),
        (lambda t: t.split("end of trees")[0], "ends before"),
        (lambda t: re.sub("left_child=[^\n]*\n", "", t, count=1), "Tree=0: left_child is missing"),
        (lambda t: re.sub("left_child=", "left_child=x", t, count=1), "Tree=0: left_child holds something"),
        (lambda t: re.sub("leaf_value=", "leaf_value=1 ", t, count=1), "leaf_value has"),
        (lambda t: re.sub("num_leaves=\\d+", "num_leaves=99999999999", t, count=1), "num_leaves is 99999999999"),
        (lambda t: re.sub("split_feature=\\d+", "split_feature=77", t, count=1), "Tree=0: split_feature 77"),
    ],
)
def test_a_damaged_file_names_the_place(data, tmp_path, change, says):
    path = tmp_path / "model.txt"
    train(data, {"objective": "binary", "num_leaves": 8}, path, rounds=3)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=says) as raised:
        load_trees(path)
    assert "model.txt" in str(raised.value)


def test_damaged_bytes_never_crash(data, tmp_path):
    path = tmp_path / "model.txt"
    train(data, {"objective": "binary", "num_leaves": 8}, path, rounds=3)
    good = path.read_bytes()
    rng = np.random.default_rng(11)
    refused = 0
    for copy in damaged(good, rng, 400):
        path.write_bytes(copy)
        try:
            model = load_trees(path)
        except ValueError as error:
            refused += str(error).startswith(str(path))
        else:
            model.predict(np.zeros((3, model.n_inputs)))
    assert refused > 50
