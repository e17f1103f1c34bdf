"""XGBoost JSON and UBJSON models against XGBoost itself, bit for bit, and an independent reading of the file."""

import json

import numpy as np
import pytest

from oracles.tree_rows import damaged, every_variant, rows_at, ulps
from oracles.trees import xgboost_raw
from penstock.models.trees import TreeModel, load_trees, read_ensemble

xgb = pytest.importorskip("xgboost")

N, INPUTS, CATEGORIES = 1200, 6, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, INPUTS)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, CATEGORIES] = rng.integers(0, 30, N)
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1]) + np.sin(x[:, CATEGORIES]) > 0).astype(int)
    return x, y, rng.integers(0, 3, N)


def matrix(x, label=None, categorical=False):
    kinds = ["c" if categorical and k == CATEGORIES else "float" for k in range(INPUTS)]
    return xgb.DMatrix(x, label, feature_types=kinds, enable_categorical=categorical)


def train(data, params, path, rounds=12, label=None, categorical=False, **more):
    x, y, y3 = data
    if label is None:
        label = y3 if "num_class" in params else y + 1.0 if params["objective"] in ("reg:gamma", "survival:cox") else y
    if "quantile_alpha" in params:
        label = y + y3 / 3
    params = {"nthread": 1, "max_depth": 5, "seed": 1, **params}
    with np.errstate(all="ignore"):
        xgb.train(params, matrix(x, label, categorical), rounds, **more).save_model(path)
    return xgb.Booster(params={"nthread": 1}, model_file=path)


def rows_for(form, data, rng, categorical, n=300):
    cuts = np.array([*form.threshold, *form.steps])
    x = rows_at(cuts[np.abs(cuts) < 1e30], INPUTS, True, rng, n)
    if categorical:  # XGBoost refuses what is no category
        x[:, CATEGORIES] = rng.choice([*range(60), 0.5, 3.25, np.nan, 16777215.0], n)
    return np.vstack([x, data[0][:100].astype(float)])


CASES = [
    {"objective": "binary:logistic"},
    {"objective": "binary:logistic", "tree_method": "exact", "base_score": 0.5},
    {"objective": "binary:logistic", "max_leaves": 31, "grow_policy": "lossguide", "max_depth": 0},
    {"objective": "binary:logistic", "max_depth": 9},
    {"objective": "binary:logistic", "num_parallel_tree": 5, "subsample": 0.5},
    {"objective": "reg:squarederror"},
    {"objective": "reg:squaredlogerror"},
    {"objective": "reg:pseudohubererror"},
    {"objective": "reg:absoluteerror"},
    {"objective": "reg:logistic"},
    {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.5]},
    {"objective": "binary:logitraw"},
    {"objective": "binary:hinge"},
    {"objective": "count:poisson"},
    {"objective": "reg:gamma"},
    {"objective": "reg:tweedie"},
    {"objective": "survival:cox"},
    {"objective": "rank:pairwise"},
    {"objective": "multi:softprob", "num_class": 3},
    {"objective": "multi:softmax", "num_class": 3},
    {"objective": "multi:softprob", "num_class": 3, "num_parallel_tree": 3, "subsample": 0.5},
    {"objective": "multi:softprob", "num_class": 3, "base_score": 0.7},
    {"objective": "binary:logistic", "booster": "dart", "rate_drop": 0.5},
    {"objective": "multi:softprob", "num_class": 3, "booster": "dart", "rate_drop": 0.5},
    {"objective": "multi:softprob", "num_class": 3, "multi_strategy": "multi_output_tree"},
    {"objective": "binary:logistic", "max_cat_to_onehot": 1, "categorical": True},
    {"objective": "binary:logistic", "max_cat_to_onehot": 100, "categorical": True},
    {"objective": "binary:logistic", "max_cat_to_onehot": 1, "categorical": True, "booster": "dart", "rate_drop": 0.5},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_equal_xgboost(data, tmp_path, case):
    params = dict(case)
    categorical = params.pop("categorical", False)
    path = tmp_path / "model.json"
    booster = train(data, params, path, categorical=categorical)
    booster.save_model(tmp_path / "model.ubj")
    form = read_ensemble(path)
    assert read_ensemble(tmp_path / "model.ubj") == form
    x = rows_for(form, data, np.random.default_rng(7), categorical)
    finite = x.copy()
    finite[np.isinf(finite)] = 3e38  # a DMatrix refuses infinities
    rows = matrix(finite, categorical=categorical)
    raw = booster.predict(rows, output_margin=True).reshape(len(x), -1).astype(float)
    out = booster.predict(rows).reshape(len(x), -1)
    for model in every_variant(form, TreeModel):
        np.testing.assert_array_equal(model.predict_raw(finite), raw, err_msg=f"{model.layout} {model.simd}")
        ones = np.vstack([model.predict_raw(row[None]) for row in finite[::9]])
        np.testing.assert_array_equal(ones, raw[::9])
        assert model.predict(finite).shape == out.shape
        assert ulps(model.predict(finite), out, single=True) <= 1
        if not categorical and "booster" not in params:
            # In place, XGBoost takes them.
            raw_inf = booster.inplace_predict(x, predict_type="margin").reshape(len(x), -1)
            np.testing.assert_array_equal(model.predict_raw(x), raw_inf.astype(float))
    document = json.loads(path.read_bytes())
    assert [xgboost_raw(document, row, form.base) for row in finite[:25]] == raw[:25].tolist()


