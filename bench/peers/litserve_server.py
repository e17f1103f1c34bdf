"""LitServe peer: the 100-tree model in ONNX Runtime behind LitAPI, its defaults. --port P; FRAUD_MODEL is the file."""

import os
import sys

import litserve
import numpy as np
import onnxruntime


class Fraud(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)

    def decode_request(self, request):
        return np.array([request["features"]], dtype=np.float32)

    def predict(self, x):
        return self.session.run(["probabilities"], {"input": x})[0]

    def encode_response(self, output):
        return {"score": float(output[0, 1])}


if __name__ == "__main__":
    server = litserve.LitServer(Fraud(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), generate_client_file=False)
