"""The Open Inference Protocol over HTTP, with the clients that people have, and raw bytes where those are too polite.

The traps are the places where the specification and its implementations disagree, in the order of the research report
(serving.md 1.2); each of them has one test of its own.
"""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

ROWS = np.array([[0.5, 1.5, -2.0], [3.0, 0.25, 1.0]], np.float32)
KSERVE = Path(sys.prefix) / "kserve" / "bin" / "python"


def _sibling(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oip_models = _sibling("oip_models")


class Oip:
    """The server, its folder, the libraries' own models, and raw requests."""

    def __init__(self, folder, wire):
        self.folder = folder / "models"
        self.wire = wire
        self.oracles = oip_models.make_models(self.folder)
        self.trace = folder / "trace.json"
        self.process = oip_models.ServerProcess(
            *("--models", str(self.folder), "--models-control", "explicit", "--trace-file", str(self.trace)),
            cwd=folder,
        )
        self.url = self.process.url
        with self.triton() as client:
            for name in ("tree", "lgb", "forest", "fp16", "bf16", "strings", "one.string"):
                client.load_model(name)

    def triton(self, **more):
        return triton.InferenceServerClient(self.url.removeprefix("http://"), **more)

    def ask(self, data):
        with self.wire.Client(self.process.port) as client:
            client.send(data)
            answer = client.read(head_only=data.startswith(b"HEAD "))
            assert answer is not None, "the connection ended without an answer"
            return answer

    def get(self, path, method="GET"):
        return self.ask(f"{method} {path} HTTP/1.1\r\nHost: t\r\n\r\n".encode())

    def post(self, path, body=b"", *fields):
        return self.ask(self.wire.request(path, body, *fields))

    def score(self, rows, model="tree@2"):
        import xgboost

        oracle = self.oracles[model]
        return oracle.predict(xgboost.DMatrix(rows) if model.startswith("tree") else rows)


@pytest.fixture(scope="module")
def oip(tmp_path_factory, wire):
    served = Oip(tmp_path_factory.mktemp("oip"), wire)
    yield served
    served.process.close()


def tensor(name, values, datatype, binary=True):
    found = triton.InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values, binary_data=binary)
    return found


def infer_body(rows=ROWS, **more):
    data = {"name": "input", "shape": list(rows.shape), "datatype": "FP32", "data": rows.tolist()}
    return {"inputs": [data], **more}


# The ten traps.


def test_trap_1_paths_carry_no_literal_dollar(oip):
    assert not [path for path in oip.get("/openapi.json").json["paths"] if "$" in path]
    assert oip.get("/v2/models/$tree/versions/$1/ready").status == 404


def test_trap_2_paths_with_and_without_version(oip):
    for path in ("", "/ready", "/config", "/stats"):
        assert oip.get(f"/v2/models/tree{path}").status == 200
        assert oip.get(f"/v2/models/tree/versions/1{path}").status == 200
    for path, version in (("", "2"), ("/versions/1", "1"), ("/versions/2", "2")):
        answer = oip.post(f"/v2/models/tree{path}/infer", infer_body())
        assert answer.json["model_version"] == version
        np.testing.assert_array_equal(np.float32(answer.json["outputs"][0]["data"]), oip.score(ROWS, f"tree@{version}"))


def test_trap_3_trailing_slash_is_served_without_a_redirect(oip):
    assert oip.get("/v2").status == oip.get("/v2/").status == 200
    assert oip.get("/v2").json == oip.get("/v2/").json
    assert oip.get("/v2").json["name"] == "penstock"


def test_trap_4_health_has_a_body_that_every_client_reads(oip):
    for path in ("/v2/health/live", "/v2/health/ready"):
        answer = oip.get(path)
        assert answer.status == 200
        assert answer.json == {"live": True, "ready": True}


def test_trap_5_what_is_not_ready_is_503(oip):
    assert oip.post("/v2/repository/models/lgb/unload").status == 200
    try:
        for path in ("/ready", "", "/config", "/stats"):
            answer = oip.get(f"/v2/models/lgb{path}")
            assert answer.status == 503
            assert "retry-after" in answer.fields
            assert "lgb" in answer.json["error"]
        assert oip.post("/v2/models/lgb/infer", infer_body()).status == 503
        with oip.triton() as client:
            assert not client.is_model_ready("lgb")
    finally:
        assert oip.post("/v2/repository/models/lgb/load").status == 200
    assert oip.get("/v2/models/lgb/ready").json == {"name": "lgb", "ready": True}


