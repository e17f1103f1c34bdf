"""Timestamp against Python's datetime and numpy's datetime64 (S1)."""

import datetime as dt
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.timestamp import FIELDS, Timestamp, TimestampUnit

# Short of the lower end of int64, where numpy's own days wrap round.
INT64 = st.integers(-(2**63) + 2 * 86_400_000_000, 2**63 - 1)
MOMENTS = st.datetimes(min_value=dt.datetime(1, 1, 1), max_value=dt.datetime(9999, 12, 31, 23, 59, 59, 999999))
EPOCH = dt.datetime(1970, 1, 1)


@given(MOMENTS)
def test_fields_are_those_of_datetime(moment):
    at = Timestamp.from_datetime(moment)
    assert int(at) == (moment - EPOCH) // dt.timedelta(microseconds=1)
    for name in FIELDS:
        expected = getattr(moment, name)
        assert getattr(at, name) == (expected() if callable(expected) else expected), name
    assert at.datetime() == moment.replace(tzinfo=dt.UTC)
    assert Timestamp.parse(at.isoformat()) == at


@given(INT64)
def test_fields_over_all_of_int64_agree_with_numpy(us):
    at = Timestamp(us)
    moment = np.datetime64(us, "us")
    assert at.year == int(moment.astype("datetime64[Y]").astype(np.int64)) + 1970
    assert at.month == int(moment.astype("datetime64[M]").astype(np.int64)) % 12 + 1
    first = moment.astype("datetime64[M]").astype("datetime64[D]")
    assert at.day == int((moment.astype("datetime64[D]") - first).astype(np.int64)) + 1
    assert 0 <= at.hour < 24
    assert 0 <= at.minute < 60
    assert 0 <= at.second < 60
    assert 0 <= at.weekday < 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01 00:00:01", 1_000_000),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("1969-12-31T23:59:59.9999999Z", -1),
        ("1970-01-01T00:00:00.5Z", 500_000),
        ("1970-01-01T00:00:00.000000999Z", 0),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T16:30:00-07:30", 0),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000_000),
        ("2018-04-01T00:00:00Z", 1_522_540_800_000_000),
        ("2024-02-29T12:00:00Z", 1_709_208_000_000_000),
    ],
)
def test_parse(text, expected):
    assert Timestamp.parse(text) == expected
    assert isinstance(Timestamp.parse(text), Timestamp)


@pytest.mark.parametrize(
    "text",
    ["", "2018", "2018-04-01", "2018-04-01T00:00", "2018-13-01T00:00:00Z", "2018-02-30T00:00:00Z", "now",
     "2018-04-01T24:00:00Z", "2018-04-01T00:60:00Z", "2018-04-01T00:00:61Z", "2018-04-01T00:00:00+24:00",
     "2018-04-01T00:00:00.Z", "2018-04-01T00:00:00Z ", "٢٠١٨-04-01T00:00:00Z", "0000-01-01T00:00:00Z"],
)  # fmt: skip
def test_parse_refuses_and_shows_the_text(text):
    with pytest.raises(ValueError) as error:
        Timestamp.parse(text)
    assert repr(text) in str(error.value)


def test_isoformat():
    assert Timestamp(0).isoformat() == "1970-01-01T00:00:00Z"
    assert Timestamp(-1).isoformat() == "1969-12-31T23:59:59.999999Z"
    assert repr(Timestamp(1)) == "Timestamp('1970-01-01T00:00:00.000001Z')"
    assert str(Timestamp(0)) == "1970-01-01T00:00:00Z"
    assert Timestamp(2**63 - 1).isoformat() == "+294247-01-10T04:00:54.775807Z"


def test_is_an_int():
    at = Timestamp(5)
    assert at == 5
    assert hash(at) == hash(5)
    assert type(at - Timestamp(2)) is int
    assert at < Timestamp(6)


def test_other_sources():
    zone = dt.timezone(dt.timedelta(hours=2))
    assert Timestamp.from_datetime(dt.datetime(1970, 1, 1, 2, tzinfo=zone)) == 0
    assert Timestamp.of("1970-01-01T00:00:00Z") == 0
    assert Timestamp.of(dt.datetime(1970, 1, 1)) == 0
    assert Timestamp.of(7) == 7
    assert abs(Timestamp.now() - dt.datetime.now(dt.UTC).timestamp() * 1e6) < 5e6
    with pytest.raises(TypeError, match="expected a time"):
        Timestamp.of(1.5)
    with pytest.raises(TypeError, match="integer of microseconds"):
        Timestamp(1.5)
    with pytest.raises(OverflowError, match="64 bits"):
        Timestamp(2**63)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(-1, "ns", -1), (1999, "ns", 1), (-1001, "ns", -2), (3, "us", 3), (-3, "ms", -3000), (2, "s", 2_000_000),
     (1, "D", 86_400_000_000), (-1, "M", -31 * 86_400_000_000), (1, "Y", 365 * 86_400_000_000), (2, "h", 7_200_000_000),
     (2_000_000, "ps", 2), (-1, "ps", -1)],
)  # fmt: skip
def test_datetime64_is_floored(value, unit, expected):
    assert Timestamp.of(np.datetime64(value, unit)) == expected


def test_datetime64_nat():
    with pytest.raises(ValueError, match="NaT"):
        Timestamp.of(np.datetime64("NaT"))


def test_unit():
    unit = Timestamp(unit="ms")
    assert unit == TimestampUnit("ms")
    assert unit.timestamp(-5) == -5000
    assert Timestamp(unit="s").timestamp(2) == 2_000_000
    assert Timestamp(unit="ns").timestamp(-1) == -1
    assert set(typing.get_args(unit | None)) == {unit, type(None)}
    with pytest.raises(ValueError, match="expected one of s, ms, us, ns"):
        Timestamp(unit="min")
    with pytest.raises(AttributeError):
        unit.unit = "s"
    with pytest.raises(OverflowError):
        Timestamp(unit="s").timestamp(2**60)


def test_an_error_does_not_repeat_a_long_text():
    with pytest.raises(ValueError, match="expected a time such as") as caught:
        Timestamp.parse("2" * 1_000_000)
    assert len(str(caught.value)) < 150
