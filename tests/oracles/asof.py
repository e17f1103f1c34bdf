"""Oracle of the point-in-time join: for every spine row, look at every feature row. No index, no order, no speed.

What must stay true: it follows S5, S6, S9, S10 and S17 word for word, on Python values with None for null.
"""

import math

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"


def same_key(a, b):
    """`1` and "1" are different keys; null is no key. A tuple is a key of several parts."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same_key(x, y) for x, y in zip(a, b))
    return a is not None and b is not None and type(a) is type(b) and a == b


def visible_row(key, at, rows, backfill=False):
    """Number of the newest feature row visible to (key, at), or None. rows: [{"key", "event", "ingest", ...}];
    "ingest" may be missing. Times are integers of microseconds."""
    best = None
    for number, row in enumerate(rows):
        if not same_key(key, row["key"]) or row["event"] > at:
            continue
        ingest = row.get("ingest")
        if ingest is not None and not backfill and ingest > at:
            continue
        order = (row["event"], ingest if ingest is not None else 0, number)
        if best is None or order > best[0]:
            best = (order, number)
    return None if best is None else best[1]


def asof(spine, rows, columns, ttl=None, backfill=False, defaults=None):
    """One list of (value, status) per column, one entry per (key, at) of the spine, in its order."""
    out = {column: [] for column in columns}
    for key, at in spine:
        number = visible_row(key, at, rows, backfill)
        for column in columns:
            value = None
            if number is None:
                status = NOT_FOUND
            elif ttl is not None and at - rows[number]["event"] > ttl:
                status = OUTSIDE_MAX_AGE
            else:
                value = rows[number][column]
                if isinstance(value, float) and math.isnan(value):
                    value = None
                status = NULL_VALUE if value is None else PRESENT
            if value is None and defaults:
                value = defaults.get(column)
            out[column].append((value, status))
    return out
