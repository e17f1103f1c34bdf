"""The handbook's five models: how each is trained, stored in the model folder, and judged (control path).

What must stay true: defaults of the libraries, seed 0, columns in the handbook's order, so that the published table
comes out.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.demo.generator import Transactions
from penstock.demo.metrics import auc_roc, average_precision, card_precision

Floats = npt.NDArray[np.float64]


class Figures(NamedTuple):
    """AUC ROC, average precision, card precision@100."""

    auc: float
    ap: float
    cp100: float


class Recipe(NamedTuple):
    """A model of the published table. `tolerance`: how near a run comes, given that the order of rows inside one
    second is not published."""

    key: str
    title: str
    published: Figures
    tolerance: float


RECIPES = (
    Recipe("logistic", "Logistic regression", Figures(0.871, 0.606, 0.291), 0.001),
    Recipe("tree2", "Decision tree, depth 2", Figures(0.763, 0.496, 0.241), 0.001),
    Recipe("tree", "Decision tree, unlimited", Figures(0.788, 0.309, 0.243), 0.005),
    Recipe("forest", "Random forest, 100 trees", Figures(0.867, 0.658, 0.287), 0.005),
    Recipe("xgboost", "XGBoost", Figures(0.862, 0.639, 0.273), 0.001),
)


def build(key: str) -> Any:
    """The untrained model of a recipe, with the scikit-learn interface."""
    if key == "logistic":
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(random_state=0))
    if key in ("tree2", "tree"):
        from sklearn.tree import DecisionTreeClassifier

        return DecisionTreeClassifier(max_depth=2 if key == "tree2" else None, random_state=0)
    if key == "forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(random_state=0, n_jobs=os.cpu_count())
    if key == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(random_state=0, tree_method="exact", base_score=0.5, n_jobs=1)
    raise ValueError(f"model {key!r}: expected one of {', '.join(r.key for r in RECIPES)}")


def save(model: Any, features: list[str], folder: Path) -> Path:
    """Write a trained model as folder/model.onnx (scikit-learn) or folder/model.ubj (XGBoost); returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model.*"):
        old.unlink()
    if type(model).__module__.startswith("xgboost"):
        path = folder / "model.ubj"
        booster = model.get_booster()
        booster.feature_names = features
        booster.save_model(path)
        return path
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    logging.getLogger("skl2onnx").setLevel(logging.ERROR)
    inputs = [("features", FloatTensorType([None, len(features)]))]
    converted = to_onnx(model, initial_types=inputs, options={"zipmap": False})
    path = folder / "model.onnx"
    path.write_bytes(converted.SerializeToString())
    return path


def train(
    x: Floats,
    label: npt.NDArray[np.int8],
    features: list[str],
    models: Path,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every recipe on x (rows, features) and store it as models/fraud_<key>/1; returns the models by key."""
    trained = {}
    for recipe in RECIPES:
        if step is not None:
            step(recipe.title)
        model = build(recipe.key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, label)
            save(model, features, models / f"fraud_{recipe.key}" / "1")
        trained[recipe.key] = model
    return trained


def judge(data: Transactions, rows: npt.NDArray[np.int64], score: Floats) -> Figures:
    """The three figures of scores (n,) of the given rows."""
    label = data.fraud[rows]
    return Figures(
        auc_roc(label, score),
        average_precision(label, score),
        card_precision(data.day[rows], data.customer[rows], data.amount[rows], label, score),
    )