def test_trap_6_data_is_required_only_without_raw_bytes(oip):
    body = infer_body()
    del body["inputs"][0]["data"]
    answer = oip.post("/v2/models/tree/infer", body)
    assert answer.status == 400
    assert "input" in answer.json["error"]
    body["inputs"][0]["parameters"] = {"binary_data_size": ROWS.nbytes}
    head = json.dumps(body).encode()
    answer = oip.post("/v2/models/tree/infer", head + ROWS.tobytes(), f"Inference-Header-Content-Length: {len(head)}")
    np.testing.assert_array_equal(np.float32(answer.json["outputs"][0]["data"]), oip.score(ROWS))


@pytest.mark.parametrize("given", ["abc", "", 'quote " back \\ slash', "üñí✓", "\n\t\u0000"])
def test_trap_7_id_comes_back_only_when_given(oip, given):
    assert "id" not in oip.post("/v2/models/tree/infer", infer_body()).json
    answer = oip.post("/v2/models/tree/infer", infer_body(id=given)).json
    assert answer.get("id", "") == given


def test_trap_8_parameters_take_every_kind_of_number(oip):
    """gRPC's InferParameter has doubles and uint64 in the proto file alone; JSON has them anyway."""
    more = {"a": 1.5, "b": 2**64 - 1, "c": -(2**63), "d": True, "e": "text", "f": 1e300}
    answer = oip.post("/v2/models/tree/infer", infer_body(parameters=more))
    assert answer.status == 200, answer
    assert oip.post("/v2/models/tree/infer", infer_body(parameters=[1])).status == 400


def test_trap_9_versions_are_served_and_unknown_ones_are_404(oip):
    assert oip.get("/v2/models/tree").json["versions"] == ["1", "2"]
    for path in ("", "/ready", "/config", "/stats"):
        answer = oip.get(f"/v2/models/tree/versions/9{path}")
        assert answer.status == 404
        assert answer.json["error"] == "model tree has no version '9'; have 1, 2"
    assert oip.post("/v2/models/tree/versions/9/infer", infer_body()).status == 404


def test_trap_10_load_answers_an_empty_object_and_models_are_listed(oip):
    answer = oip.post("/v2/repository/models/tree/load")
    assert (answer.status, answer.json) == (200, {})
    assert oip.get("/v2/models").json == {"models": ["bf16", "forest", "fp16", "lgb", "one.string", "strings", "tree"]}


def test_a_server_that_starts_or_stops_is_not_ready(wire):
    from types import SimpleNamespace

    from penstock.server.config import ServerConfig
    from penstock.server.oip import OipRoutes
    from penstock.server.routes import build_server

    nothing = SimpleNamespace(
        table=SimpleNamespace(target=lambda name, version="": None),
        index=lambda ready=False: [],
        model=lambda name, version="": None,
        versions=lambda name: [],
        control="none",
    )
    served = wire.Served()
    served.server = build_server(served.engine, ServerConfig(), served.state, flow=served.flow, oip=OipRoutes(nothing))
    with served:
        assert served.get("/v2/health/ready").json == {"live": True, "ready": True}
        assert served.get("/v2/models").json == {"models": []}
        assert served.get("/v2/models/any").json == {"error": "no model 'any'; have none"}
        served.state["ready"] = False
        answer = served.get("/v2/health/ready")
        assert answer.status == 503
        assert "retry-after" in answer.fields
        assert answer.json == {"error": "the server is starting"}
        assert served.get("/v2/health/live").json == {"live": True, "ready": False}
        served.state["ready"] = True
        served.server.draining = True
        assert served.get("/v2/health/ready").json == {"error": "the server is stopping"}
        served.server.draining = False
        answer = served.post("/v2/repository/models/any/load", {})
        assert answer.status == 501
        assert "--models-control" in answer.json["error"]


