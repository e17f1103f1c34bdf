"""The exact engine (control path): a view's values from raw events, by lists and fractions, each read from scratch.

What `parity --independent` and the tests' oracles compare the window kernel with; slow on purpose, after S2, S5 to S9,
S11 to S14 and S17 alone. What must stay true: it shares no rule with the kernel, and a value depends on nothing but the
entity's own events, T, K, and the watermark of the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from .exact_condition import condition

if TYPE_CHECKING:
    from ..plan import Plan

__all__ = ["ExactOutput", "ExactValue", "ExactView", "RawEvent", "canonical_key", "exact_sum", "exact_view", "nearest"]

Row = Mapping[str, Any]

PRESENT = "PRESENT"
NULL_VALUE = "NULL_VALUE"
NOT_FOUND = "NOT_FOUND"
OUTSIDE_MAX_AGE = "OUTSIDE_MAX_AGE"
INVALID = "INVALID"


class RawEvent(NamedTuple):
    """An event of one entity as the log has it. values: field -> value, times in microseconds, None for null."""

    time: int
    ingest_time: int
    sequence: int
    outcome: str
    values: Row


class ExactValue(NamedTuple):
    """A value and its status (S17); the value is None where the status says that there is none."""

    value: Any
    status: str


class ExactOutput(NamedTuple):
    """One feature. type: of its column; where: of a row, whether it counts (only True does); window: microseconds, None
    for Lifetime; result: the feature's own type."""

    name: str
    function: str
    column: str | None
    type: str
    where: Callable[[Row], bool | None] | None
    window: int | None
    closed: str
    ttl: int | None
    default: Any
    result: str


class ExactView(NamedTuple):
    """A view's outputs and the lengths that bound them, in microseconds. retention: how long Lifetime keeps an entity,
    where the view says so."""

    outputs: tuple[ExactOutput, ...]
    lateness: int
    retention: int | None

    @property
    def reach(self) -> int | None:
        """How old an event may be and still make the entity known; None: for ever (S9)."""
        lengths = [output.window for output in self.outputs]
        if self.retention is not None or None in lengths:
            return self.retention
        return max((length for length in lengths if length is not None), default=0)

    def values(
        self,
        events: Iterable[RawEvent],
        as_of: int,
        before: int | None = None,
        watermark: int | None = None,
        request: Row | None = None,
    ) -> list[ExactValue]:
        """Every output as of (T, K), its default= applied.

        events: of one entity, in any order; before: K, the sequence before which they count (None: all do); watermark:
        of the view's source at K (None: it has none); request: the row being scored, where it counts though it is not
        among the applied events (S8).
        """
        return [
            filled(output, found)
            for output, found in zip(self.outputs, self.bare(events, as_of, before, watermark, request))
        ]

    def bare(
        self,
        events: Iterable[RawEvent],
        as_of: int,
        before: int | None = None,
        watermark: int | None = None,
        request: Row | None = None,
    ) -> list[ExactValue]:
        """As values(), without defaults."""
        if watermark is not None and as_of < watermark - self.lateness:  # S14
            return [ExactValue(None, INVALID) for _ in self.outputs]
        rows = [(event.time, event.values) for event in self.kept(events, before) if event.time <= as_of]
        if request is not None:
            rows.append((as_of, request))  # the newest at T
        reach = self.reach
        known = any(reach is None or time >= as_of - reach for time, _ in rows)
        if not known:
            rows = []
        empty = NULL_VALUE if known else NOT_FOUND
        return [one(output, rows, as_of, empty) for output in self.outputs]

    def kept(self, events: Iterable[RawEvent], before: int | None) -> list[RawEvent]:
        """The applied events before K, in the order of S6; those of an earlier life of the entity have gone (S9)."""
        applied = [e for e in events if e.outcome == "applied" and (before is None or e.sequence < before)]
        if self.retention is not None:
            life: list[RawEvent] = []
            newest = None
            for event in sorted(applied, key=lambda e: e.sequence):
                if newest is not None and event.time > newest + self.retention + self.lateness:
                    life, newest = [], None
                life.append(event)
                newest = event.time if newest is None else max(newest, event.time)
            applied = life
        return sorted(applied, key=lambda e: (e.time, e.ingest_time, e.sequence))


def exact_view(plan: Plan, name: str) -> ExactView:
    """A view of a compiled app."""
    view = plan.views[name]
    store = plan.stores[view.store]
    fields = plan.events[view.event].fields
    types = {field.name: field.type for field in fields}
    outputs = []
    for o in view.outputs:
        column = None if o.column is None else fields[store.columns[o.column]].name
        where = None if o.where is None else condition(store.wheres[o.where], types)
        outputs.append(
            ExactOutput(
                name=o.name,
                function="count" if o.function == "count_col" else o.function,
                column=column,
                type="int64" if column is None else types[column],
                where=where,
                window=o.window,
                closed=o.closed,
                ttl=o.ttl,
                default=o.default,
                result=o.type,
            )
        )
    return ExactView(tuple(outputs), store.lateness, view.retention)


