"""The exact engine, rule by rule: every expectation is written out by hand from SEMANTICS."""

import math
from fractions import Fraction

import pytest

from penstock.offline.exact import ExactOutput, ExactView, RawEvent, canonical_key, exact_sum, nearest
from penstock.offline.exact_condition import condition, evaluate

HUGE = 1.7976931348623157e308


def output(function, window=10, column="x", kind="float64", closed="right", **more):
    result = "int64" if function in ("count", "distinct_count") else kind
    given = {"where": None, "ttl": None, "default": None, **more}
    return ExactOutput(
        name=function,
        function=function,
        column=column,
        type=kind,
        window=window,
        closed=closed,
        result=result,
        **given,
    )


def view(*outputs, lateness=0, retention=None):
    return ExactView(outputs, lateness, retention)


def stream(*rows):
    """Events (time, value[, outcome]), in the order in which they came."""
    return [
        RawEvent(row[0], 1000 + i, i, row[2] if len(row) > 2 else "applied", {"x": row[1]})
        for i, row in enumerate(rows)
    ]


def read(function, events, at=100, window=None, kind="float64", **more):
    (found,) = view(output(function, window, kind=kind, **more)).values(events, at)
    return found


def test_edges_of_the_windows():
    """S2; a length of 0 with both edges is T alone."""
    events = stream((89, 1.0), (90, 1.0), (91, 1.0), (100, 1.0), (101, 1.0))
    for closed, n in (("right", 2), ("both", 3), ("left", 2)):
        assert read("count", events, window=10, closed=closed).value == n
    assert read("count", events, window=0, closed="both") == (1, "PRESENT")
    assert read("count", events, closed="left").value == 3
    assert read("count", events).value == 4


def test_visible_is_what_was_applied_before_k_with_a_time_up_to_t():
    """S5: late, repeated and quarantined events never count; K cuts by sequence, T by time."""
    events = stream(
        (10, 1.0), (30, 2.0), (20, 4.0, "late"), (5, 8.0), (12, 16.0, "duplicate"), (9, 32.0, "quarantined")
    )
    of = view(output("sum", None), lateness=100)
    assert of.values(events, 30) == [(11.0, "PRESENT")]
    assert of.values(events, 29) == [(9.0, "PRESENT")]
    assert of.values(events, 30, before=3) == [(3.0, "PRESENT")]
    assert of.values(events, 30, before=0) == [(None, "NOT_FOUND")]


def test_the_row_being_scored_is_the_newest_at_t():
    """S8, S6."""
    events = stream((10, 1.0), (10, 2.0))
    of = view(output("last"), output("first"), output("count", column=None))
    assert of.values(events, 10, request={"x": 3.0}) == [(3.0, "PRESENT"), (1.0, "PRESENT"), (3, "PRESENT")]
    assert of.values([], 10, request={"x": None}) == [(None, "NULL_VALUE"), (None, "NULL_VALUE"), (1, "PRESENT")]
    assert of.values(events, 10) == [(2.0, "PRESENT"), (1.0, "PRESENT"), (2, "PRESENT")]


def test_an_event_that_came_later_with_an_older_time_is_no_news():
    events = stream((10, 1.0), (12, 2.0), (11, 3.0))
    assert read("last", events).value == 2.0
    assert read("last", events, at=11).value == 3.0


def test_what_state_no_longer_reaches_is_invalid_whatever_the_default():
    """S14, S11."""
    of = view(output("count", column=None), output("sum", default=7.0), lateness=5)
    events = stream((10, 1.0), (20, 2.0))
    assert of.values(events, 15, watermark=20) == [(1, "PRESENT"), (1.0, "PRESENT")]
    assert of.values(events, 14, watermark=20) == [(None, "INVALID"), (None, "INVALID")]