def test_a_load_can_choose_versions_and_bring_files(oip):
    tree = (oip.folder / "tree" / "1" / "model.json").read_bytes()
    only_1 = json.dumps({"version_policy": {"specific": {"versions": [1]}}})
    with oip.triton() as client:
        try:
            client.load_model("tree", config=only_1)
            assert client.get_model_config("tree")["version_policy"] == {"specific": {"versions": [1]}}
            assert client.get_model_metadata("tree")["versions"] == ["1"]
            assert not client.is_model_ready("tree", "2")
            answer = client.infer("tree", [tensor("input", ROWS, "FP32")])
            np.testing.assert_array_equal(answer.as_numpy("score").reshape(-1), oip.score(ROWS, "tree@1"))
        finally:
            client.load_model("tree")
        assert client.get_model_metadata("tree")["versions"] == ["1", "2"]
        client.load_model("given", config="{}", files={"file:7/model.json": tree})
        answer = client.infer("given", [tensor("input", ROWS, "FP32")], model_version="7")
        np.testing.assert_array_equal(answer.as_numpy("score").reshape(-1), oip.score(ROWS, "tree@1"))
        with pytest.raises(InferenceServerException) as refused:
            client.load_model("given", config="{}", files={"file:7/model.json": b"not a model"})
        assert refused.value.status() == "400"
        client.infer("given", [tensor("input", ROWS, "FP32")], model_version="7")
        client.unload_model("given")
        assert not client.is_model_ready("given")
    assert not (oip.folder / "given").exists()


# Triton's client.


def test_triton_client_sees_the_server(oip):
    with oip.triton() as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tree")
        assert client.is_model_ready("tree", "1")
        assert not client.is_model_ready("absent")
        assert not client.is_model_ready("tree", "7")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        metadata = client.get_model_metadata("tree", "1")
        assert metadata["platform"] == "penstock_trees"
        assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}]
        assert metadata["outputs"][0]["shape"][0] == -1
        assert client.get_model_metadata("strings")["inputs"][0]["datatype"] == "BYTES"


def test_triton_client_reads_the_configuration(oip):
    with oip.triton() as client:
        config = client.get_model_config("tree")
        assert config["max_batch_size"] > 0
        assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [3]}]
        assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
        config = client.get_model_config("strings")
        assert config["backend"] == "onnxruntime"
        assert config["input"][0] == {"name": "x", "data_type": "TYPE_STRING", "dims": [-1]}
        config = client.get_model_config("one.string")
        assert config["max_batch_size"] == 0
        assert config["input"][0]["dims"] == [1]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("named", [None, True, False])
@pytest.mark.parametrize("version", ["", "1"])
def test_triton_client_infers(oip, binary, named, version):
    outputs = None if named is None else [triton.InferRequestedOutput("score", binary_data=named)]
    with oip.triton() as client:
        answer = client.infer(
            "tree",
            [tensor("input", ROWS, "FP32", binary)],
            model_version=version,
            outputs=outputs,
            request_id="r1",
            priority=1,
            timeout=10_000_000,
        )
    assert answer.get_response()["id"] == "r1"
    got = answer.as_numpy("score")
    np.testing.assert_array_equal(got.reshape(-1), oip.score(ROWS, f"tree@{version or 2}"))


def test_triton_client_infers_in_doubles(oip):
    rows = ROWS.astype(np.float64)
    with oip.triton() as client:
        answer = client.infer("lgb", [tensor("input", rows, "FP64")])
        np.testing.assert_array_equal(answer.as_numpy("score").reshape(-1), oip.score(rows, "lgb@1"))


def test_triton_client_infers_with_trees_in_onnx(oip):
    session = oip.oracles["forest@1"]
    with oip.triton() as client:
        metadata = client.get_model_metadata("forest")
        assert metadata["platform"] == "penstock_trees"
        (port,), (output,) = metadata["inputs"], metadata["outputs"]
        assert (port["name"], output["name"]) == (session.get_inputs()[0].name, session.get_outputs()[0].name)
        got = client.infer("forest", [tensor(port["name"], ROWS, "FP32")]).as_numpy(output["name"])
    np.testing.assert_array_equal(got, session.run(None, {port["name"]: ROWS})[0])


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_sends_strings(oip, binary):
    words = np.array([["", "a b"], ["üñí", '"quoted"\\']], dtype=object)
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
    with oip.triton() as client:
        got = client.infer("strings", [tensor("x", words, "BYTES", binary)], outputs=outputs).as_numpy("y")
    assert [[v.decode() if isinstance(v, bytes) else v for v in row] for row in got.tolist()] == words.tolist()


