"""The onnx rows: one row through ONNX Runtime's C API, beside InferenceSession.run of the same model, interleaved.

Models: a scaler + logistic regression on 15 features (the fraud pipeline's), and a 30-64-32 perceptron. Floor: the same
call from C (a loop over rows without Python). Batches: ours go row by row, so that a row scores the same bits in
score() and score_batch(); `run` with 256 rows at once is stated beside them. As a script: python bench/micro/onnx.py
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # and not this folder, whose onnx.py is not the package

from rows import row, table
from timing import interleaved, note

COMMAND = "make bench ARGS='--only onnx'"
ROWS, BATCH, ROUNDS = 2048, 256, 15


def models() -> dict[str, tuple[bytes, int]]:
    """Bytes and number of features of each model, fitted on seeded noise."""
    import numpy as np
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = {}
    for name, n, estimator in [
        ("logistic", 15, make_pipeline(StandardScaler(), LogisticRegression())),
        ("mlp", 30, MLPClassifier((64, 32), max_iter=20, random_state=0)),
    ]:
        x = np.random.default_rng(0).normal(size=(2000, n)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.fit(x, x[:, 0] + x[:, 1] ** 2 > 0.7)
        made[name] = (to_onnx(estimator, x[:1], options={"zipmap": False}).SerializeToString(), n)
    return made


def run() -> list[dict[str, Any]]:
    import tempfile

    import numpy as np
    import onnxruntime

    from penstock.models.onnx_runtime import OnnxRuntime

    rows = []
    for name, (data, n) in models().items():
        note(f"onnx: {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(data)
            ours = OnnxRuntime(path, None, None, name).model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].name
        x = np.random.default_rng(1).normal(size=(ROWS, n))
        singles, narrow = list(x), [r[None] for r in x.astype(np.float32)]
        batches = [np.ascontiguousarray(x[i : i + BATCH], dtype=np.float32) for i in range(0, ROWS, BATCH)]
        expected = np.vstack([session.run(["probabilities"], {given: r})[0] for r in narrow]).astype(np.float64)
        if ours.predict(x).tobytes() != expected.tobytes():
            raise AssertionError(f"{name}: our scores are not those of InferenceSession.run")

        def ours_single(predict: Any = ours.predict, singles: Any = singles) -> None:
            for r in singles:
                predict(r)

        def run_single(run: Any = session.run, given: str = given, narrow: Any = narrow) -> None:
            for r in narrow:
                run(["probabilities"], {given: r})

        def run_batch(run: Any = session.run, given: str = given, batches: Any = batches) -> None:
            for b in batches:
                run(["probabilities"], {given: b})

        def from_c(predict: Any = ours.predict, x: Any = x) -> None:
            predict(x)

        seconds = interleaved(
            {"ours": ours_single, "run": run_single, "c": from_c, "run_batch": run_batch}, rounds=ROUNDS, warmup=2
        )
        us = {contender: 1e6 * took / ROWS for contender, took in seconds.items()}
        group = "onnx" if name == "logistic" else f"onnx.{name}"
        rows += [
            row(f"{group}.single_us", us["ours"], "us/row", COMMAND, us["c"], us["ours"] / us["c"]),
            row(f"{group}.python_run_us", us["run"], "us/row", COMMAND, us["c"], us["run"] / us["c"]),
            row(f"{group}.single_ratio_to_run", us["run"] / us["ours"], "x", COMMAND),
            row(f"{group}.python_run_batch256_us_per_row", us["run_batch"], "us/row", COMMAND),
        ]
    return rows


if __name__ == "__main__":
    print(table(run()))
