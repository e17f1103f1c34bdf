"""A model folder for the tests of the Open Inference Protocol, and a server process over it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TREE_INPUTS = 3


def make_models(folder: Path) -> dict[str, Any]:
    """tree 1 and 2 (XGBoost), lgb (LightGBM), forest (ONNX), identities of FP16, BF16 and strings. -> the trees."""
    import lightgbm
    import onnx
    import onnxruntime
    import xgboost
    from onnx import TensorProto, helper
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestRegressor

    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, TREE_INPUTS)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).astype(np.float32)
    oracles: dict[str, Any] = {}
    for version, rounds in (("1", 5), ("2", 12)):
        booster = xgboost.train(
            {"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, xgboost.DMatrix(x, y), rounds
        )
        booster.save_model(_place(folder, "tree", version) / "model.json")
        oracles[f"tree@{version}"] = booster
    gbm = lightgbm.train(
        {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": 7}, lightgbm.Dataset(x, y), 6
    )
    gbm.save_model(_place(folder, "lgb", "1") / "model.txt")
    oracles["lgb@1"] = gbm
    forest = RandomForestRegressor(5, max_depth=4, random_state=1).fit(x, y)
    converted = to_onnx(forest, x[:1], target_opset={"": 14, "ai.onnx.ml": 3})
    path = _place(folder, "forest", "1") / "model.onnx"
    onnx.save(converted, path)
    oracles["forest@1"] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, kind, shape in (
        ("fp16", TensorProto.FLOAT16, ["rows", 2]),
        ("bf16", TensorProto.BFLOAT16, ["rows", 2]),
        ("strings", TensorProto.STRING, ["rows", "columns"]),
        ("one.string", TensorProto.STRING, [1]),
    ):
        ports = [helper.make_tensor_value_info(port, kind, shape) for port in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], name, ports[:1], ports[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
        onnx.save(model, _place(folder, name, "1") / "model.onnx")
    return oracles


def _place(folder: Path, name: str, version: str) -> Path:
    place = folder / name / version
    place.mkdir(parents=True, exist_ok=True)
    return place


class ServerProcess:
    """`penstock serve` with these arguments on a free port; ended by SIGTERM, which must give 0."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env=environment | {"PYTHONUNBUFFERED": "1"},
        )
        self.folder = cwd
        self.lines: list[str] = []
        self.port = 0
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._up.wait(60) or not self.port:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"on http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                self._up.set()
        self._up.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self, text: str, timeout: float = 5) -> bool:
        """Whether the server has printed this, or does soon."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if any(text in line for line in self.lines):
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(5)
        assert code == 0, "".join(self.lines)