def test_an_entity_is_known_by_its_own_events_within_the_view():
    """S9: the longest window of the view, both edges; others have no part in it."""
    of = view(output("sum", 3), output("sum", 10))
    events = stream((10, None))
    assert [v.status for v in of.values(events, 20, watermark=20)] == ["NULL_VALUE", "NULL_VALUE"]
    assert [v.status for v in of.values(events, 21, watermark=21)] == ["NOT_FOUND", "NOT_FOUND"]
    assert read("sum", events, at=10**15).status == "NULL_VALUE"  # Lifetime without retention: for ever
    assert read("sum", stream((10, 1.0)), at=9).status == "NOT_FOUND"
    # What where= leaves out still makes it known.
    assert read("sum", stream((10, 1.0)), where=lambda row: row["x"] > 1.0).status == "NULL_VALUE"


def test_retention_bounds_lifetime_and_an_entity_begins_anew():
    """S9."""
    of = view(output("sum", None), output("count", None, column=None), lateness=5, retention=20)
    events = stream((10, 1.0), (30, 2.0))
    assert of.values(events, 30) == [(3.0, "PRESENT"), (2, "PRESENT")]
    assert of.values(events, 50) == [(3.0, "PRESENT"), (2, "PRESENT")]
    assert of.values(events, 51) == [(None, "NOT_FOUND"), (0, "PRESENT")]
    assert of.values(stream((10, 1.0), (35, 2.0)), 35) == [(3.0, "PRESENT"), (2, "PRESENT")]
    assert of.values(stream((10, 1.0), (36, 2.0)), 36) == [(2.0, "PRESENT"), (1, "PRESENT")]


def test_ttl_is_validity():
    events = stream((10, 1.0), (20, 2.0))
    assert read("last", events, at=25, ttl=5) == (2.0, "PRESENT")
    assert read("last", events, at=26, ttl=5) == (None, "OUTSIDE_MAX_AGE")
    assert read("last", events, at=26, ttl=5, default=9.0) == (9.0, "OUTSIDE_MAX_AGE")
    assert read("first", events, at=20, ttl=5) == (None, "OUTSIDE_MAX_AGE")


def test_nulls_counts_and_defaults():
    """S11, S12."""
    events = stream((1, None), (2, math.nan), (3, 4.0))
    assert read("count", events, column=None).value == 3
    assert read("count", events).value == 1
    assert read("sum", stream((1, None))) == (None, "NULL_VALUE")
    assert read("sum", stream((1, None)), default=2) == (2.0, "PRESENT")
    assert read("sum", [], default=2) == (2.0, "PRESENT")
    assert read("count", []) == (0, "PRESENT")
    assert read("var_samp", events) == (None, "NULL_VALUE")
    assert read("var_pop", events) == (0.0, "PRESENT")
    assert read("distinct_count", stream((1, -0.0), (2, 0.0), (3, 1.0))).value == 2


def test_arithmetic_is_exact_and_rounded_once():
    """S13."""
    tenth = stream(*((i, 0.1) for i in range(10)))
    assert read("sum", tenth).value == float(Fraction(0.1) * 10) == 1.0
    assert read("sum", stream((1, 1e300), (2, 1.0), (3, -1e300))).value == 1.0
    assert read("mean", stream((1, 1.0), (2, 2.0))).value == 1.5
    for function in ("var_samp", "var_pop", "stddev_samp", "stddev_pop"):
        assert read(function, stream(*((i, 0.1) for i in range(7)))) == (0.0, "PRESENT")
    assert read("var_pop", stream((1, 1.0), (2, 2.0), (3, 4.0))).value == (3 * 21 - 49) / 9.0
    assert read("var_samp", stream((1, 1.0), (2, 2.0), (3, 4.0))).value == 14.0 / 6.0
    assert read("stddev_samp", stream((1, 1.0), (2, 2.0), (3, 4.0))).value == math.sqrt(14.0 / 6.0)
    assert math.copysign(1, read("sum", stream((1, -0.0))).value) == 1


def test_integers_are_exact_and_past_64_bits_a_float():
    top = 2**63 - 1
    assert read("sum", stream((1, top), (2, -1), (3, 1)), kind="int64") == (top, "PRESENT")
    found = read("sum", stream((1, top), (2, top)), kind="int64").value
    assert (type(found), found) == (float, float(2 * top))
    assert read("sum", stream((1, True), (2, True)), kind="bool") == (2, "PRESENT")
    assert read("var_pop", stream((1, top), (2, top)), kind="int64") == (0.0, "PRESENT")


