"""Open Inference Protocol over gRPC (control path): the methods of GRPCInferenceService, and grpc's health check.

Runs on the serving loop. An inference that costs less than a millisecond is done where it arrives; a longer one waits
for a thread of a small pool, by priority, within its model's queue limit and its deadline. Nothing imports this module
unless --grpc-port is given. What must stay true: a request is answered exactly once, with a result or a status; no
exception reaches grpc, which would keep the request alive with it; the loop never waits for a long model.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np

from .._ext.http import RequestError
from .._ext.infer import InferError
from ..errors import PenstockError
from ..models.folder import ModelError
from ..models.repository import UnknownModel
from .oip import OipRoutes
from .tracing import SettingError

try:
    import grpc
    from google.protobuf import json_format
    from google.protobuf.message import DecodeError

    from .grpc_messages import HEALTH, INFERENCE, SERVICES, health, oip
except ImportError as _error:
    raise PenstockError(f"gRPC needs grpcio and protobuf: pip install 'penstock[grpc]' ({_error})") from None

__all__ = ["GrpcServer", "start_grpc"]

POOL_NS = 1_000_000  # a request that costs more goes to a thread
ELEMENT_NS = 60  # what a value of typed contents costs to read
LINGER = 0.5  # a stream may have a request on its way: seconds to wait for it when stopping
MAX_CALLS = 4096  # calls under way; more are refused
DEFAULT_PRIORITY = 4  # of 1 (first) to 7, as over HTTP
FAR = 1 << 62

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

# Datatype: the field of InferTensorContents that holds it, how it is held there, and as it lies in raw contents.
_CONTENTS = {
    "BOOL": ("bool_contents", "?", "?"),
    "INT8": ("int_contents", "<i4", "<i1"),
    "INT16": ("int_contents", "<i4", "<i2"),
    "INT32": ("int_contents", "<i4", "<i4"),
    "INT64": ("int64_contents", "<i8", "<i8"),
    "UINT8": ("uint_contents", "<u4", "<u1"),
    "UINT16": ("uint_contents", "<u4", "<u2"),
    "UINT32": ("uint_contents", "<u4", "<u4"),
    "UINT64": ("uint64_contents", "<u8", "<u8"),
    "FP32": ("fp32_contents", "<f4", "<f4"),
    "FP64": ("fp64_contents", "<f8", "<f8"),
    "BYTES": ("bytes_contents", "", ""),
}
RAW_ONLY = ("FP16", "BF16")


class Refusal(Exception):
    """A request that gets a status instead of a result."""

    def __init__(self, code: Any, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def _invalid(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


class GrpcServer:
    """A running server. port: where it listens. counts: answers by (method, code)."""

    def __init__(self, service: _Service, server: Any, port: int) -> None:
        self._service = service
        self._server = server
        self.port = port

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return self._service.counts

    @property
    def open_calls(self) -> int:
        return self._service.open

    async def stop(self, grace: float) -> None:
        """Accept no more calls, give those under way `grace` seconds, and cancel the rest.

        A stream between two requests counts as under way for LINGER seconds only. A thread that is at work ends by
        itself; nobody waits for its answer.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        ended = asyncio.ensure_future(self._server.stop(grace))
        while not ended.done():
            await asyncio.wait((ended,), timeout=0.02)
            if loop.time() - began > LINGER and self._service.idle == self._service.open:
                await self._server.stop(0)
        await ended
        self._service.pool.close()


