"""Trains and stores the benchmark's models: LightGBM ensembles of 100 trees x 31 leaves, and a slow perceptron.

`folder()` gives DIR with
  DIR/models/fraud_trees/{1,2}/model.txt   the fraud pipeline's
  DIR/fraud_trees.onnx                     version 1 for ONNX Runtime, and the same as DIR/served/fraud/1/model.onnx
  DIR/served/wide/1/model.onnx             the same kind of ensemble on 30 float32 inputs: the features, and noise
  DIR/slow/fraud_deep/1/model.onnx         a perceptron of 15 inputs that takes over 200 us
trained once per version of this file and of stream.py, then read from the cache. As a script it prints DIR.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from app import stream  # noqa: E402
from load.generator import CACHE  # noqa: E402

ROWS, TREES, LEAVES = 200_000, 100, 31
DEEP = [1536, 1536, 1024]  # hidden layers of the slow model


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
            onnx = as_onnx(booster)
            (target / "fraud_trees.onnx").write_bytes(onnx)
            put(target / "served" / "fraud", onnx)
    noise = np.random.default_rng(5).normal(size=(len(x), 30 - x.shape[1]))
    wide = lightgbm.train(options, lightgbm.Dataset(np.hstack([x, noise]).astype(np.float32), y), TREES)
    put(target / "served" / "wide", as_onnx(wide))
    put(target / "slow" / "fraud_deep", perceptron([x.shape[1], *DEEP, 1]))


def put(model: Path, data: bytes) -> None:
    place = model / "1"
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(data)


def as_onnx(booster: Any) -> bytes:
    """The ensemble as ONNX with one input "input"."""
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    types = [("input", FloatTensorType([None, booster.num_feature()]))]
    data: bytes = onnxmltools.convert_lightgbm(
        booster, initial_types=types, zipmap=False, target_opset=15
    ).SerializeToString()
    return data


def perceptron(sizes: list[int]) -> bytes:
    """An ONNX perceptron with seeded weights: what it says means nothing, what it costs is the point."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(11)
    nodes, weights, name = [], [], "input"
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights.append(numpy_helper.from_array((rng.normal(size=(a, b)) / a**0.5).astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(b, np.float32), f"b{i}"))
        last = i == len(sizes) - 2
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Sigmoid" if last else "Relu", [f"h{i}"], ["score" if last else f"a{i}"]))
        name = f"a{i}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, sizes[0]])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


if __name__ == "__main__":
    print(folder())
