"""Made tests/data/log_v1, the log that every later version must open: `python tests/oracles/make_log_v1.py FOLDER`.

The stored folder is never made again; a new record format gets a folder of its own beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from penstock import Aggregation, Engine, Event, FeatureView, Pipeline, Rule, Timestamp
from penstock.offline.recovery import LogOptions

T0 = 1_790_000_000_000_000
SECOND = 1_000_000


class Payment(Event, event_id="id", lateness="30s", max_skew="3650d", retry_window="1h"):
    id: int
    customer: str
    amount: float | None
    note: str | None
    paid: bool
    at: Timestamp


spend = FeatureView(
    "spend",
    entity="customer",
    source=Payment,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["1h"]),
        Aggregation("sum", "amount", windows=["1h"]),
        Aggregation("last", "note", windows=["1h"]),
    ],
)
APP: dict[str, Any] = {
    "Payment": Payment,
    "spend": spend,
    "pay": Pipeline(
        "pay", event=Payment, features=["amount", spend], rules=[Rule("many", "spend.count_1h > 5", "review", "many")]
    ),
}


def events() -> list[dict[str, Any]]:
    """Nulls, empty and non-ASCII strings, late events."""
    made = []
    for i in range(40):
        at = i - 35 if i in (36, 38) else i
        made.append(
            {
                "id": i,
                "customer": ("c0", "c1", "ünï")[i % 3],
                "amount": None if i % 7 == 3 else 0.25 * (i % 9),
                "note": None if i % 5 == 4 else "" if i % 4 == 2 and i % 3 == 2 else f"note {i}",
                "paid": i % 2 == 0,
                "at": T0 + at * SECOND,
            }
        )
    return made


def main(folder: Path) -> None:
    options = LogOptions(segment_bytes=12288, keeper=False)
    with Engine(APP, log=folder, log_options=options) as engine:
        for i, event in enumerate(events()):
            if i % 4 == 3:
                engine.ingest(event)
            else:
                engine.score(event)
    (folder / "lock").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
