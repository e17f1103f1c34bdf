"""Inference by the client on a real server of a model folder, over HTTP and RESP."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from penstock import AsyncClient, Client
from penstock.client import InvalidRequest, NotFound

lightgbm = pytest.importorskip("lightgbm")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: Any) -> tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A model folder with "gbm", some rows, and LightGBM's own predictions."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4))
    data = lightgbm.Dataset(x, (x[:, 0] + x[:, 1] > 0).astype(int))
    booster = lightgbm.train({"objective": "binary", "verbose": -1, "num_leaves": 7, "num_threads": 1}, data, 10)
    folder = tmp_path_factory.mktemp("models")
    (folder / "gbm" / "1").mkdir(parents=True)
    booster.save_model(folder / "gbm" / "1" / "model.txt")
    return folder, x[:5], booster.predict(x[:5])


@pytest.fixture(scope="module")
def urls(trees: Any) -> Iterator[tuple[str, str]]:
    """(HTTP, RESP) of a server of the folder."""
    command = [sys.executable, "-m", "penstock", "serve", "--models", str(trees[0]), "--port", "0", "--resp-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        ports: list[str] = []
        lines = []
        for line in process.stdout:
            lines.append(line)
            ports += re.findall(r" on (?:http://)?(127\.0\.0\.1:\d+)", line)
            if len(ports) == 2:
                break
        assert len(ports) == 2, lines
        yield f"http://{ports[0]}", f"resp://{ports[1]}"
    finally:
        process.terminate()
        process.wait(20)


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Within one ulp, as transformed scores are (SEMANTICS, scores)."""
    return bool(np.all(np.abs(found[:, 0] - expected) <= np.spacing(expected)))


def test_over_http(urls: Any, trees: Any) -> None:
    _, x, expected = trees
    with Client(urls[0]) as client:
        assert client.ready()
        metadata = client.metadata("gbm")
        assert metadata.versions == ["1"]
        (port,) = metadata.inputs
        assert (port.datatype, port.shape) == ("FP64", [-1, 4])
        for rows in (x, x.tolist(), np.asfortranarray(x), x.astype(">f8")):
            for version in (None, 1):
                found = client.infer("gbm", {port.name: rows}, version)
                assert list(found) == [metadata.outputs[0].name]
                assert close(found["score"], expected)
        with pytest.raises(NotFound):
            client.infer("none", {"x": x})
        with pytest.raises(NotFound):
            client.metadata("gbm", 9)
        for inputs in ({"none": x}, {port.name: x[:, :2]}, {port.name: x.astype(str)}):
            with pytest.raises(InvalidRequest) as caught:
                client.infer("gbm", inputs)
            assert caught.value.status == 400

    async def run() -> None:
        async with AsyncClient(urls[0]) as client:
            found = await asyncio.gather(*[client.infer("gbm", {port.name: x[i : i + 1].tolist()}) for i in range(5)])
            assert close(np.concatenate([f["score"] for f in found]), expected)

    asyncio.run(run())


def test_over_resp(urls: Any, trees: Any) -> None:
    _, x, expected = trees
    with Client(urls[1]) as client:
        assert client.ready()
        assert close(client.infer("gbm", {"input": x}, outputs={"score": "FP64"})["score"], expected)
        assert close(client.infer("gbm", {"input": x}, 1, outputs={"score": "FP64"})["score"], expected)
        with pytest.raises(NotFound):
            client.infer("none", {"input": x}, outputs={"score": "FP64"})
        with pytest.raises(InvalidRequest):
            client.infer("gbm", {"input": x[:1, :3]}, outputs={"score": "FP64"})