def test_triton_client_sends_halves(oip):
    import ml_dtypes

    with oip.triton() as client:
        for name, kind, dtype in (("fp16", "FP16", np.float16), ("bf16", "BF16", ml_dtypes.bfloat16)):
            rows = np.array([[0.1, -65504.0], [np.inf, 2**-14]], dtype)
            got = client.infer(name, [tensor("x", rows, kind)]).as_numpy("y")
            assert got.dtype == dtype
            assert got.tobytes() == rows.tobytes()


@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("asked", [None, "gzip", "deflate"])
def test_triton_client_compresses(oip, sent, asked):
    rows = np.repeat(ROWS, 2000, axis=0)
    with oip.triton() as client:
        answer = client.infer(
            "tree",
            [tensor("input", rows, "FP32")],
            request_compression_algorithm=sent,
            response_compression_algorithm=asked,
        )
    np.testing.assert_array_equal(answer.as_numpy("score").reshape(-1), np.repeat(oip.score(ROWS), 2000))


def test_triton_client_reads_statistics(oip):
    with oip.triton() as client:
        before = client.get_inference_statistics("tree", "2")["model_stats"][0]
        for _ in range(3):
            client.infer("tree", [tensor("input", ROWS, "FP32")])
        with pytest.raises(InferenceServerException):
            client.infer("tree", [tensor("wrong", ROWS, "FP32")])
        after = client.get_inference_statistics("tree", "2")["model_stats"][0]
        assert after["inference_count"] - before["inference_count"] == 6
        assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 3
        assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
        assert after["last_inference"] > 1_600_000_000_000
        assert [row["version"] for row in client.get_inference_statistics("tree")["model_stats"]] == ["1", "2"]
        names = {row["name"] for row in client.get_inference_statistics()["model_stats"]}
        assert {"tree", "lgb", "fp16"} <= names


def test_triton_client_loads_and_unloads(oip):
    with oip.triton() as client:
        client.unload_model("strings", unload_dependents=True)
        assert not client.is_model_ready("strings")
        index = {(row["name"], row.get("version")): row["state"] for row in client.get_model_repository_index()}
        assert index["strings", "1"] == "UNAVAILABLE"
        assert index["tree", "1"] == "READY"
        client.load_model("strings")
        assert client.is_model_ready("strings")
        for name in ("absent", "no/such", "..", "a b"):
            with pytest.raises(InferenceServerException) as refused:
                client.load_model(name)
            assert refused.value.status() == "404"
    ready = oip.post("/v2/repository/index", {"ready": True}).json
    assert {row["state"] for row in ready} == {"READY"}


def test_triton_client_sets_the_log(oip):
    with oip.triton() as client:
        settings = client.get_log_settings()
        assert settings["log_error"] is True
        assert client.update_log_settings({"log_info": False})["log_info"] is False
        client.load_model("bf16")
        assert client.update_log_settings({"log_info": True, "log_format": "ISO8601"})["log_format"] == "ISO8601"
        client.load_model("fp16")
        assert oip.process.said("model fp16 is loaded")
        client.update_log_settings({"log_format": "default"})
        for wrong, status in (({"log_info": 3}, "400"), ({"log_file": "/tmp/x"}, "501"), ({"log_colour": 1}, "400")):
            with pytest.raises(InferenceServerException) as refused:
                client.update_log_settings(wrong)
            assert refused.value.status() == status
        assert client.get_log_settings() == settings


