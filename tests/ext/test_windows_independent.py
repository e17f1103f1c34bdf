"""Window state against DuckDB and polars, and under load: many entities, one hot entity, hostile orders (hot path).

Counts, min, max, first and last must be equal; sums agree within 1e-12 of the sum of absolute values, because the
libraries round at every step.
"""

import math
import random
import time

import duckdb
import numpy as np
import polars as pl
import pytest

from penstock._ext.windows import Output, WindowStore

WINDOWS = {"1m": 60_000_000, "1h": 3_600_000_000, "24h": 86_400_000_000}
FUNCTIONS = ["count", "sum", "mean", "min", "max", "first", "last"]
ROWS = 20_000


@pytest.fixture(scope="module")
def events():
    """Rows in event-time order, with ties, of 300 entities over three days."""
    rng = np.random.default_rng(3)
    t = np.sort(rng.integers(0, 3 * 86_400, ROWS)) * 1_000_000 + 1_600_000_000_000_000
    entity = rng.zipf(1.3, ROWS) % 300
    amount = np.round(rng.lognormal(3, 1.5, ROWS), 2)
    return pl.DataFrame({"row": np.arange(ROWS), "entity": entity, "t": t, "amount": amount})


def outputs():
    return [
        Output(function, None if function == "count" else 0, window=length)
        for length in WINDOWS.values()
        for function in FUNCTIONS
    ]


def check(ours, theirs):
    """Rows of len(WINDOWS) * len(FUNCTIONS) values; theirs has the sum of absolute values after each window."""
    assert len(ours) == len(theirs)
    width = len(FUNCTIONS)
    for mine, other in zip(ours, theirs):
        for w in range(len(WINDOWS)):
            a, b = mine[w * width : (w + 1) * width], other[w * (width + 1) : (w + 1) * (width + 1)]
            slack = 1e-12 * b[-1]
            assert a[0] == b[0]
            assert abs(a[1] - b[1]) <= slack
            assert abs(a[2] - b[2]) <= slack
            assert a[3:] == list(b[3:7])


def test_reads_after_everything_equal_duckdb_range_windows(events):
    """SQL's RANGE closes the left edge too, so it starts 1 us later; peers with equal time all count."""
    store = WindowStore(["float64"], outputs(), lateness=10 * 86_400_000_000)
    for row in events.iter_rows():
        store.apply(row[1], row[2], [row[3]])
    ours = [[v for v, _ in store.read(row[1], 0, row[2])] for row in events.iter_rows()]
    columns = []
    for length in WINDOWS.values():
        # RANGE does not define which of several equal times is first or last: rows have an order within the window
        over = f"OVER (PARTITION BY entity ORDER BY t RANGE BETWEEN {length - 1} PRECEDING AND CURRENT ROW)"
        for function in ("count(*)", "sum(amount)", "avg(amount)", "min(amount)", "max(amount)"):
            columns.append(f"{function} {over}")
        columns.append(f"arg_min(amount, row) {over}")
        columns.append(f"arg_max(amount, row) {over}")
        columns.append(f"sum(abs(amount)) {over}")
    with duckdb.connect() as connection:
        connection.register("events", events.to_arrow())
        theirs = connection.execute(f"SELECT {', '.join(columns)} FROM events ORDER BY row").fetchall()
    check(ours, theirs)


def test_stream_equals_polars_rolling(events):
    """Polars' rolling sees all ties, so rows are read once their last tie is in."""
    store = WindowStore(["float64"], outputs())
    distinct = events.unique(subset=["entity", "t"], keep="last", maintain_order=True)
    last_rows = set(distinct["row"])
    ours = {}
    for row, entity, t, amount in events.iter_rows():
        store.apply(entity, t, [amount])
        if row in last_rows:
            ours[row] = [v for v, _ in store.read(entity, 0, t)]
    frames = []
    for name, length in WINDOWS.items():
        a = pl.col("amount")
        frames.append(
            events.with_columns(pl.col("t").cast(pl.Datetime("us")))
            .sort("entity", "t", maintain_order=True)
            .rolling("t", period=f"{length}us", closed="right", group_by="entity")
            .agg(
                pl.col("row").last(),
                *[
                    expression.alias(f"{function}_{name}")
                    for function, expression in {
                        "count": pl.len(),
                        "sum": a.sum(),
                        "mean": a.mean(),
                        "min": a.min(),
                        "max": a.max(),
                        "first": a.first(),
                        "last": a.last(),
                        "abs": a.abs().sum(),
                    }.items()
                ],
            )
            .unique(subset=["row"], keep="first")
            .sort("row")
            .drop("entity", "t")
        )
    joined = frames[0].join(frames[1], on="row").join(frames[2], on="row").sort("row")
    assert set(joined["row"]) == last_rows
    check([ours[row] for row in joined["row"]], [line[1:] for line in joined.iter_rows()])