async def start_grpc(
    repository: Any,
    *,
    host: str,
    port: int,
    max_message: int,
    state: dict[str, bool],
    routes: OipRoutes | None = None,
    threads: int | None = None,
    max_calls: int = MAX_CALLS,
) -> GrpcServer:
    """Serve the repository's models on the running loop. state["ready"] is what the readiness calls tell.

    port: 0 takes a free one. max_message: bytes of the largest request. routes: what HTTP answers with, so that both
    share settings of traces and of the log; one is made where it is None. threads: of the pool for long models.
    Raises PenstockError where the address cannot be had.
    """
    if routes is None:
        routes = OipRoutes(repository, not_ready=lambda: None if state["ready"] else "the server is starting")
    service = _Service(repository, routes, state, threads or min(4, os.cpu_count() or 1), max_calls)
    options = [
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", -1),
        # Without this a second server would share the port in silence.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(handlers=[service], options=options)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        hint = "; --grpc-port 0 takes a free one" if port else ""
        raise PenstockError(f"gRPC cannot listen on {address}{hint}")
    await server.start()
    return GrpcServer(service, server, bound)


class _Unary:
    """One call, and at once what grpc calls its handler. Its life is the call's, which counts the calls under way."""

    __slots__ = ("arrival", "method", "refused", "service")
    request_streaming = response_streaming = False
    request_deserializer = response_serializer = None
    unary_stream = stream_unary = stream_stream = None

    def __init__(self, service: _Service, method: _Method, refused: bool) -> None:
        self.service = service
        self.method = method
        self.refused = refused
        self.arrival = time.monotonic_ns()
        service.open += 1

    def __del__(self) -> None:
        self.service.open -= 1

    async def unary_unary(self, data: bytes, context: Any) -> bytes:
        method = self.method
        counts = self.service.counts
        try:
            if self.refused:
                raise self.service.too_many()
            answer: bytes = (await method.act(_decode(method, data), context, self.arrival)).SerializeToString()
            counts[method.name, "OK"] += 1
            return answer
        except Exception as error:
            code, message = self.service.status(error)
        # grpc drops the answer when the code is not OK. abort() would raise an exception that grpc keeps with the call.
        context.set_code(code)
        context.set_details(message)
        counts[method.name, code.name] += 1
        return b""


class _Stream(_Unary):
    """One call with requests and answers in streams. Answers come in the order of the requests."""

    __slots__ = ()
    request_streaming = response_streaming = True
    unary_unary = None  # type: ignore[assignment]

    async def stream_stream(self, _: Any, context: Any) -> None:  # type: ignore[override]
        method = self.method
        service = self.service
        # Triton's clients may ask that an error ends the stream with a status.
        strict = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())
        status = service.status(service.too_many()) if self.refused else None
        while status is None:
            service.idle += 1
            try:
                data = await context.read()
            finally:
                service.idle -= 1
            if data is grpc.aio.EOF:
                return
            answer = oip.ModelStreamInferResponse()
            request: Any = None
            try:
                request = _decode(method, data)
                answer.infer_response.CopyFrom(await service.infer(request, context, time.monotonic_ns()))
                if request.parameters:
                    final = request.parameters.get("triton_enable_empty_final_response")
                    if final is not None and final.bool_param:
                        answer.infer_response.parameters["triton_final_response"].bool_param = True
                service.counts[method.name, "OK"] += 1
            except Exception as error:
                code, message = service.status(error)
                service.counts[method.name, code.name] += 1
                if strict:
                    status = code, message
                    break
                answer.error_message = message
                if request is not None:
                    answer.infer_response.id = request.id
            await context.write(answer.SerializeToString())
        context.set_code(status[0])
        context.set_details(status[1])


class _Method:
    """A method of a service: its name, the class of its requests, and what answers it."""

    __slots__ = ("act", "call", "name", "request")

    def __init__(self, name: str, request: Any, act: Callable[[Any, Any, int], Awaitable[Any]]) -> None:
        self.name = name
        self.request = request
        self.act = act
        self.call: type[_Unary] = _Stream if name == "ModelStreamInfer" else _Unary


def _decode(method: _Method, data: bytes) -> Any:
    try:
        return method.request.FromString(data)
    except DecodeError:
        name = method.request.DESCRIPTOR.full_name
        raise _invalid(f"request: {len(data)} bytes that are not a message {name}") from None