def test_triton_client_traces(oip):
    with oip.triton() as client:
        assert "trace" in client.get_server_metadata()["extensions"]
        assert client.get_trace_settings()["trace_level"] == ["OFF"]
        changed = {"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_count": "3"}
        settings = client.update_trace_settings("tree", changed)
        assert settings["trace_rate"] == "2"
        assert client.get_trace_settings()["trace_rate"] == "1000"
        for i in range(10):
            client.infer("tree", [tensor("input", ROWS, "FP32")], request_id=f"t{i}")
            client.infer("lgb", [tensor("input", ROWS, "FP32")])
        assert client.get_trace_settings("tree")["trace_count"] == "0"
        settings = client.update_trace_settings("tree", {"trace_level": None, "trace_rate": None, "trace_count": None})
        assert settings["trace_level"] == ["OFF"]
        assert settings["trace_rate"] == "1000"
        for wrong, status in (({"trace_level": ["TENSORS"]}, "501"), ({"trace_rate": "0"}, "400"), ({"a": "1"}, "400")):
            with pytest.raises(InferenceServerException) as refused:
                client.update_trace_settings("tree", wrong)
            assert refused.value.status() == status
        with pytest.raises(InferenceServerException):
            client.update_trace_settings(settings={"trace_file": "/tmp/elsewhere"})
    traces = _until(lambda: json.loads(oip.trace.read_bytes()) if oip.trace.exists() else [], 6)
    heads, times = traces[::2], traces[1::2]
    assert [head["model_name"] for head in heads] == ["tree"] * 3
    assert [head["id"] for head in heads] == [stamps["id"] for stamps in times]
    for stamps in times:
        ns = [stamp["ns"] for stamp in stamps["timestamps"]]
        assert stamps["timestamps"][0]["name"] == "REQUEST_START"
        assert stamps["timestamps"][-1]["name"] == "REQUEST_END"
        assert ns == sorted(ns)
        assert 0 < ns[-1] - ns[0] < 10**9


def _until(look, length):
    import time

    for _ in range(100):
        found = look()
        if len(found) >= length:
            return found
        time.sleep(0.02)
    return found


def test_triton_client_finds_no_shared_memory(oip):
    with oip.triton() as client:
        assert not {e for e in client.get_server_metadata()["extensions"] if "shared_memory" in e}
        assert client.get_system_shared_memory_status() == []
        assert client.get_cuda_shared_memory_status() == []
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        with pytest.raises(InferenceServerException) as refused:
            client.register_system_shared_memory("region", "/key", 64)
        assert refused.value.status() == "501"
        shared = triton.InferInput("input", [2, 3], "FP32")
        shared.set_shared_memory("region", 24)
        with pytest.raises(InferenceServerException):
            client.infer("tree", [shared])


def test_triton_client_is_told_what_is_wrong(oip):
    wrong = [
        ("absent", tensor("input", ROWS, "FP32"), "404", "absent"),
        ("tree", tensor("wrong", ROWS, "FP32"), "400", "wrong"),
        ("tree", tensor("input", ROWS[:, :2].copy(), "FP32"), "400", "input"),
        ("strings", tensor("x", ROWS, "FP32"), "400", "x"),
    ]
    with oip.triton() as client:
        for name, given, status, says in wrong:
            with pytest.raises(InferenceServerException) as refused:
                client.infer(name, [given])
            assert refused.value.status() == status
            assert says in refused.value.message()


def test_triton_aio_client(oip):
    import tritonclient.http.aio as aio

    async def talk():
        async with aio.InferenceServerClient(oip.url.removeprefix("http://")) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("tree")
            given = aio.InferInput("input", [2, 3], "FP32")
            given.set_data_from_numpy(ROWS)
            answers = await asyncio.gather(*(client.infer("tree", [given]) for _ in range(50)))
            packed = await client.infer("tree", [given], request_compression_algorithm="gzip")
            await client.unload_model("one.string")
            await client.load_model("one.string")
            index = await client.get_model_repository_index()
            return [*answers, packed], index

    answers, index = asyncio.run(talk())
    for answer in answers:
        np.testing.assert_array_equal(answer.as_numpy("score").reshape(-1), oip.score(ROWS))
    assert len(index) >= 7


# KServe's client.


