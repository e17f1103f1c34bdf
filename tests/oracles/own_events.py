"""Oracle of a spine over the log's own events (S5, S8, S14): lists of dicts, one row after the other (tests only).

What must stay true: it is written from SEMANTICS alone, and shares no rule with the package: which event a row is, what
it may see, and what a handful of functions make of that. Times are integer microseconds, None is null.
"""

import math
from typing import Any, NamedTuple


class Logged(NamedTuple):
    type: str
    row: dict[str, Any]
    outcome: str
    ingest: int


class Kind(NamedTuple):
    """An event type: its id field, and how long after the newest event one still counts."""

    id: str | None
    lateness: int


class View(NamedTuple):
    name: str
    type: str
    key: str
    include: bool
    outputs: tuple[
        tuple[str, str, str | None, int | None, Any], ...
    ]  # name, function, column, length (None: Lifetime), default


def same(a, b):
    """Equal values: null and NaN are one, 0.0 and -0.0 are equal, a flag is no number."""
    a, b = (None if isinstance(v, float) and math.isnan(v) else v for v in (a, b))
    return type(a) is type(b) and a == b if isinstance(a, bool) or isinstance(b, bool) else a == b


def own_events(kinds, log, spine, types, columns, time):
    """Per row the number of its event in the log, or None. types: those that a row may be; columns: of the spine.

    Rows that have an id choose first. A row whose equal events are all taken is the last of them once more.
    """
    taken: set[int] = set()
    found: list[int | None] = [None] * len(spine)

    def has_id(row):
        return any(kinds[t].id in columns and row[kinds[t].id] is not None for t in types)

    for i, row in sorted(enumerate(spine), key=lambda one: (not has_id(one[1]), one[0])):
        for number, (type_, event, outcome, _) in enumerate(log):
            if type_ not in types or outcome == "duplicate":
                continue
            id = kinds[type_].id
            if id in columns and row[id] is not None:
                equal = same(row[id], event[id])
            else:
                shared = [f for f in event if f in columns and f not in (id, time)]
                equal = row[time] == event["at"] and all(same(row[f], event[f]) for f in shared)
            if not equal:
                continue
            found[i] = number
            if number not in taken:
                taken.add(number)
                break
    return found


def value(function, column, length, events, at):
    """Over events in the order of S6, at most as old as the window is long."""
    inside = [e for e in events if e["at"] <= at and (length is None or at - length < e["at"])]
    if function == "count":
        return len(inside)
    values = [e[column] for e in inside if e[column] is not None and e[column] == e[column]]
    if not values:
        return None
    return {"sum": sum, "max": max, "last": lambda v: v[-1], "first": lambda v: v[0]}[function](values)


def training_set(kinds, views, log, spine, columns, time, types, mode, own="auto"):
    """Per row {output: (value, "INVALID", "PRESENT" or "absent")}. mode: ingest_time, backfill, or a column's name."""
    numbers = [None] * len(spine) if own == "never" else own_events(kinds, log, spine, types, columns, time)
    result = []
    for row, number in zip(spine, numbers):
        at = row[time]
        outputs = {}
        given = row[mode] if mode not in ("ingest_time", "backfill") else None
        for view in views:
            seen, clock = [], -math.inf
            for sequence, logged in enumerate(log):
                clock = max(clock, logged.ingest)
                if logged.type != view.type or logged.outcome != "applied":
                    continue
                place = (logged.row["at"], sequence)  # the ingest clock never goes back: the log's order is its order
                if given is not None:
                    visible = sequence < given
                elif mode == "backfill" and number is not None:
                    visible = place < (log[number].row["at"], number)
                elif mode == "backfill":
                    visible = True
                elif number is not None:
                    visible = sequence < number
                else:
                    visible = clock <= at
                if visible:
                    seen.append((place, logged.row))
            is_own = number is not None and (given is None or given == number)
            newest = max((place[0] for place, _ in seen), default=-math.inf)
            seen = [(place, e) for place, e in seen if same(e[view.key], row[view.key])]
            seen = [e for _, e in sorted(seen, key=lambda one: one[0])]
            if view.include and is_own:
                mine = log[number]
                if (
                    mine.type == view.type
                    and mine.row["at"] <= at
                    and (mine.outcome != "applied" or same(mine.row[view.key], row[view.key]))
                ):
                    seen = sorted([*seen, mine.row], key=lambda e: e["at"])  # newest of its own time
                    newest = max(newest, mine.row["at"]) if mine.outcome == "applied" else newest
            elif view.include and mode != "backfill" and not (number is not None and number < (given or 0)):
                seen.append({**{f: row.get(f) for f in ("x", "n", "note", "y")}, "at": at})
            invalid = (is_own or given is not None) and mode != "backfill" and at < newest - kinds[view.type].lateness
            for name, function, column, length, default in view.outputs:
                found = value(function, column, length, seen, at)
                if invalid:
                    outputs[name] = None, "INVALID"
                else:
                    found = default if found is None else found
                    outputs[name] = found, "absent" if found is None else "PRESENT"
        result.append(outputs)
    return result, numbers
