"""HTTP/1.1 as the client speaks it, without a socket (control path): requests as bytes, answers by llhttp.

What must stay true: a connection is used again only where llhttp says that the answer is over and may be followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httptools
import msgspec

from ..timestamp import Timestamp
from .address import Address
from .calls import Call, Deadline
from .errors import (
    AccessDenied,
    ClientError,
    DeadlineExceeded,
    InvalidEvent,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
)
from .events import json_bytes, json_list
from .results import Decision, FeatureRows, Ingested, ModelMetadata

__all__ = ["HttpProtocol"]

_EVENT_CODES = ("invalid_event", "malformed_json", "invalid_utf8", "too_deep")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class HttpAnswer(msgspec.Struct):
    status: int
    fields: dict[bytes, bytes]
    body: bytes


class HttpReader:
    """The answer to one request."""

    def __init__(self) -> None:
        self.replies: list[HttpAnswer] = []
        self.reusable = False
        self._parser = httptools.HttpResponseParser(self)
        self._fields: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._extra = False

    def feed(self, data: bytes) -> bool:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.replies:
                raise ServerError(f"the answer is not HTTP: {error}", code="protocol") from None
            self._extra = True
        self.reusable = self.reusable and not self._extra
        return bool(self.replies)

    def end(self) -> bool:
        framed = b"content-length" in self._fields or b"transfer-encoding" in self._fields
        if not self.replies and not framed and self._parser.get_status_code() >= 200 and self._fields:
            self.replies.append(HttpAnswer(self._parser.get_status_code(), self._fields, b"".join(self._body)))
        self.reusable = False
        return bool(self.replies)

    # what llhttp calls

    def on_message_begin(self) -> None:
        self._extra = self._extra or bool(self.replies)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.replies:
            self._fields[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        if not self.replies:
            self._body.append(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._fields = {}
            self._body = []
        elif not self.replies:
            self.replies.append(HttpAnswer(status, self._fields, b"".join(self._body)))
            self.reusable = bool(self._parser.should_keep_alive())


class HttpProtocol:
    """Calls of one server. headers: fields that every request carries beside its own."""

    width = 1

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        extra = []
        for name, value in (headers or {}).items():
            if _TOKEN.fullmatch(name) is None or not value.isprintable() or not value.isascii():
                raise ValueError(f"headers: {name!r}: {value!r} is no HTTP field")
            extra.append(f"\r\n{name}: {value}")
        self._prefix = address.path
        self._common = f" HTTP/1.1\r\nHost: {address.authority}{''.join(extra)}".encode("ascii")

    def reader(self, n: int) -> HttpReader:
        return HttpReader()

    def greeting(self) -> list[Call]:
        return []

    def _get(self, path: str) -> bytes:
        return f"GET {self._prefix}{path}".encode() + self._common + b"\r\n\r\n"

    def _post(self, path: str, body: bytes, kind: bytes = b"application/json", fields: bytes = b"") -> bytes:
        head = (
            f"POST {self._prefix}{path}".encode(),
            self._common,
            b"\r\nContent-Type: ",
            kind,
            fields,
            b"\r\nContent-Length: %d\r\n\r\n" % len(body),
            body,
        )
        return b"".join(head)

    # the calls

    def score(
        self, pipeline: str, events: Any, ingest: bool, explain: bool, priority: int | None, safe: bool
    ) -> list[Call]:
        many = isinstance(events, list)
        body = json_list(events) if many else json_bytes(events)
        path = "/v1/score/" + quote(pipeline, safe="")

        def render(deadline: Deadline) -> bytes:
            flags = ["ingest=false"] * (not ingest) + ["explain=true"] * explain
            return self._post(_with_query(path, deadline, priority, flags), body)

        kind: Any = list[Decision] if many else Decision
        return [Call(safe or not ingest, render, lambda reply: _document(reply, kind))]

    def ingest(self, event_type: str, events: Any, priority: int | None, safe: bool) -> list[Call]:
        body = json_list(events) if isinstance(events, list) else json_bytes(events)
        path = "/v1/events/" + quote(event_type, safe="")

        def render(deadline: Deadline) -> bytes:
            return self._post(_with_query(path, deadline, priority, []), body)

        return [Call(safe, render, lambda reply: _document(reply, Ingested))]

    def features(self, view: str, keys: Sequence[str | int], as_of: Timestamp | None) -> list[Call]:
        body: dict[str, Any] = {"keys": list(keys)}
        if as_of is not None:
            body["as_of"] = int(as_of)
        request = self._post("/v1/features/" + quote(view, safe=""), msgspec.json.encode(body))

        def decode(reply: HttpAnswer) -> FeatureRows:
            found = _document(reply, _Features)
            return FeatureRows(found.view, Timestamp.parse(found.as_of), found.features, found.statuses)

        return [Call(True, lambda deadline: request, decode)]

    def infer(
        self,
        model: str,
        version: str | None,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None,
        priority: int | None,
    ) -> list[Call]:
        from .tensors import datatype_of, to_bytes

        heads, raw = [], []
        for name, array in inputs.items():
            data = to_bytes(array)
            raw.append(data)
            heads.append(
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": datatype_of(array, name),
                    "parameters": {"binary_data_size": len(data)},
                }
            )
        tail = b"".join(raw)
        path = _model_path(model, version) + "/infer"

        def render(deadline: Deadline) -> bytes:
            parameters: dict[str, Any] = {"binary_data_output": True}
            us = deadline.server_us()
            if us is not None:
                parameters["timeout"] = us
            if priority is not None:
                parameters["priority"] = priority
            request: dict[str, Any] = {"parameters": parameters, "inputs": heads}
            if outputs is not None:
                request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
            head = msgspec.json.encode(request)
            fields = b"\r\nInference-Header-Content-Length: %d" % len(head)
            return self._post(path, head + tail, b"application/octet-stream", fields)

        return [Call(True, render, _tensors)]

    def metadata(self, model: str, version: str | None) -> list[Call]:
        request = self._get(_model_path(model, version))
        return [Call(True, lambda deadline: request, lambda reply: _document(reply, ModelMetadata))]

    def ready(self) -> list[Call]:
        return self._health("/health/ready")

    def live(self) -> list[Call]:
        return self._health("/health/live")

    def _health(self, path: str) -> list[Call]:
        request = self._get(path)
        return [Call(True, lambda deadline: request, lambda reply: reply.status == 200)]


class _Features(msgspec.Struct):
    view: str
    as_of: str
    features: list[dict[str, Any]]
    statuses: list[dict[str, str]]


class _Port(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: dict[str, Any] = {}


class _Inference(msgspec.Struct):
    outputs: list[_Port]


class _Error(msgspec.Struct):
    code: str
    message: str
    path: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str


def _with_query(path: str, deadline: Deadline, priority: int | None, flags: list[str]) -> str:
    us = deadline.server_us()
    query = ([] if us is None else [f"timeout={us}"]) + ([] if priority is None else [f"priority={priority}"]) + flags
    return f"{path}?{'&'.join(query)}" if query else path


def _model_path(model: str, version: str | None) -> str:
    path = "/v2/models/" + quote(model, safe="")
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _document(reply: HttpAnswer, kind: Any, body: bytes | None = None) -> Any:
    if reply.status != 200:
        raise _refusal(reply)
    try:
        return msgspec.json.decode(reply.body if body is None else body, type=kind)
    except msgspec.DecodeError as error:
        raise ServerError(f"the answer is not what was expected: {error}", code="protocol", status=200) from None


def _tensors(reply: HttpAnswer) -> dict[str, Any]:
    from .tensors import from_bytes, from_json

    size = len(reply.body)
    given = reply.fields.get(b"inference-header-content-length")
    if given is not None and reply.status == 200:
        if not given.isdigit() or int(given) > size:
            raise ServerError("Inference-Header-Content-Length: beyond the answer", code="protocol", status=200)
        size = int(given)
    found = _document(reply, _Inference, reply.body[:size])
    tail, at, arrays = memoryview(reply.body)[size:], 0, {}
    for port in found.outputs:
        n = port.parameters.get("binary_data_size")
        if n is None:
            arrays[port.name] = from_json(port.data, port.datatype, port.shape, port.name)
            continue
        if not isinstance(n, int) or at + n > len(tail):
            raise ServerError("binary_data_size: beyond the answer", code="protocol", path=port.name, status=200)
        arrays[port.name] = from_bytes(tail[at : at + n], port.datatype, port.shape, port.name)
        at += n
    return arrays


def _refusal(reply: HttpAnswer) -> ClientError:
    """The error that an answer other than 200 stands for."""
    status = reply.status
    code, path = "", None
    try:
        error = msgspec.json.decode(reply.body, type=_Refusal).error
        if isinstance(error, str):
            message = error
        else:
            code, message, path = error.code, error.message, error.path
    except msgspec.DecodeError:  # a proxy's answer
        message = reply.body[:200].decode("utf-8", "replace") or "no text"
    if status == 504 or (status == 503 and code == "deadline"):
        return DeadlineExceeded(message, code=code or "deadline", path=path, status=status)
    if status in (429, 503):
        after = reply.fields.get(b"retry-after", b"")
        wait = float(after) if after.isdigit() else None
        return Overloaded(message, code=code or "overloaded", path=path, status=status, retry_after=wait)
    if status == 404:
        return NotFound(message, code=code or "not_found", path=path, status=status)
    if status in (401, 403):
        return AccessDenied(message, code=code or "denied", path=path, status=status)
    if code in _EVENT_CODES:
        return InvalidEvent(message, code=code, path=path, status=status)
    if 400 <= status < 500:
        return InvalidRequest(message, code=code, path=path, status=status)
    return ServerError(message, code=code, path=path, status=status)