@pytest.mark.skipif(not KSERVE.exists(), reason="KServe's client is not installed: make ci-extra")
def test_kserve_client(oip):
    done = subprocess.run(
        [KSERVE, Path(__file__).with_name("kserve_client.py"), oip.url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["live"] is said["ready"] is said["model"] is True
    assert said["absent"] is False
    np.testing.assert_array_equal(np.float32(said["json"]), oip.score(ROWS))
    np.testing.assert_array_equal(np.float32(said["binary"]), oip.score(ROWS))
    assert said["fp16"] == [1, 2, 3, 4]
    assert "400" in said["refused"]


# Raw bytes.


def test_raw_binary_request(oip):
    for rows in (ROWS[:1], ROWS):
        answer = oip.post("/v2/models/tree/infer", rows.tobytes(), "Inference-Header-Content-Length: 0")
        assert answer.fields["content-type"] == "application/octet-stream"
        length = int(answer.fields["inference-header-content-length"])
        head = json.loads(answer.body[:length])
        raw = answer.body[length:]
        assert head["outputs"][0]["parameters"]["binary_data_size"] == len(raw)
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32), oip.score(rows))
    assert oip.post("/v2/models/tree/infer", b"12345", "Inference-Header-Content-Length: 0").status == 400


@pytest.mark.parametrize("length", ["1", "100000", "-1", "x", "1.5", "99999999999999999999", " "])
def test_wrong_header_length(oip, length):
    answer = oip.post("/v2/models/tree/infer", infer_body(), f"Inference-Header-Content-Length: {length}")
    assert answer.status == 400
    assert isinstance(answer.json["error"], str)


def test_nested_and_flat_data(oip):
    flat = infer_body()
    flat["inputs"][0]["data"] = ROWS.reshape(-1).tolist()
    assert oip.post("/v2/models/tree/infer", flat).body == oip.post("/v2/models/tree/infer", infer_body()).body


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_compressed_request(oip, pack):
    name = "gzip" if pack is gzip.compress else "deflate"
    body = json.dumps(infer_body()).encode()
    answer = oip.post("/v2/models/tree/infer", pack(body), f"Content-Encoding: {name}")
    assert answer.body == oip.post("/v2/models/tree/infer", body).body
    for damaged in (b"", b"not packed", pack(body)[:-5], pack(body) + b"more"):
        answer = oip.post("/v2/models/tree/infer", damaged, f"Content-Encoding: {name}")
        assert answer.status == 400, damaged
        assert isinstance(answer.json["error"], str)
    bomb = oip.post("/v2/models/tree/infer", pack(bytes(50_000_000)), f"Content-Encoding: {name}")
    assert bomb.status == 413
    assert oip.post("/v2/models/tree/infer", body, "Content-Encoding: br").status == 415


READ = [
    *("/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/v2/models/tree"),
    *("/v2/models/tree/ready", "/v2/models/tree/config", "/v2/models/tree/versions/1/stats", "/v2/logging"),
    *("/v2/trace/setting", "/v2/models/tree/trace/setting", "/v2/systemsharedmemory/status"),
    "/v2/cudasharedmemory/status",
]


@pytest.mark.parametrize("path", READ)
def test_head_is_get_without_a_body(oip, path):
    full, head = oip.get(path), oip.get(path, "HEAD")
    assert head.status == full.status == 200
    assert abs(int(head.fields["content-length"]) - len(full.body)) < 40  # statistics may grow in between
    assert head.body == b""


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v2", "GET, HEAD"),
        ("DELETE", "/v2/models/tree", "GET, HEAD"),
        ("POST", "/v2/models/tree/ready", "GET, HEAD"),
        ("GET", "/v2/models/tree/infer", "POST"),
        ("GET", "/v2/models/tree/versions/1/infer", "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/repository/models/tree/load", "POST"),
        ("PUT", "/v2/trace/setting", "GET, HEAD, POST"),
    ],
)
def test_wrong_method(oip, method, path, allow):
    answer = oip.ask(oip.wire.request(path, b"{}", method=method))
    assert answer.status == 405
    assert answer.fields["allow"] == allow
    assert isinstance(answer.json["error"], str)


