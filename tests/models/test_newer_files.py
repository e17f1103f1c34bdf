"""Files of newer training libraries: what moved is read where it is, what is unknown is refused, what is newer warns.

Scores that stand here as numbers were given by XGBoost 3.4.1 for the same documents. Where PENSTOCK_XGBOOST_PYTHON
names an interpreter with a newer XGBoost than the tests' own, that one trains too, and scores are compared bit for bit.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from models.folders import put, trained

from penstock.models.folder import ModelError
from penstock.models.lightgbm_text import _category_steps, _count_steps
from penstock.models.loader import Loader
from penstock.models.repository import ModelRepository
from penstock.models.runtime import load
from penstock.models.trees import load_trees


def stump(low, high, at=0.5):
    return {
        "base_weights": [0.0, 0.0, 0.0], "categories": [], "categories_nodes": [], "categories_segments": [],
        "categories_sizes": [], "default_left": [0, 0, 0], "id": 0, "left_children": [1, -1, -1],
        "right_children": [2, -1, -1], "loss_changes": [0.0, 0.0, 0.0], "parents": [2147483647, 0, 0],
        "split_conditions": [at, low, high], "split_indices": [0, 0, 0], "split_type": [0, 0, 0],
        "sum_hessian": [1.0, 1.0, 1.0],
        "tree_param": {"num_deleted": "0", "num_feature": "2", "num_nodes": "3", "size_leaf_vector": "1"},
    }  # fmt: skip


def document(trees, groups=None, objective=None, base="0E0", targets=1, version=(3, 4, 1)):
    n = len(trees)
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(n)},
        "iteration_indptr": list(range(0, n + 1, targets)),
        "tree_info": groups or [0] * n,
        "trees": [dict(tree, id=i) for i, tree in enumerate(trees)],
    }
    parameters = {
        "base_score": base, "boost_from_average": "1", "num_class": "0", "num_feature": "2", "num_target": str(targets)
    }  # fmt: skip
    return {
        "learner": {
            "attributes": {},
            "feature_names": [],
            "feature_types": [],
            "gradient_booster": {"model": model, "name": "gbtree"},
            "learner_model_param": parameters,
            "objective": objective or {"name": "reg:squarederror", "reg_loss_param": {"scale_pos_weight": "1"}},
        },
        "version": list(version),
    }


def levels(name, alphas):
    block = {"quantile": "quantile_loss_param", "expectile": "expectile_loss_param"}[name]
    return {"name": f"reg:{name}error", block: {f"{name}_alpha": json.dumps(alphas)}}


ROWS = np.array([[0.0, 0.0], [1.0, 0.0]])
TREES = [stump(1.0, 2.0), stump(10.0, 20.0), stump(100.0, 200.0)]


def scores(tmp_path, made):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(made))
    return load_trees(path).predict(ROWS)


def booster(made):
    return made["learner"]["gradient_booster"]


@pytest.mark.parametrize("where", ["dart", "booster", "model"])
def test_the_weights_of_dart_are_read_where_each_version_puts_them(tmp_path, where):
    made = document(TREES, base="[5E-1]")
    if where == "dart":  # up to 3.2
        model = booster(made)["model"]
        made["learner"]["gradient_booster"] = {
            "name": "dart", "gbtree": {"name": "gbtree", "model": model}, "weight_drop": [0.5, 0.25, 0.125]
        }  # fmt: skip
    elif where == "booster":  # 3.3
        booster(made)["weight_drop"] = [0.5, 0.25, 0.125]
    else:  # 3.4
        booster(made)["model"]["weight_drop"] = [0.5, 0.25, 0.125]
    assert scores(tmp_path, made).ravel().tolist() == [0.5 + 0.5 + 2.5 + 12.5, 0.5 + 1 + 5 + 25]


@pytest.mark.parametrize("where", ["booster", "model"])
def test_weights_may_be_fewer_than_trees_and_never_more(tmp_path, where):
    made = document(TREES)
    into = booster(made) if where == "booster" else booster(made)["model"]
    for weights, expected in (([], [111.0, 222.0]), ([0.5], [110.5, 221.0]), ([0.5, 0.25], [103.0, 206.0])):
        into["weight_drop"] = weights
        assert scores(tmp_path, made).ravel().tolist() == expected
    into["weight_drop"] = [0.5] * 4
    with pytest.raises(ValueError, match="weight_drop: 4 values for 3 trees"):
        scores(tmp_path, made)


def test_weights_in_two_places_are_refused(tmp_path):
    made = document(TREES)
    booster(made)["weight_drop"] = booster(made)["model"]["weight_drop"] = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="which one holds"):
        scores(tmp_path, made)


def test_quantiles_come_in_order_since_3_4(tmp_path):
    trees = [stump(3.0, 1.0), stump(1.0, 2.0), stump(2.0, 3.0)]
    how = {"groups": [0, 1, 2], "objective": levels("quantile", [0.1, 0.5, 0.9]), "base": "[0E0,0E0,0E0]", "targets": 3}
    assert scores(tmp_path, document(trees, **how)).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert scores(tmp_path, document(trees, version=(3, 3, 0), **how)).tolist() == [[3, 1, 2], [1, 2, 3]]
    many = [stump(float((7 * k) % 20), float(k)) for k in range(20)]
    made = document(
        many, list(range(20)), levels("quantile", [k / 21 for k in range(1, 21)]), json.dumps([0.0] * 20), 20
    )
    assert scores(tmp_path, made).tolist() == [list(range(20))] * 2
    how["objective"] = levels("quantile", [0.1, 0.9])
    with pytest.raises(ValueError, match="quantile_alpha: 2 levels for 3 outputs"):
        scores(tmp_path, document(trees, **how))


EXPECTILES = [[-1.10000002, -0.49406004, -0.494059026], [1.89999998, 1.93178821, 18.1162796]]


def test_expectiles_add_up(tmp_path):
    trees = [stump(-1.0, 2.0), stump(0.25, -3.0), stump(-7.0, 30.0)]
    made = document(trees, [0, 1, 2], levels("expectile", [0.1, 0.5, 0.9]), "[-1E-1,4E-1,4E-1]", 3)
    assert scores(tmp_path, made).astype(np.float32).tolist() == np.array(EXPECTILES, np.float32).tolist()


PLACES = [
    (), ("learner",), ("learner", "learner_model_param"), ("learner", "objective"),
    ("learner", "objective", "reg_loss_param"), ("learner", "gradient_booster"),
    ("learner", "gradient_booster", "model"), ("learner", "gradient_booster", "model", "gbtree_model_param"),
    ("learner", "gradient_booster", "model", "trees", 1),
    ("learner", "gradient_booster", "model", "trees", 1, "tree_param"),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_key_that_is_not_known_is_refused(tmp_path, place):
    made = copy.deepcopy(document(TREES))
    into = made
    for key in place:
        into = into[key]
    into["leaf_scale"] = [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"'leaf_scale' is not known to Penstock.*scores may depend on it"):
        scores(tmp_path, made)


def test_what_users_add_is_theirs(tmp_path):
    made = document(TREES)
    made["learner"]["attributes"] = {"leaf_scale": "2", "best_score": "0.5"}
    assert scores(tmp_path, made).ravel().tolist() == [111.0, 222.0]


def test_a_newer_version_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"saved by XGBoost 3\.5\.0; .*up to 3\.4"):
        scores(tmp_path, document(TREES, version=(3, 5, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(tmp_path, document(TREES, version=(3, 4, 7)))
    text = trained(1)
    path = put(tmp_path, "m", "1", text.replace("version=v4", "version=v5"))
    with pytest.warns(UserWarning, match="version=v5; .*up to v4"):
        load(path)
    repository = ModelRepository(tmp_path / "served", control="poll")
    put(tmp_path / "served", "m", "1", json.dumps(document(TREES, version=(4, 0, 0))), "model.json")
    repository.start()
    repository.loader.stop()
    assert repository.versions("m") == ["1"]
    assert [text for text in repository.warnings if "saved by XGBoost 4.0.0" in text and "m@1" in text]


# LightGBM


def test_lightgbm_keys_that_are_not_known_are_refused(tmp_path):
    text = trained(1)
    for old, where in (("max_feature_idx=", "header"), ("num_leaves=", "Tree=0")):
        with pytest.raises(ModelError, match=rf"{where}: 'leaf_scale' is not known.*scores may depend on it"):
            load(put(tmp_path, "m", "1", text.replace(old, f"leaf_scale=2\n{old}", 1)))
    with pytest.raises(ModelError, match="Tree=0: leaf_value stands twice"):
        load(put(tmp_path, "m", "1", text.replace("leaf_value=", "leaf_value=1 2 3 4\nleaf_value=", 1)))


def test_lightgbm_without_end_of_trees(tmp_path):
    x = np.random.default_rng(1).normal(size=(20, 6))
    text = trained(1)
    old = text.replace("end of trees\n", "")
    assert "feature_importances" in old or "feature importances" in old
    mine = load(put(tmp_path, "m", "1", old)).predict(x)
    assert mine.tobytes() == load(put(tmp_path, "m", "2", text)).predict(x).tobytes()
    with pytest.raises(ModelError, match="the file ends before"):
        load(put(tmp_path, "m", "3", text[: text.index("end of trees")]))


@pytest.mark.parametrize("name", ["price\u00a0net", "金額\u3000税込", "a\u2028b", "a\u0085b", "a\x0bb"])
def test_lightgbm_names_hold_any_blank_but_a_space(tmp_path, name):
    names = (name, "b", "c", "d", "e", "f")
    text = trained(1)
    for i, one in enumerate(names):
        text = text.replace(f"Column_{i}", one)
    assert load(put(tmp_path, "m", "1", text)).inputs == names


# Files that would take far more memory than they have bytes


def test_sets_that_nodes_share_are_bounded_by_the_file(tmp_path):
    rng = np.random.default_rng(3)
    for _ in range(200):
        words = [int(w) for w in rng.choice([0, 1, 1 << 31, (1 << 32) - 1, 0x55555555, int(rng.integers(1 << 32))], 4)]
        assert _count_steps(words) == len(_category_steps(words))
    text = trained(1, trees=1)
    n, words = 40, " ".join(["1431655765"] * 20000)
    tree = (
        f"Tree=0\nnum_leaves={n + 1}\nnum_cat=1\nsplit_feature={' '.join(['0'] * n)}\nthreshold={' '.join(['0'] * n)}\n"
        f"decision_type={' '.join(['1'] * n)}\nleft_child={' '.join(map(str, [*range(1, n), -1]))}\n"
        f"right_child={' '.join(str(-i - 2) for i in range(n))}\nleaf_value={' '.join(['1'] * (n + 1))}\n"
        f"cat_boundaries=0 20000\ncat_threshold={words}\nis_linear=0\nshrinkage=1\n\n"
    )
    bomb = text[: text.index("Tree=0")] + tree + "end of trees\n"
    with pytest.raises(ModelError, match="Tree=0: node 1: its categories"):
        load(put(tmp_path, "m", "1", bomb))
    wide = stump(0.0, 0.0)
    wide["split_type"] = [1, 0, 0]
    wide |= {"categories": list(range(0, 20000, 2)), "categories_nodes": [0], "categories_segments": [0]}
    wide["categories_sizes"] = [10000]
    load(put(tmp_path, "m", "2", json.dumps(document([wide])), "model.json"))  # once is what it takes
    wide |= {"categories_nodes": [0] * 50, "categories_segments": [0] * 50, "categories_sizes": [10000] * 50}
    with pytest.raises(ModelError, match=r"trees\[0\]\.categories_segments: its categories"):
        load(put(tmp_path, "m", "3", json.dumps(document([wide])), "model.json"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: booster(d)["model"]["trees"][0]["split_conditions"].__setitem__(0, 10**400), "1329 bits"),
        (lambda d: booster(d)["model"]["trees"][0]["split_indices"].__setitem__(0, 2**80), "81 bits"),
        (lambda d: d["learner"]["learner_model_param"].__setitem__("num_feature", "9" * 30), "num_feature"),
        (lambda d: d["learner"].__setitem__("feature_names", ["a", "\ud800"]), r"feature_names\[1\]"),
        (lambda d: d["learner"]["objective"].__setitem__("name", "\ud800"), "not supported"),
        (lambda d: d.__setitem__("version", "3"), r"\$\.version"),
    ],
)
def test_hostile_values_are_errors_in_words(tmp_path, change, why):
    made = document(TREES)
    change(made)
    path = put(tmp_path, "m", "1", json.dumps(made), "model.json")
    with pytest.raises(ModelError, match=rf"model m@1: .*model\.json: .*{why}"):
        load(path)
    loader = Loader()
    try:
        with pytest.raises(ModelError, match=rf"model m@1: .*{why}"):
            loader.compile(str(path), "m@1")
        assert loader.restarts == 0
    finally:
        loader.stop()


# The newest XGBoost itself

TRAINER = r"""
import sys, numpy as np, xgboost as x
out = sys.argv[1]
r = np.random.default_rng(0)
X, Z = (r.normal(size=(n, 3)).astype(np.float32) for n in (200, 300))
y = X[:, 0] + r.standard_t(2, size=200)
cases = [
    {"objective": "binary:logistic", "rate_drop": 0.5, "one_drop": 1}, {"objective": "binary:logistic"},
    {"objective": "reg:quantileerror", "quantile_alpha": [0.4, 0.5, 0.6], "eta": 1.0},
    {"objective": "reg:expectileerror", "expectile_alpha": [0.4, 0.5, 0.6], "eta": 1.0},
    {"objective": "reg:quantileerror", "quantile_alpha": [0.4, 0.5, 0.6], "rate_drop": 0.5},
    {"objective": "reg:expectileerror", "expectile_alpha": 0.3},
]
for i, case in enumerate(cases):
    if "rate_drop" in case:
        case["booster"] = "dart"
    label = (y > 0).astype(int) if "logistic" in case["objective"] else y
    b = x.train({"nthread": 1, "max_depth": 5, "seed": 1, **case}, x.DMatrix(X, label), 10)
    if i == 0:  # trees beyond the weights
        b = x.train({"nthread": 1, "max_depth": 5}, x.DMatrix(X, label), 3, xgb_model=b)
    for suffix in ("json", "ubj"):
        b.save_model(f"{out}/{i}.{suffix}")
    z = x.DMatrix(Z)
    np.savez(f"{out}/{i}.npz", Z=Z, out=b.predict(z), raw=b.predict(z, output_margin=True))
"""


def test_scores_equal_the_newest_xgboost(tmp_path):
    python = os.environ.get("PENSTOCK_XGBOOST_PYTHON")
    if not python:
        pytest.skip("PENSTOCK_XGBOOST_PYTHON names no interpreter with a newer XGBoost")
    subprocess.run([python, "-W", "ignore", "-c", TRAINER, str(tmp_path)], check=True, capture_output=True)
    saved = sorted(tmp_path.glob("*.npz"))
    assert len(saved) == 6
    for file in saved:
        with np.load(file) as held:
            rows, out, raw = held["Z"].astype(float), held["out"], held["raw"]
        for suffix in (".json", ".ubj"):
            model = load_trees(Path(file).with_suffix(suffix))
            mine = model.predict_raw(rows)
            assert mine.astype(np.float32).tobytes() == raw.reshape(mine.shape).tobytes(), file
            given = model.predict(rows).astype(np.float32)
            apart = np.abs(given.view(np.int32) - out.reshape(given.shape).view(np.int32))
            assert apart.max() <= 1, file
