"""PyTriton peer: the 100-tree model in ONNX Runtime as a Python callable behind Triton's own HTTP server. --port P."""

import os
import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)


@batch
def score(input):
    return {"score": session.run(["probabilities"], {"input": input})[0][:, 1:2]}


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    with Triton(config=TritonConfig(http_port=port, grpc_port=port + 1, metrics_port=port + 2)) as triton:
        triton.bind(
            model_name="fraud",
            infer_func=score,
            inputs=[Tensor(name="input", dtype=np.float32, shape=(15,))],
            outputs=[Tensor(name="score", dtype=np.float32, shape=(1,))],
            config=ModelConfig(max_batch_size=64),
        )
        triton.serve()