def test_several_targets(data, tmp_path):
    label = np.column_stack([data[1], data[2]])
    for strategy in ("one_output_per_tree", "multi_output_tree"):
        path = tmp_path / f"{strategy}.json"
        booster = train(data, {"objective": "reg:squarederror", "multi_strategy": strategy}, path, label=label)
        x = data[0][:200]
        want = booster.predict(matrix(x)).astype(float)
        for model in every_variant(read_ensemble(path), TreeModel):
            np.testing.assert_array_equal(model.predict(x.astype(float)), want)


@pytest.mark.parametrize(
    "params",
    [
        {"objective": "binary:logistic"},
        {"objective": "multi:softprob", "num_class": 3},
        {"objective": "binary:logistic", "num_parallel_tree": 2, "subsample": 0.5},
    ],
)
def test_early_stopping_keeps_the_best_iteration(data, tmp_path, params):
    path = tmp_path / "model.json"
    x, y, y3 = data
    label = y3 if "num_class" in params else np.random.default_rng(0).permutation(y)
    held = matrix(x[::-1], label)
    booster = train(data, {**params, "learning_rate": 1.0}, path, rounds=30, label=label,
                    evals=[(held, "held")], early_stopping_rounds=3, verbose_eval=False)  # fmt: skip
    best = booster.best_iteration
    assert best + 1 < booster.num_boosted_rounds()
    want = booster.predict(matrix(x), output_margin=True, iteration_range=(0, best + 1)).reshape(len(x), -1)
    np.testing.assert_array_equal(load_trees(path).predict_raw(x.astype(float)), want.astype(float))


def test_pruned_nodes_are_left_out(data, tmp_path):
    path = tmp_path / "model.json"
    booster = train(data, {"objective": "binary:logistic", "tree_method": "exact", "gamma": 3.0, "max_depth": 8}, path)
    trees = json.loads(path.read_bytes())["learner"]["gradient_booster"]["model"]["trees"]
    assert any(int(tree["tree_param"]["num_deleted"]) for tree in trees)
    want = booster.predict(matrix(data[0]), output_margin=True).astype(float)
    np.testing.assert_array_equal(load_trees(path).predict_raw(data[0].astype(float))[:, 0], want)


