"""MLServer peer: a custom runtime with the 100-tree model in ONNX Runtime, parallel workers off (faster)."""

import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Fraud(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        score = self.session.run(["probabilities"], {"input": x})[0][:, 1]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("score", score)])
