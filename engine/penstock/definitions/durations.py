"""Lengths of time as a user writes them (control path): "90s", "15m", "1h", "7d", "2w", a timedelta, or Lifetime."""

from __future__ import annotations

import re
from datetime import timedelta

__all__ = ["Lifetime", "LifetimeWindow", "Window", "duration_us", "window_label"]

_UNITS = {
    "us": 1,
    "ms": 10**3,
    "s": 10**6,
    "m": 60 * 10**6,
    "h": 3600 * 10**6,
    "d": 86400 * 10**6,
    "w": 7 * 86400 * 10**6,
}
_TEXT = re.compile(r"\s*(\d+)\s*(us|ms|s|m|h|d|w)\s*")
_LONGEST = 200 * 366 * 86400 * 10**6  # two centuries: beyond this, event time minus window could leave int64


class LifetimeWindow:
    """The window without a left edge: every event there ever was. Written `Lifetime`."""

    def __repr__(self) -> str:
        return "Lifetime"


Lifetime = LifetimeWindow()
Window = str | timedelta | LifetimeWindow


def duration_us(value: str | timedelta) -> int:
    """Length in microseconds.

    Raises ValueError where the text is not a whole number followed by us, ms, s, m, h, d or w, or is not positive.
    """
    if isinstance(value, timedelta):
        us = value // timedelta(microseconds=1)
    else:
        match = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f'expected a length such as "90s", "15m", "1h" or "7d", got {value!r}')
        us = int(match[1]) * _UNITS[match[2]]
    if not 0 <= us <= _LONGEST:
        raise ValueError(f"expected a length from 0 to 200 years, got {value!r}")
    return us


def window_label(window: Window) -> str:
    """The window's part of a feature name: what the user wrote, or the shortest whole unit of a timedelta."""
    if isinstance(window, LifetimeWindow):
        return "lifetime"
    if isinstance(window, str):
        return "".join(window.split())
    us = duration_us(window)
    for unit in ("w", "d", "h", "m", "s", "ms"):
        if us and us % _UNITS[unit] == 0 and unit != "w":
            return f"{us // _UNITS[unit]}{unit}"
    return f"{us}us"