STRESS = [
    Output(function, None if function == "count" else 0, window=length)
    for function in ("count", "sum", "mean", "max")
    for length in WINDOWS.values()
]


def test_a_million_events_over_fifty_thousand_entities():
    """Every entity's windows at the end equal numpy's from scratch; math.fsum is the exactly rounded sum."""
    rng = np.random.default_rng(17)
    n, entities = 1_000_000, 50_000
    weight = 1 / np.arange(1, entities + 1) ** 1.1
    entity = rng.choice(entities, n, p=weight / weight.sum())
    step = 7 * 86_400_000_000 // n
    t = np.arange(n, dtype=np.int64) * step
    amount = np.round(rng.lognormal(3, 2, n), 2)
    store = WindowStore(["float64"], STRESS)
    apply, read = store.apply, store.read
    keys, times, amounts = [f"e{e}" for e in entity.tolist()], t.tolist(), amount.tolist()
    for i in range(n):
        apply(keys[i], times[i], (amounts[i],))
        if not i & 15:
            read(keys[i], 0, times[i])
    stats = store.stats()
    assert stats.applied == n
    assert stats.entities == len(set(keys))
    assert stats.events < 2.5 * n / 7
    order = np.argsort(entity, kind="stable")
    starts = np.searchsorted(entity[order], np.arange(entities + 1))
    now = times[-1]
    for e in [*range(200), *range(200, entities, 37)]:
        mine = order[starts[e] : starts[e + 1]]
        row = [v for v, _ in read(f"e{e}", 0, now)]
        for w, length in enumerate(WINDOWS.values()):
            inside = amount[mine[t[mine] > now - length]]
            total = math.fsum(inside)
            expected = [len(inside)] + ([total, total / len(inside), inside.max()] if len(inside) else [None] * 3)
            assert [row[f * 3 + w] for f in range(4)] == expected


def seconds_per_event(events, window, functions=("max",)):
    store = WindowStore(["float64"], [Output(f, 0, window=window) for f in functions], lateness=10**6)
    begin = time.process_time()
    for t, value in events:
        store.apply("k", t, (value,))
        store.read("k", 0, store_time := max(t, 0))
    return (time.process_time() - begin) / len(events), store.read("k", 0, store_time)


def test_one_entity_with_hostile_orders():
    """Falling values make the max leave the window with every event; equal times and late events meet full chunks."""
    n = 200_000
    usual, _ = seconds_per_event([(t, float(t % 1000)) for t in range(n)], n // 2)
    falling, result = seconds_per_event([(t, float(-t)) for t in range(n)], n // 2)
    assert result[0][0] == float(-(n - n // 2))
    assert falling < 20 * usual, "a falling max must not cost a scan of the window per event"
    _, result = seconds_per_event([(5, float(t)) for t in range(n)], 10, ("max", "count_col", "first", "last"))
    assert [v for v, _ in result] == [n - 1.0, n, 0.0, n - 1.0]
    rng = random.Random(1)
    late = [(t if t % 2 else max(t - rng.randint(0, 5000), 0), 1.0) for t in range(n // 4)]
    store = WindowStore(["float64"], [Output("count_col", 0, window=1000), Output("sum", 0)], lateness=6000)
    for t, value in late:
        store.apply("k", t, (value,))
        store.read("k", 0, t)
    newest = max(t for t, _ in late)
    for as_of in (newest, newest - 1, newest - 4000):
        expected = sum(as_of - 1000 < t <= as_of for t, _ in late), float(sum(t <= as_of for t, _ in late))
        assert tuple(v for v, _ in store.read("k", 0, as_of)) == expected
