"""What a stream does before any window is read (tests only): outcomes, visible events, and who reads what as of when.

Written from SEMANTICS (S5, S8, S14, S16, one step) alone: it imports nothing of Penstock. Both oracles read the lists
that are made here; what a window holds they decide, each in its own way.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from stress.apps import FAR, App, Case, Op, View

NEVER = -math.inf


@dataclass(frozen=True)
class Seen:
    """One event of a source as the oracles see it. number: its place in the stream."""

    number: int
    at: int
    row: dict[str, Any]
    applied: bool


@dataclass(frozen=True)
class Read:
    """One view read for one key: visible are the applied events before number `before`, and event `own` (its own that
    was not applied, yet counts), as of `at`. watermark: the source's at that moment."""

    view: str
    key: tuple[type, Any]
    at: int
    before: int
    own: int | None
    watermark: float


@dataclass
class Verdict:
    """What is expected of one operation. reads: view -> its read; first: for a repeated event that was scored before,
    that operation's number (its answer is given again), while `reads` is what reading anew gives."""

    outcome: str
    reads: dict[str, Read] = field(default_factory=dict)
    first: int | None = None
    watermarks: dict[str, float] = field(default_factory=dict)  # after it


@dataclass
class Stream:
    app: App
    verdicts: list[Verdict]
    seen: dict[str, list[Seen]]
    watermarks: dict[str, float]
    outcomes: dict[str, dict[str, int]]


def key_of(app: App, view: View, value: Any) -> tuple[type, Any]:
    """A key as the view's entity reads it: 1 and "1" are two unless the entity has a type."""
    kind = dict(app.entities)[view.entity]
    if kind == "str":
        value = str(value)
    elif kind == "int" and isinstance(value, str) and re.fullmatch(r"0|-?[1-9][0-9]*", value):
        number = int(value)
        value = number if -(2**63) <= number < 2**63 else value
    return type(value), value


def key_field(view: View, source: str) -> str:
    """Where an event of a source holds the view's key: the view's own field for its own source."""
    return view.key if view.key is not None and view.source == source else view.entity


def run(case: Case, ops: list[Op] | None = None, event_clock: bool = False) -> Stream:
    """The stream in the order of ops. event_clock: an event's own time is the ingest clock, nothing is quarantined."""
    app = case.app
    ops = list(case.ops) if ops is None else ops
    seen: dict[str, list[Seen]] = {s.name: [] for s in app.sources}
    watermark: dict[str, float] = {s.name: NEVER for s in app.sources}
    ids: dict[str, dict[Any, int | None]] = {s.name: {} for s in app.sources}
    words = ("off", "applied", "duplicate", "late", "quarantined")
    outcomes = {s.name: dict.fromkeys(words, 0) for s in app.sources}
    verdicts = []
    for number, op in enumerate(ops):
        source = app.source(op.source)
        at = op.row["at"]
        event_id = op.row[source.event_id] if source.event_id else None
        known = ids[op.source]
        first = None
        if event_id is not None and event_id in known:
            outcome = "duplicate"
            first = known[event_id] if op.kind != "ingest" else None
        elif op.kind == "try":
            outcome = "off"
        elif at >= FAR and not event_clock:
            outcome = "quarantined"
        elif watermark[op.source] - at > source.lateness:
            outcome = "late"
        else:
            outcome = "applied"
        if event_id is not None and outcome not in ("duplicate", "off"):
            known[event_id] = number if op.kind == "score" else None
        elif event_id is not None and op.kind == "score" and known[event_id] is None:
            known[event_id] = number
        outcomes[op.source][outcome] += 1
        before = dict(watermark)
        if outcome != "duplicate":
            seen[op.source].append(Seen(number, at, op.row, outcome == "applied"))
        if outcome == "applied":
            watermark[op.source] = max(watermark[op.source], at)
        verdict = Verdict(outcome, first=first, watermarks=dict(watermark))
        if op.source in app.pipelines:
            for view in app.views:
                own = view.include and view.source == op.source
                verdict.reads[view.name] = Read(
                    view.name,
                    key_of(app, view, op.row[key_field(view, op.source)]),
                    at,
                    number + 1 if own and outcome == "applied" else number,
                    number if own and outcome in ("off", "late", "quarantined") else None,
                    (watermark if view.include else before)[view.source],
                )
        verdicts.append(verdict)
    return Stream(app, verdicts, seen, watermark, outcomes)
