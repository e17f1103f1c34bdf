"""KServe peer: the 100-tree model in ONNX Runtime behind kserve.Model, one worker. --http_port P (its own flag)."""

import os

import numpy as np
import onnxruntime
from kserve import Model, ModelServer


class Fraud(Model):
    def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)
        self.ready = True
        return True

    async def predict(self, payload, headers=None, response_headers=None):
        x = np.array(payload["instances"], dtype=np.float32)
        return {"predictions": self.session.run(["probabilities"], {"input": x})[0][:, 1].tolist()}


if __name__ == "__main__":
    model = Fraud("fraud")
    model.load()
    ModelServer(workers=1, enable_grpc=False).start([model])
