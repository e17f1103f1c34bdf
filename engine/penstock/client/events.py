"""Events as bytes (control path): dicts and Event Structs to JSON or MessagePack, with the server's idea of a time.

What must stay true: a value that the wire cannot carry is refused with its path, never altered in silence; only what
SEMANTICS says is null (NaN, S11) becomes null, and only what it floors (S1) is floored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from ..definitions.event import Event, event_fields
from ..timestamp import Timestamp
from .errors import InvalidEvent

__all__ = ["event_name", "is_safe", "json_bytes", "json_list", "packed"]

_PLAIN = (str, bool, type(None))
_UNITS = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": -1000}
_units: dict[type, dict[str, str | None]] = {}

_encode_json = msgspec.json.Encoder().encode
_encode_pack = msgspec.msgpack.Encoder().encode


def json_bytes(event: Any) -> bytes:
    """One event as a JSON object. Raises InvalidEvent."""
    return _encoded(_encode_json, _as_dict(event, "$", False), "$")


def json_list(events: list[Any]) -> bytes:
    """Events as a JSON array. Raises InvalidEvent with the place of the first that cannot be sent."""
    return (
        b"["
        + b",".join(
            _encoded(_encode_json, _as_dict(event, f"$[{i}]", False), f"$[{i}]") for i, event in enumerate(events)
        )
        + b"]"
    )


def packed(event: Any, place: str = "$") -> bytes:
    """One event as a MessagePack map. Raises InvalidEvent."""
    return _encoded(_encode_pack, _as_dict(event, place, True), place)


def event_name(event_type: str | type[Event]) -> str:
    """The name of an event type, given as such or as its class."""
    return event_type if isinstance(event_type, str) else event_type.__name__


def is_safe(event: Any) -> bool:
    """Whether the event may be sent twice: its type has an event_id, and the event has one (S16)."""
    if not isinstance(event, Event):
        return False
    field = event.__event_options__.event_id  # type: ignore[attr-defined]
    return field is not None and getattr(event, field, None) is not None


def _encoded(encode: Callable[[Any], bytes], event: dict[str, Any], place: str) -> bytes:
    try:
        return encode(event)
    except (TypeError, OverflowError, UnicodeEncodeError, RecursionError) as error:
        for name, value in event.items():  # which one it was
            try:
                encode({name: value})
            except (TypeError, OverflowError, UnicodeEncodeError, RecursionError):
                shown = repr(name)[1:-1] if isinstance(name, str) else repr(name)
                raise InvalidEvent(f"cannot be sent: {error}", code="invalid_event", path=f"{place}.{shown}") from None
        raise InvalidEvent(str(error), code="invalid_event", path=place) from None


def _as_dict(event: Any, place: str, infinities: bool) -> dict[str, Any]:
    if isinstance(event, Event):
        units = _units_of(type(event))
        return {name: _value(getattr(event, name), unit, f"{place}.{name}", infinities) for name, unit in units.items()}
    if isinstance(event, Mapping):
        return {name: _value(value, "?", f"{place}.{name}", infinities) for name, value in event.items()}
    raise InvalidEvent(
        f"expected an Event or a dict of its fields, got {type(event).__name__}", code="invalid_event", path=place
    )


def _units_of(kind: type[Event]) -> dict[str, str | None]:
    """Field -> unit of its integer times; None for a time that is sent as text, "?" for what is no time."""
    units = _units.get(kind)
    if units is None:
        units = {f.name: f.unit if f.type == "timestamp" else "?" for f in event_fields(kind)}
        _units[kind] = units
    return units


def _value(value: Any, unit: str | None, path: str, infinities: bool) -> Any:
    """A field's value as the wire has it. unit "?": nothing is known of the field, a time is sent as text."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        if math.isinf(value) and not infinities:
            raise InvalidEvent("JSON has no infinity; RESP carries it", code="invalid_event", path=path)
        return None if value != value else value  # S11
    if kind is int:
        return value if unit is not None else _time(value, unit, path)
    if isinstance(value, Timestamp):
        return _time(value, unit, path)
    if isinstance(value, datetime) or kind.__name__ == "datetime64":
        return None if value != value else _time(value, unit, path)  # NaT
    if isinstance(value, (int, float, str)) and not hasattr(value, "dtype"):
        base = int if isinstance(value, int) else float if isinstance(value, float) else str
        return _value(base(value), unit, path, infinities)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of numpy
        return _value(value.item(), unit, path, infinities)
    return value


def _time(value: Any, unit: str | None, path: str) -> Any:
    try:
        at = Timestamp.of(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidEvent(str(error), code="invalid_event", path=path) from None
    if unit is None or unit == "?":
        return at.isoformat()
    factor = _UNITS[unit]
    return int(at) // factor if factor > 0 else int(at) * -factor