@pytest.mark.parametrize(
    "path",
    [
        *("/v2/models/absent", "/v2/models/absent/ready", "/v2/models//ready", "/v2/models/", "/v2/models/tree/"),
        *("/v2/models/tree/nothing", "/v2/models/tree/versions", "/v2/models/tree/versions//ready", "/v2/x"),
        *("/v2/models/a%20b", "/v2/models/%C3%BC/config", "/v2/models/..%2Ftree", "/v2/models/tree%00", "/v2//"),
        *("/v2/models/%22%3Cscript%3E/stats", "/v2/models/tree/infer/", "/v2/models/" + "n" * 3000),
    ],
)
def test_what_is_not_there_is_404_with_an_error_text(oip, path):
    answer = oip.get(path)
    assert answer.status == 404
    assert set(answer.json) == {"error"}
    assert isinstance(answer.json["error"], str)
    assert len(answer.json["error"]) < 600


BEFORE_ROUTING = {  # refused before a route is looked for, or without one
    "too many bytes": (["Content-Length: 2000000"], b"", 413),
    "too many in chunks": (["Transfer-Encoding: chunked"], b"100000\r\n" + b"a" * 0x100000 + b"\r\n1\r\nb\r\n", 413),
    "a long head": (["X: " + "a" * 20000], b"", 431),
    "many fields": ([f"X-{i}: a" for i in range(200)], b"", 431),
    "an expectation": (["Expect: x", "Content-Length: 2"], b"{}", 417),
    "an expectation without a body": (["Expect: 100-continue", "Content-Length: 2000000"], b"", 413),
    "a coding": (["Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n", 400),
    "a compression": (["Content-Encoding: br", "Content-Length: 2"], b"{}", 415),
    "two hosts": (["Host: b", "Content-Length: 2"], b"{}", 400),
    "no length": ([], b"", 400),
    "two lengths": (["Content-Length: 2", "Content-Length: 3"], b"{}", 400),
    "not HTTP": (["nonsense", "Content-Length: 2"], b"{}", 400),
    "a wrong chunk": (["Transfer-Encoding: chunked"], b"xyz\r\n", 400),
    "a foreign page": (["Origin: http://evil.example", "Content-Length: 2"], b"{}", 403),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_ROUTING)
@pytest.mark.parametrize(
    "path", ["/v2/models/tree/infer", "/v2/nope", "/v2", "http://t/v2/models/tree/infer?a=b", "/%762/x"]
)
def test_what_is_refused_before_routing_is_refused_in_the_protocols_form(oip, name, path):
    fields, body, status = BEFORE_ROUTING[name]
    data = "\r\n".join([f"POST {path} HTTP/1.1", "Host: t", *fields, "", ""]).encode() + body
    answer = oip.ask(data)
    # A path that has no route, or another method, may be told first.
    assert answer.status in ((status,) if "tree/infer" in path else (status, 404, 405)), answer
    assert list(answer.json) == ["error"]
    assert isinstance(answer.json["error"], str)
    own = oip.ask(data.replace(path.encode(), b"/v1/nope"))
    assert set(own.json["error"]) == {"code", "message", "path"}
    beside = oip.ask(data.replace(path.encode(), b"/v2nope"))
    assert set(beside.json["error"]) == {"code", "message", "path"}


def test_a_request_that_never_ends_is_refused_in_the_protocols_form(oip):
    for data in (
        b"POST /v2/models/tree/infer HTTP/1.1\r\nHo",
        b"POST /v2/models/tree/infer HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n{",
    ):
        with oip.wire.Client(oip.process.port) as client:
            client.send(data)
            client.socket.shutdown(1)
            answer = client.read()
        assert (answer.status, list(answer.json), type(answer.json["error"])) == (400, ["error"], str)


def test_the_limit_of_bodies_does_not_bound_binary_tensors(oip):
    """Binary data is read where it lies; JSON of that size is refused, and what triton's client prints is a text."""
    rows = np.resize(ROWS, (120_000, 3)).astype(np.float32)
    with oip.triton(network_timeout=30.0) as client:
        result = client.infer("tree", [tensor("input", rows, "FP32")], model_version="2")
        np.testing.assert_array_equal(
            result.as_numpy(result.get_response()["outputs"][0]["name"]).ravel(), oip.score(rows)
        )
        result = client.infer("tree", [tensor("input", rows, "FP32")], request_compression_algorithm="gzip")
        assert result.get_response()["outputs"][0]["shape"][0] == 120_000
        with pytest.raises(InferenceServerException) as refused:
            client.infer("tree", [tensor("input", rows, "FP32", binary=False)])
        assert isinstance(refused.value.message(), str)
        assert "at most 1048576" in str(refused.value)
    length = ["Inference-Header-Content-Length: 9", "Content-Length: 67108865"]
    head = "\r\n".join(["POST /v2/models/tree/infer HTTP/1.1", "Host: t", *length, "", ""])
    assert oip.ask(head.encode()).status == 413


def test_names_may_be_percent_encoded(oip):
    assert oip.get("/v2/models/one%2Estring/ready").json == {"name": "one.string", "ready": True}
    assert oip.get("/v2/models/%74ree/versions/%31").json["name"] == "tree"
    assert oip.post("/v2/models/%74ree/infer", infer_body()).json["model_name"] == "tree"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/index", b"[]"),
        ("/v2/repository/index", b'{"ready":1}'),
        ("/v2/repository/index", b"\xff"),
        ("/v2/repository/index", b"[" * 100_000),
        ("/v2/repository/models/tree/load", b'{"parameters":[]}'),
        ("/v2/repository/models/tree/load", b'{"parameters":{"file:1/model.json":"YQ=="}}'),
        ("/v2/repository/models/tree/load", b'{"parameters":{"config":"{}","file:1/model.json":"%%"}}'),
        ("/v2/repository/models/tree/load", b'{"parameters":{"config":1}}'),
        ("/v2/repository/models/tree/unload", b'{"parameters":{"unload_dependents":"yes"}}'),
        ("/v2/trace/setting", b"[1]"),
        ("/v2/trace/setting", b'{"trace_rate":"9999999999999999999999"}'),
        ("/v2/trace/setting", b'{"trace_rate":true}'),
        ("/v2/trace/setting", b'{"trace_level":"SOME"}'),
        ("/v2/logging", b'{"log_info":{}}'),
        ("/v2/models/tree/infer", b""),
        ("/v2/models/tree/infer", b"{}"),
        ("/v2/models/tree/infer", b'{"inputs":[]}'),
        ("/v2/models/tree/infer", b"[" * 100_000),
        ("/v2/models/tree/infer", b'{"inputs":[{"name":"input","shape":[4611686018427387904,4],"datatype":"FP32"}]}'),
    ],
)
def test_bad_bodies_are_400_and_change_nothing(oip, path, body):
    before = oip.get("/v2/trace/setting").json, oip.get("/v2/logging").json, oip.get("/v2/models").json
    answer = oip.post(path, body)
    assert answer.status == 400
    assert set(answer.json) == {"error"}
    assert isinstance(answer.json["error"], str)
    assert before == (oip.get("/v2/trace/setting").json, oip.get("/v2/logging").json, oip.get("/v2/models").json)


