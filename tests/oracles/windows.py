"""Slow, obvious window state: plain lists, exact fractions, every read from scratch (control path, tests only).

The one thing that must stay true: a read looks at nothing but the events applied so far, in the order S6.
Events are (event_time, values, where_mask) in order of arrival; columns are named types as in WindowStore.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = 1, 2, 3, 4


class Output(NamedTuple):
    function: str
    column: int | None = None
    where: int | None = None
    window: int | None = None  # microseconds; None: Lifetime
    closed: str = "right"
    ttl: int | None = None


class Event(NamedTuple):
    event_time: int
    values: tuple[Any, ...] = ()
    where_mask: int = 0


def nearest(x: Fraction) -> float:
    """The double nearest to x, ties to even; an infinity beyond the largest; +0.0 for zero."""
    if x == 0:
        return 0.0
    try:
        return x.numerator / x.denominator  # int / int is correctly rounded
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def two_sum(a: float, b: float) -> tuple[float, float]:
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def fast_two_sum(a: float, b: float) -> tuple[float, float]:
    s = a + b
    return s, b - (s - a)


def two_prod(a: float, b: float) -> tuple[float, float]:
    def split(x: float) -> tuple[float, float]:
        c = 134217729.0 * x
        high = c - (c - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def dd_div(h: float, low: float, d: float) -> tuple[float, float]:
    q = h / d
    t, u = two_prod(q, d)
    s, e = two_sum(h, -t)
    return fast_two_sum(q, (s + ((e - u) + low)) / d)


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def variance(sx: Fraction, sxx: Fraction, n: int, divisor: int) -> float:
    """S13 in the operation sequence that ext/exact_sum.h fixes."""
    if sxx == 0:
        return 0.0
    p = floor_log2(sxx) >> 1
    scaled = sx / Fraction(2) ** p
    ah = nearest(scaled)
    al = nearest(scaled - Fraction(ah))
    scaled = sxx / Fraction(2) ** (2 * p)
    bh = nearest(scaled)
    bl = nearest(scaled - Fraction(bh))
    h, low = two_prod(ah, ah)
    low = low + 2.0 * (ah * al)
    h, low = fast_two_sum(h, low)
    q, r = dd_div(h, low, float(n))
    s, e = two_sum(bh, -q)
    t, f = two_sum(bl, -r)
    e = e + t
    s, e = fast_two_sum(s, e)
    e = e + f
    s, e = fast_two_sum(s, e)
    v, w = dd_div(s, e, float(divisor))
    v = v + w
    if not v > 0.0:
        return 0.0
    try:
        return math.ldexp(v, 2 * p)
    except OverflowError:
        return math.inf


class WindowOracle:
    """The same questions as WindowStore answers, for any number of entities."""

    def __init__(self, columns: list[str], outputs: list[Any], groups: list[int] | None = None):
        self.columns = columns
        self.outputs = outputs
        self.groups = groups or [len(outputs)]
        self.events: dict[Any, list[Event]] = {}

    def apply(self, key: Any, event_time: int, values: Any = (), where_mask: int = 0) -> None:
        self.events.setdefault((type(key), key), []).append(Event(event_time, tuple(values), where_mask))

    def read(self, key: Any, group: int = 0, as_of: int = 0, extra: Any = None) -> list[tuple[Any, int]]:
        known = (type(key), key) in self.events
        events = list(self.events.get((type(key), key), []))
        if extra is not None:
            events.append(Event(*extra))
        events.sort(key=lambda e: e.event_time)  # stable: arrival order among equal times (S6)
        start = sum(self.groups[:group])
        unknown = NULL_VALUE if known or extra is not None else NOT_FOUND
        return [
            self.evaluate(output, events, as_of, unknown) for output in self.outputs[start : start + self.groups[group]]
        ]

    def evaluate(self, o: Any, events: list[Event], as_of: int, unknown: int) -> tuple[Any, int]:
        rows = []
        for event in events:
            t = event.event_time
            if o.window is not None and (t <= as_of - o.window if o.closed == "right" else t < as_of - o.window):
                continue
            if t > as_of or (o.closed == "left" and t == as_of):
                continue
            if o.where is not None and not event.where_mask >> o.where & 1:
                continue
            value = None if o.column is None else event.values[o.column]
            if o.column is not None and (value is None or value != value):
                continue
            rows.append((t, value))
        n = len(rows)
        values = [value for _, value in rows]
        if o.function in ("count", "count_col"):
            return n, PRESENT
        if o.function == "distinct_count":
            return len(set(values)), PRESENT  # -0.0 == 0.0 and they hash alike
        if n == 0:
            return None, unknown
        kind = self.columns[o.column]
        if o.function in ("first", "last"):
            t, value = rows[0] if o.function == "first" else rows[-1]
            if o.ttl is not None and as_of - t > o.ttl:
                return None, OUTSIDE_MAX_AGE
            return value, PRESENT
        if o.function == "min":
            return min(values, key=lambda v: (v, math.copysign(1.0, v)) if kind == "float64" else v), PRESENT
        if o.function == "max":
            return max(values, key=lambda v: (v, math.copysign(1.0, v)) if kind == "float64" else v), PRESENT
        sx = sum(Fraction(v) for v in values)
        if o.function == "sum":
            if kind == "float64" or not -(2**63) <= sx < 2**63:
                return nearest(sx), PRESENT
            return int(sx), PRESENT
        if o.function == "mean":
            return nearest(sx) / float(n), PRESENT
        kind, estimator = o.function.split("_")
        if estimator == "samp" and n < 2:
            return None, NULL_VALUE
        sxx = sum(Fraction(v) ** 2 for v in values)
        var = variance(sx, sxx, n, n - 1 if estimator == "samp" else n)
        return (var if kind == "var" else math.sqrt(var)), PRESENT
