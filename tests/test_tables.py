"""Arrow tables in: every layout that Arrow has for the same values, checked whole before the first row is used.

What must stay true: a refused table has changed nothing, and the error names the row and the column.
"""

import warnings
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from penstock import (
    Aggregation,
    Engine,
    Event,
    EventError,
    FeatureView,
    Lifetime,
    PenstockError,
    Pipeline,
    Rule,
    Timestamp,
)

SECOND = 10**6
T0 = 1_700_000_000 * SECOND


class Row(Event, time="at"):
    name: str
    number: int
    x: float
    at: Timestamp
    y: float | None = None
    n: int | None = None
    b: bool | None = None
    s: str | None = None
    t: Timestamp | None = None


per_name = FeatureView(
    "per_name",
    entity="name",
    source=Row,
    include_request_event=True,
    aggregations=[
        Aggregation("count", windows=["1h"]),
        Aggregation("sum", "x", windows=["1h"]),
        Aggregation("sum", "n", windows=["1h"]),
        Aggregation("max", "t", windows=["1h"]),
        Aggregation("min", "b", windows=["1h"]),
        Aggregation("last", "s", windows=["1h"]),
    ],
)
per_number = FeatureView(
    "per_number", entity="number", source=Row, aggregations=[Aggregation("count", "y", windows=["1h"])]
)
FIELDS = ("name", "number", "x", "at", "y", "n", "b", "s", "t")
APP = {
    "per_name": per_name,
    "per_number": per_number,
    "p": Pipeline("p", event=Row, features=[*FIELDS, per_name, per_number]),
}

ROWS = [
    {
        "name": f"näme{i % 3}",
        "number": [-(2**63), 2**63 - 1, 5][i % 3],
        "x": i / 7,
        "at": T0 + i * SECOND,
        "y": None if i % 4 == 0 else -i / 3,
        "n": None if i % 5 == 0 else i * 2**60,
        "b": [None, True, False][i % 3],
        "s": [None, "", "é\0", "long" * 30][i % 4],
        "t": None if i % 7 == 0 else T0 - i,
    }
    for i in range(600)
]
TYPES = {
    "name": pa.string(), "number": pa.int64(), "x": pa.float64(), "at": pa.timestamp("us", "UTC"), "y": pa.float64(),
    "n": pa.int64(), "b": pa.bool_(), "s": pa.string(), "t": pa.timestamp("us"),
}  # fmt: skip


def column(name, rows=None):
    values = [r[name] for r in rows or ROWS]
    if name == "n":
        values = [v if v is None or v < 2**63 else v % 2**62 for v in values]
    return pa.array(values, type=TYPES[name])


BASE = pa.table({name: column(name) for name in FIELDS})


def score(table, ingest=True):
    """The features of a table of rows, by an engine of its own."""
    result = Engine(APP, clock="event").score_batch(table, ingest, explain=True)
    return result.drop_columns(["id"])


EXPECTED = score(BASE)


def chunked(table):
    return pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1, 255), table.slice(256)])


def sliced(table):
    """The same rows, with every buffer at an odd offset."""
    padded = pa.concat_tables([table.slice(0, 3), table, table.slice(0, 5)]).combine_chunks()
    return padded.slice(3, table.num_rows)


def cast(table, **types):
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table


def dictionary(table):
    for name in ("name", "s"):
        table = table.set_column(table.column_names.index(name), name, table[name].combine_chunks().dictionary_encode())
    return table