def test_the_servers_own_paths_stay(oip):
    assert oip.get("/health/live").json == {"live": True}
    assert oip.get("/health/ready").json == {"ready": True}
    assert set(oip.get("/absent").json["error"]) == {"code", "message", "path"}
    assert "/v2/models" in oip.get("/").body.decode()
    for name in ("tree", "lgb"):
        for path in ("", "/ready", "/versions/1", "/versions/1/ready"):
            oip.get(f"/v2/models/{name}{path}")
    lines = oip.get("/metrics").body.decode().splitlines()
    rows = [line.split(" ")[0] for line in lines if line.strip() and line[0] != "#"]
    assert len(rows) == len(set(rows))
    assert 'penstock_http_requests_total{route="infer/tree",code="200"}' in rows


def test_a_load_keeps_nobody_waiting(oip):
    """Requests of another connection are answered while a model loads, and every one of them is accepted."""
    import threading
    import time

    stop, slowest, refused = threading.Event(), 0.0, 0

    def ask():
        nonlocal slowest, refused
        with oip.wire.Client(oip.process.port) as client:
            while not stop.is_set():
                began = time.perf_counter()
                client.send(oip.wire.request("/v2/models/tree/infer", infer_body()))
                refused += client.read().status != 200
                slowest = max(slowest, time.perf_counter() - began)

    asker = threading.Thread(target=ask)
    asker.start()
    for _ in range(5):
        assert oip.post("/v2/repository/models/tree/load").status == 200
    stop.set()
    asker.join()
    assert refused == 0
    assert slowest < 0.5
