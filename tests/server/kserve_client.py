"""What KServe's client does against a server, run in the client's own environment: python kserve_client.py URL.

Prints one JSON object. tests/server/test_oip.py starts it and looks at what it says.
"""

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def main(url: str) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=10))
    said: dict[str, object] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model": await client.is_model_ready(url, "tree"),
        "absent": await client.is_model_ready(url, "absent"),
    }
    rows = np.array([[0.5, 1.5, -2.0], [3.0, 0.25, 1.0]], np.float32)
    for kind, binary in (("json", False), ("binary", True)):
        tensor = InferInput("input", [2, 3], "FP32")
        tensor.set_data_from_numpy(rows, binary_data=binary)
        wanted = [RequestedOutput("score", parameters={"binary_data": binary})]
        answer = await client.infer(url, InferRequest("tree", [tensor], request_outputs=wanted), model_name="tree")
        said[kind] = answer.outputs[0].as_numpy().reshape(-1).tolist()
    halves = InferInput("x", [2, 2], "FP16")
    halves.set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float16), binary_data=True)
    answer = await client.infer(
        url,
        InferRequest("fp16", [halves], request_outputs=[RequestedOutput("y", parameters={"binary_data": True})]),
        model_name="fp16",
    )
    said["fp16"] = answer.outputs[0].as_numpy().reshape(-1).tolist()
    try:
        await client.infer(url, {"inputs": []}, model_name="tree")
    except httpx.HTTPStatusError as error:
        said["refused"] = str(error)
    await client.close()
    print(json.dumps(said))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
