"""OIP over gRPC: the messages against Triton's descriptors; calls by tritonclient, KServe's client and bare stubs."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from penstock._ext.flow import Lane
from penstock._ext.infer import InferError, ServedModel
from penstock.errors import PenstockError
from penstock.models.folder import ModelError
from penstock.models.repository import ModelRepository
from penstock.server.grpc_messages import HEALTH, INFERENCE, SERVICES, health, oip
from penstock.server.grpc_server import GrpcServer, start_grpc

DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT8": "i1", "UINT8": "u1", "BOOL": "?", "FP16": "<f2"}
DTYPES |= {"INT16": "<i2", "INT32": "<i4", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"}
StatusCode = grpc.StatusCode


# Messages.


def kinds(message: Any) -> Iterator[Any]:
    yield message
    for nested in message.nested_types:
        yield from kinds(nested)


def shown(field: Any) -> tuple[Any, ...]:
    """All that the wire and a client's code depend on."""
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    packed = field.is_packed if hasattr(field, "is_packed") else None
    return (
        field.name,
        field.number,
        field.type,
        repeated,
        packed,
        field.containing_oneof.name if field.containing_oneof else None,
        field.message_type.full_name if field.message_type else None,
        field.enum_type.full_name if field.enum_type else None,
        field.has_presence,
    )


# Parts of a model's configuration that we never tell, and clients do not ask for.
PARTIAL = {"ModelInput", "ModelOutput", "ModelInstanceGroup", "ModelConfig", "ModelDynamicBatching"}
MESSAGES = [kind for top in oip.DESCRIPTOR.message_types_by_name.values() for kind in kinds(top)]


@pytest.mark.parametrize("ours", MESSAGES, ids=lambda kind: kind.full_name)
def test_every_message_is_tritons(ours: Any) -> None:
    theirs = service_pb2.DESCRIPTOR.pool.FindMessageTypeByName(ours.full_name)
    assert ours.GetOptions().map_entry == theirs.GetOptions().map_entry
    for field in ours.fields:
        assert shown(field) == shown(theirs.fields_by_number[field.number])
    if ours.full_name.removeprefix("inference.") not in PARTIAL:
        assert len(ours.fields) == len(theirs.fields)
        assert [one.name for one in ours.oneofs] == [one.name for one in theirs.oneofs]
    for enum in ours.enum_types:
        assert enum_values(enum) == enum_values(theirs.enum_types_by_name[enum.name])


def enum_values(enum: Any) -> list[tuple[str, int]]:
    return [(value.name, value.number) for value in enum.values]


def test_every_message_and_method_of_triton_is_there() -> None:
    ours = {kind.full_name for kind in MESSAGES}
    for top in service_pb2.DESCRIPTOR.message_types_by_name.values():
        assert {kind.full_name for kind in kinds(top)} <= ours
    assert enum_values(oip.DataType) == enum_values(
        service_pb2.DESCRIPTOR.pool.FindEnumTypeByName("inference.DataType")
    )
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {m.name: (m.input_type.name, m.output_type.name) for m in service.methods} == SERVICES[INFERENCE]
    assert [m.name for m in service.methods if m.server_streaming or m.client_streaming] == ["ModelStreamInfer"]


def test_what_we_write_triton_reads_alike() -> None:
    request = oip.ModelInferRequest(model_name="m", id="é", raw_input_contents=[b"\0\1", b""])
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[2, -1])
    tensor.contents.bytes_contents.append(b"\xff")
    tensor.parameters["p"].double_param = 0.5
    request.parameters["timeout"].uint64_param = 2**64 - 1
    theirs = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.SerializeToString(deterministic=True) == request.SerializeToString(deterministic=True)
    assert oip.ModelInferRequest.FromString(theirs.SerializeToString()) == request


def test_health_messages() -> None:
    status = health.HealthCheckResponse.DESCRIPTOR.enum_types_by_name["ServingStatus"]
    assert enum_values(status) == [("UNKNOWN", 0), ("SERVING", 1), ("NOT_SERVING", 2), ("SERVICE_UNKNOWN", 3)]
    assert health.HealthCheckResponse(status="SERVING").SerializeToString() == b"\x08\x01"
    assert health.HealthCheckRequest(service="ab").SerializeToString() == b"\x0a\x02ab"


# A server of models that the tests can look into.


class FakeModel:
    """The surface of ServedModel. Doubles its input; waits, fails and counts as told."""

    platform = "penstock_trees"
    batched = True
    nbytes = 1000
    version = "3"

    def __init__(self, name: str, datatype: str = "FP32", *, row_ns: int = 2000, seconds: float = 0.0) -> None:
        self.name = name
        self.inputs = (SimpleNamespace(name="input", datatype=datatype, shape=(-1, 2)),)
        self.outputs = (SimpleNamespace(name="score", datatype=datatype, shape=(-1, 2)),)
        self.row_ns = row_ns
        self.seconds = seconds
        self.fails: Exception | None = None
        self.calls: list[Any] = []
        self.threads: set[str] = set()
        self.gate: threading.Event | None = None

    def infer(self, inputs: Any, outputs: Any = None) -> Any:
        self.threads.add(threading.current_thread().name)
        self.calls.append((inputs, outputs))
        del self.calls[:-100]
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.seconds:
            time.sleep(self.seconds)
        if self.fails is not None:
            raise self.fails
        if outputs not in (None, ["score"]):
            raise InferError(400, f"outputs[0]: no {outputs[0]!r}; have score")
        (name, datatype, shape, data), *_ = inputs
        if name != "input":
            raise InferError(400, f"inputs[0].name: no {name!r}; have input")
        if datatype == "BYTES":
            return [("score", datatype, shape, data)]
        dtype = DTYPES[datatype]
        values = np.frombuffer(data, dtype)
        if values.size != np.prod(shape):
            raise InferError(400, f"inputs[0]: expected {np.prod(shape)} values, got {values.size}")
        doubled = values if datatype == "BOOL" else values * np.array(2, dtype)
        return [("score", datatype, shape, doubled.astype(dtype).tobytes())]

    def stats(self) -> dict[str, Any]:
        zero = {"count": 0, "ns": 0}
        kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit")
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": 1_700_000_000_123,
            "inference_count": 7,
            "execution_count": 5,
            "inference_stats": {kind: {"count": 5, "ns": 50} for kind in kinds} | {"cache_miss": zero},
            "response_stats": {},
            "batch_stats": [{"batch_size": 1, "compute_input": zero, "compute_infer": zero, "compute_output": zero}],
            "memory_usage": [{"type": "CPU", "id": 0, "byte_size": self.nbytes}],
        }


