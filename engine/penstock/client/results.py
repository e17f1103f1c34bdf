"""What calls return (control path): plain frozen values, the same over every protocol."""

from __future__ import annotations

from typing import Any

import msgspec

from ..timestamp import Timestamp

__all__ = ["Decision", "FeatureRows", "Ingested", "ModelMetadata", "Tensor"]


class Decision(msgspec.Struct, frozen=True):
    """What one event was answered: the fields of the engine's Decision, the score with the same bits.

    features and statuses: where `explain` was asked for, by feature name; times are RFC 3339 text. degraded: whether a
    feature of a view could not be known, or the event was late or quarantined.
    """

    id: str
    action: str
    score: float | None
    reasons: tuple[str, ...]
    model: str | None
    model_version: str | None
    arms: dict[str, str | None]
    outcome: str
    features: dict[str, Any] | None = None
    statuses: dict[str, str] | None = None
    degraded: bool = False


class Ingested(msgspec.Struct, frozen=True):
    """How many events were taken, and how many of each outcome (applied, duplicate, late, quarantined)."""

    accepted: int
    outcomes: dict[str, int]


class FeatureRows(msgspec.Struct, frozen=True):
    """A view's values: per key one dict of values and one of statuses (S17), in the order of the keys.

    as_of: the time they were read as of; None where the server chose it and does not tell (RESP). Times among the
    values are RFC 3339 text.
    """

    view: str
    as_of: Timestamp | None
    rows: list[dict[str, Any]]
    statuses: list[dict[str, str]]


class Tensor(msgspec.Struct, frozen=True):
    """An input or output of a model. shape: with the batch dimension; -1 where it varies."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True):
    """What the server says of a model (Open Inference Protocol)."""

    name: str
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    versions: list[str] = []
