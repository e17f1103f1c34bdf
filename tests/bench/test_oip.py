"""The requests of the inference rows are what tritonclient sends, each with its own numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from load import oip
from load.generator import frame


def parts(request: bytes) -> tuple[dict[str, str], dict, np.ndarray]:
    head, _, body = request.partition(b"\r\n\r\n")
    fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.decode().split("\r\n")[1:])}
    n = int(fields["inference-header-content-length"])
    assert int(fields["content-length"]) == len(body)
    return fields, json.loads(body[:n]), np.frombuffer(body[n:], np.float32)


@pytest.mark.parametrize("client", [True, False])
def test_a_captured_request_is_a_binary_inference(client, monkeypatch):
    if client:
        pytest.importorskip("tritonclient.http")
    else:
        monkeypatch.setitem(__import__("sys").modules, "tritonclient.http", None)
    request, what = oip.captured("wide", "probabilities", 30)
    assert ("missing" in what) is not client
    assert request.startswith(b"POST /v2/models/wide/infer HTTP/1.1\r\n")
    assert oip.whole_length(request) == len(request)
    _, header, values = parts(request)
    (tensor,) = header["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("input", "FP32", [1, 30])
    assert tensor["parameters"] == {"binary_data_size": 120}
    assert header["outputs"] == [{"name": "probabilities", "parameters": {"binary_data": True}}]
    assert not values.any()


def test_requests_differ_in_their_numbers_alone(monkeypatch, tmp_path):
    x = np.arange(90, dtype=np.float32).reshape(3, 30)
    monkeypatch.setattr(oip, "inputs", lambda n: x[:, :n])
    monkeypatch.setattr(oip, "CACHE", tmp_path)
    data = oip.requests("wide", "probabilities", 30).read_bytes()
    n = int.from_bytes(data[:4], "little")
    whole = [data[i + 4 : i + 4 + n] for i in range(0, len(data), n + 4)]
    assert frame(whole) == data
    assert [parts(r)[2].tolist() for r in whole] == x.tolist()
    assert len({r[:-120] for r in whole}) == 1