def test_older_base_scores(data, tmp_path):
    """Before 3.1 base_score was one number, `5E-1`."""
    path = tmp_path / "model.json"
    train(data, {"objective": "binary:logistic"}, path)
    document = json.loads(path.read_bytes())
    want = load_trees(path).predict_raw(data[0].astype(float))
    parameters = document["learner"]["learner_model_param"]
    parameters["base_score"] = parameters["base_score"].strip("[]")
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(load_trees(path).predict_raw(data[0].astype(float)), want)


@pytest.mark.parametrize("objective", ["binary:logistic", "count:poisson", "multi:softprob"])
def test_scores_far_out(data, tmp_path, objective):
    """Leaves 300 times as large: exp overflows and underflows."""
    path = tmp_path / "model.json"
    train(data, {"objective": objective} | ({"num_class": 3} if "multi" in objective else {}), path)
    document = json.loads(path.read_bytes())
    for tree in document["learner"]["gradient_booster"]["model"]["trees"]:
        for i, left in enumerate(tree["left_children"]):
            if left < 0:
                tree["split_conditions"][i] *= 300
    path.write_text(json.dumps(document))
    booster = xgb.Booster(params={"nthread": 1}, model_file=path)
    want = booster.predict(matrix(data[0]))
    got = load_trees(path).predict(data[0].astype(float))
    assert ulps(got, want.reshape(got.shape), single=True) <= 1


def test_names(data, tmp_path):
    path = tmp_path / "model.ubj"
    x, y, _ = data
    names = ["amount", "night", "a", "b", "c", "d"]
    xgb.train({"objective": "binary:logistic"}, xgb.DMatrix(x, y, feature_names=names), 2).save_model(path)
    model = load_trees(path)
    assert model.feature_names == tuple(names)
    assert (model.n_inputs, model.n_outputs) == (6, 1)


def change(path, *keys):
    def edit(value):
        document = json.loads(path.read_bytes())
        node = document
        for key in keys[:-1]:
            node = node[key]
        if value is None:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
        path.write_text(json.dumps(document))

    return edit


TREE = ("learner", "gradient_booster", "model", "trees", 0)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("learner",), None, r"\$\.learner: missing"),
        (("learner",), [1], r"\$\.learner: unexpected list"),
        (("learner", "objective", "name"), "reg:mystery", "reg:mystery is not supported"),
        (("learner", "gradient_booster", "name"), "gblinear", "no trees"),
        (("learner", "learner_model_param", "num_feature"), "-1", "num_feature: -1"),
        (("learner", "learner_model_param", "num_feature"), "six", "'six' is no integer"),
        (("learner", "learner_model_param", "num_class"), "99999999", "99999999 outputs"),
        (("learner", "learner_model_param", "base_score"), "[1,2,3]", "3 values for 1 outputs"),
        (("learner", "learner_model_param", "base_score"), "half", "base_score: 'half'"),
        (("learner", "gradient_booster", "model", "tree_info"), [0], "tree_info: 1 values"),
        ((*TREE, "left_children"), [], "a tree without nodes"),
        ((*TREE, "right_children"), [1], r"trees\[0\]\.right_children: expected \d+ values"),
        ((*TREE, "left_children", 0), 0, r"trees\[0\]: node 0 is used twice"),
        ((*TREE, "right_children", 0), 5000, r"trees\[0\]: node 5000 does not exist"),
        ((*TREE, "split_indices", 0), 6, "feature 6, expected 0 to 5"),
        ((*TREE, "split_conditions", 0), "x", "'x' is no float"),
        ((*TREE, "split_conditions", 0), float("nan"), "NaN"),
    ],
)
def test_a_damaged_file_names_the_place(data, tmp_path, keys, value, says):
    path = tmp_path / "model.json"
    train(data, {"objective": "binary:logistic"}, path, rounds=2)
    change(path, *keys)(value)
    with pytest.raises(ValueError, match=says) as raised:
        load_trees(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("suffix", ["json", "ubj"])
def test_damaged_bytes_never_crash(data, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    train(data, {"objective": "binary:logistic", "max_cat_to_onehot": 1}, path, rounds=2, categorical=True)
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
