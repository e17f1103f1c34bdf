"""The FastAPI peer: the same 100-tree model behind FastAPI + ONNX Runtime, one uvicorn process, features in requests.

It computes no feature, splits nothing and applies no rule: less work than ours. FRAUD_MODEL names the ONNX file.
"""

import os

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(os.environ["FRAUD_MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()


class Features(BaseModel):
    features: list[float]


class Score(BaseModel):
    score: float


@app.get("/health")
async def health() -> dict[str, bool]:
    return {"ok": True}


@app.post("/score")
async def score(body: Features) -> Score:
    x = np.array([body.features], dtype=np.float32)
    (probabilities,) = session.run(["probabilities"], {"input": x})
    return Score(score=float(probabilities[0, 1]))
