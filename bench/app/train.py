"""Trains and stores the benchmark's models: two LightGBM ensembles of 100 trees x 31 leaves on the fraud features.

`folder()` gives DIR with DIR/models/fraud_trees/{1,2}/model.txt (ours) and DIR/fraud_trees.onnx (version 1, for ONNX
Runtime); trained once per version of this file and of stream.py, then read from the cache. As a script it prints DIR.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from app import stream  # noqa: E402
from load.generator import CACHE  # noqa: E402

ROWS, TREES, LEAVES = 200_000, 100, 31


def folder() -> Path:
    """The folder that holds the models, trained if need be (a few seconds)."""
    version = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("train.py", "stream.py"))).hexdigest()
    ready = CACHE / f"fraud-{version[:12]}"
    if not ready.exists():
        draft = CACHE / f"fraud-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        train(draft)
        try:
            draft.rename(ready)
        except OSError:  # somebody else was faster
            shutil.rmtree(draft)
    return ready


def train(target: Path) -> None:
    """Trains both versions into `target`; seeded, one thread, so the trees are the same every time."""
    import lightgbm
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    data = stream.transactions(ROWS + 50_000)
    x, y = stream.features(data)[50_000:], data.fraud[50_000:]
    for version in (1, 2):
        options = {
            "objective": "binary",
            "num_leaves": LEAVES,
            "min_data_in_leaf": 20,
            "learning_rate": 0.1,
            "feature_fraction": 0.8,
            "seed": version,
            "deterministic": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        booster = lightgbm.train(options, lightgbm.Dataset(x, y, feature_name=stream.FEATURES), TREES)
        leaves = [t["num_leaves"] for t in booster.dump_model()["tree_info"]]
        if len(leaves) != TREES or min(leaves) < LEAVES:
            raise RuntimeError(f"expected {TREES} trees of {LEAVES} leaves, trained {len(leaves)} of {min(leaves)}+")
        place = target / "models" / "fraud_trees" / str(version)
        place.mkdir(parents=True)
        booster.save_model(place / "model.txt")
        if version == 1:
            onnx = onnxmltools.convert_lightgbm(
                booster,
                initial_types=[("input", FloatTensorType([None, x.shape[1]]))],
                zipmap=False,
                target_opset=15,
            )
            (target / "fraud_trees.onnx").write_bytes(onnx.SerializeToString())


if __name__ == "__main__":
    print(folder())
