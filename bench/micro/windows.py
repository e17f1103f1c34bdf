"""The windows row: 3 windows x 4 aggregations as of each of 1M events, from Arrow with string keys to Arrow columns.

Ours is Engine.replay of a pipeline without a model. Peers on the same table, one thread each: polars (rolling over
groups, rows left in group order), DuckDB (RANGE windows, left edge moved by 1 us), pandas (groupby.rolling on the
first 100k events, scaled). Floor: a Numba loop over keys that are dictionary-encoded already, with running float sums.
All results are compared: a peer that disagrees is an error row. Run as a script: python bench/micro/windows.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

for _name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from app import stream  # noqa: E402
from rows import error_row, row  # noqa: E402
from timing import interleaved, note  # noqa: E402

COMMAND = "make bench ARGS='--only windows'"
EVENTS, PANDAS_EVENTS = 1_000_000, 100_000
WINDOWS_US = {"1m": 60_000_000, "1h": 3_600_000_000, "24h": 86_400_000_000}
AGGREGATIONS = ("count", "sum", "mean", "max")
APP = Path(__file__).resolve().parents[1] / "app" / "windows_bench.py"


def ours(table: Any) -> Any:
    """The replay, and its 12 columns in row order."""
    from penstock import Engine

    engine = Engine(str(APP), clock="event")
    begin = time.perf_counter()
    out = engine.replay({"Sample": table}, out="windows")
    return out, time.perf_counter() - begin


def ours_columns(out: Any) -> dict[str, np.ndarray]:
    return {
        f"{f}_{w}": out.column(f"activity.count_{w}" if f == "count" else f"activity.{f}_value_{w}").to_numpy()
        for w in WINDOWS_US
        for f in AGGREGATIONS
    }


def polars_rolling(frame: Any) -> list[Any]:
    import polars as pl

    return [
        frame.rolling("at", period=w, group_by="key", closed="right").agg(
            pl.len().alias("count"),
            pl.col("value").sum().alias("sum"),
            pl.col("value").mean().alias("mean"),
            pl.col("value").max().alias("max"),
        )
        for w in WINDOWS_US
    ]


def polars_columns(results: list[Any]) -> dict[str, np.ndarray]:
    columns = {}
    for w, frame in zip(WINDOWS_US, results):
        in_order = frame.sort("at")  # times are distinct
        columns |= {f"{f}_{w}": in_order[f].to_numpy() for f in AGGREGATIONS}
    return columns


def duckdb_windows(connection: Any, table: Any) -> Any:
    connection.register("samples", table)
    select = ", ".join(
        f"{call} OVER w{w} AS {f}_{w}"
        for w in WINDOWS_US
        for f, call in zip(AGGREGATIONS, ("count(*)", "sum(value)", "avg(value)", "max(value)"))
    )
    # RANGE closes its left edge; S2's is open.
    names = ", ".join(
        f'w{w} AS (PARTITION BY "key" ORDER BY "at" RANGE BETWEEN to_microseconds({us - 1}) PRECEDING AND CURRENT ROW)'
        for w, us in WINDOWS_US.items()
    )
    return connection.sql(f'SELECT "at", {select} FROM samples WINDOW {names}').to_arrow_table()


def duckdb_columns(out: Any) -> dict[str, np.ndarray]:
    import pyarrow.compute as pc

    order = pc.sort_indices(out.column("at"))
    return {f"{f}_{w}": out.column(f"{f}_{w}").take(order).to_numpy() for w in WINDOWS_US for f in AGGREGATIONS}


def pandas_rolling(frame: Any) -> list[Any]:
    grouped = frame.groupby("key", sort=False)["value"]
    results = []
    for us in WINDOWS_US.values():
        rolling = grouped.rolling(f"{us}us", closed="right")
        results.append([getattr(rolling, f)() for f in AGGREGATIONS])  # twice as fast as agg() with a list
    return results


def pandas_columns(results: list[Any]) -> dict[str, np.ndarray]:
    columns = {}
    for w, series in zip(WINDOWS_US, results):
        columns |= {f"{f}_{w}": s.droplevel(0).sort_index().to_numpy() for f, s in zip(AGGREGATIONS, series)}
    return columns


def numba_loop() -> Any:
    """A streaming loop, per event what an online engine does at least: per window a tail, a running sum, a deque of
    falling maxima, all linked through arrays. Returns f(keys, at, value, entities, lengths) -> 4 arrays (windows, n)
    of count, sum, mean, max."""
    import numba

    @numba.njit(cache=False)
    def run(keys, at, value, entities, lengths):  # type: ignore[no-untyped-def]
        n, kinds = len(keys), len(lengths)
        following = np.full(n, -1, np.int64)  # the entity's next event
        newest = np.full(entities, -1, np.int64)
        tail = np.full((entities, kinds), -1, np.int64)
        held = np.zeros((entities, kinds), np.int64)
        total = np.zeros((entities, kinds))
        top = np.full((entities, kinds), -1, np.int64)  # deque of maxima: front, back, and links per event
        bottom = np.full((entities, kinds), -1, np.int64)
        above = np.full((n, kinds), -1, np.int64)
        below = np.full((n, kinds), -1, np.int64)
        count = np.empty((kinds, n), np.int64)
        sums = np.empty((kinds, n))
        mean = np.empty((kinds, n))
        largest = np.empty((kinds, n))
        for i in range(n):
            k, t, v = keys[i], at[i], value[i]
            if newest[k] >= 0:
                following[newest[k]] = i
            newest[k] = i
            for w in range(kinds):
                edge = t - lengths[w]
                j = tail[k, w]
                if j < 0:
                    j = i
                s, c = total[k, w] + v, held[k, w] + 1
                while at[j] <= edge:
                    s -= value[j]
                    c -= 1
                    j = following[j]
                tail[k, w], total[k, w], held[k, w] = j, s, c
                b = bottom[k, w]
                while b >= 0 and value[b] <= v:
                    b = above[b, w]
                above[i, w] = b
                if b >= 0:
                    below[b, w] = i
                else:
                    top[k, w] = i
                bottom[k, w] = i
                f = top[k, w]
                while at[f] <= edge:
                    f = below[f, w]
                    above[f, w] = -1
                top[k, w] = f
                count[w, i], sums[w, i], mean[w, i], largest[w, i] = c, s, s / c, value[f]
        return count, sums, mean, largest

    return run


def numba_columns(results: Any) -> dict[str, np.ndarray]:
    return {f"{f}_{w}": results[a][i] for i, w in enumerate(WINDOWS_US) for a, f in enumerate(AGGREGATIONS)}


def disagreement(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> str | None:
    """The first column in which two results differ: counts and maxima exactly, sums and means beyond 1e-9 of the
    largest running value (peers that subtract what leaves a window keep a residue)."""
    for name, right in want.items():
        left = got[name][: len(right)]
        if name.startswith(("count", "max")):
            wrong = left != right
        else:
            wrong = ~(np.abs(left - right) <= 1e-9 * max(1.0, float(np.abs(right).max())))
        if wrong.any():
            i = int(np.argmax(wrong))
            return f"{name} of row {i}: {left[i]!r} and {right[i]!r} ({int(wrong.sum())} rows differ)"
    return None


def run() -> list[dict[str, Any]]:
    import duckdb
    import polars as pl

    note(f"{EVENTS:,} events; compiling the floor")
    table = stream.samples(EVENTS)
    encoded = table.column("key").combine_chunks().dictionary_encode()
    keys = encoded.indices.to_numpy().astype(np.int64)
    at = table.column("at").cast("int64").to_numpy()
    value = table.column("value").to_numpy()
    loop = numba_loop()
    lengths = np.array(list(WINDOWS_US.values()))
    loop(keys[:10], at[:10], value[:10], len(encoded.dictionary), lengths)

    frame = pl.from_arrow(table)
    connection = duckdb.connect(config={"threads": 1})
    sample = table.slice(0, PANDAS_EVENTS).to_pandas().set_index("at")

    rows: list[dict[str, Any]] = []
    mine: list[float] = []
    reference = numba_columns(loop(keys, at, value, len(encoded.dictionary), lengths))
    contenders: dict[str, Any] = {
        "numba": lambda: loop(keys, at, value, len(encoded.dictionary), lengths),
        "polars": lambda: polars_rolling(frame),
    }
    problem: str | None = None
    try:
        first, _ = ours(table)
        problem = disagreement(ours_columns(first), reference)
        del first
        contenders["ours"] = lambda: mine.append(ours(table)[1])
    except Exception as e:
        problem = f"{type(e).__name__}: {e}"
    if problem:
        rows.append(error_row("windows.events_per_s", problem, COMMAND))
        rows.append(error_row("windows.ratio_to_best_peer", "see windows.events_per_s", COMMAND))

    note("ours, polars and the Numba loop, 5 interleaved rounds")
    seconds = interleaved(contenders, rounds=5)
    note("DuckDB and pandas, 2 rounds")
    seconds |= interleaved(
        {
            "duckdb": lambda: duckdb_windows(connection, table),
            "pandas": lambda: pandas_rolling(sample),
        },
        rounds=2,
        warmup=0,
    )
    speed = {name: EVENTS / s for name, s in seconds.items()}
    speed["pandas"] = PANDAS_EVENTS / seconds["pandas"]

    floor = speed["numba"]
    if not problem:
        # The engine is made anew for every replay, outside the time: its state starts empty.
        speed["ours"] = EVENTS / float(np.median(mine[-5:]))
        best = max(speed[name] for name in ("polars", "duckdb", "pandas"))
        rows.append(row("windows.events_per_s", speed["ours"], "events/s", COMMAND, floor, speed["ours"] / floor))
        rows.append(row("windows.ratio_to_best_peer", speed["ours"] / best, "x", COMMAND))
    rows.append(row("windows.numba_loop_events_per_s", floor, "events/s", COMMAND))
    checks = {
        "polars": lambda: disagreement(reference, polars_columns(polars_rolling(frame))),
        "duckdb": lambda: disagreement(reference, duckdb_columns(duckdb_windows(connection, table))),
        "pandas": lambda: disagreement(reference, pandas_columns(pandas_rolling(sample))),
    }
    for name, check in checks.items():
        label = f"windows.{name}_events_per_s"
        wrong = check()
        if wrong:
            rows.append(error_row(label, wrong, COMMAND))
        else:
            rows.append(row(label, speed[name], "events/s", COMMAND, floor, speed[name] / floor))
    return rows


if __name__ == "__main__":
    from rows import table as show

    print(show(run()))
