"""The overload rows: what is offered beyond the maximum must not take from what is answered.

Open loop, 256 connections, Poisson arrivals at a multiple of the maximum that a closed loop reached just before. Good
is an answer within DEADLINE of the request's due time; the server is told the same deadline with --deadline. A request
that finds no idle connection within PATIENCE is given up by the client: offered, never read, not answered. Maximum and
overload alternate; medians of RUNS.
  overload.goodput_ratio   a pipeline whose model takes over 200 us, at 2 times its maximum
  overload.fraud_http      the fraud pipeline over HTTP at 1.2 times
  overload.fraud_resp      the same over RESP at 2 times, 16 arriving at once on a connection
Run as a script: python bench/load/overload.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

from app import train
from load.resp import with_resp
from load.serving import Ours, median
from rows import error_row, row
from timing import note

COMMAND = "make bench ARGS='--only overload'"
DEADLINE_S, PATIENCE_S = 0.05, 0.01
CONNECTIONS, DEPTH = 256, 16
RUNS, MAXIMUM_S, OVERLOAD_S = 3, 3.0, 10.0
Load = Callable[..., dict[str, Any]]


def overload(
    name: str, ours: Ours, load: Load, times: float, closed: dict[str, Any], burst: int
) -> list[dict[str, Any]]:
    """The maximum in a closed loop, then `times` as much in an open one, RUNS times in turn."""
    best, runs = [], []
    for seed in range(RUNS):
        best.append(load(duration=MAXIMUM_S, warmup=0.5, allow_errors=True, **closed)["requests_per_s"])
        runs.append(
            load(
                rate=round(times * best[-1]),
                duration=OVERLOAD_S,
                warmup=1.0,
                seed=seed,
                connections=CONNECTIONS,
                pipeline=burst,
                burst=burst,
                deadline_us=round(DEADLINE_S * 1e6),
                patience_us=round(PATIENCE_S * 1e6),
                allow_errors=True,
            )
        )
        ours.ingest_labels()
    maximum = median(best)
    good = median([r["good_per_s"] / m for r, m in zip(runs, best)])
    p99 = median([r["ok_p99_us"] or float("inf") for r in runs]) / 1e6
    rows = [
        row(name, good, "of maximum", COMMAND),
        row(f"{name}.maximum_per_s", maximum, "requests/s", COMMAND),
        row(f"{name}.accepted_p50_ms", median([r["ok_p50_us"] for r in runs]) / 1000, "ms", COMMAND),
        row(f"{name}.accepted_p99_ms", p99 * 1000, "ms", COMMAND, DEADLINE_S * 1000, p99 / DEADLINE_S),
        row(f"{name}.accepted_p999_ms", median([r["ok_p999_us"] for r in runs]) / 1000, "ms", COMMAND),
    ]
    for what in ("refused", "late", "failed", "unsent"):
        share = median([r[what] / r["offered"] for r in runs])
        rows.append(row(f"{name}.{what}", share, "of offered", COMMAND))
    if failed := max(r["failed"] for r in runs):
        note(f"{name}: {failed} failed, for example {next(r['first_error'] for r in runs if r['failed'])!r}")
    return rows


def slow_rows() -> list[dict[str, Any]]:
    arguments = ("--deadline", str(DEADLINE_S))
    with Ours("deep_bench.py", train.folder() / "slow", *arguments) as ours:
        ours.load(duration=2.0, connections=16, allow_errors=True)
        # 16 connections: the queue of a closed loop stays well within the deadline, so that nothing is refused.
        rows = overload("overload.goodput_ratio", ours, ours.load, 2.0, {"connections": 16}, 1)
    p99 = next(r for r in rows if r["name"].endswith("accepted_p99_ms"))
    return [*rows, row("overload.p99_of_deadline", p99["ratio"], "of deadline", COMMAND)]


def fraud_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with with_resp("fraud_bench.py", None, "--deadline", str(DEADLINE_S)) as ours:
        ours.load(duration=6.0, allow_errors=True)
        for name, load, times, closed, burst in (
            ("overload.fraud_http", ours.load, 1.2, {"connections": 64}, 1),
            ("overload.fraud_resp", ours.load_resp, 2.0, {"pipeline": DEPTH}, DEPTH),
        ):
            note(name)
            try:
                rows += overload(name, ours, load, times, closed, burst)
            except Exception as e:
                rows.append(error_row(name, f"{type(e).__name__}: {e}", COMMAND))
    return rows


def run() -> list[dict[str, Any]]:
    train.folder()
    rows: list[dict[str, Any]] = []
    for names, make in (
        (("overload.goodput_ratio",), slow_rows),
        (("overload.fraud_http", "overload.fraud_resp"), fraud_rows),
    ):
        note(names[0])
        try:
            rows += make()
        except Exception as e:
            have = {r["name"] for r in rows}
            rows += [error_row(n, f"{type(e).__name__}: {e}", COMMAND) for n in names if n not in have]
    return rows


if __name__ == "__main__":
    from rows import table

    print(table(run()))
