"""A case that differs, made small: views, aggregates, windows, events and columns are dropped while it still differs.

What must stay true: every candidate is a whole case, checked as any other; what is kept differs in the same way in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from stress.apps import App, Case, View


def shrink(case: Case, differs: Callable[[Case], bool], seconds: float = 60.0) -> Case:
    """The smallest case found within some seconds for which `differs` holds, as it does for `case`."""
    end = time.monotonic() + seconds
    before = None
    while case != before and time.monotonic() < end:
        before = case
        case = fewer_events(case, differs, end, 8 if len(case.app.views) > 1 else 1)
        case = less_app(case, differs, end)
        case = fewer_events(case, differs, end, 1)
    return case


def less_app(case: Case, differs: Callable[[Case], bool], end: float) -> Case:
    changed = True
    while changed:
        changed = False
        for smaller in apps(case.app):
            if time.monotonic() > end:
                return case
            made = without_unused(replace(case, app=smaller))
            if differs(made):
                case, changed = made, True
                break
    return case


def fewer_events(case: Case, differs: Callable[[Case], bool], end: float, parts: int) -> Case:
    """Runs of events are left out, each half as long as before, down to 1/parts of all, or to single events."""
    cut = max(1, len(case.ops) // 2)
    least = len(case.ops) // parts if parts > 1 else 1
    while cut >= max(1, least):
        start = 0
        while start < len(case.ops):
            if time.monotonic() > end:
                return case
            made = replace(case, ops=case.ops[:start] + case.ops[start + cut :])
            if made.ops and differs(made):
                case = made
            else:
                start += cut
        cut //= 2
    return case


def apps(app: App) -> Iterator[App]:
    """Apps with a piece less, the largest pieces first."""
    if len(app.pipelines) > 1:
        for name in app.pipelines:
            yield replace(app, pipelines=tuple(p for p in app.pipelines if p != name))
    if len(app.views) > 1:
        for view in app.views:
            yield replace(app, views=tuple(v for v in app.views if v is not view))
    for i, view in enumerate(app.views):
        for smaller in views(view):
            yield replace(app, views=app.views[:i] + (smaller,) + app.views[i + 1 :])


def views(view: View) -> Iterator[View]:
    n = len(view.aggregates)
    size = n // 2
    while size:
        for start in range(0, n, size):
            kept = view.aggregates[:start] + view.aggregates[start + size :]
            if kept:
                yield replace(view, aggregates=kept)
        size //= 2
    if n <= 4:
        for i, a in enumerate(view.aggregates):
            plainer: list[dict[str, Any]] = [{"windows": (w,)} for w in a.windows if len(a.windows) > 1]
            plainer += [{"where": None}] * (a.where is not None) + [{"default": None}] * (a.default is not None)
            plainer += [{"ttl": None}] * (a.ttl is not None) + [{"closed": "right"}] * (
                a.closed != "right" and 0 not in a.windows
            )
            for less in plainer:
                yield replace(view, aggregates=view.aggregates[:i] + (replace(a, **less),) + view.aggregates[i + 1 :])
        for less in [{"include": False}] * view.include + [{"retention": None}] * (view.retention is not None):
            yield replace(view, **less)


def columns_of(tree: Any) -> set[str]:
    match tree:
        case None:
            return set()
        case ("not", inner):
            return columns_of(inner)
        case ("and" | "or", a, b):
            return columns_of(a) | columns_of(b)
    return {tree[1]}


def without_unused(case: Case) -> Case:
    """Without the columns and sources that no view and no pipeline needs."""
    app = case.app
    needed = {v.source for v in app.views} | set(app.pipelines)
    sources = []
    for source in app.sources:
        if source.name not in needed:
            continue
        aggregates = [a for v in app.views if v.source == source.name for a in v.aggregates]
        used = {"card", "card2", "shop", "at", source.event_id} | {a.column for a in aggregates}
        for a in aggregates:
            used |= columns_of(a.where)
        sources.append(replace(source, fields=tuple(f for f in source.fields if f.name in used)))
    kept = {s.name: {f.name for f in s.fields} for s in sources}
    ops = tuple(
        replace(
            o,
            row={name: value for name, value in o.row.items() if name in kept[o.source]},
            kind=o.kind if o.source in app.pipelines else "ingest",
        )
        for o in case.ops
        if o.source in kept
    )
    return replace(case, app=replace(app, sources=tuple(sources)), ops=ops)