class FakeRepository:
    """The surface of ModelRepository."""

    def __init__(self) -> None:
        self.targets: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.table = self

    def add(self, model: Any, **limits: Any) -> Any:
        lane = Lane(model.name, row_ns=model.row_ns, **limits)
        self.targets[model.name] = SimpleNamespace(name=model.name, version="", model=model, lane=lane)
        return model

    def target(self, name: str, version: str = "") -> Any:
        return self.targets.get(name) if version in ("", "3") else None

    def model(self, name: str, version: str = "") -> Any:
        target = self.target(name, version)
        return None if target is None else target.model

    def versions(self, name: str) -> list[str]:
        return ["3"] if name in self.targets else []

    def version_policy(self, name: str) -> dict[str, Any]:
        return {"all": {}}

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        return [
            {
                "name": name,
                "version": "3",
                "state": "READY" if target.model else "UNAVAILABLE",
                "reason": "" if target.model else "unloaded",
            }
            for name, target in self.targets.items()
            if target.model or not ready
        ]

    async def load(self, name: str, config: Any = None, files: Any = None) -> None:
        self.asked.append(("load", name, config, files))
        if name == "broken":
            raise ModelError("model broken: expected one of model.onnx, found nothing")
        if name == "polled":
            raise PenstockError("models are loaded by polling; start with --models-control explicit")

    async def unload(self, name: str) -> None:
        self.asked.append(("unload", name))
        self.targets[name].model = None


