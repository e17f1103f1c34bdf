"""Point-in-time joins against the oracle, on generated tables of every shape: order, chunks, offsets, kinds of key."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.asof import asof
from penstock.offline.asof import FeatureTable, asof_join

US = pa.timestamp("us", "UTC")
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
# Of 0 to 40 bytes: around the 8 and 11 that the kernel holds in a line, with shared heads and tails, and not ASCII.
WORDS = [
    "",
    "a",
    "b",
    "aa",
    "abcdefgh",
    "abcdefghi",
    "abcdefghijk",
    "abcdefghijkl",
    "é" * 5,
    "é" * 6,
    "x" * 16,
    "x" * 17,
]
WORDS += [
    "y" + "x" * 16,
    "user-000000000000000000000000000000000001",
    "user-000000000000000000000000000000000002",
    "a\0",
    "\0",
]


def shaped(values, kind, cuts, junk):
    """The values as a ChunkedArray cut at `cuts`; with junk, every chunk is a slice out of a longer array."""
    edges = [0, *sorted({min(c, len(values)) for c in cuts}), len(values)]
    chunks = []
    for begin, end in pairwise(edges):
        part = values[begin:end]
        padded = [*(values[:junk] or [None] * junk), *part, *(values[:1] * 2)] if junk else part
        array = pa.array(padded, kind) if not pa.types.is_dictionary(kind) else dictionary(padded, kind)
        chunks.append(array.slice(len(padded) - len(part) - 2 * bool(junk and values), len(part)) if junk else array)
    return pa.chunked_array(chunks, chunks[0].type)


def dictionary(values, kind):
    """Dictionaries differ from chunk to chunk and have values that no row points to."""
    return pa.array([None if v is None else v for v in values], kind.value_type).dictionary_encode().cast(kind)


@st.composite
def cases(draw):
    integers = draw(st.booleans())
    pool = [0, 1, 2, 7, 100] if integers else draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
    kinds = INTEGERS if integers else TEXTS
    kinds = kinds + [pa.dictionary(pa.int8(), kinds[0]), pa.dictionary(pa.int32(), kinds[1])]
    key = st.one_of(st.none(), st.sampled_from(pool), st.sampled_from(pool))
    at = st.integers(-12, 12)
    spine = draw(st.lists(st.tuples(key, at), max_size=12))
    has_ingest = draw(st.booleans())
    value = st.one_of(st.none(), st.just(math.nan), st.integers(0, 9).map(float))
    rows = draw(st.lists(st.fixed_dictionaries({"key": key, "event": at, "ingest": at, "x": value}), max_size=25))
    order = draw(st.sampled_from(["any", "event", "available"]))
    if order == "event":
        rows.sort(key=lambda r: r["event"])
    if order == "available":
        rows.sort(key=lambda r: max(r["event"], r["ingest"]))
    if draw(st.booleans()):
        spine.sort(key=lambda s: s[1])
    for i, row in enumerate(rows):
        row["n"] = i
        row["word"] = None if i % 3 == 0 else WORDS[i % len(WORDS)]
        row["flag"] = None if i % 4 == 0 else i % 2 == 0
        if not has_ingest:
            del row["ingest"]
    return {
        "spine": spine,
        "rows": rows,
        "spine_kind": draw(st.sampled_from(kinds)),
        "kind": draw(st.sampled_from(kinds)),
        "cuts": draw(st.lists(st.integers(0, 25), max_size=3)),
        "junk": draw(st.integers(0, 11)),
        "ttl": draw(st.one_of(st.none(), st.integers(0, 8))),
        "backfill": draw(st.booleans()),
        "default": draw(st.booleans()),
        "has_ingest": has_ingest,
    }


def spine_table(case):
    keys, times = [k for k, _ in case["spine"]], [t for _, t in case["spine"]]
    columns = {
        "key": shaped(keys, case["spine_kind"], case["cuts"], case["junk"]),
        "at": shaped(times, pa.int64(), case["cuts"][:1], case["junk"]).cast(US),
        "more": pa.array(range(len(keys)), pa.int32()),
    }
    return pa.table(columns)


def feature_table(case):
    rows = case["rows"]
    kinds = {"event": pa.int64(), "x": pa.float64(), "n": pa.int16(), "word": pa.string(), "flag": pa.bool_()}
    if case["has_ingest"]:
        kinds["ingest"] = pa.int64()
    columns = {"key": shaped([r["key"] for r in rows], case["kind"], case["cuts"], case["junk"])}
    for place, (name, kind) in enumerate(kinds.items()):
        columns[name] = shaped([r[name] for r in rows], kind, case["cuts"][place % 2 :], case["junk"])
    columns["nested"] = shaped([[r["n"]] for r in rows], pa.list_(pa.int64()), case["cuts"], 0)
    columns["code"] = shaped(
        [r["word"] for r in rows], pa.dictionary(pa.int16(), pa.string()), case["cuts"], case["junk"]
    )
    columns["event"] = columns["event"].cast(US)
    if case["has_ingest"]:
        columns["ingest"] = columns["ingest"].cast(US)
    return pa.table(columns)


def expected(case, column, ttl, defaults):
    rows = [{**row, "nested": [row["n"]], "code": row["word"]} for row in case["rows"]]
    return asof(case["spine"], rows, [column], ttl, case["backfill"], defaults)[column]


@settings(max_examples=250, deadline=None)
@given(cases())
def test_oracle(case):
    from datetime import timedelta

    ttl = None if case["ttl"] is None else timedelta(microseconds=case["ttl"])
    defaults = {"x": -1.0, "word": "none", "flag": True, "code": "none"} if case["default"] else None
    spine = spine_table(case)
    table = FeatureTable(
        feature_table(case), "key", "event", ["x", "n", "word", "flag", "nested", "code"],
        ingest_time="ingest" if case["has_ingest"] else None, ttl=ttl, defaults=defaults, name="f",
    )  # fmt: skip
    told = []
    out = asof_join(spine, table, time="at", backfill=case["backfill"], statuses=True, progress=told.append)
    out.validate(full=True)
    assert out.select(spine.column_names).equals(spine)
    assert sum(told) == out.num_rows == len(case["spine"])
    for column in table.features:
        got = list(zip(out[f"f.{column}"].to_pylist(), out[f"f.{column}__status"].to_pylist()))
        assert got == expected(case, column, case["ttl"], defaults), column
        if not defaults or column not in defaults:
            assert out.schema.field(f"f.{column}").type == table.table.schema.field(column).type
    again = asof_join(spine, table, time="at", backfill=case["backfill"])
    assert again.equals(out.select(again.column_names))


@settings(max_examples=60, deadline=None)
@given(st.lists(cases(), min_size=2, max_size=3), st.integers(1, 3))
def test_several_tables(several, threads):
    """Tables do not disturb each other, whichever side the keys are taken from and however many threads there are."""
    first = several[0]
    tables = []
    for i, case in enumerate(several):
        case["backfill"] = False
        ingest = "ingest" if case["has_ingest"] else None
        tables.append(FeatureTable(feature_table(case), "key", "event", ["x", "n"], ingest_time=ingest, name=f"t{i}"))
    texts = [isinstance(k, str) for case in several for k in [*(r["key"] for r in case["rows"])] if k is not None]
    texts += [isinstance(k, str) for k, _ in first["spine"] if k is not None]
    kinds = {str(c["kind"]).count("string") > 0 for c in several} | {str(first["spine_kind"]).count("string") > 0}
    if len(kinds) > 1:
        with pytest.raises(ValueError, match="different keys"):
            asof_join(spine_table(first), tables, time="at", max_threads=threads)
        return
    out = asof_join(spine_table(first), tables, time="at", statuses=True, max_threads=threads)
    for i, case in enumerate(several):
        want = asof(first["spine"], case["rows"], ["x", "n"])
        for column in ("x", "n"):
            got = list(zip(out[f"t{i}.{column}"].to_pylist(), out[f"t{i}.{column}__status"].to_pylist()))
            assert got == want[column]


@st.composite
def keys_of_parts(draw):
    """Keys of two to four parts, texts and integers mixed, nulls in some; few values, so that parts are shared."""
    integers = draw(st.lists(st.booleans(), min_size=2, max_size=4))
    pools = [
        [0, 1, -1, 2**40] if whole else draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
        for whole in integers
    ]
    one = st.tuples(
        *(st.one_of(st.none(), st.sampled_from(pool), st.sampled_from(pool), st.sampled_from(pool)) for pool in pools)
    )

    def kind(whole):
        plain = [pa.int64(), pa.int64()] if whole else TEXTS
        return draw(st.sampled_from([*plain, pa.dictionary(pa.int8(), plain[0])]))

    return {
        "spine": draw(st.lists(st.tuples(one, st.integers(0, 6)), max_size=14)),
        "rows": draw(st.lists(st.fixed_dictionaries({"key": one, "event": st.integers(0, 6)}), max_size=40)),
        "kinds": [(kind(whole), kind(whole)) for whole in integers],
        "cuts": draw(st.lists(st.integers(0, 40), max_size=3)),
        "sorted": draw(st.booleans()),
        "renamed": draw(st.booleans()),
        "threads": draw(st.integers(1, 2)),
    }


@settings(max_examples=200, deadline=None)
@given(keys_of_parts())
def test_keys_of_several_columns(case):
    """Every part must be equal; null in any part matches nothing."""
    rows, spine = case["rows"], case["spine"]
    if case["sorted"]:
        rows.sort(key=lambda r: r["event"])
    for i, row in enumerate(rows):
        row["n"] = i
    parts = range(len(case["kinds"]))
    names = [f"k{i}" for i in parts]
    there = {
        f"s{i}" if case["renamed"] else f"k{i}": shaped(
            [k[i] for k, _ in spine], case["kinds"][i][0], case["cuts"][i % 2 :], 3
        )
        for i in parts
    }
    table = {f"k{i}": shaped([r["key"][i] for r in rows], case["kinds"][i][1], case["cuts"][i % 2 :], 1) for i in parts}
    times = {
        "t": pa.array([r["event"] for r in rows], pa.int64()).cast(US),
        "n": pa.array([r["n"] for r in rows], pa.int64()),
    }
    key = dict(zip(names, there)) if case["renamed"] else names
    out = asof_join(
        pa.table({**there, "at": pa.array([t for _, t in spine], pa.int64()).cast(US)}),
        [FeatureTable(pa.table({**table, **times}), key, "t", ["n"], name=name) for name in ("f", "g")],
        time="at", statuses=True, max_threads=case["threads"],
    )  # fmt: skip
    want = asof(spine, rows, ["n"])["n"]
    for name in ("f", "g"):
        assert list(zip(out[f"{name}.n"].to_pylist(), out[f"{name}.n__status"].to_pylist())) == want


def test_parts_are_no_text_beside_text():
    """("a", "bc") is not ("ab", "c"), and (1, 2) is not (2, 1); a table by one part stands beside one by two."""
    at = pa.array([5] * 4, US)
    spine = pa.table(
        {"k": ["a", "ab", "a", None], "c": ["bc", "c", None, "c"], "i": [1, 2, 1, 1], "j": [2, 1, 1, 1], "at": at}
    )
    texts = pa.table({"k": ["ab", "a", "ab"], "c": ["c", None, "d"], "t": pa.array([1, 1, 1], US), "x": [1, 2, 3]})
    numbers = pa.table({"i": [2, 1], "j": [1, 1], "t": pa.array([1, 1], US), "y": [1, 2]})
    whole = pa.table({"k": ["a", "ab"], "t": pa.array([1, 1], US), "z": [1, 2]})
    out = asof_join(
        spine,
        [FeatureTable(texts, ["k", "c"], "t"), FeatureTable(numbers, ("i", "j"), "t"), FeatureTable(whole, "k", "t")],
        time="at",
    )
    assert out["x"].to_pylist() == [None, 1, None, None]
    assert out["y"].to_pylist() == [None, 1, 2, 2]
    assert out["z"].to_pylist() == [1, 2, 1, None]


def test_a_part_of_nothing_but_nulls():
    table = {"k": ["a"], "c": pa.nulls(1), "t": pa.array([0], US), "x": [1]}
    spine = {"k": ["a"], "c": ["b"], "at": pa.array([1], US)}
    out = asof_join(spine, FeatureTable(table, ["k", "c"], "t"), time="at", statuses=True)
    assert (out["x"].to_pylist(), out["x__status"].to_pylist()) == ([None], ["NOT_FOUND"])


@pytest.mark.parametrize("parts", [["k"], ["k", "c"]])
def test_times_and_keys_in_the_index_of_a_frame(parts):
    """The index of a pandas frame is no feature; but a level that is asked for by name is read."""
    import pandas as pd

    features = pd.DataFrame({"k": ["a", "b"], "c": [1, 2], "t": pd.to_datetime([1, 2], utc=True), "x": [10, 20]})
    spine = pd.DataFrame({"k": ["b", "a"], "c": [2, 1], "at": pd.to_datetime([5, 5], utc=True)}, index=[7, 7])
    spine = spine.set_index("at").set_index("k", append=True)
    out = asof_join(spine, FeatureTable(features.set_index(["t", "c"]).sample(2), parts, "t", ["x"]), time="at")
    assert sorted(out.column_names) == ["at", "c", "k", "x"]
    assert out["x"].to_pylist() == [20, 10]
    again = asof_join(spine, FeatureTable(features.sample(2, random_state=1), parts, "t", ["x"]), time="at")
    assert again["x"].to_pylist() == [20, 10]


VALUE_TYPES = [
    *INTEGERS, pa.float16(), pa.float32(), pa.float64(), pa.date32(), pa.date64(), pa.timestamp("ns"), pa.duration("s"),
    pa.time32("ms"), pa.time64("ns"), pa.decimal128(20, 3), pa.decimal256(50, 3), pa.binary(), pa.large_binary(),
    pa.binary(3), pa.string_view(), pa.month_day_nano_interval(), pa.struct([("a", pa.int8())]), pa.null(),
]  # fmt: skip


@pytest.mark.parametrize("kind", VALUE_TYPES, ids=str)
def test_types_of_values(kind):
    """Whatever the type, out comes what went in, of the same type."""
    whole = [None, 1, 2, None, 4, 100, 7]
    if pa.types.is_null(kind):
        values = pa.nulls(7)
    elif pa.types.is_struct(kind):
        values = pa.array([None if v is None else {"a": v} for v in whole], kind)
    elif "interval" in str(kind):
        values = pa.array([None if v is None else (v, v, v) for v in whole], kind)
    elif "string" in str(kind) or "binary" in str(kind):
        values = pa.array([None if v is None else b"%03d" % v for v in whole], kind)
    elif pa.types.is_decimal(kind):
        from decimal import Decimal

        values = pa.array([None if v is None else Decimal(v) / 8 for v in whole], kind)
    elif pa.types.is_date64(kind):
        values = pa.array(whole, pa.date32()).cast(kind)
    elif pa.types.is_float16(kind):
        values = pa.array([None if v is None else np.float16(v) for v in whole], kind)
    else:
        values = pa.array(whole, pa.int32() if kind.bit_width == 32 else pa.int64()).cast(kind)
    features = pa.table({"k": [0, 1, 2, 3, 4, 5, 6], "t": pa.array([5] * 7, US), "v": values})
    order = [6, 3, 0, 9, 5, 2, 1, 4, 4]
    spine = pa.table({"k": order, "at": pa.array([5] * 9, US)})
    out = asof_join(spine, FeatureTable(features, "k", "t"), time="at")
    out.validate(full=True)
    assert out["v"].type == (pa.large_string() if kind == pa.string_view() else kind)
    assert out["v"].to_pylist() == [None if k == 9 else values[k].as_py() for k in order]


def test_nan_is_null_in_every_width():
    for kind in (np.float16, np.float32, np.float64):
        values = np.array([1, np.nan, -np.nan, np.inf, -np.inf, 0.0], dtype=kind)
        features = {"k": list(range(6)), "t": pa.array([0] * 6, US), "v": values}
        out = asof_join({"k": list(range(6)), "at": pa.array([0] * 6, US)}, FeatureTable(features, "k", "t"), time="at")
        assert out["v"].null_count == 2
        assert out["v"].to_pylist() == [1, None, None, math.inf, -math.inf, 0.0]


def test_ttl_is_inclusive():
    features = {"k": ["a"], "t": pa.array([10], US), "v": [1]}
    spine = {"k": ["a"] * 4, "at": pa.array([9, 10, 1_000_010, 1_000_011], US)}
    table = FeatureTable(features, "k", "t", ttl="1s", defaults={"v": 7})
    out = asof_join(spine, table, time="at", statuses=True)
    assert out["v"].to_pylist() == [7, 1, 1, 7]
    assert out["v__status"].to_pylist() == ["NOT_FOUND", "PRESENT", "PRESENT", "OUTSIDE_MAX_AGE"]


def test_late_versions():
    """An older version written late is a no-op; an equal event time with a later ingest time replaces (S6)."""
    features = pa.table(
        {
            "k": ["a"] * 4,
            "t": pa.array([10, 20, 15, 20], US),
            "seen": pa.array([11, 21, 50, 40], US),
            "v": [1, 2, 3, 4],
        }
    )
    spine = pa.table({"k": ["a"] * 6, "at": pa.array([10, 11, 21, 40, 60, 20], US)})
    table = FeatureTable(features, "k", "t", ["v"], ingest_time="seen")
    assert asof_join(spine, table, time="at")["v"].to_pylist() == [None, 1, 2, 4, 4, 1]
    assert asof_join(spine, table, time="at", backfill=True)["v"].to_pylist() == [1, 1, 4, 4, 4, 4]


def test_units_zones_and_naive_times():
    """Nanoseconds are floored, naive is UTC, dates are midnights, integers microseconds (S1)."""
    late = pa.array([-1, 1_999], pa.timestamp("ns"))
    spine = {"k": [1, 1], "at": late}
    features = {"k": [1, 1, 1], "t": pa.array([-2, -1, 1], pa.timestamp("us", "Europe/Paris")), "v": ["a", "b", "c"]}
    assert asof_join(spine, FeatureTable(features, "k", "t"), time="at")["v"].to_pylist() == ["b", "c"]
    days = {"k": [1, 1], "t": pa.array([0, 1], pa.date32()), "v": [1, 2]}
    spine = {"k": [1, 1, 1], "at": [-1, 0, 86_400_000_000]}
    assert asof_join(spine, FeatureTable(days, "k", "t"), time="at")["v"].to_pylist() == [None, 1, 2]


def test_spine_is_not_copied():
    spine = pa.table({"k": [1, 2], "at": pa.array([5, 6], US), "x": [0.5, 0.25]})
    features = {"k": [1], "t": pa.array([5], US), "v": [1]}
    out = asof_join(spine, FeatureTable(features, "k", "t"), time="at")
    for name in spine.column_names:
        before, after = spine[name].chunk(0).buffers()[1], out[name].chunk(0).buffers()[1]
        assert before.address == after.address


def test_pandas_and_polars():
    import pandas as pd
    import polars as pl

    columns = {"k": ["a", "b"], "t": pd.to_datetime(["2024-01-01", "2024-01-02"]), "v": [1.5, 2.5]}
    spine = {"customer": ["b", "a"], "at": pd.to_datetime(["2024-01-03", "2023-01-03"])}
    for make in (pd.DataFrame, pl.DataFrame):
        table = FeatureTable(make(columns), {"k": "customer"}, "t", ["v"])
        assert asof_join(make(spine), table, time="at")["v"].to_pylist() == [2.5, None]


def test_none_of_anything():
    empty = pa.table({"k": pa.array([], pa.string()), "t": pa.array([], US), "v": pa.array([], pa.string())})
    spine = pa.table({"k": ["a"], "at": pa.array([1], US)})
    out = asof_join(spine, FeatureTable(empty, "k", "t"), time="at", statuses=True)
    assert out["v"].to_pylist() == [None]
    assert out["v__status"].to_pylist() == ["NOT_FOUND"]
    out = asof_join(spine.slice(0, 0), FeatureTable(empty, "k", "t", defaults={"v": "x"}), time="at", statuses=True)
    assert out.column_names == ["k", "at", "v", "v__status"]
    assert out.num_rows == 0
    assert asof_join(spine, [], time="at").equals(spine)
    # Keys that are all null match nothing, of whatever kind the other side is.
    nulls = {"k": pa.nulls(1), "t": pa.array([0], US), "v": [1]}
    assert asof_join(spine, FeatureTable(nulls, "k", "t"), time="at")["v"].to_pylist() == [None]
    some = {"k": [1], "t": pa.array([0], US), "v": [1]}
    assert asof_join({"k": pa.nulls(1), "at": [1]}, FeatureTable(some, "k", "t"), time="at")["v"].to_pylist() == [None]


def test_text_beyond_two_gigabytes(monkeypatch):
    """A string column that does not fit one array has more chunks."""
    monkeypatch.setattr("penstock.offline.asof.MOST_TEXT", 100)
    words = [None if i % 7 == 0 else "w" * (i % 30) for i in range(200)]
    features = {"k": list(range(200)), "t": [0] * 200, "v": words}
    out = asof_join(
        {"k": list(range(200)), "at": [1] * 200}, FeatureTable(features, "k", "t"), time="at", statuses=True
    )
    out.validate(full=True)
    assert out["v"].num_chunks > 10
    assert out["v"].to_pylist() == words
    assert out["v__status"].to_pylist() == ["NULL_VALUE" if w is None else "PRESENT" for w in words]
