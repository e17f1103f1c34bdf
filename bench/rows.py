"""The rows of a benchmark: their form, the bars they are held to, the table they are printed as, the file they go to.

A row is {name, value, unit, floor, ratio, command}; floor and ratio are null where there is none. A piece that is
missing or fails is a row whose value is null and whose unit is "error": nothing is skipped silently.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("name", "value", "unit", "floor", "ratio", "command")


@dataclass(frozen=True)
class Bar:
    """What a row must reach (`bar`) and should reach (`goal`), in the row's unit; `least` says which way is good."""

    bar: float
    goal: float | None = None
    least: bool = False  # True: the value must be at least the bar (throughput, ratios); False: at most (times)
    also_ratio: float | None = None  # and the row's ratio must be at least this

    def met(self, value: float, ratio: float | None) -> str:
        def reached(limit: float) -> bool:
            return value >= limit if self.least else value <= limit

        if self.also_ratio is not None and (ratio is None or ratio < self.also_ratio):
            return "NO"
        if not reached(self.bar):
            return "NO"
        return "goal" if self.goal is not None and reached(self.goal) else "yes"


BARS = {
    "windows.events_per_s": Bar(2e6, 4e6, least=True),
    "windows.ratio_to_best_peer": Bar(3.0, least=True),
    "trees.single_us": Bar(2.0, 1.2),
    "trees.batch256_us_per_row": Bar(0.8, 0.5),
    "trees.single_ratio_to_walk": Bar(2.0, least=True),
    "trees.large_single_us": Bar(22.0, 15.0),
    "trees.large_batch256_us_per_row": Bar(9.0, 6.0),
    "engine.score_single_us": Bar(8.0, 5.0),
    "engine.score_dict_us": Bar(10.0, 7.0),
    "engine.score_batch_us_per_event": Bar(4.0, 2.5),
    "ids.bytes_per_id": Bar(32.0),
    "ids.longest_pause_ms": Bar(1.0),
    "split.assign_ns": Bar(500.0),
    "split.assign_batch_ns_per_id": Bar(50.0),
    "log.append_events_per_s": Bar(5e5, least=True),
    "log.score_overhead": Bar(1.2),
    "log.recovery_events_per_s": Bar(7e5, least=True),
    "replay.events_per_s": Bar(1e6, least=True),
    "pit.rows_per_s": Bar(4e6, 8e6, least=True),
    "pit.unsorted_rows_per_s": Bar(5e5, 1e6, least=True),
    "pit.peak_memory_ratio": Bar(1.2),
    "pit.unsorted_peak_memory_ratio": Bar(1.6),
    "http.score_ratio_to_floor": Bar(0.5, 0.6, least=True),
    "http.p99_ratio_to_floor": Bar(1.5),
    "http.p999_ratio_to_floor": Bar(2.0),
    "http.fastapi_ratio": Bar(10.0, least=True),
    "cold_start_s": Bar(1.5),
    "oip.binary_ratio_to_floor": Bar(0.5, 0.65, least=True),
    "resp.score_per_s_pipelined": Bar(150e3, 250e3, least=True),
    "resp.ratio_to_redis_d1": Bar(0.6, 0.8, least=True),
    "resp.ratio_to_redis_d16": Bar(0.2, 0.33, least=True),
    "overload.goodput_ratio": Bar(0.85, 0.9, least=True),
    "overload.p99_of_deadline": Bar(1.0),
    "overload.fraud_http": Bar(0.6, least=True),
    "overload.fraud_resp": Bar(0.7, least=True),
    "models.many_p99_ratio": Bar(2.0),
    "peers.best_ratio": Bar(12.0, least=True),
}


def row(
    name: str, value: float, unit: str, command: str, floor: float | None = None, ratio: float | None = None
) -> dict[str, Any]:
    """A row. `ratio` says how `value` compares with `floor` (or with what the name says, when there is no floor)."""
    return {"name": name, "value": value, "unit": unit, "floor": floor, "ratio": ratio, "command": command}


def error_row(name: str, reason: str, command: str) -> dict[str, Any]:
    """The row of a piece that is missing or failed; the reason stands in `error`."""
    return {"name": name, "value": None, "unit": "error", "floor": None, "ratio": None, "command": command} | {
        "error": reason
    }


def check_row(candidate: Any) -> dict[str, Any]:
    """The row itself; ValueError naming the field that is missing, surplus or of the wrong kind."""
    if not isinstance(candidate, dict):
        raise ValueError(f"row: expected a dict, got {type(candidate).__name__}")
    name = candidate.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"row.name: expected a non-empty string, got {name!r}")
    if missing := [f for f in FIELDS if f not in candidate]:
        raise ValueError(f"{name}: missing {', '.join(missing)}")
    if surplus := candidate.keys() - {*FIELDS, "error"}:
        raise ValueError(f"{name}: surplus {', '.join(sorted(surplus))}")
    for field in ("unit", "command"):
        if not isinstance(candidate[field], str):
            raise ValueError(f"{name}.{field}: expected a string, got {candidate[field]!r}")
    failed = candidate["unit"] == "error"
    for field in ("value", "floor", "ratio"):
        number = candidate[field]
        if number is None and (field != "value" or failed):
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name}.{field}: expected a finite number, got {number!r}")
    if failed and not candidate.get("error"):
        raise ValueError(f"{name}.error: an error row says its reason")
    return candidate


def number_text(value: float | None) -> str:
    """Three or four significant digits, thousands separated: what a reader compares, not what a file stores."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned text table, with bar, goal and whether they were met; error reasons stand below."""
    head = ("name", "value", "unit", "bar", "goal", "met", "floor", "ratio")
    lines = [head]
    for r in rows:
        bar = BARS.get(r["name"])
        if r["value"] is None:
            met = "ERROR"
        else:
            met = bar.met(r["value"], r["ratio"]) if bar else ""
        sign = "" if bar is None else ">= " if bar.least else "<= "
        lines.append(
            (
                r["name"],
                number_text(r["value"]),
                r["unit"],
                sign + number_text(bar.bar) if bar else "",
                number_text(bar.goal) if bar and bar.goal is not None else "",
                met,
                number_text(r["floor"]) if r["floor"] is not None else "",
                number_text(r["ratio"]) if r["ratio"] is not None else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 2, 5}
    text = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    text += [f"  {r['name']}: {r['error']}" for r in rows if r.get("error")]
    return "\n".join(text)


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows as one JSON list, all or nothing. Error rows keep the six fields; the reason is the unit's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{f: check_row(r)[f] for f in FIELDS} for r in rows]
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(plain, indent=1) + "\n")
    os.replace(draft, path)
