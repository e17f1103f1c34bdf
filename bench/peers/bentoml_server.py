"""BentoML peer: the 100-tree model in ONNX Runtime behind a service: `bentoml serve bentoml_server:Fraud`."""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, traffic={"timeout": 30})
class Fraud:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)

    @bentoml.api
    async def score(self, features: list[float]) -> dict[str, float]:
        x = np.array([features], dtype=np.float32)
        return {"score": float(self.session.run(["probabilities"], {"input": x})[0][0, 1])}
