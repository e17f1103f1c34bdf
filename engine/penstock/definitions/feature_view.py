"""Entities and feature views (control path): which windowed aggregations are kept for whom. Typed values only."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import msgspec

from .durations import Window
from .event import Event

__all__ = ["FUNCTIONS", "Aggregation", "Entity", "FeatureView"]

#: Aggregation functions; those that need no column are marked False.
FUNCTIONS: dict[str, bool] = {
    "count": False,
    "sum": True,
    "mean": True,
    "min": True,
    "max": True,
    "var_samp": True,
    "var_pop": True,
    "stddev_samp": True,
    "stddev_pop": True,
    "first": True,
    "last": True,
    "distinct_count": True,
}


class Entity(msgspec.Struct, frozen=True):
    """Whom features are about: a customer, a terminal.

    `key` is the event field that holds its key (default: the entity's name). `type` is str or int where keys of the
    other kind are to be read as the same key; left out, the key has the type of the source's field, and `1` and `"1"`
    are different keys.
    """

    name: str
    key: str | None = None
    type: type | None = None


class _AggregationFields(msgspec.Struct, frozen=True):
    function: str
    column: str | None = None


class Aggregation(_AggregationFields, frozen=True, kw_only=True):
    """One function over one column in one or more windows.

    function: count, sum, mean, min, max, var_samp, var_pop, stddev_samp, stddev_pop, first, last, distinct_count.
    `count()` counts rows, `count(column)` non-null values; every function skips nulls (S11).
    windows: lengths such as "1h" or "7d", timedeltas, or Lifetime.
    where: an expression over the event's fields; rows for which it is not true do not count.
    default: the value where the window is empty, for training and serving alike (S11).
    closed: which edges belong to the window: "right" (T-W, T], "both" [T-W, T], "left" [T-W, T) (S2). A window of
        length 0 with "both" is the instant T.
    ttl: for first and last, how old the value's event may be (S9); it forgets nothing, see FeatureView.retention.
    name: replaces `{function}[_{column}]` in the feature's name.
    """

    windows: Sequence[Window]
    where: str | None = None
    default: float | int | str | bool | None = None
    closed: Literal["right", "both", "left"] = "right"
    ttl: str | timedelta | None = None
    name: str | None = None


class _FeatureViewFields(msgspec.Struct, frozen=True):
    name: str


class FeatureView(_FeatureViewFields, frozen=True, kw_only=True):
    """Aggregations of one event type per entity.

    include_request_event: whether the event being scored counts in its own features (S8).
    key: the source's field that holds the entity's key, where it is not the entity's own.
    retention: how long an entity is kept after its newest event, such as "90d", where the view has Lifetime windows; it
        is then unknown, and starts anew with an event that comes later than that and the source's lateness. Left out,
        Lifetime grows with every entity there ever was (S9).
    """

    entity: str | Entity
    source: type[Event]
    aggregations: Sequence[Aggregation]
    include_request_event: bool = False
    key: str | None = None
    retention: str | timedelta | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: Any) -> bool:
        return self is other