class Running:
    """A gRPC server on a uvloop in a thread of its own."""

    def __init__(self, repository: Any = None, **settings: Any) -> None:
        self.repository = FakeRepository() if repository is None else repository
        self.state = {"ready": True}
        self.grace = 0.5
        self.settings = {"host": "127.0.0.1", "port": 0, "max_message": 1 << 20, "threads": 2, **settings}
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        import uvloop

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        finally:
            self.started.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.server: GrpcServer = await start_grpc(self.repository, state=self.state, **self.settings)
        self.address = f"127.0.0.1:{self.server.port}"
        self.started.set()
        await self.stop.wait()
        await self.server.stop(self.grace)

    def __enter__(self) -> Running:
        self.thread.start()
        assert self.started.wait(10)
        assert self.thread.is_alive()
        self.channel = grpc.insecure_channel(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(20)
        assert not self.thread.is_alive()

    def call(self, name: str, timeout: float | None = 5.0, path: str = INFERENCE, **fields: Any) -> Any:
        """One unary call with our own messages."""
        messages = oip if path == INFERENCE else health
        request, answer = SERVICES[path][name]
        return self.send(name, getattr(messages, request)(**fields), timeout, path, getattr(messages, answer))

    def send(
        self, name: str, request: Any, timeout: float | None = 5.0, path: str = INFERENCE, answer: Any = None
    ) -> Any:
        ask = self.channel.unary_unary(
            f"/{path}/{name}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=(answer or oip.ModelInferResponse).FromString,
        )
        return ask(request, timeout=timeout)

    def refused(self, code: Any, call: Callable[[], Any]) -> str:
        """The details of the status that this call ends with."""
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == code, caught.value.details()
        return str(caught.value.details())

    def idle(self) -> None:
        """Wait until no call is under way, and nothing runs."""
        for _ in range(500):
            if self.server.open_calls == 0 and self.server._service.pool.running == 0:
                return
            time.sleep(0.01)
        raise AssertionError((self.server.open_calls, self.server._service.pool.running))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running() as server:
        for datatype in ("FP32", "FP64", "INT8", "UINT8", "INT16", "INT64", "UINT64", "BOOL", "FP16", "BYTES"):
            server.repository.add(FakeModel(datatype.lower(), datatype))
        server.repository.add(FakeModel("gone")).name = "gone"
        server.repository.targets["gone"].model = None
        yield server


def raw_request(model: str = "fp32", values: Any = ((1.0, 2.0),), datatype: str = "FP32", **fields: Any) -> Any:
    array = np.array(values, DTYPES[datatype])
    request = oip.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="input", datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def triton_input(values: Any, datatype: str = "FP32", name: str = "input") -> Any:
    array = np.array(values, DTYPES[datatype])
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


# Clients of others.


def test_tritonclient(running: Running) -> None:
    with triton.InferenceServerClient(running.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("fp32")
        assert client.is_model_ready("fp32", "3")
        assert not client.is_model_ready("fp32", "4")
        assert not client.is_model_ready("none")
        assert not client.is_model_ready("gone")
        assert client.get_server_metadata(as_json=True)["name"] == "penstock"
        metadata = client.get_model_metadata("fp32", as_json=True)
        assert metadata == {
            "name": "fp32",
            "versions": ["3"],
            "platform": "penstock_trees",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": ["-1", "2"]}],
            "outputs": [{"name": "score", "datatype": "FP32", "shape": ["-1", "2"]}],
        }
        config = client.get_model_config("fp32").config
        assert (config.name, config.backend, config.max_batch_size) == ("fp32", "penstock", 4096)
        assert config.input[0].data_type == 11
        assert list(config.input[0].dims) == [2]
        assert config.dynamic_batching.default_queue_policy.allow_timeout_override
        result = client.infer("fp32", [triton_input([[1, 2], [3, 4.5]])], request_id="a/1")
        assert result.as_numpy("score").tolist() == [[2, 4], [6, 9]]
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("a/1", "fp32", "3")
        assert len(response.raw_output_contents) == 1
        assert not response.outputs[0].HasField("contents")
        wanted = [triton.InferRequestedOutput("score")]
        result = client.infer("fp64", [triton_input([[0.1, 2]], "FP64")], outputs=wanted, timeout=1_000_000, priority=1)
        assert result.as_numpy("score").tolist() == [[0.2, 4.0]]
        assert running.repository.targets["fp64"].model.calls[-1][1] == ["score"]
        result = client.infer("fp16", [triton_input([[0.5, 2]], "FP16")])
        assert result.as_numpy("score").tolist() == [[1.0, 4.0]]
        texts = triton.InferInput("input", [1, 2], "BYTES")
        texts.set_data_from_numpy(np.array([["é".encode(), b""]], object))
        assert client.infer("bytes", [texts]).as_numpy("score").tolist() == [["é".encode(), b""]]


def test_tritonclient_statistics_and_repository(running: Running) -> None:
    with triton.InferenceServerClient(running.address) as client:
        (stats,) = client.get_inference_statistics("fp32").model_stats
        assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("fp32", "3", 7, 5)
        assert stats.last_inference == 1_700_000_000_123
        assert (stats.inference_stats.queue.count, stats.inference_stats.queue.ns) == (5, 50)
        assert stats.memory_usage[0].byte_size == 1000
        assert len(client.get_inference_statistics().model_stats) == len(running.repository.targets) - 1
        index = {model.name: model.state for model in client.get_model_repository_index().models}
        assert index["fp32"] == "READY"
        assert index["gone"] == "UNAVAILABLE"
        running.repository.add(FakeModel("extra"))
        client.load_model("extra", config="{}", files={"file:1/model.txt": b"\0tree"})
        assert running.repository.asked[-1] == ("load", "extra", "{}", {"1/model.txt": b"\0tree"})
        client.load_model("extra")
        assert running.repository.asked[-1] == ("load", "extra", None, None)
        client.unload_model("extra")
        assert not client.is_model_ready("extra")
        del running.repository.targets["extra"]


def test_tritonclient_settings_and_shared_memory(running: Running) -> None:
    with triton.InferenceServerClient(running.address) as client:
        assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
        settings = client.update_trace_settings("fp32", {"trace_rate": "5"}).settings
        assert settings["trace_rate"].value == ["5"]
        assert client.update_trace_settings("fp32", {"trace_rate": None}).settings["trace_rate"].value == ["1000"]
        with pytest.raises(InferenceServerException, match="without a trace file") as caught:
            client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
        assert client.get_log_settings().settings["log_info"].bool_param
        assert not client.update_log_settings({"log_info": False}).settings["log_info"].bool_param
        client.update_log_settings({"log_info": True})
        with pytest.raises(InferenceServerException, match="log_format: expected default or ISO8601"):
            client.update_log_settings({"log_format": "xml"})
        assert not client.get_system_shared_memory_status().regions
        assert not client.get_cuda_shared_memory_status().regions
        with pytest.raises(InferenceServerException, match="shared memory is not supported") as caught:
            client.register_system_shared_memory("r", "/r", 8)
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
        with pytest.raises(InferenceServerException, match="none is registered"):
            client.get_system_shared_memory_status("r")
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        held = triton.InferInput("input", [1, 2], "FP32")
        held.set_shared_memory("r", 8)
        with pytest.raises(InferenceServerException, match="shared memory is not supported"):
            client.infer("fp32", [held])


def test_tritonclient_aio(running: Running) -> None:
    import tritonclient.grpc.aio as aio

    async def main() -> None:
        async with aio.InferenceServerClient(running.address) as client:
            assert await client.is_server_ready()
            inputs = [triton_input([[i, 0]]) for i in range(64)]
            results = await asyncio.gather(*(client.infer("fp32", [one]) for one in inputs))
            assert [result.as_numpy("score")[0, 0] for result in results] == [2 * i for i in range(64)]

            async def requests() -> Any:
                for i in range(5):
                    name = "fp32" if i != 3 else "none"
                    yield {"model_name": name, "inputs": [triton_input([[i, 0]])], "request_id": str(i)}

            seen = []
            async for result, error in client.stream_infer(requests()):
                seen.append(result.as_numpy("score")[0, 0] if error is None else error.message())
            assert seen[:3] == [0, 2, 4]
            assert "no model 'none'" in seen[3]
            assert seen[4] == 8

    asyncio.run(main())


def test_tritonclient_stream(running: Running) -> None:
    with triton.InferenceServerClient(running.address) as client:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(20):
            client.async_stream_infer("fp32", [triton_input([[i, 1]])], request_id=str(i))
        for i in range(20):
            result, error = answers.get(timeout=5)
            assert error is None
            assert result.get_response().id == str(i)
            assert result.as_numpy("score")[0, 0] == 2 * i
        client.async_stream_infer("fp32", [triton_input([[1, 1]], name="other")])
        result, error = answers.get(timeout=5)
        assert error.message() == "inputs[0].name: no 'other'; have input"
        client.async_stream_infer("fp32", [triton_input([[5, 1]])], enable_empty_final_response=True)
        result, error = answers.get(timeout=5)
        assert result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
        # What Triton calls strict mode: an error ends the stream, with its status.
        client.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
        client.async_stream_infer("none", [triton_input([[1, 1]])])
        result, error = answers.get(timeout=5)
        assert error.status() == "StatusCode.NOT_FOUND"
        client.stop_stream()
    running.idle()


KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

async def main():
    client = InferenceGRPCClient(url=sys.argv[1], retries=0)
    assert await client.is_server_live() and await client.is_server_ready()
    assert await client.is_model_ready("fp32") and not await client.is_model_ready("none")
    typed = InferInput(name="input", datatype="FP32", shape=[2, 2], data=[1.0, 2.0, 3.0, 4.5])
    answer = await client.infer(InferRequest(model_name="fp32", request_id="r1", infer_inputs=[typed]))
    assert answer.id == "r1" and answer.outputs[0].as_numpy().tolist() == [[2, 4], [6, 9]], answer
    raw = InferInput(name="input", datatype="FP16", shape=[1, 2])
    raw.set_data_from_numpy(np.array([[0.5, 2]], np.float16), binary_data=True)
    answer = await client.infer(InferRequest(model_name="fp16", infer_inputs=[raw]))
    assert answer.outputs[0].as_numpy().tolist() == [[1, 4]], answer
    await client.close()

asyncio.run(main())
print("fine")
"""


def test_kserve_client(running: Running) -> None:
    # In a process of its own: its generated module has the names of tritonclient's.
    python = Path(sys.prefix) / "kserve" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"kserve is not installed at {python}: it needs a pandas of its own, so an environment of its own")
    done = subprocess.run([python, "-c", KSERVE, running.address], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr


# Typed contents.


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("FP32", "fp32_contents", [0.5, -3.25]),
        ("FP64", "fp64_contents", [0.1, 1e300]),
        ("INT8", "int_contents", [-64, 63]),
        ("UINT8", "uint_contents", [0, 127]),
        ("INT16", "int_contents", [-16384, 16383]),
        ("INT64", "int64_contents", [-(2**62), 2**62 - 1]),
        ("UINT64", "uint64_contents", [0, 2**63 - 1]),
        ("BOOL", "bool_contents", [True, False]),
        ("BYTES", "bytes_contents", [b"\xff\0", b""]),
    ],
)
def test_typed_contents_are_answered_raw(running: Running, datatype: str, field: str, values: list[Any]) -> None:
    request = oip.ModelInferRequest(model_name=datatype.lower())
    getattr(request.inputs.add(name="input", datatype=datatype, shape=[1, 2]).contents, field).extend(values)
    answer = running.send("ModelInfer", request)
    # As Triton and OpenVINO answer whatever came: published clients read nothing else.
    assert not answer.outputs[0].HasField("contents")
    (raw,) = answer.raw_output_contents
    if datatype == "BYTES":
        assert raw == b"\x02\0\0\0\xff\0" + b"\0\0\0\0"
        return
    kind = np.dtype(triton_to_np_dtype(datatype))
    assert np.frombuffer(raw, kind).tolist() == (values if datatype == "BOOL" else [2 * value for value in values])


def test_an_empty_typed_tensor(running: Running) -> None:
    request = oip.ModelInferRequest(model_name="fp32")
    request.inputs.add(name="input", datatype="FP32", shape=[0, 2])
    answer = running.send("ModelInfer", request)
    assert (list(answer.outputs[0].shape), list(answer.raw_output_contents)) == ([0, 2], [b""])


def test_typed_contents_refused(running: Running) -> None:
    def ask(datatype: str, field: str, values: list[Any], shape: tuple[int, ...] = (1, 2), model: str = "fp32") -> str:
        request = oip.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="input", datatype=datatype, shape=shape)
        if field:
            getattr(tensor.contents, field).extend(values)
        return running.refused(StatusCode.INVALID_ARGUMENT, lambda: running.send("ModelInfer", request))

    assert ask("FP32", "fp64_contents", [1, 2]) == (
        "inputs[0] 'input'.contents: FP32 stands in fp32_contents, got fp64_contents"
    )
    assert ask("FP32", "fp32_contents", [1]) == ("inputs[0] 'input'.contents: expected 2 values for its shape, got 1")
    assert ask("INT8", "int_contents", [1, 128]) == "inputs[0] 'input'.contents.int_contents[1]: expected INT8, got 128"
    assert ask("UINT16", "uint_contents", [65536, 0]) == (
        "inputs[0] 'input'.contents.uint_contents[0]: expected UINT16, got 65536"
    )
    for datatype in ("FP16", "BF16"):
        assert ask(datatype, "fp32_contents", [1, 2]) == (
            f"inputs[0] 'input': {datatype} has no typed contents; send raw_input_contents"
        )
    assert "expected one of BOOL, INT8" in ask("DOUBLE", "fp64_contents", [1, 2])
    assert "expected 2 values" in ask("FP32", "", [])


def test_raw_and_typed_are_not_mixed(running: Running) -> None:
    request = raw_request()
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    details = running.refused(StatusCode.INVALID_ARGUMENT, lambda: running.send("ModelInfer", request))
    assert details == "inputs[0] 'input': contents beside raw_input_contents; send one of them"
    request = raw_request()
    request.inputs.add(name="more", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    details = running.refused(StatusCode.INVALID_ARGUMENT, lambda: running.send("ModelInfer", request))
    assert details == "raw_input_contents: expected one per input, 2, got 1"


# Errors.


def test_errors(running: Running) -> None:
    def ask(code: Any, request: Any, method: str = "ModelInfer") -> str:
        return running.refused(code, lambda: running.send(method, request))

    missing = ask(StatusCode.NOT_FOUND, raw_request("none"))
    assert missing.startswith("no model 'none'; have ")
    assert ask(StatusCode.NOT_FOUND, raw_request(model_version="9")) == "model fp32 has no version '9'; have 3"
    assert ask(StatusCode.UNAVAILABLE, raw_request("gone")).startswith("model 'gone' is not loaded")
    request = raw_request()
    request.outputs.add(name="nothing")
    assert ask(StatusCode.INVALID_ARGUMENT, request) == "outputs[0]: no 'nothing'; have score"
    request.outputs[0].name = "score"
    request.outputs[0].parameters["classification"].int64_param = 2
    assert "classification is not supported" in ask(StatusCode.UNIMPLEMENTED, request)
    assert "that are not a message inference.ModelInferRequest" in ask(StatusCode.INVALID_ARGUMENT, b"\xff\xff\xff")
    for name in ("timeout", "priority"):
        request = raw_request()
        request.parameters[name].string_param = "soon"
        assert f"parameters.{name}: expected" in ask(StatusCode.INVALID_ARGUMENT, request)
        request.parameters[name].int64_param = -1
        assert "int64_param: -1" in ask(StatusCode.INVALID_ARGUMENT, request)
    # A shape is what a client says.
    request = raw_request()
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend([2**62, 2])
    assert "values" in ask(StatusCode.INVALID_ARGUMENT, request)
    for name in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        kind = getattr(oip, f"{name}Request")
        assert ask(StatusCode.NOT_FOUND, kind(name="none"), name).startswith("no model 'none'")
        assert "has no version '8'" in ask(StatusCode.NOT_FOUND, kind(name="fp32", version="8"), name)
    with pytest.raises(grpc.RpcError) as caught:
        running.send("NoSuchMethod", b"")
    assert caught.value.code() == StatusCode.UNIMPLEMENTED


def test_errors_of_the_model(running: Running, capfd: Any) -> None:
    model = running.repository.targets["fp32"].model
    try:
        model.fails = InferError(500, "model fp32 failed: boom")
        assert running.refused(StatusCode.INTERNAL, lambda: running.send("ModelInfer", raw_request())) == str(
            model.fails
        )
        model.fails = ZeroDivisionError("oops")
        details = running.refused(StatusCode.INTERNAL, lambda: running.send("ModelInfer", raw_request()))
        assert details == "internal error: ZeroDivisionError: oops"
        assert "ZeroDivisionError: oops" in capfd.readouterr().err
    finally:
        model.fails = None
    assert running.send("ModelInfer", raw_request()).model_name == "fp32"


def test_errors_of_the_repository(running: Running) -> None:
    def ask(code: Any, method: str, **fields: Any) -> str:
        return running.refused(code, lambda: running.call(method, **fields))

    assert ask(StatusCode.NOT_FOUND, "RepositoryModelLoad", model_name="none").startswith("no model 'none'")
    assert ask(StatusCode.NOT_FOUND, "RepositoryModelUnload", model_name="none").startswith("no model 'none'")
    for name in ("broken", "polled"):
        running.repository.add(FakeModel(name))
    assert "expected one of model.onnx" in ask(StatusCode.INVALID_ARGUMENT, "RepositoryModelLoad", model_name="broken")
    assert "explicit" in ask(StatusCode.UNAVAILABLE, "RepositoryModelLoad", model_name="polled")
    for name in ("broken", "polled"):
        del running.repository.targets[name]
    parameter = oip.ModelRepositoryParameter
    for parameters, expected in (
        ({"file:1/model.txt": parameter(bytes_param=b"x")}, "'file:' needs 'config'"),
        ({"config": parameter(int64_param=1)}, "parameters.config: expected"),
        ({"config": parameter(string_param="{}"), "file:a": parameter(string_param="x")}, "expected bytes"),
    ):
        details = ask(StatusCode.INVALID_ARGUMENT, "RepositoryModelLoad", model_name="fp32", parameters=parameters)
        assert expected in details
    parameters = {"unload_dependents": parameter(string_param="x")}
    details = ask(StatusCode.INVALID_ARGUMENT, "RepositoryModelUnload", model_name="fp32", parameters=parameters)
    assert "true or false" in details


def test_health_and_readiness(running: Running) -> None:
    assert running.call("Check", path=HEALTH).status == 1
    assert running.call("Check", path=HEALTH, service=INFERENCE).status == 1
    assert running.call("ServerReady").ready
    assert "no 'other'" in running.refused(
        StatusCode.NOT_FOUND, lambda: running.call("Check", path=HEALTH, service="other")
    )
    running.state["ready"] = False
    try:
        assert running.call("Check", path=HEALTH).status == 2
        assert not running.call("ServerReady").ready
        assert running.call("ServerLive").live
    finally:
        running.state["ready"] = True


def test_a_request_that_is_too_large(running: Running) -> None:
    fits = raw_request(values=np.zeros((100_000, 2)).tolist())
    assert running.send("ModelInfer", fits).outputs[0].shape[0] == 100_000
    large = raw_request(values=np.zeros((140_000, 2)).tolist())
    assert "larger than max" in running.refused(
        StatusCode.RESOURCE_EXHAUSTED, lambda: running.send("ModelInfer", large)
    )


def test_answers_are_counted(running: Running) -> None:
    before = running.server.counts.copy()
    running.send("ModelInfer", raw_request())
    running.refused(StatusCode.NOT_FOUND, lambda: running.send("ModelInfer", raw_request("none")))
    counted = running.server.counts - before
    assert counted == {("ModelInfer", "OK"): 1, ("ModelInfer", "NOT_FOUND"): 1}


def test_the_port_is_ours_alone(running: Running) -> None:
    async def second() -> None:
        settings = running.settings | {"port": running.server.port}
        await start_grpc(running.repository, state=running.state, **settings)

    with pytest.raises(PenstockError, match=r"gRPC cannot listen on 127\.0\.0\.1:\d+; --grpc-port 0 takes a free one"):
        asyncio.run(second())


def test_without_the_extra() -> None:
    code = """
        import sys
        sys.modules["grpc"] = None
        import penstock.server, penstock.server.lifecycle
        try:
            import penstock.server.grpc_server
        except penstock.errors.PenstockError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.startswith("gRPC needs grpcio and protobuf: pip install 'penstock[grpc]'"), done.stderr


def test_the_server_imports_no_grpc_by_itself() -> None:
    code = "import sys, penstock.server.lifecycle, penstock.server.routes; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# Long models: threads, deadlines, limits, cancellation.


@pytest.fixture
def slow() -> Iterator[Running]:
    with Running(threads=1) as server:
        server.repository.add(FakeModel("slow", row_ns=50_000_000, seconds=0.05), max_rows=3)
        server.repository.add(FakeModel("fp32"))
        yield server
        model = server.repository.targets["slow"].model
        if model.gate is not None:
            model.gate.set()
        server.idle()


def futures(server: Running, n: int, **fields: Any) -> list[Any]:
    ask = server.channel.unary_unary(f"/{INFERENCE}/ModelInfer", None, oip.ModelInferResponse.FromString)
    return [ask.future(raw_request("slow", [[i, 0]], **fields).SerializeToString(), timeout=10) for i in range(n)]


def waits(server: Running, rows: int) -> None:
    """Until this many rows wait for a thread."""
    pool = server.server._service.pool
    for _ in range(500):
        if pool.running and pool.waiting["slow"] == rows:
            return
        time.sleep(0.01)
    raise AssertionError((pool.running, pool.waiting))


def test_a_long_model_does_not_hold_the_loop(slow: Running) -> None:
    model = slow.repository.targets["slow"].model
    model.gate = threading.Event()
    first, *_ = futures(slow, 1)
    waits(slow, 0)
    for _ in range(20):
        assert slow.send("ModelInfer", raw_request()).model_name == "fp32"
    assert not first.done()
    model.gate.set()
    assert first.result().model_name == "slow"
    assert {name.partition("_")[0] for name in model.threads} == {"penstock-grpc"}
    assert slow.repository.targets["fp32"].model.threads == {slow.thread.name}


def test_the_queue_has_an_end(slow: Running) -> None:
    model = slow.repository.targets["slow"].model
    model.gate = threading.Event()
    asked = futures(slow, 1)
    waits(slow, 0)
    asked += futures(slow, 3)
    waits(slow, 3)
    details = slow.refused(StatusCode.UNAVAILABLE, lambda: slow.send("ModelInfer", raw_request("slow")))
    assert details == "model slow: the queue is full: 3 rows wait, and it holds 3; retry later"
    model.gate.set()
    assert [future.result().outputs[0].shape[0] for future in asked] == [1, 1, 1, 1]


def test_priority(slow: Running) -> None:
    model = slow.repository.targets["slow"].model
    model.gate = threading.Event()
    asked = futures(slow, 1)
    waits(slow, 0)
    for level in (5, 0, 1):
        request = raw_request("slow", [[level, 0]])
        request.parameters["priority"].uint64_param = level
        ask = slow.channel.unary_unary(f"/{INFERENCE}/ModelInfer", None, oip.ModelInferResponse.FromString)
        asked.append(ask.future(request.SerializeToString(), timeout=10))
        waits(slow, len(asked) - 1)
    model.gate.set()
    for future in asked:
        future.result()
    order = [np.frombuffer(inputs[0][3], "<f4")[0] for inputs, _ in model.calls]
    assert order == [0, 1, 0, 5]  # the one that ran, then 1, then 0 (which means 4), then 5


def test_deadlines(slow: Running) -> None:
    # Known when it comes: the model takes 50 ms a row.
    details = slow.refused(StatusCode.DEADLINE_EXCEEDED, lambda: slow.send("ModelInfer", raw_request("slow"), 0.03))
    model = slow.repository.targets["slow"].model
    request = raw_request("slow")
    request.parameters["timeout"].int64_param = 30_000
    details = slow.refused(StatusCode.DEADLINE_EXCEEDED, lambda: slow.send("ModelInfer", request))
    assert details.startswith("model slow: it could not be answered by its deadline: it waited")
    assert "needs another 50.0 ms" in details
    assert model.calls == []
    request.parameters["timeout"].int64_param = 300_000
    assert slow.send("ModelInfer", request).model_name == "slow"
    # Found when it is taken: what stood before it took longer than was thought.
    model.gate = threading.Event()
    first, *_ = futures(slow, 1)
    waits(slow, 0)
    late = slow.channel.unary_unary(f"/{INFERENCE}/ModelInfer", None, oip.ModelInferResponse.FromString).future(
        request.SerializeToString(), timeout=10
    )
    waits(slow, 1)
    calls = len(model.calls)
    time.sleep(0.35)
    model.gate.set()
    assert first.result().model_name == "slow"
    assert late.exception().code() == StatusCode.DEADLINE_EXCEEDED
    assert "its time has run out" in late.exception().details()
    assert len(model.calls) == calls


def test_the_lanes_timeouts() -> None:
    with Running(threads=1) as server:
        server.repository.add(FakeModel("slow", row_ns=50_000_000), default_timeout=0.02, max_timeout=0.2)
        server.refused(StatusCode.DEADLINE_EXCEEDED, lambda: server.send("ModelInfer", raw_request("slow")))
        request = raw_request("slow")
        request.parameters["timeout"].int64_param = 100_000
        assert server.send("ModelInfer", request).model_name == "slow"
        request = raw_request("slow", [[1, 2]] * 6)
        request.parameters["timeout"].int64_param = 10_000_000  # no more than the lane's maximum
        server.refused(StatusCode.DEADLINE_EXCEEDED, lambda: server.send("ModelInfer", request))


def test_a_client_that_leaves(slow: Running) -> None:
    model = slow.repository.targets["slow"].model
    model.gate = threading.Event()
    asked = []
    for rows in range(3):
        asked += futures(slow, 1)
        waits(slow, rows)
    first, second, third = asked
    second.cancel()
    waits(slow, 1)
    first.cancel()
    time.sleep(0.1)
    assert slow.server._service.pool.running == 1  # the thread is still at it
    model.gate.set()
    assert third.result().model_name == "slow"
    slow.idle()
    assert len(model.calls) == 2
    assert slow.server._service.pool.waiting["slow"] == 0


def test_too_many_calls() -> None:
    with Running(threads=1, max_calls=4) as server:
        model = server.repository.add(FakeModel("slow", row_ns=50_000_000))
        server.repository.add(FakeModel("fp32"))
        model.gate = threading.Event()
        held = futures(server, 4)
        waits(server, 3)
        details = server.refused(StatusCode.UNAVAILABLE, lambda: server.send("ModelInfer", raw_request()))
        assert details == "overloaded: 4 calls are under way; retry later"
        stream = server.channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
        server.refused(StatusCode.UNAVAILABLE, lambda: list(stream(iter([b""]), timeout=5)))
        model.gate.set()
        for future in held:
            future.result()
        server.idle()
        assert server.send("ModelInfer", raw_request()).model_name == "fp32"


def test_stop_answers_what_is_under_way() -> None:
    with Running(threads=1) as server:
        server.repository.add(FakeModel("slow", row_ns=50_000_000, seconds=0.2))
        asked, *_ = futures(server, 1)
        waits(server, 0)
        server.loop.call_soon_threadsafe(server.stop.set)
        assert asked.result().model_name == "slow"
        server.thread.join(5)
        assert server.refused(StatusCode.UNAVAILABLE, lambda: server.call("ServerLive"))


def test_stop_does_not_wait_for_an_idle_stream() -> None:
    with Running() as server:
        server.repository.add(FakeModel("fp32"))
        held = threading.Event()

        def requests() -> Iterator[bytes]:
            yield raw_request().SerializeToString()
            held.wait(10)

        stream = server.channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")(requests())
        assert next(stream)
        began = time.monotonic()
        server.grace = 8.0
        server.loop.call_soon_threadsafe(server.stop.set)
        server.thread.join(10)
        assert 0.4 < time.monotonic() - began < 4
        held.set()
        with pytest.raises(grpc.RpcError):
            next(stream)


# Real models.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    """A model folder: trees of 30 features in two versions, and `pair` with one."""
    import lightgbm

    root = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(7)
    rows = random.normal(size=(800, 30))
    for name, version, trees in (("trees", "1", 5), ("trees", "2", 100), ("pair", "1", 2)):
        data = lightgbm.Dataset(rows, rows[:, 0] * rows[:, 1] > 0)
        booster = lightgbm.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, data, trees)
        (root / name / version).mkdir(parents=True)
        booster.save_model(root / name / version / "model.txt")
    return root


@pytest.fixture(scope="module")
def real(folder: Any) -> Iterator[Running]:
    repository = ModelRepository(folder, control="explicit", names=["trees", "pair"], lane=Lane)
    repository.start()
    with Running(repository) as server:
        yield server
        asyncio.run_coroutine_threadsafe(repository.close(), server.loop).result(10)


def test_trees_answer_as_their_library_does(real: Running, folder: Any) -> None:
    import lightgbm

    rows = np.random.default_rng(8).normal(size=(50, 30))
    with triton.InferenceServerClient(real.address) as client:
        metadata = client.get_model_metadata("trees")
        assert list(metadata.versions) == ["1", "2"]
        for version, wanted in (("", "2"), ("1", "1"), ("2", "2")):
            booster = lightgbm.Booster(model_file=folder / "trees" / wanted / "model.txt")
            tensor = triton_input(rows, "FP64", metadata.inputs[0].name)
            result = client.infer("trees", [tensor], model_version=version)
            assert result.get_response().model_version == wanted
            scores = result.as_numpy(metadata.outputs[0].name)
            assert scores.ravel().tolist() == booster.predict(rows).tolist()
        stats = client.get_inference_statistics("trees", "1").model_stats[0]
        assert (stats.inference_count, stats.execution_count, stats.inference_stats.success.count) == (50, 1, 1)
        assert stats.inference_stats.compute_infer.ns > 0
        assert stats.batch_stats[0].batch_size == 50
        config = client.get_model_config("trees").config
        assert (config.platform, list(config.input[0].dims)) == ("penstock_trees", [30])
        # Values of our own stubs, typed.
        request = oip.ModelInferRequest(model_name="trees", model_version="1")
        tensor = request.inputs.add(name=metadata.inputs[0].name, datatype="FP64", shape=[50, 30])
        tensor.contents.fp64_contents.extend(rows.ravel().tolist())
        answer = real.send("ModelInfer", request)
        booster = lightgbm.Booster(model_file=folder / "trees" / "1" / "model.txt")
        assert np.frombuffer(answer.raw_output_contents[0]).tolist() == booster.predict(rows).tolist()


def test_onnx_graphs(tmp_path: Any) -> None:
    """FP16 and texts go through as they are."""
    import onnx
    from onnx import TensorProto, helper

    with Running() as server, triton.InferenceServerClient(server.address) as client:
        for name, kind, operator in (("half", TensorProto.FLOAT16, "Neg"), ("text", TensorProto.STRING, "Identity")):
            ports = [helper.make_tensor_value_info(port, kind, ["rows", 2]) for port in "xy"]
            graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], name, ports[:1], ports[1:])
            path = tmp_path / f"{name}.onnx"
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
            server.repository.add(ServedModel(name, "3", None, path=path))
        result = client.infer("half", [triton_input([[0.5, -2]], "FP16", "x")])
        assert result.as_numpy("y").tolist() == [[-0.5, 2]]
        texts = triton.InferInput("x", [2, 2], "BYTES")
        given = np.array([["é".encode(), b""], [b"a b", b"\n"]], object)
        texts.set_data_from_numpy(given)
        assert client.infer("text", [texts]).as_numpy("y").tolist() == given.tolist()
        request = oip.ModelInferRequest(model_name="text")
        request.inputs.add(name="x", datatype="BYTES", shape=[1, 2]).contents.bytes_contents.extend([b"a", b"b"])
        assert list(server.send("ModelInfer", request).raw_output_contents) == [b"\1\0\0\0a\1\0\0\0b"]
        request = raw_request("half", datatype="FP16", values=[[1, 2]])
        request.inputs[0].name = "x"
        request.raw_input_contents[0] += b"0"
        details = server.refused(StatusCode.INVALID_ARGUMENT, lambda: server.send("ModelInfer", request))
        assert "inputs[0]: expected 4 bytes for FP16" in details


