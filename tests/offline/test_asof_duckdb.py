"""Point-in-time joins against DuckDB, an independent implementation, at sizes where blocks and sorting matter."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from penstock.offline.asof import FeatureTable, asof_join

US = pa.timestamp("us", "UTC")


def named(form, numbers):
    """The entities as keys: integers, short text, text around the kernel's 11 bytes, long text."""
    if form == "integers":
        return pa.array(numbers * 7_919 - 1_000_000_007)
    pattern = {"short": "e{}", "edge": "user-{:06d}{}", "long": "customer/{:032d}"}[form]
    distinct = pa.array([pattern.format(i, "z" * (i % 3)) for i in range(int(numbers.max()) + 1)])
    return distinct.take(pa.array(numbers))


def data(form, spine_rows, rows, entities, seed, distinct):
    """Spine and features, both in order of time. distinct: no two rows of an entity have one time."""
    rng = np.random.default_rng(seed)
    span = 10 * rows if distinct else rows // 20
    entity = rng.integers(0, entities, rows)
    at = np.sort(rng.choice(span, rows, replace=False) if distinct else rng.integers(0, span, rows))
    features = pa.table(
        {
            "k": named(form, entity),
            "t": pa.array(at - span // 2).cast(US),
            "seen": pa.array(at - span // 2 + rng.integers(0, span // 10, rows)).cast(US),
            "x": pa.array(rng.random(rows), mask=rng.random(rows) < 0.1),
            "n": pa.array(np.arange(rows)),
        }
    )
    spine = pa.table(
        {
            "k": named(form, rng.integers(0, entities + entities // 10 + 1, spine_rows)),
            "at": pa.array(np.sort(rng.integers(-span // 2 - span // 20, span // 2, spine_rows))).cast(US),
            "i": np.arange(spine_rows),
        }
    )
    return spine, features


def shuffled(table, seed):
    return table.take(pa.array(np.random.default_rng(seed).permutation(table.num_rows)))


def chunked(table, rows):
    return pa.Table.from_batches(table.to_batches(max_chunksize=rows))


def query(text, **tables):
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, table in tables.items():
            connection.register(name, table)
        return connection.sql(text).to_arrow_table()


def same(out, want, columns):
    for column in columns:
        left, right = out[column].combine_chunks(), want[column].combine_chunks()
        assert left.equals(right.cast(left.type)), column


@pytest.mark.parametrize("form", ["integers", "short", "edge", "long"])
@pytest.mark.parametrize("entities", [3, 2_000, 40_000])
def test_asof(form, entities):
    """One row per (entity, time): the merge, the index, and both by chunks agree with ASOF."""
    spine, features = data(form, 20_000, 60_000, entities, entities, distinct=True)
    want = query(
        "SELECT i, x, n FROM spine LEFT JOIN (SELECT k AS key, * FROM features) f "
        "ON spine.k = f.key AND spine.at >= f.t ORDER BY i".replace("LEFT JOIN", "ASOF LEFT JOIN"),
        spine=spine,
        features=features,
    )
    assert 0 < want["n"].null_count < 20_000
    for rows in (features, chunked(features, 777), shuffled(features, 1), chunked(shuffled(features, 2), 5_000)):
        out = asof_join(spine, FeatureTable(rows, "k", "t", ["x", "n"]), time="at")
        same(out, want, ["x", "n"])
    mixed = shuffled(spine, 3)
    out = asof_join(mixed, FeatureTable(features, "k", "t", ["x", "n"]), time="at").sort_by("i")
    same(out, want, ["x", "n"])


@pytest.mark.parametrize("backfill", [False, True])
@pytest.mark.parametrize("order", ["t", "available", "none"])
def test_ties_and_ingest_times(backfill, order):
    """Many equal times: newest by (event time, ingest time, row) among the visible, by aggregation in SQL."""
    spine, features = data("short", 3_000, 20_000, 300, 5, distinct=False)
    if order == "available":
        available = np.maximum(features["t"].cast("int64").to_numpy(), features["seen"].cast("int64").to_numpy())
        features = features.take(pa.array(np.argsort(available, kind="stable")))
    if order == "none":
        features, spine = shuffled(features, 6), shuffled(spine, 7)
    features = features.set_column(4, "n", pa.array(np.arange(features.num_rows)))
    visible = "f.t <= s.at" if backfill else "f.t <= s.at AND f.seen <= s.at"
    want = query(
        f"SELECT s.i AS i, max_by(n, (f.t, f.seen, n)) AS n FROM spine s LEFT JOIN features f "
        f"ON s.k = f.k AND {visible} GROUP BY s.i ORDER BY s.i",
        spine=spine,
        features=features,
    )
    table = FeatureTable(features, "k", "t", ["n"], ingest_time="seen")
    out = asof_join(spine, table, time="at", backfill=backfill).sort_by("i")
    same(out, want, ["n"])
    plain = asof_join(spine, FeatureTable(chunked(features, 999), "k", "t", ["n"]), time="at").sort_by("i")
    want = query(
        "SELECT s.i AS i, max_by(n, (f.t, n)) AS n FROM spine s LEFT JOIN features f ON s.k = f.k AND f.t <= s.at "
        "GROUP BY s.i ORDER BY s.i",
        spine=spine,
        features=features,
    )
    same(plain, want, ["n"])


@pytest.mark.parametrize("forms", [("integers", "short"), ("long", "edge"), ("short", "integers", "edge")])
@pytest.mark.parametrize("ordered", [True, False])
def test_keys_of_several_columns(forms, ordered):
    """Every part equal, null in any part matches nothing, as SQL's equality has it; the keys from either side."""
    rng = np.random.default_rng(len(forms))
    spine, features = data(forms[0], 8_000, 40_000, 30, 11, distinct=False)
    names = ["k", *(f"k{i}" for i in range(1, len(forms)))]
    for name, form in zip(names[1:], forms[1:]):
        for table, rows in ((spine, 8_000), (features, 40_000)):
            values = named(form, rng.integers(0, 12, rows)).to_numpy(zero_copy_only=False)
            column = pa.array(values, mask=rng.random(rows) < 0.05)
            if table is spine:
                spine = spine.append_column(name, column)
            else:
                features = features.append_column(name, column)
    if not ordered:
        features, spine = shuffled(features, 1), shuffled(spine, 2)
    features = features.set_column(4, "n", pa.array(np.arange(features.num_rows)))
    equal = " AND ".join(f"s.{name} = f.{name}" for name in names)
    text = (
        "SELECT s.i AS i, max_by(n, (f.t, n)) AS n FROM spine s LEFT JOIN features f "
        f"ON {equal} AND f.t <= s.at GROUP BY s.i ORDER BY s.i"
    )
    for some in (features, features.slice(0, 5_000)):
        want = query(text, spine=spine, features=some)
        assert 0 < want["n"].null_count < 8_000
        out = asof_join(spine, FeatureTable(chunked(some, 3_333), names, "t", ["n"]), time="at").sort_by("i")
        same(out, want, ["n"])


def test_one_key_with_long_ties():
    """One entity, 30,000 rows out of order, few distinct times: sorting goes on by row number."""
    rng = np.random.default_rng(9)
    times = rng.choice([-5, 0, 0, 0, 2**40], 30_000)
    features = pa.table({"k": np.zeros(30_000, np.int8), "t": pa.array(times).cast(US), "n": np.arange(30_000)})
    spine = pa.table({"k": np.zeros(6, np.int64), "at": pa.array([-6, -5, -1, 0, 2**40 - 1, 2**40]).cast(US)})
    last = {t: int(np.flatnonzero(times == t)[-1]) for t in (-5, 0, 2**40)}
    out = asof_join(spine, FeatureTable(features, "k", "t"), time="at")
    assert out["n"].to_pylist() == [None, last[-5], last[-5], last[0], last[0], last[2**40]]
