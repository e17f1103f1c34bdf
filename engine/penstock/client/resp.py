"""RESP3 as the client speaks it, without a socket (control path): commands and replies by hiredis.

What must stay true: one reply per command, in order; a reply that is an error is an error of its own command only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import hiredis
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
from .events import packed
from .results import Decision, FeatureRows, Ingested

__all__ = ["RespProtocol"]

_NOT_YET = object()
_DECISION = msgspec.msgpack.Decoder(Decision)
# `KIND code $.path: message`, where code and path may be missing; a code is told from a message by its underscore.
_ERROR = re.compile(
    r"(?P<kind>[A-Z]+) (?:(?P<code>[a-z]+(?:_[a-z]+)+|internal|overloaded|deadline):? )?"
    r"(?:(?P<path>\$.*?): )?(?P<message>.*)",
    re.DOTALL,
)
_RETRY = re.compile(r"retry in (\d+(?:\.\d+)?) ms")
_EVENT_CODES = ("invalid_event", "malformed_payload", "invalid_utf8", "too_deep")
_FOR_NOW = ("log_refused", "max_clients")  # nothing was done, and later it may be


class RespReader:
    """The replies to n commands."""

    def __init__(self, n: int) -> None:
        self.replies: list[Any] = []
        self.reusable = False
        self._n = n
        self._parser = hiredis.Reader(notEnoughData=_NOT_YET)

    def feed(self, data: bytes) -> bool:
        try:
            self._parser.feed(data)
            while len(self.replies) < self._n:
                reply = self._parser.gets()
                if reply is _NOT_YET:
                    return False
                if not isinstance(reply, hiredis.PushNotification):
                    self.replies.append(reply)
        except hiredis.ProtocolError as error:
            raise ServerError(f"the answer is not RESP: {error}", code="protocol") from None
        self.reusable = not self._parser.has_data()
        return True

    def end(self) -> bool:
        self.reusable = False
        return len(self.replies) == self._n


class RespProtocol:
    """Calls of one server."""

    width = 64  # commands before their replies are read: what both sides' socket buffers hold

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        if headers:
            raise ValueError("headers: RESP has none")
        command: list[Any] = ["HELLO", "3"]
        if address.password is not None:
            command += ["AUTH", address.user or "default", address.password]
        command += ["SETNAME", "penstock-python"]
        self._hello = hiredis.pack_command(tuple(command))

    def reader(self, n: int) -> RespReader:
        return RespReader(n)

    def greeting(self) -> list[Call]:
        """What a new connection says first."""
        return [Call(True, lambda deadline: self._hello, _checked)]

    # the calls

    def score(
        self, pipeline: str, events: Any, ingest: bool, explain: bool, priority: int | None, safe: bool
    ) -> list[Call]:
        many = isinstance(events, list) and len(events) > 1
        single = isinstance(events, list) and not many
        payloads = (
            [packed(event, f"$[{i}]") for i, event in enumerate(events)]
            if many
            else [packed(events[0], "$[0]") if single else packed(events)]
        )
        flags = (() if ingest else ("NOINGEST",)) + (("EXPLAIN",) if explain else ())

        def render(deadline: Deadline) -> bytes:
            return _packed("PENSTOCK.SCORE", pipeline, *_options(deadline, priority), *flags, *payloads)

        def decode(reply: Any) -> Any:
            reply = _checked(reply)
            if many:
                return [_decision(item) for item in _array(reply, len(payloads))]
            return [_decision(reply)] if single else _decision(reply)

        return [Call(safe or not ingest, render, decode)]

    def ingest(self, event_type: str, events: Any, priority: int | None, safe: bool) -> list[Call]:
        many = isinstance(events, list)
        payloads = [packed(event, f"$[{i}]") for i, event in enumerate(events)] if many else [packed(events)]

        def render(deadline: Deadline) -> bytes:
            return _packed("PENSTOCK.INGEST", event_type, *_options(deadline, priority), *payloads)

        def decode(reply: Any) -> Ingested:
            reply = _checked(reply)
            words = [reply] if len(payloads) == 1 and not isinstance(reply, list) else _array(reply, len(payloads))
            return Ingested(len(words), dict(Counter(_text(word) for word in words)))

        return [Call(safe, render, decode)]

    def features(self, view: str, keys: Sequence[str | int], as_of: Timestamp | None) -> list[Call]:
        integers = {isinstance(key, int) for key in keys}
        if len(integers) > 1:
            raise InvalidRequest("RESP takes keys of one type in a call, got strings and integers", path="$.keys")
        options: tuple[Any, ...] = () if as_of is None else ("ASOF", int(as_of))
        if integers == {True}:
            options += ("INT",)
        request = _packed("PENSTOCK.FEATURES", view, *options, "WITHSTATUS", "KEYS", *keys)

        def decode(reply: Any) -> FeatureRows:
            reply = _checked(reply)
            pairs = [reply] if len(keys) == 1 and _is_pair(reply) else _array(reply, len(keys))
            rows, statuses = [], []
            for pair in pairs:
                if not _is_pair(pair):
                    raise ServerError("expected a map of values and one of statuses", code="protocol")
                rows.append({_text(name): _plain(value) for name, value in pair[0].items()})
                statuses.append({_text(name): _text(status) for name, status in pair[1].items()})
            return FeatureRows(view, as_of, rows, statuses)

        return [Call(True, lambda deadline: request, decode)]

    def infer(
        self,
        model: str,
        version: str | None,
        inputs: Mapping[str, Any],
        outputs: Any,
        priority: int | None,
    ) -> list[Call]:
        from .tensors import DTYPES, from_bytes, to_bytes

        if len(inputs) != 1:
            raise InvalidRequest(f"RESP is for models of one input, got {len(inputs)}; HTTP takes more", path="inputs")
        if not isinstance(outputs, Mapping) or not outputs:
            raise InvalidRequest(
                "RESP answers raw bytes: give the model's outputs in their order with their types, "
                "such as outputs={'score': 'FP32'}",
                path="outputs",
            )
        for name, datatype in outputs.items():
            if datatype not in DTYPES:
                raise InvalidRequest(f"expected one of {', '.join(DTYPES)}, got {datatype!r}", path=f"outputs.{name}")
        (array,) = inputs.values()
        data = to_bytes(array)
        rows = array.shape[0] if array.ndim > 1 else 1
        target = model if version is None else f"{model}@{version}"

        def render(deadline: Deadline) -> bytes:
            return _packed("PENSTOCK.INFER", target, *_options(deadline, priority), data)

        def decode(reply: Any) -> dict[str, Any]:
            reply = _checked(reply)
            parts = [reply] if isinstance(reply, bytes) else _array(reply, len(outputs))
            if len(parts) != len(outputs):
                raise ServerError(f"the model has {len(parts)} outputs, {len(outputs)} were named", code="protocol")
            arrays = {}
            for (name, datatype), part in zip(outputs.items(), parts):
                flat = from_bytes(part, datatype, [-1], name)
                arrays[name] = flat.reshape(rows, -1) if rows > 0 and flat.size % rows == 0 else flat
            return arrays

        return [Call(True, render, decode)]

    def metadata(self, model: str, version: str | None) -> list[Call]:
        raise InvalidRequest("RESP does not tell a model's metadata; HTTP does", code="unsupported")

    def ready(self) -> list[Call]:
        return self.live()

    def live(self) -> list[Call]:
        request = _packed("PING")
        return [Call(True, lambda deadline: request, lambda reply: _text(_checked(reply)) == "PONG")]


def _options(deadline: Deadline, priority: int | None) -> list[Any]:
    us = deadline.server_us()
    options: list[Any] = [] if us is None else ["TIMEOUT", us]
    return options if priority is None else [*options, "PRIORITY", priority]


def _packed(*parts: Any) -> bytes:
    try:
        return hiredis.pack_command(parts)  # type: ignore[no-any-return]
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"cannot be sent: {error}") from None


def _checked(reply: Any) -> Any:
    if isinstance(reply, hiredis.ReplyError):
        raise _refusal(str(reply))
    return reply


def _array(reply: Any, n: int) -> list[Any]:
    if not isinstance(reply, list) or len(reply) != n:
        raise ServerError(f"expected an array of {n}", code="protocol")
    return reply


def _is_pair(reply: Any) -> bool:
    return isinstance(reply, list) and len(reply) == 2 and all(isinstance(part, dict) for part in reply)


def _decision(data: Any) -> Decision:
    if not isinstance(data, bytes):
        raise (
            _refusal(str(data))
            if isinstance(data, hiredis.ReplyError)
            else ServerError("expected a decision", code="protocol")
        )
    try:
        return _DECISION.decode(data)
    except msgspec.DecodeError as error:
        raise ServerError(f"the decision is not what was expected: {error}", code="protocol") from None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _refusal(text: str) -> ClientError:
    """The error that an error reply stands for."""
    match = _ERROR.fullmatch(text)
    if match is None:
        return ServerError(text, code="protocol")
    kind, code, path, message = match.group("kind", "code", "path", "message")
    code = code or kind.lower()
    if kind == "BUSY" and code == "deadline":
        return DeadlineExceeded(message, path=path)
    if kind == "BUSY" or code in _FOR_NOW:
        wait = _RETRY.search(message)
        return Overloaded(message, code=code, path=path, retry_after=float(wait[1]) / 1000 if wait else None)
    if kind in ("NOAUTH", "WRONGPASS", "NOPERM"):
        return AccessDenied(message, code=code)
    if code in ("not_found", "unknown_pipeline", "unknown_event", "unknown_view", "unknown_model"):
        return NotFound(message, code=code, path=path)
    if code in _EVENT_CODES:
        return InvalidEvent(message, code=code, path=path)
    if code == "internal":
        return ServerError(message, code=code, path=path)
    return InvalidRequest(message, code=code, path=path)
