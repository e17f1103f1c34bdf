"""Timestamp: a point in time as int64 microseconds since 1970-01-01 UTC (S1), with its calendar fields (control path).

The calendar arithmetic stands in plain functions on integers, because native functions (functions_numba.py) compile
the very same ones: a Timestamp means the same in both.
"""

from __future__ import annotations

import re
import time as _clock
from datetime import UTC, date, datetime, timedelta
from typing import Any, Union, overload

import msgspec

__all__ = ["Timestamp", "TimestampUnit"]

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

_MIN, _MAX = -(2**63), 2**63 - 1
_TO_MICROS = {"s": (SECOND, 1), "ms": (1000, 1), "us": (1, 1), "ns": (1, 1000)}


class TimestampUnit(msgspec.Struct, frozen=True):
    """Annotation of an event's time field that arrives as an integer: `at: Timestamp(unit="ms")`."""

    unit: str

    def __post_init__(self) -> None:
        if self.unit not in _TO_MICROS:
            raise ValueError(f"Timestamp(unit={self.unit!r}): expected one of {', '.join(_TO_MICROS)}")

    def timestamp(self, value: int) -> Timestamp:
        """The Timestamp of an integer in this unit since 1970 UTC; nanoseconds are floored (S1)."""
        factor, divisor = _TO_MICROS[self.unit]
        return Timestamp(value * factor // divisor)

    def __or__(self, other: Any) -> Any:
        """`Timestamp(unit="ms") | None`, as any annotation."""
        return Union.__getitem__((self, other))

    def __call__(self) -> TimestampUnit:
        """Typing takes only callables into a union; a unit is never called."""
        raise TypeError("a TimestampUnit is an annotation, not a type to be called")


# Calendar fields of an int64 of microseconds. Floor division makes times before 1970 come out right.
# Days to civil date: Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.


def hour_of(us: int) -> int:
    return us // 3_600_000_000 % 24


def minute_of(us: int) -> int:
    return us // 60_000_000 % 60


def second_of(us: int) -> int:
    return us // 1_000_000 % 60


def microsecond_of(us: int) -> int:
    return us % 1_000_000


def weekday_of(us: int) -> int:
    # 1970-01-01 was a Thursday; Monday is 0.
    return (us // 86_400_000_000 + 3) % 7


def year_of(us: int) -> int:
    days = us // 86_400_000_000 + 719468  # since 0000-03-01
    era = days // 146097
    in_era = days - era * 146097
    year = (in_era - in_era // 1460 + in_era // 36524 - in_era // 146096) // 365
    in_year = in_era - (365 * year + year // 4 - year // 100)
    month = (5 * in_year + 2) // 153  # from March
    return year + era * 400 + (1 if month >= 10 else 0)


def month_of(us: int) -> int:
    days = us // 86_400_000_000 + 719468
    in_era = days % 146097
    year = (in_era - in_era // 1460 + in_era // 36524 - in_era // 146096) // 365
    in_year = in_era - (365 * year + year // 4 - year // 100)
    month = (5 * in_year + 2) // 153
    return month + 3 if month < 10 else month - 9


def day_of(us: int) -> int:
    days = us // 86_400_000_000 + 719468
    in_era = days % 146097
    year = (in_era - in_era // 1460 + in_era // 36524 - in_era // 146096) // 365
    in_year = in_era - (365 * year + year // 4 - year // 100)
    month = (5 * in_year + 2) // 153
    return in_year - (153 * month + 2) // 5 + 1


FIELDS = {
    "year": year_of,
    "month": month_of,
    "day": day_of,
    "hour": hour_of,
    "minute": minute_of,
    "second": second_of,
    "microsecond": microsecond_of,
    "weekday": weekday_of,
}

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:([Zz])|([+-])(\d\d):(\d\d))?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = date(1970, 1, 1).toordinal()


class Timestamp(int):
    """Microseconds since 1970-01-01 UTC, an int in every respect, with UTC calendar fields.

    `Timestamp(unit="ms")` (or s, us, ns) is not a value but the annotation of a field that arrives as an integer.
    Differences and sums are plain integers of microseconds. Raises OverflowError beyond int64.
    """

    __slots__ = ()

    @overload
    def __new__(cls, value: int = 0) -> Timestamp: ...
    @overload
    def __new__(cls, *, unit: str) -> TimestampUnit: ...  # type: ignore[misc]
    def __new__(cls, value: int = 0, *, unit: str | None = None) -> Any:
        if unit is not None:
            return TimestampUnit(unit)
        if not isinstance(value, int):
            raise TypeError(f"Timestamp: expected an integer of microseconds, got {value!r}; see Timestamp.of")
        if not _MIN <= value <= _MAX:
            raise OverflowError(f"Timestamp: {value} microseconds do not fit in 64 bits")
        return super().__new__(cls, value)

    @classmethod
    def of(cls, value: Any) -> Timestamp:
        """From an int (microseconds), an RFC 3339 string, a datetime, or a numpy datetime64."""
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, datetime):
            return cls.from_datetime(value)
        if type(value).__name__ == "datetime64":
            return cls.from_datetime64(value)
        raise TypeError(f"expected a time (RFC 3339 text, datetime, datetime64, or int microseconds), got {value!r}")

    @classmethod
    def now(cls) -> Timestamp:
        """The wall clock."""
        return cls(_clock.time_ns() // 1000)

    @classmethod
    def parse(cls, text: str) -> Timestamp:
        """RFC 3339, `2018-04-01T00:00:00Z`; without an offset it is UTC; digits beyond microseconds are floored."""
        match = _RFC3339.fullmatch(text)
        if match is None:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise ValueError(f"expected a time such as 2018-04-01T00:00:00Z, got {shown!r}")
        year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
        fraction, zulu, sign, offset_hours, offset_minutes = match.group(7, 8, 9, 10, 11)
        try:
            days = date(year, month, day).toordinal() - _EPOCH_DAY
        except ValueError as error:
            raise ValueError(f"{error}: {text!r}") from None
        # Second 60 is a leap second; as in POSIX time it is the next second.
        if hour > 23 or minute > 59 or second > 60:
            raise ValueError(f"time of day out of range: {text!r}")
        us = days * DAY + hour * HOUR + minute * MINUTE + second * SECOND
        if fraction:
            us += int(fraction[:6].ljust(6, "0"))
        if sign and not zulu:
            if int(offset_hours) > 23 or int(offset_minutes) > 59:
                raise ValueError(f"offset out of range: {text!r}")
            offset = int(offset_hours) * HOUR + int(offset_minutes) * MINUTE
            us += offset if sign == "-" else -offset
        return cls(us)

    @classmethod
    def from_datetime(cls, value: datetime) -> Timestamp:
        """From a datetime; a naive one is UTC (S1)."""
        if value.tzinfo is None:
            value = value.replace(tzinfo=UTC)
        # Exact: datetime.timestamp() would go through a float.
        return cls((value - _EPOCH) // timedelta(microseconds=1))

    @classmethod
    def from_datetime64(cls, value: Any) -> Timestamp:
        """From a numpy.datetime64 of any unit, floored to microseconds. NaT is refused."""
        import numpy as np

        if np.isnat(value):
            raise ValueError("expected a time, got NaT")
        unit, count = np.datetime_data(value.dtype)
        finer = {"ns": 10**3, "ps": 10**6, "fs": 10**9, "as": 10**12}
        if unit in finer:
            return cls(int(value.astype(np.int64)) * count // finer[unit])
        coarser = {"us": 1, "ms": 1000, "s": SECOND, "m": MINUTE, "h": HOUR, "D": DAY, "W": 7 * DAY}
        if unit in coarser:
            return cls(int(value.astype(np.int64)) * count * coarser[unit])
        return cls(int(value.astype("datetime64[D]").astype(np.int64)) * DAY)  # months and years

    @property
    def year(self) -> int:
        return year_of(self)

    @property
    def month(self) -> int:
        """1 to 12."""
        return month_of(self)

    @property
    def day(self) -> int:
        """Of the month, from 1."""
        return day_of(self)

    @property
    def hour(self) -> int:
        return hour_of(self)

    @property
    def minute(self) -> int:
        return minute_of(self)

    @property
    def second(self) -> int:
        return second_of(self)

    @property
    def microsecond(self) -> int:
        """Of the second."""
        return microsecond_of(self)

    @property
    def weekday(self) -> int:
        """Monday is 0."""
        return weekday_of(self)

    def datetime(self) -> datetime:
        """The same instant as an aware datetime in UTC. Raises OverflowError outside the years 1 to 9999."""
        return _EPOCH + timedelta(microseconds=int(self))

    def isoformat(self) -> str:
        """RFC 3339 in UTC, with six digits of fraction where there is one: `2018-04-01T00:00:00Z`."""
        year = self.year
        # RFC 3339 has four digits; beyond them ISO 8601 asks for a sign.
        head = f"{year:04d}" if 0 <= year <= 9999 else f"{year:+07d}"
        fraction = f".{self.microsecond:06d}" if self.microsecond else ""
        clock = f"{self.hour:02d}:{self.minute:02d}:{self.second:02d}"
        return f"{head}-{self.month:02d}-{self.day:02d}T{clock}{fraction}Z"

    def __repr__(self) -> str:
        return f"Timestamp({self.isoformat()!r})"

    def __str__(self) -> str:
        return self.isoformat()
