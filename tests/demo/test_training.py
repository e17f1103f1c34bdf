"""Every recipe trains, is stored where the model folder expects it, and scores the same from its file."""

from pathlib import Path

import numpy as np
import pytest

from penstock.demo import training

pytest.importorskip("sklearn")
pytest.importorskip("skl2onnx")
ort = pytest.importorskip("onnxruntime")
xgboost = pytest.importorskip("xgboost")


def test_train_and_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((600, 3)).astype(np.float32).astype(np.float64)
    label = (x[:, 0] + 0.3 * rng.random(600) > 0.9).astype(np.int8)
    features = ["amount", "spend.count_1d", "night"]
    titles: list[str] = []
    stale = tmp_path / "fraud_xgboost" / "1" / "model.onnx"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"from an earlier run")
    models = training.train(x, label, features, tmp_path, titles.append)
    assert titles == [recipe.title for recipe in training.RECIPES]
    assert list(models) == ["logistic", "tree2", "tree", "forest", "xgboost"]
    for key, model in models.items():
        expected = model.predict_proba(x)[:, 1]
        (path,) = (tmp_path / f"fraud_{key}" / "1").iterdir()
        if key == "xgboost":
            assert path.name == "model.ubj"
            booster = xgboost.Booster(model_file=path)
            assert booster.feature_names == features
            got = booster.predict(xgboost.DMatrix(x, feature_names=features))
        else:
            assert path.name == "model.onnx"
            got = ort.InferenceSession(path).run(None, {"features": x.astype(np.float32)})[1][:, 1]
        assert got == pytest.approx(expected, abs=2e-6)


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="model 'svm': expected one of logistic, tree2, tree, forest, xgboost"):
        training.build("svm")