LAYOUTS = {
    "chunked": chunked,
    "sliced": sliced,
    "sliced and chunked": lambda t: sliced(chunked(t)),
    "large strings": lambda t: cast(t, name=pa.large_string(), s=pa.large_string()),
    "string views": lambda t: cast(t, name=pa.string_view(), s=pa.string_view()),
    "dictionaries": dictionary,
    "chunked dictionaries": lambda t: chunked(dictionary(t)),
    "sliced large": lambda t: sliced(cast(t, name=pa.large_string(), s=pa.large_string())),
    "nanoseconds": lambda t: cast(t, at=pa.timestamp("ns", "UTC"), t=pa.timestamp("ns")),
    "other zones": lambda t: cast(t, at=pa.timestamp("us", "Asia/Kathmandu")),
    "naive": lambda t: cast(t, at=pa.timestamp("us")),
    "integer times": lambda t: cast(t, at=pa.int64(), t=pa.int64()),
    "another order": lambda t: t.select(FIELDS[::-1]),
    "validity without nulls": lambda t: with_validity(t, "x"),
    "ipc": lambda t: through_ipc(t),
    "polars": lambda t: pl.from_arrow(t),
    "polars rechunked": lambda t: pl.from_arrow(chunked(t)).rechunk(),
}


def with_validity(table, name):
    array = table[name].combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    bitmap = pa.py_buffer(b"\xff" * (len(array) // 8 + 1))
    made = pa.Array.from_buffers(array.type, len(array), [bitmap, array.buffers()[1]])
    return table.set_column(table.column_names.index(name), name, made)


def through_ipc(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_same_values_gives_the_same_bits(layout):
    assert score(LAYOUTS[layout](BASE)).equals(EXPECTED)


def test_a_table_equals_its_rows():
    engine = Engine(APP, clock="event")
    names = [n for n in EXPECTED.column_names if n in {*FIELDS} or "." in n]
    expected = EXPECTED.select(names).to_pylist()
    for row, record in zip(BASE.to_pylist(), expected):
        features = engine.score(row, explain=True).features
        got = {n: v.datetime() if isinstance(v, Timestamp) else v for n, v in features.items()}
        # A column of integers with one beyond 64 bits is float64 (S13).
        got["per_name.sum_n_1h"] = None if got["per_name.sum_n_1h"] is None else float(got["per_name.sum_n_1h"])
        assert got == record


def test_a_record_batch_a_dict_and_pandas():
    assert score(BASE.combine_chunks().to_batches()[0]).equals(EXPECTED)
    assert score({name: BASE[name] for name in FIELDS}).equals(EXPECTED)
    assert score({**{n: BASE[n] for n in FIELDS}, "x": np.array([r["x"] for r in ROWS])}).equals(EXPECTED)
    frame = BASE.to_pandas(types_mapper=lambda t: pd.Int64Dtype() if t == pa.int64() else None)
    assert score(frame).equals(EXPECTED)
    # In pandas' own float columns a missing number is NaN, which is null here (S11).
    assert frame["y"].isna().any()
    with pytest.raises(
        TypeError, match=r"expected an Arrow table \(pyarrow, polars, pandas or a dict of columns\), got int"
    ):
        score(5)


def test_narrow_and_unsigned_numbers():
    for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        table = pa.table({"name": ["a"], "number": pa.array([7], kind), "x": pa.array([2], kind), "at": [T0]})
        assert score(table).select(["number", "x"]).to_pylist() == [{"number": 7, "x": 2.0}]
    for kind in (pa.float16(), pa.float32(), pa.decimal128(10, 2)):
        value = {"float": 0.5, "halffloat": np.float16(0.5)}.get(str(kind), Decimal("0.50"))
        table = pa.table({"name": ["a"], "number": [1], "x": pa.array([value], kind), "at": [T0]})
        assert score(table)["x"].to_pylist() == [0.5]


def test_coarse_times_and_dates():
    day = datetime(2023, 11, 14)
    for array in (
        pa.array([day], pa.timestamp("s")),
        pa.array([day], pa.timestamp("ms", "UTC")),
        pa.array([day.date()], pa.date32()),
        pa.array([day.date()], pa.date64()),
    ):
        table = pa.table({"name": ["a"], "number": [1], "x": [1.0], "at": array})
        assert score(table)["at"].to_pylist() == [day.replace(tzinfo=UTC)]


@pytest.mark.parametrize("ns", [-1, -1000, -1001, 999, 1000, -(10**18) - 1])
def test_nanoseconds_are_floored(ns):
    """S1; Arrow's own cast goes towards zero."""
    table = pa.table({"name": ["a"], "number": [1], "x": [1.0], "at": pa.array([ns], pa.timestamp("ns"))})
    assert score(table)["at"].cast(pa.int64()).to_pylist() == [ns // 1000]
    optional = table.append_column("t", pa.array([ns], pa.timestamp("ns")))
    assert score(pa.concat_tables([optional, optional]))["t"].cast(pa.int64()).to_pylist() == [ns // 1000] * 2


def test_null_columns_and_absent_ones():
    needed = BASE.select(["name", "number", "x", "at"])
    nulls = needed
    for name in FIELDS[4:]:
        nulls = nulls.append_column(name, pa.nulls(BASE.num_rows))
    typed = needed
    for name in FIELDS[4:]:
        typed = typed.append_column(name, pa.nulls(BASE.num_rows, TYPES[name]))
    assert score(needed).equals(score(nulls))
    assert score(needed).equals(score(typed))
    assert score(needed)["per_name.sum_n_1h"].null_count == BASE.num_rows


def test_nan_is_null_and_sliced_nan_too():
    x = pa.array([1.0, float("nan"), None, 2.0, float("nan")])
    table = pa.table({"name": ["a"] * 5, "number": [1] * 5, "x": [0.0] * 5, "at": [T0] * 5, "y": x})
    assert score(table)["y"].to_pylist() == [1.0, None, None, 2.0, None]
    assert score(table.slice(1, 3))["y"].to_pylist() == [None, None, 2.0]
    assert score(table)["per_number.count_y_1h"].to_pylist() == [0, 1, 1, 1, 2]


def test_empty_tables():
    engine = Engine(APP, clock="event")
    for empty in (
        BASE.slice(0, 0),
        BASE.schema.empty_table(),
        pa.table({n: [] for n in FIELDS}),
        pl.from_arrow(BASE)[:0],
    ):
        result = engine.score_batch(empty, explain=True)
        assert result.num_rows == 0
        assert result.drop_columns(["id"]).schema.names == EXPECTED.schema.names
        assert engine.replay({"Row": empty}, out="p").num_rows == 0
        assert engine.ingest(empty) == {"applied": 0, "duplicate": 0, "late": 0, "quarantined": 0}
    assert engine.replay({}) is None
    assert [s[:2] for s in engine.core.store_stats()] == [(0, 0), (0, 0)]


def base(**changes):
    table = BASE.slice(0, 300)
    for name, values in changes.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, values)
        else:
            table = table.append_column(name, values)
    return table


def at_row(row, name, value):
    """The column with one other value; times as integers."""
    array = BASE[name].slice(0, 300)
    array = array.cast(pa.int64()) if pa.types.is_timestamp(array.type) else array
    values = array.to_pylist()
    values[row] = value
    return pa.array(values, type=array.type)


@pytest.mark.parametrize(
    ("changes", "path", "said"),
    [
        ({"z": pa.nulls(300)}, ".z", "unknown column; Row has name, number"),
        ({"name": pa.array([1] * 300)}, ".name", "expected a column of string, got int64"),
        ({"name": pa.array([b"x"] * 300)}, ".name", "expected a column of string, got binary"),
        ({"name": pa.nulls(300)}, "[0].name", "expected a value, got null"),
        ({"name": at_row(271, "name", None)}, "[271].name", "expected a value, got null"),
        ({"name": at_row(270, "name", "x" * 1025)}, "[270].name", "expected at most 1024 bytes, got 1025"),
        ({"s": at_row(5, "s", "x" * 65537)}, "[5].s", "expected at most 65536 bytes, got 65537"),
        ({"number": pa.array([1.0] * 300)}, ".number", "expected a column of int64, got double"),
        ({"number": pa.array([True] * 300)}, ".number", "expected a column of int64, got bool"),
        ({"number": pa.array([2**63] * 300, pa.uint64())}, ".number", "the column does not fit int64"),
        ({"number": at_row(7, "number", None)}, "[7].number", "expected a value, got null"),
        ({"b": pa.array([1] * 300)}, ".b", "expected a column of bool, got int64"),
        ({"x": pa.array(["1"] * 300)}, ".x", "expected a column of float64, got string"),
        ({"x": pa.array([True] * 300)}, ".x", "expected a column of float64, got bool"),
        ({"x": at_row(299, "x", None)}, "[299].x", "expected a value, got null"),
        ({"x": at_row(299, "x", float("nan"))}, "[299].x", "expected a number, got NaN; declare it `| None`"),
        ({"x": at_row(256, "x", float("inf"))}, "[256].x", "expected a finite number (the field is aggregated)"),
        ({"y": at_row(255, "y", float("-inf"))}, "[255].y", "expected a finite number (the field is aggregated)"),
        ({"at": at_row(3, "at", None)}, "[3].at", "the event time is missing (null)"),
        ({"at": pa.array([1.5] * 300)}, ".at", "expected a column of timestamp, got double"),
        ({"at": pa.array(["2020"] * 300)}, "[0].at", "expected a time such as 2018-04-01T00:00:00Z, got '2020'"),
        ({"at": pa.array([b"2020-01-01"] * 300)}, ".at", "expected a column of timestamp, got binary"),
        ({"at": at_row(9, "at", 2**62)}, "[9].at", "expected a time between the years 1 and 9999"),
        ({"t": at_row(9, "t", -(2**62))}, "[9].t", "expected a time between the years 1 and 9999"),
        ({"at": pa.array([2**60] * 300, pa.timestamp("s"))}, ".at", "the column does not fit timestamp"),
    ],
)
def test_a_wrong_column_is_named_and_changes_nothing(changes, path, said):
    engine = Engine(APP, clock="event")
    for call in (engine.score_batch, engine.ingest, lambda t: engine.replay({"Row": t}, out="p")):
        for table in (base(**changes), chunked(base(**changes))):
            with pytest.raises(EventError) as caught:
                call(table)
            assert caught.value.path == path
            assert caught.value.message.startswith(said)
    assert [s[:2] for s in engine.core.store_stats()] == [(0, 0), (0, 0)]
    assert engine.core.watermark(0) is None
    assert not any(engine.stats()["outcomes"]["Row"].values())


def test_values_below_a_null_are_not_looked_at():
    """Arrow leaves anything there: NaN, infinities, times out of range, long strings."""
    mask = np.array([False, True, False])
    table = pa.table(
        {
            "name": ["a"] * 3,
            "number": [1] * 3,
            "x": [1.0] * 3,
            "at": [T0] * 3,
            "y": pa.array(np.array([1.0, np.inf, 2.0]), mask=mask),
            "t": pa.array(np.array([1, 2**62, 2]), mask=mask),
        }
    )
    result = score(table)
    assert result["y"].to_pylist() == [1.0, None, 2.0]
    assert result["t"].cast(pa.int64()).to_pylist() == [1, None, 2]


def test_a_missing_column_is_named():
    with pytest.raises(EventError, match=r"^x: missing column; Row needs it$"):
        score(BASE.drop_columns(["x"]))


def test_wide_integers_come_out_as_floats():
    """S13: past int64 the result is float64, and so is its column."""
    n = pa.array([2**62, 2**62, 1, None])
    table = pa.table({"name": ["a", "a", "b", "c"], "number": [1] * 4, "x": [1.0] * 4, "at": [T0] * 4, "n": n})
    found = score(table)["per_name.sum_n_1h"]
    assert found.type == pa.float64()
    assert found.to_pylist() == [2.0**62, 2.0**63, 1.0, None]
    assert score(table.slice(2))["per_name.sum_n_1h"].type == pa.int64()


# replay


def test_replay_keeps_the_order_of_the_scored_table():
    rows = BASE.slice(0, 300)
    shuffled = rows.take(pa.array(np.random.default_rng(5).permutation(300)))
    engine = Engine(APP, clock="event")
    result = engine.replay({"Row": shuffled}, out="p", decisions=True)
    assert result["at"].to_pylist() == shuffled["at"].to_pylist()
    expected = {r["at"]: r for r in score(rows).to_pylist()}
    assert result.drop_columns(["id"]).to_pylist() == [expected[r["at"]] for r in result.to_pylist()]
    assert set(result["outcome"].to_pylist()) == {"applied"}


def test_replay_says_what_it_needs():
    engine = Engine(APP, clock="event")
    with pytest.raises(PenstockError, match="no event 'Rwo'; did you mean Row"):
        engine.replay({"Rwo": BASE})
    with pytest.raises(PenstockError, match=r"replay: out='p' scores Row, but no table of Row was given"):
        engine.replay({}, out="p")
    told = []
    assert engine.replay({"Row": BASE}, progress=told.append) is None
    assert sum(told) == BASE.num_rows
    assert engine.stats()["stores"][0]["events"] == BASE.num_rows


def test_ties_across_tables_go_by_the_order_given():
    class Label(Event):
        name: str
        fraud: bool
        at: Timestamp

    risk = FeatureView("risk", entity="name", source=Label, aggregations=[Aggregation("count", windows=["1h"])])
    app = {**APP, "risk": risk, "p": Pipeline("p", event=Row, features=[risk])}
    row = pa.table({"name": ["a"], "number": [1], "x": [1.0], "at": [T0]})
    label = pa.table({"name": ["a"], "fraud": [True], "at": [T0]})
    for tables, seen in (({"Label": label, "Row": row}, 1), ({"Row": row, "Label": label}, 0)):
        result = Engine(app, clock="event").replay(tables, out="p")
        assert result.to_pylist() == [{"risk.count_1h": seen}]
    engine = Engine(app, clock="event")
    assert engine.ingest(label, event="Label")["applied"] == 1
    with pytest.raises(PenstockError, match=r"say which event: event=\.\.\.; have"):
        engine.ingest(label)


def test_times_keep_their_microseconds():
    at = [datetime(2023, 1, 1, tzinfo=UTC) + timedelta(microseconds=i) for i in range(3)]
    table = pa.table({"name": ["a"] * 3, "number": [1] * 3, "x": [1.0] * 3, "at": at})
    assert score(table)["at"].to_pylist() == at


@pytest.mark.parametrize(
    ("kind", "width", "offsets"),
    [
        (pa.string(), np.int32, [0, -5, 3]),
        (pa.string(), np.int32, [0, 6, 3]),
        (pa.string(), np.int32, [0, 3, 1000]),
        (pa.large_string(), np.int64, [0, -(2**62), 3]),
    ],
)
def test_text_whose_offsets_point_elsewhere_is_refused(kind, width, offsets):
    """Arrow does not look inside what it is handed, by a file or by another library."""
    buffers = [None, pa.py_buffer(np.array(offsets, width)), pa.py_buffer(b"abcdef")]
    engine = Engine(APP, clock="event")
    columns = {"number": [1, 2], "x": [1.0, 2.0], "at": [T0, T0]}
    with pytest.raises((EventError, pa.ArrowInvalid)):
        names = pa.Array.from_buffers(kind, 2, buffers)
        engine.score_batch(pa.table({"name": names, **columns}))
    assert engine.stats()["stores"][0]["events"] == 0


def test_text_that_is_no_utf8_is_refused():
    buffers = [None, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"\xff\xfe\xed\xa0")]
    table = pa.table(
        {"name": pa.Array.from_buffers(pa.string(), 2, buffers), "number": [1, 2], "x": [1.0, 2.0], "at": [T0, T0]}
    )
    engine = Engine(APP, clock="event")
    with pytest.raises(EventError, match=r"name: the column is damaged: .*UTF8"):
        engine.score_batch(table)
    assert engine.stats()["stores"][0]["events"] == 0


def test_a_column_that_is_there_twice_is_refused():
    columns = {"name": ["a"], "number": [1], "x": [1.0], "at": [T0]}
    arrays = [pa.array(v) for v in [*columns.values(), [2.0]]]
    with pytest.raises(EventError, match="x: two columns of this name"):
        Engine(APP, clock="event").score_batch(pa.Table.from_arrays(arrays, names=[*columns, "x"]))


class Numbered(Event, event_id="id"):
    id: int
    k: str
    at: Timestamp


def test_features_of_a_repeated_event_are_read_anew_beside_the_first_decision():
    view = FeatureView(
        "v",
        entity="k",
        source=Numbered,
        aggregations=[Aggregation("count", windows=["1h"])],
        include_request_event=True,
    )
    pipeline = Pipeline("p", event=Numbered, features=[view], rules=[Rule("r", "v.count_1h > 1", "many")])
    rows = pa.table({"id": [1, 2, 1], "k": ["a"] * 3, "at": [T0] * 3})
    result = Engine({"p": pipeline}, clock="event").score_batch(rows, explain=True)
    assert result["outcome"].to_pylist() == ["applied", "applied", "duplicate"]
    assert result["action"].to_pylist() == ["approve", "many", "approve"]
    assert result["id"][2] == result["id"][0]
    assert result["v.count_1h"].to_pylist() == [1, 2, 2]


class Visit(Event, lateness="1h"):
    who: str
    amount: float
    at: Timestamp


visits = FeatureView(
    "visits",
    entity="who",
    source=Visit,
    aggregations=[Aggregation("count", windows=["1h"]), Aggregation("last", "amount", windows=[Lifetime])],
)
VISITS = {"Visit": Visit, "visits": visits, "seen": Pipeline("seen", event=Visit, features=["amount", visits])}
DAY = 86_400_000_000


def unsorted(rows=500):
    rng = np.random.default_rng(4)
    return pa.table(
        {
            "who": [f"w{i}" for i in rng.integers(0, 20, rows)],
            "amount": np.arange(rows, dtype=np.float64),
            "at": pa.array(1_700_000_000_000_000 + rng.integers(0, 30, rows) * DAY, pa.timestamp("us", "UTC")),
        }
    )


def left(engine):
    return engine.stats()["stores"][0]["events"], engine.features("visits", [f"w{i}" for i in range(20)]).rows


def test_a_table_is_ingested_by_time_whatever_its_order():
    """Nothing of one call makes another row of it late; equal times go in as they stand: the last of them is last."""
    table = unsorted()
    order = np.argsort(table["at"].cast(pa.int64()).to_numpy(), kind="stable")
    engine, want = Engine(VISITS, clock="event"), Engine(VISITS, clock="event")
    assert engine.ingest(table) == {"applied": 500, "duplicate": 0, "late": 0, "quarantined": 0}
    for row in table.take(pa.array(order)).to_pylist():
        assert want.ingest(row) == "applied"
    assert left(engine) == left(want)
    assert (
        engine.features("visits", ["w3"]).rows[0]["visits.last_amount_lifetime"]
        == max((row["at"], row["amount"]) for row in table.to_pylist() if row["who"] == "w3")[1]
    )


def test_times_may_be_text():
    table = unsorted(200)
    text = [str(at) for at in table["at"].to_pylist()]
    assert text[0].endswith("+00:00")
    engine, want = Engine(VISITS, clock="event"), Engine(VISITS, clock="event")
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        written = table.set_column(2, "at", pa.array(text).cast(kind))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the second time on most are late
            assert engine.ingest(written) == want.ingest(table)
    assert left(engine) == left(want)
    with pytest.raises(EventError) as caught:
        engine.ingest(table.set_column(2, "at", pa.array([*text[:150], "soon", *text[151:]])))
    assert (caught.value.path, left(engine)) == ("[150].at", left(want))


def test_many_late_rows_are_told():
    """Those of ingest are late by what came before the call; score_batch keeps the table's order: its own rows too."""
    table = unsorted()
    engine = Engine(VISITS, clock="event")
    newest = {"who": "w", "amount": 1.0, "at": 1_700_000_000_000_000 + 29 * DAY}
    assert engine.ingest(newest) == "applied"
    behind = sum(at < newest["at"] for at in table["at"].cast(pa.int64()).to_pylist())
    with pytest.warns(UserWarning, match=f"{behind} of 500 rows were late and are not in the windows: newer ones were"):
        assert engine.ingest(table)["late"] == behind
    engine = Engine(VISITS, clock="event")
    with pytest.warns(UserWarning, match=r"rows were late .* sort it by time, or use replay\(out=...\)"):
        out = engine.score_batch(table, explain=True)
    assert out["amount"].to_pylist() == table["amount"].to_pylist()
    one_by_one = Engine(VISITS, clock="event")
    assert [one_by_one.score(row).outcome for row in table.to_pylist()] == out["outcome"].to_pylist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replayed = Engine(VISITS, clock="event").replay({"Visit": table}, out="seen", decisions=True)
        assert set(replayed["outcome"].to_pylist()) == {"applied"}
        assert replayed["amount"].to_pylist() == table["amount"].to_pylist()
        few = Engine(VISITS, clock="event")
        few.ingest(newest)
        few.ingest(table.slice(0, 9))


@pytest.mark.parametrize("how", ["sorted", "sampled", "twice", "named", "times", "levels", "text"])
def test_pandas_frames_with_any_index(how):
    """The index is no column, and no row is dropped or moved by it; a field that stands in it alone is read from it."""
    frame = unsorted(50).to_pandas()
    frame = {
        "sorted": lambda: frame.sort_values("amount", ascending=False),
        "sampled": lambda: frame.sample(30, random_state=1),
        "twice": lambda: pd.concat([frame, frame]),
        "named": lambda: frame.rename_axis("row").sort_values("who"),
        "times": lambda: frame.set_index("at", drop=False).sort_index(),
        "levels": lambda: frame.set_index(["at", "who"]).sort_values("amount"),
        "text": lambda: frame.set_index(frame["who"] + "!"),
    }[how]()
    fields = {name: frame.reset_index()[name] if how == "levels" else frame[name] for name in ("who", "amount", "at")}
    plain = pa.table({name: column.tolist() for name, column in fields.items()})
    for call in ("ingest", "score_batch", "replay"):
        engine, want = Engine(VISITS, clock="event"), Engine(VISITS, clock="event")
        if call == "replay":
            assert engine.replay({"Visit": frame}, out="seen").equals(want.replay({"Visit": plain}, out="seen"))
        elif call == "ingest":
            assert engine.ingest(frame) == want.ingest(plain)
        else:
            columns = ["outcome", "amount"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = engine.score_batch(frame, explain=True).select(columns)
                assert got.equals(want.score_batch(plain, explain=True).select(columns))
        assert left(engine) == left(want)


def test_a_frame_that_makes_no_table_is_told():
    frame = pd.DataFrame({"who": ["a", 1], "amount": [1.0, 2.0], "at": [0, 1]})
    with pytest.raises(EventError, match=r"the frame does not make a table: .*who"):
        Engine(VISITS, clock="event").ingest(frame)
    with pytest.raises(EventError, match="row: unknown column"):
        Engine(VISITS, clock="event").ingest(unsorted(3).to_pandas().rename_axis("row").reset_index())