class _Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds the method of a call, and answers it."""

    def __init__(
        self, repository: Any, routes: OipRoutes, state: dict[str, bool], threads: int, max_calls: int
    ) -> None:
        self.repository = repository
        self.routes = routes
        self.state = state
        self.pool = _Pool(threads)
        self.max_calls = max_calls
        self.open = 0
        self.idle = 0  # of them, streams that wait for a request
        self.counts: Counter[tuple[str, str]] = Counter()
        self.methods: dict[str, _Method] = {}
        for path, messages in ((INFERENCE, oip), (HEALTH, health)):
            for name, (request, _) in SERVICES[path].items():
                self.methods[f"/{path}/{name}"] = _Method(name, getattr(messages, request), getattr(self, _snake(name)))

    def service(self, details: Any) -> Any:
        method = self.methods.get(details.method)
        if method is None:
            return None
        return method.call(self, method, self.open >= self.max_calls)

    def too_many(self) -> Refusal:
        return Refusal(grpc.StatusCode.UNAVAILABLE, f"overloaded: {self.max_calls} calls are under way; retry later")

    def status(self, error: Exception) -> tuple[Any, str]:
        """(code, details) of an error; one that nobody expected is INTERNAL, and its place goes to the log.

        Not the error itself: a caller that kept it would be kept by its traceback, until the garbage collector comes.
        """
        match error:
            case Refusal():
                return error.code, error.message
            case InferError() | RequestError():
                other = grpc.StatusCode.INTERNAL if error.status >= 500 else grpc.StatusCode.INVALID_ARGUMENT
                return _CODES.get(error.status, other), str(error)
            case SettingError():
                return _CODES[501 if error.unsupported else 400], str(error)
            case UnknownModel():
                return grpc.StatusCode.NOT_FOUND, str(error)
            case ModelError():
                return grpc.StatusCode.INVALID_ARGUMENT, str(error)
            case PenstockError():
                return grpc.StatusCode.UNAVAILABLE, str(error)
        self.routes.log.fault(error)
        return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {error}"

    # Inference.

    async def model_infer(self, request: Any, context: Any, arrival: int) -> Any:
        return await self.infer(request, context, arrival)

    async def model_stream_infer(self, request: Any, context: Any, arrival: int) -> Any:
        raise NotImplementedError  # _Stream calls infer

    async def infer(self, request: Any, context: Any, arrival: int) -> Any:
        """The answer to a ModelInferRequest that arrived then. Raises Refusal, InferError or RequestError."""
        target = self.repository.table.target(request.model_name, request.model_version)
        served = None if target is None else target.model
        if served is None:
            served = self.routes.model(request.model_name, request.model_version)
        lane = None if target is None else target.lane
        timeout_us, priority = _schedule(request.parameters) if request.parameters else (0, 0)
        rows, cost = _size(served, request)
        now = time.monotonic_ns()
        deadline = _deadline(lane, arrival, timeout_us)
        remaining = context.time_remaining()
        if remaining is not None:
            deadline = min(deadline, now + int(remaining * 1e9))
        hook = self.routes.tracing.hook
        if cost <= POOL_NS:
            if now > deadline:
                raise _late(served.name, now - arrival)
            answer = compute(served, request)
        else:
            answer = await self.pool.run(lane, rows, cost, arrival, deadline, priority, compute, served, request)
        if hook is not None:
            times = [("REQUEST_START", arrival), ("QUEUE_START", now), ("GRPC_SEND_START", time.monotonic_ns())]
            hook(served.name, served.version, request.id, times)
        return answer

    # What HTTP tells too.

    async def server_live(self, request: Any, context: Any, arrival: int) -> Any:
        return oip.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, context: Any, arrival: int) -> Any:
        return oip.ServerReadyResponse(ready=self.is_ready())

    async def check(self, request: Any, context: Any, arrival: int) -> Any:
        if request.service not in ("", INFERENCE):
            name = request.service[:100]
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"service: no {name!r}; have {INFERENCE} and ''")
        return health.HealthCheckResponse(status="SERVING" if self.is_ready() else "NOT_SERVING")

    def is_ready(self) -> bool:
        return bool(self.state["ready"]) and self.routes.not_ready() is None

    async def model_ready(self, request: Any, context: Any, arrival: int) -> Any:
        try:
            self.routes.model(request.name, request.version)
        except RequestError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=True)

    async def server_metadata(self, request: Any, context: Any, arrival: int) -> Any:
        return _message(oip.ServerMetadataResponse(), self.routes.server_metadata())

    async def model_metadata(self, request: Any, context: Any, arrival: int) -> Any:
        return _message(oip.ModelMetadataResponse(), self.routes.model_metadata(request.name, request.version))

    async def model_config(self, request: Any, context: Any, arrival: int) -> Any:
        return _message(oip.ModelConfigResponse(), {"config": self.routes.model_config(request.name, request.version)})

    async def model_statistics(self, request: Any, context: Any, arrival: int) -> Any:
        return _message(oip.ModelStatisticsResponse(), self.routes.statistics(request.name, request.version))

    async def repository_index(self, request: Any, context: Any, arrival: int) -> Any:
        return _message(oip.RepositoryIndexResponse(), {"models": self.repository.index(request.ready)})

    async def repository_model_load(self, request: Any, context: Any, arrival: int) -> Any:
        config, files = None, {}
        for name, parameter in request.parameters.items():
            choice = parameter.WhichOneof("parameter_choice")
            if name == "config":
                if choice != "string_param":
                    raise _invalid("parameters.config: expected a model configuration as JSON text")
                config = parameter.string_param
            elif name.startswith("file:"):
                if choice != "bytes_param":
                    raise _invalid(f"parameters.{name[:100]}: expected bytes")
                files[name.removeprefix("file:")] = parameter.bytes_param
        if files and config is None:
            raise _invalid("parameters: 'file:' needs 'config' beside it")
        if not files:
            self.known(request.model_name)
        await self.repository.load(request.model_name, config, files or None)
        self.routes.log.say("info", f"model {request.model_name} is loaded")
        return oip.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any, context: Any, arrival: int) -> Any:
        parameter = request.parameters.get("unload_dependents")
        if parameter is not None and parameter.WhichOneof("parameter_choice") != "bool_param":
            raise _invalid("parameters.unload_dependents: expected true or false")
        self.known(request.model_name)
        await self.repository.unload(request.model_name)
        self.routes.log.say("info", f"model {request.model_name} is unloaded")
        return oip.RepositoryModelUnloadResponse()

    def known(self, name: str) -> None:
        """Raises RequestError 404 where the repository has no such model, loaded or not."""
        try:
            self.routes.model(name)
        except RequestError as error:
            if error.status == 404:
                raise

    async def trace_setting(self, request: Any, context: Any, arrival: int) -> Any:
        if request.model_name:
            self.routes.model(request.model_name)
        changes: dict[str, Any] = {}
        for name, setting in request.settings.items():
            values = list(setting.value)
            changes[name] = None if not values else values if name == "trace_level" or len(values) > 1 else values[0]
        tracing = self.routes.tracing
        found = tracing.update(changes, request.model_name) if changes else tracing.settings(request.model_name)
        answer = oip.TraceSettingResponse()
        for name, value in found.items():
            answer.settings[name].value.extend(value if isinstance(value, list) else [value])
        return answer

    async def log_settings(self, request: Any, context: Any, arrival: int) -> Any:
        changes = {
            name: getattr(setting, setting.WhichOneof("parameter_choice") or "string_param")
            for name, setting in request.settings.items()
        }
        found = self.routes.log.update(changes) if changes else self.routes.log.settings()
        answer = oip.LogSettingsResponse()
        for name, value in found.items():
            kind = "bool" if isinstance(value, bool) else "uint32" if isinstance(value, int) else "string"
            setattr(answer.settings[name], f"{kind}_param", value)
        return answer

    # Shared memory of a client is not read: there is never a region, so only its end can be agreed to.

    async def system_shared_memory_status(self, request: Any, context: Any, arrival: int) -> Any:
        return _no_region(request, oip.SystemSharedMemoryStatusResponse)

    async def cuda_shared_memory_status(self, request: Any, context: Any, arrival: int) -> Any:
        return _no_region(request, oip.CudaSharedMemoryStatusResponse)

    async def system_shared_memory_register(self, request: Any, context: Any, arrival: int) -> Any:
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "shared memory is not supported; send tensors in the request")

    cuda_shared_memory_register = system_shared_memory_register

    async def system_shared_memory_unregister(self, request: Any, context: Any, arrival: int) -> Any:
        return oip.SystemSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_unregister(self, request: Any, context: Any, arrival: int) -> Any:
        return oip.CudaSharedMemoryUnregisterResponse()


def _no_region(request: Any, answer: Any) -> Any:
    if request.name:
        raise Refusal(grpc.StatusCode.NOT_FOUND, f"region {request.name[:100]!r}: none is registered")
    return answer()


def _snake(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")


def _message(message: Any, values: dict[str, Any]) -> Any:
    return json_format.ParseDict(values, message, ignore_unknown_fields=True)


class _Pool:
    """Threads for long models. What waits for one stands in a heap on the loop, by priority, then arrival."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.running = 0
        self.waiting: Counter[str] = Counter()  # rows, by lane
        self._executor = ThreadPoolExecutor(threads, "penstock-grpc")
        self._heap: list[tuple[int, int, int, asyncio.Future[None]]] = []  # priority, order, cost, turn
        self._order = count()

    async def run(
        self,
        lane: Any,
        rows: int,
        cost: int,
        arrival: int,
        deadline: int,
        priority: int,
        call: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """call(*arguments) on a thread. Raises Refusal where the lane's queue is full or the deadline cannot be met."""
        name = "" if lane is None else lane.name
        loop = asyncio.get_running_loop()
        priority = min(priority, 7) or DEFAULT_PRIORITY
        if lane is not None:
            held = self.waiting[name] + lane.waiting
            if held and held + rows > lane.max_rows:
                most = f"{held} rows wait, and it holds {lane.max_rows}"
                raise Refusal(grpc.StatusCode.UNAVAILABLE, f"model {name}: the queue is full: {most}; retry later")
        before = sum(entry[2] for entry in self._heap if entry[0] <= priority and not entry[3].done()) // self.threads
        now = time.monotonic_ns()
        if now + before + cost > deadline:
            raise _late(name, now - arrival, before + cost)
        if self.running >= self.threads:
            turn: asyncio.Future[None] = loop.create_future()
            heapq.heappush(self._heap, (priority, next(self._order), cost, turn))
            self.waiting[name] += rows
            try:
                await turn  # the turn's thread is counted as running when it comes
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
            finally:
                self.waiting[name] -= rows
            now = time.monotonic_ns()
            if now > deadline:
                self._release()
                raise _late(name, now - arrival)
        else:
            self.running += 1
        try:
            work = loop.run_in_executor(self._executor, call, *arguments)
        except BaseException:
            self._release()
            raise
        work.add_done_callback(self._ended)
        # A client that leaves does not free the thread: its turn ends when the thread does.
        return await asyncio.shield(work)

    def _ended(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # it is looked at, also where nobody waits for it
        self._release()

    def _release(self) -> None:
        self.running -= 1
        while self._heap:
            turn = heapq.heappop(self._heap)[3]
            if not turn.done():
                self.running += 1
                turn.set_result(None)
                return

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def _late(name: str, waited: int, needed: int = 0) -> Refusal:
    what = f"and needs another {needed / 1e6:.1f} ms" if needed else "and its time has run out"
    text = f"model {name}: it could not be answered by its deadline: it waited {max(0, waited) / 1e6:.1f} ms, {what}"
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text)


def _deadline(lane: Any, arrival: int, timeout_us: int) -> int:
    """When a request must be answered: what it asks for, within the lane's maximum; else the lane's default."""
    timeout = timeout_us * 1000
    if lane is not None:
        most = lane.max_timeout or lane.default_timeout
        timeout = timeout or lane.default_timeout
        if most:
            timeout = min(timeout or most, most)
    return arrival + timeout if timeout else FAR


def _schedule(parameters: Any) -> tuple[int, int]:
    """(timeout in us, priority) of a request's parameters; 0 where they are not given."""
    found = []
    for name in ("timeout", "priority"):
        value: Any = 0
        if name in parameters:
            parameter = parameters[name]
            choice = parameter.WhichOneof("parameter_choice")
            value = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else None
            if value is None or value < 0:
                what = "microseconds" if name == "timeout" else "a level: 1 is served first"
                raise _invalid(f"parameters.{name}: expected {what}, as int64_param, got {choice}: {value!r}")
        found.append(value)
    return found[0], found[1]


def _size(served: Any, request: Any) -> tuple[int, int]:
    """(rows, estimated ns) of a request. Never more rows than its bytes could hold: a shape is what a client says."""
    rows = 1
    if served.batched and request.inputs:
        shape = request.inputs[0].shape
        rows = max(1, shape[0]) if shape else 1
        if rows > 1:
            rows = min(rows, max(1, request.ByteSize()))
    cost = rows * served.row_ns
    if not request.raw_input_contents:
        cost += ELEMENT_NS * sum(len(values) for tensor in request.inputs for _, values in tensor.contents.ListFields())
    return rows, cost


def compute(served: Any, request: Any) -> Any:
    """The ModelInferResponse to a request, on any thread. Raises Refusal or InferError."""
    raw = request.raw_input_contents
    tensors = request.inputs
    inputs = []
    if raw and len(raw) != len(tensors):
        raise _invalid(f"raw_input_contents: expected one per input, {len(tensors)}, got {len(raw)}")
    for i, tensor in enumerate(tensors):
        if tensor.parameters:
            _no_shared_memory(f"inputs[{i}] {tensor.name[:100]!r}", tensor.parameters)
        if not raw:
            data = typed_to_raw(i, tensor)
        elif tensor.HasField("contents"):
            raise _invalid(f"inputs[{i}] {tensor.name[:100]!r}: contents beside raw_input_contents; send one of them")
        else:
            data = raw[i]
        inputs.append((tensor.name, tensor.datatype, tuple(tensor.shape), data))
    wanted = None
    if request.outputs:
        wanted = []
        for i, output in enumerate(request.outputs):
            if output.parameters:
                place = f"outputs[{i}] {output.name[:100]!r}"
                _no_shared_memory(place, output.parameters)
                if "classification" in output.parameters:
                    raise Refusal(_CODES[501], f"{place}: classification is not supported; ask for the scores")
            wanted.append(output.name)
    results = served.infer(inputs, wanted)
    # Raw whatever came, as Triton and OpenVINO answer: published clients read nothing else.
    answer = oip.ModelInferResponse(model_name=served.name, model_version=served.version, id=request.id)
    for name, datatype, shape, data in results:
        answer.outputs.add(name=name, datatype=datatype, shape=shape)
        answer.raw_output_contents.append(data)
    return answer


def _no_shared_memory(place: str, parameters: Any) -> None:
    if "shared_memory_region" in parameters:
        raise Refusal(_CODES[501], f"{place}: shared memory is not supported; send tensors in the request")


def typed_to_raw(index: int, tensor: Any) -> bytes:
    """The bytes of an input whose values stand in `contents`. Raises Refusal that says which value is wrong."""
    place = f"inputs[{index}] {tensor.name[:100]!r}"
    datatype = tensor.datatype
    if datatype not in _CONTENTS:
        if datatype in RAW_ONLY:
            raise _invalid(f"{place}: {datatype} has no typed contents; send raw_input_contents")
        raise _invalid(f"{place}.datatype: expected one of {', '.join((*_CONTENTS, *RAW_ONLY))}, got {datatype[:40]!r}")
    field, held, wanted = _CONTENTS[datatype]
    others = [given.name for given, _ in tensor.contents.ListFields() if given.name != field]
    if others:
        raise _invalid(f"{place}.contents: {datatype} stands in {field}, got {', '.join(others)}")
    values = getattr(tensor.contents, field)
    expected = 1
    for size in tensor.shape:
        expected *= max(0, size)
    if len(values) != expected:
        raise _invalid(f"{place}.contents: expected {expected} values for its shape, got {len(values)}")
    if datatype == "BYTES":
        return b"".join(len(value).to_bytes(4, "little") + value for value in values)
    array = np.fromiter(values, held, len(values))
    if held != wanted and len(array):
        limits = np.iinfo(wanted)
        wrong = np.flatnonzero((array < limits.min) | (array > limits.max))
        if len(wrong):
            at = int(wrong[0])
            raise _invalid(f"{place}.contents.{field}[{at}]: expected {datatype}, got {array[at]}")
    data: bytes = array.astype(wanted).tobytes()
    return data
