"""The tree rows: LightGBM models of 100 trees x 31 leaves and 500 x 63, 30 features, 2,048 rotating rows.

One row per call and batches of 256, the Python call included, beside ONNX Runtime and LightGBM on the same rows. Floor:
the same call on a model of one leaf. The walk is the kernel's own branch-free one, eight trees (or rows) side by side,
forced, in the same rounds. Run as a script: python bench/micro/trees.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rows import row, table
from timing import interleaved, note

COMMAND = "make bench ARGS='--only trees'"
ROWS, BATCH, FEATURES, ROUNDS = 2048, 256, 30, 15
SIZES = {"trees.": (100, 31), "trees.large_": (500, 63)}


def lightgbm_model(trees: int, leaves: int, path: Path) -> Any:
    """A booster trained on seeded noise, saved to `path`, and rows of float32 numbers to score."""
    import lightgbm
    import numpy as np

    rng = np.random.default_rng(7)
    x = rng.normal(size=(20_000, FEATURES)).astype(np.float32).astype(np.float64)
    signal = (x[:, :10] ** 2).sum(1) + 3 * x[:, 10] * x[:, 11] + 2 * rng.normal(size=len(x))
    parameters = {"objective": "binary", "num_leaves": leaves, "num_threads": 1, "verbose": -1}
    lightgbm.train(parameters, lightgbm.Dataset(x, signal > 11), trees).save_model(path)
    rows = rng.normal(size=(ROWS, FEATURES)).astype(np.float32).astype(np.float64)
    return lightgbm.Booster(model_file=path), rows


def onnx_model(form: Any) -> bytes:
    """The same trees as a TreeEnsembleClassifier. All nodes of these models are thresholds."""
    from onnx import TensorProto, helper

    columns: dict[str, list[Any]] = {
        name: [] for name in ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids")
    }
    votes: dict[str, list[Any]] = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}
    for tree, root in enumerate(form.roots):
        places, todo = {root: 0}, [root]
        while todo:
            at = todo.pop()
            children = [] if at < 0 else [form.yes[at], form.no[at]]
            for child in children:
                places[child] = len(places)
            todo += children
            ids = [places[child] for child in children] or [0, 0]
            feature, value = (0, 0.0) if at < 0 else (form.feature[at], form.threshold[at])
            line = (tree, places[at], feature, "LEAF" if at < 0 else "BRANCH_LEQ", value, *ids)
            for column, cell in zip(columns.values(), line, strict=True):
                column.append(cell)
            if at < 0:
                for vote, cell in zip(votes.values(), (tree, places[at], 0, form.weight[~at]), strict=True):
                    vote.append(cell)
    attributes = {f"nodes_{k}": v for k, v in columns.items()} | {f"class_{k}": v for k, v in votes.items()}
    node = helper.make_node(
        "TreeEnsembleClassifier", ["X"], ["L", "P"], domain="ai.onnx.ml", classlabels_int64s=[0, 1],
        post_transform="LOGISTIC", **attributes,
    )  # fmt: skip
    ports = [helper.make_tensor_value_info(n, k, s) for n, k, s in (
        ("X", TensorProto.FLOAT, [None, FEATURES]), ("P", TensorProto.FLOAT, [None, 2]))]  # fmt: skip
    graph = helper.make_graph([node], "trees", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


def contenders_of(trees: int, leaves: int) -> tuple[dict[str, Any], str]:
    """What is timed, each over all rows once, and the layout that the loader chose."""
    import numpy as np
    import onnxruntime

    from penstock.models.tree_ensemble import TreeEnsemble
    from penstock.models.trees import TreeModel, read_ensemble

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.txt"
        booster, x = lightgbm_model(trees, leaves, path)
        form = read_ensemble(path)
    ours, walk = TreeModel(form), TreeModel(form, "walk")
    leaf = TreeEnsemble(FEATURES, 1, 1)
    leaf.roots.append(leaf.add_leaf([(0, 0.0)]))
    floor = TreeModel(leaf)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_model(form), options, providers=["CPUExecutionProvider"])
    singles, narrow = [x[i : i + 1] for i in range(ROWS)], [x[i : i + 1].astype(np.float32) for i in range(ROWS)]
    starts = range(0, ROWS, BATCH)
    batches = [x[i : i + BATCH] for i in starts]
    narrow_batches = [x[i : i + BATCH].astype(np.float32) for i in starts]

    # What is timed must be right.
    raw = booster.predict(x, raw_score=True)
    for model in (ours, walk):
        if model.predict_raw(x)[:, 0].tobytes() != raw.tobytes():
            raise AssertionError(f"{trees} x {leaves}: our raw scores are not LightGBM's")
    if abs(session.run(["P"], {"X": x.astype(np.float32)})[0][:, 1] - booster.predict(x)).max() > 1e-4:
        raise AssertionError(f"{trees} x {leaves}: ONNX Runtime scores another model")

    def each(predict: Any, parts: list[Any]) -> Any:
        def go() -> None:
            for part in parts:
                predict(part)

        return go

    def onnx(parts: list[Any]) -> Any:
        def go(run: Any = session.run) -> None:
            for part in parts:
                run(["P"], {"X": part})

        return go

    slow = singles[:256]  # LightGBM takes 100 us a call: fewer rows, scaled in run()
    return {
        "single": each(ours.predict, singles),
        "walk": each(walk.predict, singles),
        "floor": each(floor.predict, singles),
        "onnxruntime": onnx(narrow),
        "lightgbm": each(lambda part: booster.predict(part, num_threads=1), slow),
        "batch": each(ours.predict, batches),
        "batch_walk": each(walk.predict, batches),
        "batch_floor": each(floor.predict, batches),
        "batch_onnxruntime": onnx(narrow_batches),
        "batch_lightgbm": each(lambda part: booster.predict(part, num_threads=1), batches),
    }, ours.layout


def run() -> list[dict[str, Any]]:
    rows = []
    for group, (trees, leaves) in SIZES.items():
        note(f"{trees} trees x {leaves} leaves, training")
        contenders, layout = contenders_of(trees, leaves)
        note(f"{trees} x {leaves}: layout {layout}")
        seconds = interleaved(contenders, rounds=ROUNDS if trees < 500 else 7, warmup=2)
        us = {name: 1e6 * took / (256 if name == "lightgbm" else ROWS) for name, took in seconds.items()}
        rows += [
            row(f"{group}single_us", us["single"], "us/row", COMMAND, us["floor"], us["single"] / us["floor"]),
            row(f"{group}batch256_us_per_row", us["batch"], "us/row", COMMAND, us["batch_floor"],
                us["batch"] / us["batch_floor"]),
            row(f"{group}single_ratio_to_walk", us["walk"] / us["single"], "x", COMMAND),
            row(f"{group}batch256_ratio_to_walk", us["batch_walk"] / us["batch"], "x", COMMAND),
            row(f"{group}onnxruntime_single_us", us["onnxruntime"], "us/row", COMMAND),
            row(f"{group}onnxruntime_batch256_us_per_row", us["batch_onnxruntime"], "us/row", COMMAND),
            row(f"{group}lightgbm_single_us", us["lightgbm"], "us/row", COMMAND),
            row(f"{group}lightgbm_batch256_us_per_row", us["batch_lightgbm"], "us/row", COMMAND),
        ]  # fmt: skip
    return rows


if __name__ == "__main__":
    print(table(run()))
