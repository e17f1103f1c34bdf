"""Ray Serve peer: the 100-tree model in ONNX Runtime, one replica. --port P. On two cores its 12 processes starve."""

import os
import sys
import time

import numpy as np
import onnxruntime
import ray
from ray import serve


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.1})
class Fraud:
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options)

    async def __call__(self, request):
        x = np.array([(await request.json())["features"]], dtype=np.float32)
        return {"score": float(self.session.run(["probabilities"], {"input": x})[0][0, 1])}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    serve.start(http_options={"host": "127.0.0.1", "port": port, "access_log": False})
    serve.run(Fraud.bind(), route_prefix="/score")
    while True:
        time.sleep(3600)