def test_refusals_of_real_models(real: Running) -> None:
    def ask(code: Any, **fields: Any) -> str:
        return real.refused(code, lambda: real.send("ModelInfer", raw_request(**fields)))

    assert "inputs[0]" in ask(StatusCode.INVALID_ARGUMENT, model="pair")
    assert "no model 'none'" in ask(StatusCode.NOT_FOUND, model="none")
    assert "model trees has no version '7'" in ask(StatusCode.NOT_FOUND, model="trees", model_version="7")
    request = raw_request("pair", values=np.zeros((1, 30)).tolist())
    request.inputs[0].name = real.repository.model("pair").inputs[0].name
    request.outputs.add(name="nothing")
    details = real.refused(StatusCode.INVALID_ARGUMENT, lambda: real.send("ModelInfer", request))
    assert "outputs[0].name: no output is called 'nothing'" in details


def test_load_and_unload(real: Running, folder: Any) -> None:
    rows = np.zeros((1, 30))
    with triton.InferenceServerClient(real.address) as client:
        with pytest.raises(InferenceServerException, match="none") as caught:
            client.load_model("none")
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        client.unload_model("pair")
        assert not client.is_model_ready("pair")
        with pytest.raises(InferenceServerException, match="is not loaded") as caught:
            client.infer("pair", [triton_input(rows, "FP64")])
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        states = {(model.name, model.version): model.state for model in client.get_model_repository_index().models}
        assert states == {("pair", "1"): "UNAVAILABLE", ("trees", "1"): "READY", ("trees", "2"): "READY"}
        client.load_model("pair")
        assert client.is_model_ready("pair")
        given = (folder / "trees" / "1" / "model.txt").read_bytes()
        client.load_model("given", config="{}", files={"file:4/model.txt": given})
        assert client.is_model_ready("given", "4")
        with pytest.raises(InferenceServerException) as caught:
            client.load_model("given", config="{}", files={"file:5/model.txt": b"no trees"})
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        client.unload_model("given")


