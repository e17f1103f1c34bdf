"""What Client and AsyncClient share (control path): their settings, and how arguments become calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..definitions.event import Event
from ..timestamp import Timestamp
from .address import parse_url
from .calls import RETRIES, Call, Deadline
from .errors import ClientError, InvalidEvent, InvalidRequest
from .events import event_name, is_safe
from .http import HttpProtocol
from .resp import RespProtocol

__all__ = ["Asked", "ClientSettings", "batch_calls", "batch_results", "time_of"]


class ClientSettings:
    """What both clients are made with, checked."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float | None = 5.0,
        retry: str = "safe",
        attempts: int = 5,
        connections: int = 16,
        idle: float = 30.0,
        headers: Mapping[str, str] | None = None,
        tls: Any = None,
    ) -> None:
        if retry not in RETRIES:
            raise ValueError(f'retry: expected "safe", "always" or "never", got {retry!r}')
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0 or None, got {timeout!r}")
        if attempts < 1 or connections < 1:
            raise ValueError("attempts, connections: expected at least 1")
        self.address = parse_url(url)
        if tls is not None and not self.address.tls:
            raise ValueError("tls: the URL is not one of https or resps")
        self.protocol: HttpProtocol | RespProtocol = (
            HttpProtocol(self.address, headers)
            if self.address.protocol == "http"
            else RespProtocol(self.address, headers)
        )
        self.timeout = timeout
        self.retry = retry
        self.attempts = attempts
        self.connections = connections
        self.idle = idle
        self.tls = tls

    def tls_context(self) -> Any:
        """The SSLContext of connections, None without TLS."""
        if self.address.tls and self.tls is None:
            import ssl

            self.tls = ssl.create_default_context()
        return self.tls

    def deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)

    # arguments to calls

    def score(self, pipeline: str, events: Any, ingest: bool, explain: bool, priority: int | None) -> list[Call]:
        events = _events(events)
        return self.protocol.score(pipeline, events, ingest, explain, _priority(priority), _all_safe(events))

    def ingest(self, event_type: str | type[Event], events: Any, priority: int | None) -> list[Call]:
        events = _events(events)
        return self.protocol.ingest(event_name(event_type), events, _priority(priority), _all_safe(events))

    def features(self, view: str, keys: Sequence[str | int], as_of: Any) -> list[Call]:
        if isinstance(keys, (str, int)):
            raise InvalidRequest(f"expected a list of keys, got {keys!r}", path="$.keys")
        for i, key in enumerate(keys):
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise InvalidRequest(f"expected a string or an integer, got {key!r}", path=f"$.keys[{i}]")
        return self.protocol.features(view, list(keys), None if as_of is None else time_of(as_of))

    def infer(
        self,
        model: str,
        version: str | int | None,
        inputs: Mapping[str, Any],
        outputs: Any,
        priority: int | None,
        datatypes: Mapping[str, str],
    ) -> list[Call]:
        from .tensors import as_array

        if not inputs:
            raise InvalidRequest("expected at least one", path="inputs")
        arrays = {name: as_array(value, datatypes.get(name), name) for name, value in inputs.items()}
        return self.protocol.infer(model, _version(version), arrays, outputs, _priority(priority))

    def needs_metadata(self, inputs: Mapping[str, Any]) -> bool:
        """Whether an input is a list: what type it is meant in is then asked of the model."""
        return self.address.protocol == "http" and not all(hasattr(value, "dtype") for value in inputs.values())

    def metadata(self, model: str, version: str | int | None) -> list[Call]:
        return self.protocol.metadata(model, _version(version))


Asked = tuple[str, Any, bool, bool, int | None]  # one score of a batch: the arguments of ClientSettings.score


def batch_calls(settings: ClientSettings, asked: list[Asked]) -> tuple[list[Call], list[int]]:
    """The calls of a batch, and how many of its scores each of them answers, 0 where the answer is the one itself.

    RESP: a command each. HTTP: scores that follow each other with the same options are one array request.
    """
    if settings.address.protocol == "resp":
        return [call for item in asked for call in settings.score(*item)], [0] * len(asked)
    groups: list[tuple[tuple[Any, ...], list[Any]]] = []
    for pipeline, event, *options in asked:
        key = (pipeline, *options)
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        groups[-1][1].append(event)
    calls = [call for (pipeline, *options), events in groups for call in settings.score(pipeline, events, *options)]
    return calls, [len(events) for _, events in groups]


def batch_results(found: list[Any], sizes: list[int]) -> list[Any]:
    """One result or error per score of a batch."""
    results: list[Any] = []
    for result, size in zip(found, sizes):
        if size == 0:
            results.append(result)
        else:
            results += [result] * size if isinstance(result, ClientError) else result
    return results


def time_of(value: Any) -> Timestamp:
    """A Timestamp of what as_of may be. Raises InvalidRequest."""
    try:
        return value if isinstance(value, Timestamp) else Timestamp.of(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(str(error), code="invalid_time", path="$.as_of") from None


def _priority(priority: int | None) -> int | None:
    if priority is not None and not 1 <= priority <= 7:
        raise ValueError(f"priority: expected 1 (first) to 7, got {priority!r}")
    return priority


def _version(version: str | int | None) -> str | None:
    return None if version is None else str(version)


def _events(events: Any) -> Any:
    """One event as it is, several as a list."""
    if isinstance(events, (Event, Mapping, list)):
        return events
    if isinstance(events, Sequence) and not isinstance(events, (str, bytes)):
        return list(events)
    raise InvalidEvent(
        f"expected an Event, a dict of its fields, or a list of them, got {type(events).__name__}",
        code="invalid_event",
        path="$",
    )


def _all_safe(events: Any) -> bool:
    return all(map(is_safe, events)) if isinstance(events, list) else is_safe(events)