def canonical_key(value: str | int, key_type: str | None) -> tuple[type, str | int]:
    """A key as it is told apart. key_type: string or int64 where the entity says which it is; else 1 and "1" differ."""
    if key_type == "string":
        value = str(value)
    elif key_type == "int64" and isinstance(value, str):
        digits = value.removeprefix("-")
        if digits.isascii() and digits.isdecimal() and str(int(value)) == value and -(2**63) <= int(value) < 2**63:
            value = int(value)
    return type(value), value


def filled(output: ExactOutput, found: ExactValue) -> ExactValue:
    """default= stands for null, for never seen and for too old, never for INVALID (S11)."""
    if output.default is None or found.status in (PRESENT, INVALID):
        return found
    default = float(output.default) if output.result == "float64" else output.default
    return ExactValue(default, found.status if found.status == OUTSIDE_MAX_AGE else PRESENT)


def in_window(output: ExactOutput, time: int, as_of: int) -> bool:
    """S2; a Lifetime window has no left edge."""
    if output.closed == "left" and time == as_of:
        return False
    if output.window is None:
        return time <= as_of
    since = as_of - output.window
    return (since < time if output.closed == "right" else since <= time) and time <= as_of


def one(output: ExactOutput, rows: Sequence[tuple[int, Row]], as_of: int, empty: str) -> ExactValue:
    """One output over the entity's rows, oldest first. empty: the status of null where no row has a value."""
    window = [
        (time, row)
        for time, row in rows
        if in_window(output, time, as_of) and (output.where is None or output.where(row) is True)
    ]
    function = output.function
    if output.column is None:
        return ExactValue(len(window), PRESENT)
    column = output.column
    seen = [(time, row[column]) for time, row in window if not is_null(row[column])]
    values = [value for _, value in seen]
    n = len(values)
    if function == "count":
        return ExactValue(n, PRESENT)
    if function == "distinct_count":
        return ExactValue(len(set(values)), PRESENT)
    if n == 0:
        return ExactValue(None, empty)
    if function in ("first", "last"):
        time, value = seen[0] if function == "first" else seen[-1]
        if output.ttl is not None and as_of - time > output.ttl:
            return ExactValue(None, OUTSIDE_MAX_AGE)
        return ExactValue(value, PRESENT)
    if function in ("min", "max"):
        return ExactValue((min if function == "min" else max)(values, key=rank), PRESENT)
    total = exact_sum(values)
    if function == "sum":
        if output.type != "float64" and -(2**63) <= total < 2**63:
            return ExactValue(int(total), PRESENT)
        return finite(nearest(total))
    if function == "mean":
        rounded = nearest(total)
        return finite(None if rounded is None else rounded / n)
    if function in ("var_samp", "var_pop", "stddev_samp", "stddev_pop"):
        divisor = n * (n - 1) if function.endswith("samp") else n * n
        if divisor == 0:
            return ExactValue(None, NULL_VALUE)  # S12
        variance = quotient(n * exact_sum([Fraction(v) ** 2 for v in values]) - total * total, divisor)
        if variance is None or function.startswith("var"):
            return finite(variance)
        return finite(math.sqrt(variance))
    raise AssertionError(f"the exact engine has no {function}")


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def rank(value: Any) -> Any:
    """The order of min and max. No result may depend on the order of arrival (S13): -0.0 stands below 0.0."""
    return (value, math.copysign(1.0, value)) if isinstance(value, float) else value


def exact_sum(values: Iterable[Any]) -> Fraction:
    """The sum with nothing lost: over the largest of the denominators, which are all powers of two."""
    ratios = [value.as_integer_ratio() for value in values]
    largest = max((d for _, d in ratios), default=1)
    return Fraction(sum(n * (largest // d) for n, d in ratios), largest)


def nearest(x: Fraction) -> float | None:
    """The double nearest to x, ties to even; None beyond the largest."""
    try:
        return x.numerator / x.denominator  # of integers: rounded once
    except OverflowError:
        return None


def quotient(x: Fraction, divisor: int) -> float | None:
    """x rounded once to the digits of a double, whatever its exponent, then divided as doubles are (S13)."""
    if x == 0:
        return 0.0
    scale = Fraction(2) ** (x.numerator.bit_length() - x.denominator.bit_length())
    digits = nearest(x / scale)
    assert digits is not None
    return nearest(Fraction(digits / float(divisor)) * scale)


def finite(value: float | None) -> ExactValue:
    return ExactValue(None, INVALID) if value is None or math.isinf(value) else ExactValue(value, PRESENT)
