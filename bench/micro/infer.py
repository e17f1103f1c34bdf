"""The inference rows: one Open Inference Protocol request in native code, the body's bytes in, the answer's bytes out.

A LightGBM model of 100 trees x 31 leaves and 2,048 rotating rows of 30 FP32, as tritonclient sends them: a JSON header,
`binary_data_output`, 120 raw bytes. Floor: the trees alone on the same rows as doubles. No HTTP and no Python between
the requests of a round. Run as a script: python bench/micro/infer.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from micro.trees import FEATURES, lightgbm_model
from rows import row, table
from timing import interleaved

COMMAND = "make bench ARGS='--only infer'"
ROUNDS, BATCH = 21, 256


def header(rows: int, request_id: str | None = None) -> bytes:
    """As tritonclient writes it."""
    tensor = {
        "name": "input",
        "shape": [rows, FEATURES],
        "datatype": "FP32",
        "parameters": {"binary_data_size": rows * FEATURES * 4},
    }
    request = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    return json.dumps(request if request_id is None else {"id": request_id} | request, separators=(",", ":")).encode()


def identity_model(path: Path) -> None:
    """What ONNX Runtime costs where the graph costs nothing."""
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, FEATURES]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "g", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def run() -> list[dict[str, Any]]:
    import numpy as np

    from penstock._ext.infer import ServedModel
    from penstock.models.runtime import load

    with tempfile.TemporaryDirectory() as folder:
        path, graph = Path(folder) / "model.txt", Path(folder) / "model.onnx"
        booster, x = lightgbm_model(100, 31, path)
        model = ServedModel("fraud", "1", load(path), path=path)
        identity_model(graph)
        identity = ServedModel("identity", "1", None, path=graph)
    narrow = x.astype(np.float32)
    plain, batch = header(1), header(BATCH)
    named = [header(1, f"{i:08d}") for i in range(len(x))]
    bodies = [plain + narrow[i].tobytes() for i in range(len(x))]
    ids = [named[i] + narrow[i].tobytes() for i in range(len(x))]
    batches = [batch + narrow[i : i + BATCH].tobytes() for i in range(0, len(x), BATCH)]
    tensor = {"name": "input", "shape": [1, FEATURES], "datatype": "FP32"}
    texts = [json.dumps({"inputs": [tensor | {"data": r.tolist()}]}).encode() for r in narrow]
    doubles = [r.tobytes() for r in x]

    # What is timed must be right.
    answers = [model.infer_http(body, len(plain))[1][0] for body in bodies]
    if b"".join(answers) != booster.predict(x).tobytes():
        raise AssertionError("our answers are not LightGBM's")

    seconds = interleaved(
        {
            "binary": lambda: model._repeat(bodies, len(plain)),
            "id": lambda: model._repeat(ids, len(named[0])),
            "json": lambda: model._repeat(texts, -1),
            "batch": lambda: model._repeat(batches, len(batch)),
            "trees": lambda: model._repeat_trees(doubles),
            "identity": lambda: identity._repeat(bodies, len(plain)),
        },
        rounds=ROUNDS,
        warmup=2,
    )
    us = {name: 1e6 * took / len(x) for name, took in seconds.items()}
    return [
        row("infer.binary_us", us["binary"], "us/request", COMMAND, us["trees"], us["binary"] / us["trees"]),
        row("infer.binary_id_us", us["id"], "us/request", COMMAND, us["trees"], us["id"] / us["trees"]),
        row("infer.json_us", us["json"], "us/request", COMMAND, us["trees"], us["json"] / us["trees"]),
        row("infer.batch256_us_per_row", us["batch"], "us/row", COMMAND, us["trees"], us["batch"] / us["trees"]),
        row("infer.onnx_identity_us", us["identity"], "us/request", COMMAND),
    ]


if __name__ == "__main__":
    print(table(run()))