def test_beyond_the_double_range_is_invalid():
    """S17: no infinity, and no default."""
    events = stream((1, HUGE), (2, HUGE))
    for function in ("sum", "mean", "var_samp", "stddev_pop"):
        wide = events if function in ("sum", "mean") else stream((1, HUGE), (2, -HUGE))
        assert read(function, wide, default=1.0) == (None, "INVALID"), function
    assert read("sum", stream((1, HUGE), (2, HUGE), (3, -HUGE))).value == HUGE
    # The numerator alone is beyond it.
    assert read("var_pop", stream((1, 1e154), (2, -1e154), (3, 1e154), (4, -1e154))) == (1e308, "PRESENT")


def test_extremes_order_the_zeros():
    assert math.copysign(1, read("min", stream((1, 0.0), (2, -0.0))).value) == -1
    assert math.copysign(1, read("max", stream((1, -0.0), (2, 0.0), (3, -0.0))).value) == 1


def test_sums_and_rounding():
    assert exact_sum([0.1, 0.2]) == Fraction(0.1) + Fraction(0.2)
    assert exact_sum([]) == 0
    assert nearest(Fraction(2**53 + 1)) == 2.0**53
    assert nearest(Fraction(5e-324) / 2) == 0.0
    assert nearest(Fraction(HUGE) * 2) is None


@pytest.mark.parametrize(
    ("value", "kind", "key"),
    [
        ("1", None, (str, "1")),
        (1, None, (int, 1)),
        (1, "string", (str, "1")),
        ("1", "int64", (int, 1)),
        ("-7", "int64", (int, -7)),
        ("01", "int64", (str, "01")),
        ("-0", "int64", (str, "-0")),
        ("٣", "int64", (str, "٣")),
        (str(2**63), "int64", (str, str(2**63))),
        ("", "int64", (str, "")),
    ],
)
def test_keys(value, kind, key):
    assert canonical_key(value, kind) == key


TYPES = {"a": "int64", "f": "float64", "ok": "bool", "s": "string", "at": "timestamp"}
ROW = {"a": 3, "f": None, "ok": None, "s": "é", "at": 1_532_476_800_000_000}  # 2018-07-25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a > 2", True),
        ("f > 2", None),
        ("f > 2 or a == 3", True),
        ("f > 2 and a == 4", False),
        ("not ok", None),
        ("ok is null and f is null", True),
        ("a in (1, 2, null)", None),
        ("a in (1, 3, null)", True),
        ("a not in (1, 2)", True),
        ("1 < a <= 3", True),
        ("s > 'z'", True),
        ("at == '2018-07-25T00:00:00Z' and at.weekday == 2 and at.year == 2018", True),
        ("9223372036854775807 + 1 == 9223372036854775808.0", True),
        ("a == 3.0000000000000001", True),
        ("a / 0 is null and a // 0 is null and a % 0 is null", True),
        ("coalesce(f, a) / 2 == 1.5", True),
        ("min(a, f) is null", True),
        ("-7 // 2 == -4 and -7 % 2 == 1", True),
        ("log(-1) is null and sqrt(-1) is null", True),
        ("a\n  == 3", True),
    ],
)
def test_conditions(text, value):
    assert condition(text, TYPES)(ROW) is value


def test_the_calendar_of_any_year():
    for us, expected in (
        (-62_135_596_800_000_000 - 1, (0, 12, 31, 23, 59, 59)),
        (-1, (1969, 12, 31, 23, 59, 59)),
        (253_402_300_800_000_000, (10000, 1, 1, 0, 0, 0)),
    ):
        parts = ("year", "month", "day", "hour", "minute", "second")
        assert tuple(evaluate(f"at.{p}", TYPES, {**ROW, "at": us}) for p in parts) == expected
