"""The app of the event log's tests: two event types, ids, every field type, and how to open and read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock import Aggregation, Engine, Event, FeatureView, Pipeline, Rule, Timestamp
from penstock.offline.recovery import LogOptions

T0 = 1_790_000_000_000_000  # 2026-09-21
SECOND = 1_000_000


class Payment(Event, event_id="id", time="at", lateness="365d", max_skew="3650d", retry_window="365d"):
    id: str
    customer: str
    terminal: int
    amount: float | None
    note: str | None
    paid: bool | None
    due: Timestamp | None
    at: Timestamp


class Visit(Event, lateness="1h", max_skew="3650d"):
    customer: str
    page: str
    at: Timestamp


spend = FeatureView(
    "spend",
    entity="customer",
    source=Payment,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["3000d"]),
        Aggregation("sum", "amount", windows=["3000d"]),
        Aggregation("last", "note", windows=["3000d"]),
    ],
)
terminals = FeatureView(
    "terminals", entity="terminal", source=Payment, aggregations=[Aggregation("count", windows=["3000d"])]
)
visits = FeatureView(
    "visits",
    entity="customer",
    source=Visit,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["3000d"])],
)
pay = Pipeline(
    "pay",
    event=Payment,
    features=["amount", "note", spend, terminals],
    rules=[Rule("many", when="spend.count_3000d > 3", action="review", reason="many")],
)
look = Pipeline("look", event=Visit, features=[visits])
APP = {"Payment": Payment, "Visit": Visit, "spend": spend, "terminals": terminals, "visits": visits} | {
    "pay": pay,
    "look": look,
}


def payment(id: str, at: int = 0, **values: Any) -> dict[str, Any]:
    """A payment `at` microseconds behind T0."""
    made: dict[str, Any] = {"id": id, "customer": "c", "terminal": 1, "amount": 1.5, "note": "n", "paid": True}
    return made | {"due": None, "at": T0 + at} | values


def visit(at: int = 0, **values: Any) -> dict[str, Any]:
    return {"customer": "c", "page": "p", "at": T0 + at} | values


def open_engine(folder: Path, app: Any = None, **options: Any) -> Engine:
    """An engine on a log folder, without a keeper, in small segments unless told otherwise."""
    options = {"keeper": False, "segment_bytes": 1 << 16, "sync": "10ms"} | options
    return Engine(APP if app is None else app, log=folder, log_options=LogOptions(**options))


def count(engine: Engine, view: str = "spend", key: Any = "c") -> int:
    return engine.features(view, [key], as_of=T0 + 10**12).rows[0][f"{view}.count_3000d"]


def segment_files(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*.log"))