def test_the_command(folder: Any, tmp_path: Any) -> None:
    command = [sys.executable, "-m", "penstock", "serve", "--models", str(folder), "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            address = next(line.split()[-1] for line in process.stdout if line.startswith("penstock: gRPC on "))
            with triton.InferenceServerClient(address) as client:
                assert client.is_server_ready()
                assert client.is_model_ready("trees", "2")
        finally:
            process.terminate()
        assert process.wait(20) == 0


# Memory.


def resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


LOAD = """
import asyncio, sys
import grpc
from penstock.server.grpc_messages import INFERENCE, oip

def request(name):
    message = oip.ModelInferRequest(model_name=name, raw_input_contents=[bytes(8)])
    message.inputs.add(name="input", datatype="FP32", shape=[1, 2])
    return message.SerializeToString()

async def worker(infer, stream, n):
    good, bad, typed = request("fp32"), request("none"), oip.ModelInferRequest(model_name="fp32")
    typed.inputs.add(name="input", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    typed = typed.SerializeToString()
    for i in range(n):
        if i % 10 == 9:
            try:
                await infer(bad if i % 20 == 9 else b"?")
                raise SystemExit("not refused")
            except grpc.aio.AioRpcError:
                pass
        elif i % 100 == 50:
            infer(good).cancel()
        elif i % 100 == 60:
            assert len([answer async for answer in stream(iter([good, bad]))]) == 2
        else:
            await infer(typed if i % 10 == 8 else good)

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        infer = channel.unary_unary(f"/{INFERENCE}/ModelInfer")
        stream = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
        n = int(sys.argv[2]) // 20
        await asyncio.gather(*(worker(infer, stream, n) for _ in range(20)))

asyncio.run(main())
"""


@pytest.mark.timeout(600)
def test_memory_does_not_grow(running: Running) -> None:
    """100,000 requests, of which some are refused, some are streams, and some are left by the client: what a request
    leaves behind, every third of them shows; what the process grows by once (an allocator's arena) one third does."""

    def load(n: int) -> None:
        subprocess.run([sys.executable, "-c", LOAD, running.address, str(n)], check=True, timeout=500)
        running.idle()

    # No call of ours waits for the collector (grpc's own way to find a handler makes a small cycle for each).
    gc.collect()
    gc.disable()
    try:
        load(1_000)
    finally:
        gc.enable()
    load(20_000)
    third = 33_000 if os.environ.get("CI") == "true" else 5_000
    grown = []
    for _ in range(3):
        before = resident()
        load(third)
        grown.append(resident() - before)
    assert min(grown) < 80 * third, f"{[f'{n / third:.0f}' for n in grown]} bytes a request in each third"
