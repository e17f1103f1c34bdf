"""Event types (control path): a class per kind of event, its fields typed, its time rules given in the class line.

An Event is a msgspec Struct, so it is constructed like any dataclass and is not tracked by the garbage collector.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from datetime import timedelta
from typing import Any, dataclass_transform

import msgspec

from ..timestamp import Timestamp, TimestampUnit
from .durations import duration_us

__all__ = ["Event", "EventOptions", "Field", "event_fields"]


class EventOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Time rules of an event type (S14, S16). Lengths are in microseconds."""

    time: str | None = None
    event_id: str | None = None
    lateness: int = 3600 * 10**6
    max_skew: int = 300 * 10**6
    retry_window: int = 3600 * 10**6


class Field(msgspec.Struct, frozen=True):
    """One field of an event: its slot type, whether it may be null, its default, and the unit of integer times."""

    name: str
    type: str
    optional: bool
    required: bool
    default: Any = None
    unit: str | None = None


@dataclass_transform(field_specifiers=(msgspec.field,))
class EventMeta(msgspec.StructMeta):
    """Takes the options of an Event out of its class line; the rest is msgspec's."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        time: str | None = None,
        event_id: str | None = None,
        lateness: str | timedelta | None = None,
        max_skew: str | timedelta | None = None,
        retry_window: str | timedelta | None = None,
        **struct_options: Any,
    ) -> Any:
        cls = super().__new__(mcls, name, bases, namespace, **struct_options)
        given = {"time": time, "event_id": event_id}
        try:
            for option, value in (("lateness", lateness), ("max_skew", max_skew), ("retry_window", retry_window)):
                given[option] = None if value is None else duration_us(value)  # type: ignore[assignment]
        except ValueError as error:
            raise TypeError(f"event {name}: {option}: {error}") from None
        inherited = getattr(cls, "__event_options__", EventOptions())
        type.__setattr__(
            cls,
            "__event_options__",
            msgspec.structs.replace(inherited, **{key: value for key, value in given.items() if value is not None}),
        )
        return cls

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **_: Any) -> None:
        super().__init__(name, bases, namespace)


class Event(msgspec.Struct, metaclass=EventMeta, gc=False, forbid_unknown_fields=True):
    """Base class of event types.

    Fields are annotated str, int, float, bool or Timestamp, each optionally `| None`. Class options:

    - `time`: the field that holds the event time; may be left out where there is one Timestamp field.
    - `event_id`: the field that identifies a repeated event (S16).
    - `lateness` ("1h"): how far behind the newest accepted event one may be and still be applied (S14).
    - `max_skew` ("5m"): how far ahead of the ingest clock an event may be before it is quarantined (S14).
    - `retry_window` ("1h"): with lateness, how long an event id is remembered (S16).
    """


_SLOT_TYPES: dict[Any, str] = {str: "string", int: "int64", float: "float64", bool: "bool", Timestamp: "timestamp"}


def event_fields(event: type[Event]) -> list[Field]:
    """The fields of an event type, in order.

    Raises TypeError where a field's annotation is not str, int, float, bool or Timestamp, or one of them `| None`.
    """
    hints = _hints(event)
    fields = []
    for info in msgspec.structs.fields(event):
        annotation = hints[info.name]
        optional = False
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            members = [m for m in typing.get_args(annotation) if m is not type(None)]
            optional = len(members) < len(typing.get_args(annotation))
            annotation = members[0] if len(members) == 1 else annotation
        unit = None
        if isinstance(annotation, TimestampUnit):
            unit, annotation = annotation.unit, Timestamp
        if annotation not in _SLOT_TYPES:
            shown = getattr(annotation, "__name__", annotation)
            raise TypeError(
                f"event {event.__name__}.{info.name}: expected str, int, float, bool or Timestamp "
                f"(each optionally `| None`), got {shown}"
            )
        default = info.default
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()  # type: ignore[misc]
        fields.append(
            Field(
                name=info.name,
                type=_SLOT_TYPES[annotation],
                optional=optional,
                required=info.required,
                default=None if default is msgspec.NODEFAULT else default,
                unit=unit,
            )
        )
    return fields


def _hints(event: type[Event]) -> dict[str, Any]:
    """Annotations with their strings evaluated. `Timestamp(unit=...)` is a value, which get_type_hints refuses."""
    hints: dict[str, Any] = {}
    for cls in reversed(event.__mro__):
        namespace = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
        for name, annotation in inspect.get_annotations(cls).items():
            hints[name] = eval(annotation, dict(namespace), {}) if isinstance(annotation, str) else annotation
    return hints
