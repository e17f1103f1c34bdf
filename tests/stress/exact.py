"""Views by exact fractions over plain lists (tests only): the values and statuses of a read, bit for bit.

Written from SEMANTICS (S2, S6, S9, S11 to S14, S17) alone; it shares no code and no rule with the window kernel, the
Plan, or the other oracles. Slow and obvious: a read looks at every event that there is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from stress.apps import Aggregate, App, View, duration
from stress.stream import Read, Seen, Stream, key_field, key_of

Value = tuple[Any, str]


def names_of(view: View) -> list[tuple[str, Aggregate, int | None]]:
    """(feature's name, aggregate, window) in the order of the definition."""
    found = []
    for a in view.aggregates:
        for w in a.windows:
            label = "lifetime" if w is None else duration(w).strip('"')
            base = a.name or (f"{a.function}_{a.column}" if a.column else a.function)
            alone = a.name is not None and len(a.windows) == 1
            found.append((f"{view.name}.{base}" if alone else f"{view.name}.{base}_{label}", a, w))
    return found


# conditions, Kleene's: None is unknown


def holds(tree: Any, row: dict[str, Any]) -> bool | None:
    match tree:
        case ("is true", column):
            return None if row[column] is None else row[column]
        case ("null", column):
            return row[column] is None
        case ("not null", column):
            return row[column] is not None
        case ("not", inner):
            value = holds(inner, row)
            return None if value is None else not value
        case ("and", a, b):
            both = (holds(a, row), holds(b, row))
            return False if False in both else None if None in both else True
        case ("or", a, b):
            both = (holds(a, row), holds(b, row))
            return True if True in both else None if None in both else False
        case ("in", column, values):
            return None if row[column] is None else row[column] in values
        case (operator, column, value):
            mine, other = row[column], value[1] if isinstance(value, tuple) else value
            if mine is None:
                return None
            if isinstance(mine, str):
                mine, other = mine.encode(), other.encode()
            return {
                "<": mine < other, "<=": mine <= other, ">": mine > other, ">=": mine >= other,
                "==": mine == other, "!=": mine != other,
            }[operator]  # fmt: skip
    raise ValueError(tree)


class ExactViews:
    """Reads of one stream's views."""

    def __init__(self, stream: Stream) -> None:
        self.app: App = stream.app
        self.events: dict[tuple[str, Any], list[Seen]] = {}
        self.seen = stream.seen
        self.rows: dict[Any, set[int]] = {}
        self.outputs = {v.name: names_of(v) for v in stream.app.views}
        for view in self.app.views:
            for event in stream.seen[view.source]:
                key = key_of(self.app, view, event.row[key_field(view, view.source)])
                self.events.setdefault((view.name, key), []).append(event)

    def visible(self, view: View, read: Read) -> list[Seen]:
        """In the order of S6: by event time, then as they came; the event that is scored is the newest at T."""
        found: list[Seen] = []
        newest = -math.inf
        lateness = self.app.source(view.source).lateness
        for event in self.events.get((view.name, read.key), ()):
            if (event.number >= read.before or not event.applied) and event.number != read.own:
                continue
            if view.retention is not None and event.at > newest + view.retention + lateness:
                found = []  # the entity starts anew
            newest = max(newest, event.at)
            found.append(event)
        return sorted((e for e in found if e.at <= read.at), key=lambda e: (e.at, e.number))

    def read(self, view: View, read: Read) -> dict[str, Value]:
        outputs = self.outputs[view.name]
        if read.at < read.watermark - self.app.source(view.source).lateness:
            return {name: (None, "INVALID") for name, _, _ in outputs}
        rows = self.visible(view, read)
        reach: float = max(math.inf if w is None else w for _, _, w in outputs)
        if any(w is None for _, _, w in outputs) and view.retention is not None:
            reach = view.retention
        known = any(e.at >= read.at - reach for e in rows)
        if not known:
            rows = []
        found: dict[str, Value] = {}
        times = [e.at for e in rows]
        for name, a, w in outputs:
            # right: T-W < t <= T; both: T-W <= t <= T; left: T-W <= t < T
            edge = bisect_right if a.closed == "right" else bisect_left
            start = 0 if w is None else edge(times, read.at - w)
            end = bisect_left(times, read.at) if a.closed == "left" else len(times)
            counts = self.counted(view, a)
            value, status = aggregate(a, [e for e in rows[start:end] if e.number in counts], read.at)
            if status == "NULL_VALUE" and not known:
                status = "NOT_FOUND"
            if a.default is not None and value is None and status != "INVALID":
                value = a.default
                status = status if status == "OUTSIDE_MAX_AGE" else "PRESENT"
            found[name] = (value, status)
        return found

    def counted(self, view: View, a: Aggregate) -> set[int]:
        """Numbers of the events that an aggregate counts wherever they stand: not null, where= true."""
        place = (view.source, a.column, a.where)
        if place not in self.rows:
            self.rows[place] = {
                e.number
                for e in self.seen[view.source]
                if (a.column is None or e.row[a.column] is not None)
                and (a.where is None or holds(a.where, e.row) is True)
            }
        return self.rows[place]


def aggregate(a: Aggregate, rows: list[Seen], at: int) -> Value:
    """One function over rows in the order of S6."""
    n = len(rows)
    if a.function == "count":
        return n, "PRESENT"
    values = [e.row[a.column] for e in rows]
    if a.function == "distinct_count":
        return len(set(values)), "PRESENT"
    if n == 0:
        return None, "NULL_VALUE"
    match a.function:
        case "first" | "last":
            event = rows[0 if a.function == "first" else -1]
            if a.ttl is not None and at - event.at > a.ttl:
                return None, "OUTSIDE_MAX_AGE"
            return event.row[a.column], "PRESENT"
        case "min":
            return min(values, key=signed), "PRESENT"
        case "max":
            return max(values, key=signed), "PRESENT"
    integers = not isinstance(values[0], float)
    scale, numbers = whole(values)
    sx = sum(numbers)
    total = rounded(Fraction(sx, scale))
    if a.function == "sum":
        if integers and -(2**63) <= sx < 2**63:
            return sx, "PRESENT"
        return finite(total)
    if a.function == "mean":
        return finite(total / n) if math.isfinite(total) else (None, "INVALID")
    estimator = a.function.split("_")[1]
    if estimator == "samp" and n < 2:
        return None, "NULL_VALUE"
    numerator = Fraction(n * sum(x * x for x in numbers) - sx * sx, scale * scale)
    variance = scaled_quotient(numerator, float(n * (n - 1) if estimator == "samp" else n * n))
    return finite(variance if a.function.startswith("var") else math.sqrt(variance))


def signed(value: Any) -> Any:
    """Order of min and max: -0.0 below 0.0, so that no order of arrival decides."""
    return (value, math.copysign(1.0, value)) if isinstance(value, float) else value


def whole(values: list[Any]) -> tuple[int, int | list[int]] | Any:
    """The values as integers over one denominator: (denominator, numerators)."""
    ratios = [(v, 1) if not isinstance(v, float) else v.as_integer_ratio() for v in values]
    scale = max(d for _, d in ratios)
    return scale, [int(p) * (scale // d) for p, d in ratios]


def rounded(x: Fraction) -> float:
    """The double nearest to x, ties to even; infinite beyond the largest."""
    try:
        return x.numerator / x.denominator  # int / int is rounded once
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def scaled_quotient(numerator: Fraction, divisor: float) -> float:
    """The numerator rounded once to the bits of a double (its exponent has no end), then divided; infinite beyond."""
    if numerator == 0:
        return 0.0
    power = numerator.numerator.bit_length() - numerator.denominator.bit_length()
    bits = rounded(numerator / Fraction(2) ** power)  # between 1/2 and 2
    try:
        return math.ldexp(bits / divisor, power)
    except OverflowError:
        return math.inf


def finite(x: float) -> Value:
    return (x, "PRESENT") if math.isfinite(x) else (None, "INVALID")


def read_all(stream: Stream, reads: Iterable[Read]) -> dict[Read, dict[str, Value]]:
    views = {v.name: v for v in stream.app.views}
    exact = ExactViews(stream)
    return {r: exact.read(views[r.view], r) for r in reads}
