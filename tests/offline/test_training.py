"""Training sets from the log: against the oracle on generated logs and spines, against scoring itself, against DuckDB.

What must stay true: bits and statuses are equal, whatever the number of workers and passes.
"""

import math
import struct
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offline.shop_log import OPTIONS, SHOP, fill, rewritten

from oracles import training as oracle
from oracles.engine import SlowAggregation, SlowApp, SlowEvent, SlowPipeline, SlowView, definitions, output_type
from oracles.log_files import events_of
from penstock import (
    Aggregation,
    Engine,
    Entity,
    Event,
    EventError,
    FeatureView,
    Lifetime,
    LogError,
    PenstockError,
    Pipeline,
    Timestamp,
    on_demand_feature_view,
)
from penstock.offline import training
from penstock.offline.log_folder import LogFolder
from penstock.offline.training import training_set

pa = pytest.importorskip("pyarrow")

SECOND = 10**6
BASE = 1_700_000_000 * SECOND
UTC = pa.timestamp("us", "UTC")
OUTCOME_CODES = {"applied": 1, "duplicate": 2, "late": 3, "quarantined": 4}

FIELDS_A = {
    "customer": "string",
    "terminal": "int64",
    "amount": "float64?",
    "qty": "int64",
    "flag": "bool?",
    "label": "string?",
    "at": "timestamp",
}
FIELDS_B = {"customer": "string", "code": "string", "loss": "float64?", "label": "string?", "at": "timestamp"}
ARROW = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "timestamp": UTC}
NUMERIC = ("sum", "mean", "var_samp", "stddev_pop", "min", "max")
WHERES_A = (None, None, (">", ("slot", "amount"), ("literal", 2.0)), ("slot", "flag"))
WHERES_B = (None, None, ("is not null", ("slot", "label")))


@st.composite
def aggregations(draw, fields, wheres):
    function = draw(st.sampled_from(("count", "first", "last", "distinct_count", *NUMERIC)))
    numeric = [f for f, k in fields.items() if k.rstrip("?") in ("float64", "int64", "bool")]
    column = draw(st.sampled_from(numeric if function in NUMERIC else list(fields)))
    if function == "count" and draw(st.booleans()):
        column = None
    windows = draw(st.lists(st.sampled_from(["3s", "10s", "1m", "lifetime"]), min_size=1, max_size=3, unique=True))
    ttl = draw(st.sampled_from([None, "2s", "20s"])) if function in ("first", "last") else None
    closed = draw(st.sampled_from(["right", "both", "left"]))
    made = SlowAggregation(function, column, tuple(windows), draw(st.sampled_from(wheres)), None, closed, ttl)
    if draw(st.integers(0, 3)) == 0:
        kinds = {"float64": -1.5, "int64": 7, "bool": True, "string": "none", "timestamp": 5}
        made = made._replace(default=kinds[output_type(made, fields)])
    return made


@st.composite
def apps(draw):
    a = SlowEvent("A", FIELDS_A, draw(st.sampled_from(["0s", "5s", "30s"])))
    b = SlowEvent("B", FIELDS_B, draw(st.sampled_from(["0s", "20s"])))
    views = []
    for i in range(draw(st.integers(1, 4))):
        event = draw(st.sampled_from([a, a, b]))
        entity = draw(st.sampled_from(["customer", "terminal"]))
        key = entity if event is a or entity == "customer" else "code"
        made = draw(st.lists(aggregations(event.fields, WHERES_A if event is a else WHERES_B), min_size=1, max_size=3))
        kept, names = [], set()
        for one in made:
            mine = {(one.function, one.column, w) for w in one.windows}
            if not mine & names:
                kept.append(one)
                names |= mine
        views.append(SlowView(f"v{i}", event.name, entity, key, tuple(kept), draw(st.booleans())))
    entities = {"terminal": draw(st.sampled_from([int, str])), "customer": None}
    return SlowApp((a, b), tuple(views), SlowPipeline("p", "A", ("amount", "label")), entities)


offsets = st.one_of(st.integers(0, 12), st.integers(0, 70), st.sampled_from([200, -100]))
keys = st.sampled_from(["a", "b", "1", "2"])
amounts = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 0.1, 2.5, 1e16, -1e16, 1e-300, math.nan]))
labels = st.sampled_from([None, "x", "é", "", "long " * 40])
events = st.lists(
    st.fixed_dictionaries(
        {
            "event": st.sampled_from(["A", "A", "B"]),
            "customer": keys,
            "terminal": st.sampled_from([1, 2, -(2**63)]),
            "code": st.sampled_from(["1", "2", "01", "x"]),
            "amount": amounts,
            "loss": amounts,
            "qty": st.sampled_from([0, 1, 5, 2**63 - 1, -(2**63)]),
            "flag": st.sampled_from([None, True, False]),
            "label": labels,
            "at": st.builds(lambda s, us: BASE + s * SECOND + us, offsets, st.sampled_from([0, 0, 1])),
            "ingest": st.sampled_from([0, 0, 1, SECOND, 5 * SECOND, 40 * SECOND]),
            "other": st.sampled_from([None, None, None, None, "late", "quarantined", "duplicate"]),
        }
    ),
    max_size=30,
)
spines = st.lists(
    st.fixed_dictionaries(
        {
            "customer": st.sampled_from(["a", "b", "1", "unknown"]),
            "terminal": st.sampled_from([1, 2, 77]),
            "code": st.sampled_from(["1", "2", "x", "?"]),
            "amount": amounts,
            "loss": amounts,
            "qty": st.sampled_from([0, 1, 2**63 - 1]),
            "flag": st.sampled_from([None, True]),
            "label": labels,
            "at": st.builds(lambda s, us: BASE + s * SECOND + us, offsets, st.sampled_from([0, 0, 1, -1])),
            "with": st.sampled_from([None, None, "ingest", "event", "own", "own"]),
            "seen": st.integers(0, 31),
            "extra": st.integers(0, 3),
        }
    ),
    max_size=12,
)


def bits(value):
    return (float, struct.pack("<d", value)) if isinstance(value, float) else (type(value) is bool, value)


def plain(array):
    """Values with times as integers; of floats the bits, NaN and null alike."""
    if pa.types.is_timestamp(array.type):
        array = array.cast(pa.int64())
    return array.to_pylist()


def make_log(app, rows, folder):
    """Write the events through an engine, then give each its ingest time, and some another outcome."""
    fields = {e.name: e.fields for e in app.events}
    logged = []
    latest = BASE - 50 * SECOND
    with Engine(definitions(app), clock="event", log=folder, log_options=OPTIONS) as engine:
        for row in rows:
            own = {f: row[f] for f in fields[row["event"]]}
            outcome = engine.ingest(own, event=row["event"])
            latest += row["ingest"]
            own = {f: None if isinstance(v, float) and math.isnan(v) else v for f, v in own.items()}
            if outcome == "applied" and row["other"] is not None:
                outcome = row["other"]
            logged.append(oracle.Logged(row["event"], own, outcome, latest))

    def change(records):
        changed = []
        for kind, sequence, data in records:
            if kind == "event":
                new = bytearray(data)
                new[9] = OUTCOME_CODES[logged[sequence].outcome]
                new[24:32] = logged[sequence].ingest_time.to_bytes(8, "little", signed=True)
                data = bytes(new)
            changed.append((kind, sequence, data))
        return changed

    if logged:
        rewritten(folder, change)
    return logged


def spine_table(rows, more=("seen", "extra")):
    kinds = {**FIELDS_B, **FIELDS_A}
    columns = {f: pa.array([r[f] for r in rows], type=ARROW[k.rstrip("?")]) for f, k in kinds.items()}
    return pa.table({**columns, **{f: pa.array([r[f] for r in rows], type=pa.int64()) for f in more}})


@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(apps(), events, spines, st.sampled_from(["ingest_time", "backfill", "seen"]), st.sampled_from([1, 3]))
def test_any_log_and_spine_give_what_the_oracle_gives(app, rows, spine, mode, workers):
    views = [v.name for v in app.views]
    with tempfile.TemporaryDirectory() as folder:
        log = make_log(app, rows, Path(folder) / "log")
        for row in spine:
            # Times that are an event's own, or when it was ingested: the edges.
            if row["with"] is not None and log:
                one = log[row["seen"] % len(log)]
                row["at"] = one.ingest_time if row["with"] == "ingest" else one.row["at"]
                if row["with"] == "own":
                    row.update(one.row)  # the event itself, whose columns the spine has
                    row["seen"] = row["seen"] % len(log)
        table = spine_table(spine)
        how = {"backfill": {"backfill": True}, "seen": {"sequence": "seen"}}.get(mode, {})
        got = training_set(
            definitions(app), Path(folder) / "log", table, features=views, workers=workers, statuses=True, **how
        )
    expected = oracle.training_set(app, log, spine, views, "at", mode)
    assert repr(got.select(table.column_names).to_pylist()) == repr(table.to_pylist())
    for name in got.column_names[table.num_columns :]:
        if name.endswith("__status"):
            base = name.removesuffix("__status")
            statuses = got.column(name).to_pylist()
            assert statuses == [one[base][1] for one in expected], name
            values = plain(got.column(base))
            wide = got.schema.field(base).type == pa.float64()
            want = [expected[i][base][0] for i in range(len(spine))]
            want = [float(v) if wide and type(v) is int else v for v in want]
            assert list(map(bits, values)) == list(map(bits, want)), base


# scoring itself


def as_spine(folder):
    """The logged orders as a spine, with K just before each."""
    rows = [{**e.values, "before": e.sequence, "row": i} for i, e in enumerate(events_of(folder)) if "id" in e.values]
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.column_names.index("at"), "at", table.column("at").cast(UTC))


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_what_scoring_gave(tmp_path, workers):
    """Late events, ties, an unlogged default, a Python function, two sources: bit for bit, status by status."""
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = fill(engine, 400)
    spine = as_spine(tmp_path / "log")
    found = training_set(SHOP, tmp_path / "log", spine, sequence="before", statuses=True, workers=workers)
    assert {d.outcome for d in decisions} == {"applied", "late"}
    assert found.select(spine.column_names).equals(spine)
    for name in decisions[0].features:
        assert list(map(bits, plain(found.column(name)))) == [bits(d.features[name]) for d in decisions], name
        assert found.column(f"{name}__status").to_pylist() == [d.statuses[name] for d in decisions], name


def test_a_log_that_is_being_written_is_read_as_of_now(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = fill(engine, 50)
        spine = as_spine(tmp_path / "log")
        found = training_set(SHOP, tmp_path / "log", spine, pipeline="orders", sequence="before")
    for name in decisions[0].features:
        assert list(map(bits, plain(found.column(name)))) == [bits(d.features[name]) for d in decisions], name


def test_native_functions_defaults_and_request_fields(tmp_path):
    """Functions of functions, of defaults, of views of strings and of the time; a field that the spine lacks."""

    class Pay(Event):
        who: str
        amount: float
        at: Timestamp
        note: str | None = None
        rate: float = 2.0

    spend = FeatureView(
        "spend",
        entity="who",
        source=Pay,
        aggregations=[
            Aggregation("sum", "amount", windows=["1h"], default=0.5),
            Aggregation("last", "note", windows=["1h"]),
            Aggregation("count", windows=["1h"]),
        ],
    )

    @on_demand_feature_view
    def twice(amount: float, rate: float) -> float:
        return amount * rate

    @on_demand_feature_view
    def share(twice: float, spend__sum_amount_1h: float) -> float:
        return twice / spend__sum_amount_1h

    @on_demand_feature_view
    def late_hour(at: Timestamp) -> bool:
        return at.hour >= 22

    @on_demand_feature_view(mode="python")
    def words(spend__last_note_1h: str, spend__count_1h: int) -> str:
        if spend__count_1h == 3:
            raise ValueError("three")
        return f"{spend__last_note_1h}{spend__count_1h}"

    app = {
        "p": Pipeline(
            "p", event=Pay, features=["rate", twice, share, late_hour, words, spend, "note"], fallback="none"
        ),
        "other": Pipeline("other", event=Pay, features=["amount"]),
    }  # fmt: skip
    rows = [
        {"who": "a", "amount": 1.0 + i, "at": BASE + 600 * SECOND * i, "note": [None, "x", "é"][i % 3]}
        for i in range(9)
    ]
    with Engine(app, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = [engine.score(row, explain=True, pipeline="p") for row in rows]
    spine = pa.Table.from_pylist([{**row, "before": i} for i, row in enumerate(rows)])
    found = training_set(app, tmp_path / "log", spine, pipeline="p", sequence="before", statuses=True)
    assert found.column_names[: spine.num_columns] == spine.column_names
    assert found.column_names.count("note") == 1
    for name in decisions[0].features:
        assert list(map(bits, plain(found.column(name)))) == [bits(d.features[name]) for d in decisions], name
        assert found.column(f"{name}__status").to_pylist() == [d.statuses[name] for d in decisions], name
    assert found.column("words").null_count == 3  # two rows without a note before, one that failed
    bare = training_set(app, tmp_path / "log", spine.drop_columns(["note"]), pipeline="p", sequence="before")
    assert bare.column("note").null_count == 9
    with pytest.raises(PenstockError, match="say features= or pipeline=; have p, other"):
        training_set(app, tmp_path / "log", spine)


# an independent engine


def test_backfill_is_what_duckdb_counts(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        fill(engine, 400)
    log = [e for e in events_of(tmp_path / "log") if "id" in e.values and e.outcome == 1]
    rows = pa.Table.from_pylist(
        [{"shop": e.values["shop"], "amount": e.values["amount"], "at": e.values["at"]} for e in log]
    )
    start, end = min(rows["at"].to_pylist()), max(rows["at"].to_pylist())
    spine = pa.table({"n": range(500), "shop": [i % 9 - 4 for i in range(500)], "at": [
        start + (end - start) * i // 450 for i in range(500)]})  # fmt: skip
    expected = duckdb.sql(
        "select n, count(r.at) c, sum(case when r.at > s.at - 3600000000 then 1 else 0 end)::bigint h, "
        "sum(r.amount::decimal(18, 2))::double total "
        "from spine s left join rows r on r.shop = s.shop and r.at <= s.at and r.at > s.at - 86400000000 "
        "group by n order by n"
    ).fetchall()
    found = training_set(SHOP, tmp_path / "log", spine, features=["shops"], time="at", backfill=True)
    for (n, count, hour, total), row in zip(expected, found.to_pylist()):
        assert row["n"] == n
        assert row["shops.count_1h"] == (hour or 0)
        assert (row["shops.sum_amount_1d"] is None) == (count == 0)
        if count:
            assert row["shops.sum_amount_1d"] == pytest.approx(total, rel=1e-12)


# how the work is split


@pytest.fixture
def big(tmp_path):
    """A log of 20,000 orders in several segments, and a spine of 3,000 rows."""
    from penstock.offline.options import LogOptions

    n = 20_000
    table = pa.table(
        {
            "id": [f"o{i}" for i in range(n)],
            "customer": [f"c{i * 7919 % 2000}" for i in range(n)],
            "shop": [i * 31 % 50 for i in range(n)],
            "amount": [i * 0.37 % 91 for i in range(n)],
            "note": [None if i % 3 else f"note {i}" for i in range(n)],
            "at": [BASE + i * 7 * SECOND for i in range(n)],
        }
    )
    options = LogOptions(keeper=False, segment_bytes=1 << 20)
    with Engine(str(SHOP), clock="event", log=tmp_path / "log", log_options=options) as engine:
        engine.ingest(table, event="Order")
    spine = pa.table(
        {
            "customer": [f"c{i * 13 % 2100}" for i in range(3000)],
            "shop": [i % 60 for i in range(3000)],
            "amount": [float(i) for i in range(3000)],
            "note": [f"spine {i}" for i in range(3000)],
            "at": [BASE + i * 7919 % 20_000 * 7 * SECOND for i in range(3000)],
        }
    )
    return tmp_path / "log", spine


def test_no_split_changes_a_bit(big, tmp_path, monkeypatch):
    log, spine = big
    ask = {"features": ["spend", "shops.sum_amount_1d", "logins"], "time": "at", "statuses": True}
    whole = training_set(SHOP, log, spine, workers=1, **ask).combine_chunks()
    assert whole.column("spend.last_note_1d").null_count == 0  # the row itself counts
    assert training_set(SHOP, log, spine, workers=5, **ask).equals(whole)
    path = tmp_path / "out.parquet"
    monkeypatch.setattr(training, "CHUNK", 700)
    assert training_set(SHOP, log, spine, workers=2, out=path, **ask) == 3000
    import pyarrow.parquet as pq

    assert pq.read_table(path).equals(whole)
    assert not list(tmp_path.glob("*.part"))
    assert training_set(SHOP, log, spine, workers=2, **ask).equals(whole)
    backfilled = training_set(SHOP, log, spine, workers=1, backfill=True, **ask).combine_chunks()
    assert training_set(SHOP, log, spine, workers=3, backfill=True, **ask).combine_chunks().equals(backfilled)


@pytest.mark.parametrize("backfill", [False, True])
def test_a_state_that_does_not_fit_is_split_by_keys(big, monkeypatch, backfill):
    log, spine = big
    ask = {"features": ["spend", "shops"], "time": "at", "backfill": backfill}
    whole = training_set(SHOP, log, spine, **ask).combine_chunks()
    monkeypatch.setattr(training, "LEAST_STATE", 1)
    told = []
    split = training_set(
        SHOP,
        log,
        spine,
        workers=1,
        memory="1MB" if backfill else "700KB",
        progress=lambda done, total: told.append((done, total)),
        **ask,
    )
    assert split.combine_chunks().equals(whole)
    assert told[-1][1] > 2 * 20_000  # more passes than were planned


@pytest.mark.parametrize(
    ("backfill", "what"), [(False, "the state of one key"), (True, "what is kept of one key's events")]
)
def test_memory_that_no_split_makes_enough(tmp_path, monkeypatch, backfill, what):
    n = 30_000
    table = pa.table({"who": ["a"] * n, "amount": [1.0] * n, "at": range(BASE, BASE + n)})
    with Engine(HOUR, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        engine.ingest(table)
    monkeypatch.setattr(training, "LEAST_STATE", 1)
    spine = {"who": ["a"], "at": [BASE + n]}
    with pytest.raises(PenstockError, match=rf"^{what} does not fit into 0.2 MiB, a worker's share; give more memory="):
        training_set(
            HOUR, tmp_path / "log", spine, features=["hour"], time="at", backfill=backfill, memory=400_000, workers=2
        )
    enough = training_set(HOUR, tmp_path / "log", spine, features=["hour"], time="at", backfill=backfill)
    assert enough["hour.sum_amount_1h"].to_pylist() == [float(n)]


def test_progress_ends_at_the_total(big):
    log, spine = big
    told = []
    training_set(
        SHOP, log, spine, features=["shops"], workers=2, progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (60_000, 60_000)  # the search for own events, and two passes


def test_a_failure_in_one_worker_ends_all(big):
    log, spine = big
    number = LogFolder(log).numbers()[1]
    path = LogFolder(log).segment_path(number)
    data = bytearray(path.read_bytes())
    data[500_000] ^= 1
    path.write_bytes(data)
    before = threading.active_count()
    with pytest.raises(LogError, match=rf"{number:012d}.log at offset \d+: a record does not check"):
        training_set(SHOP, log, spine, features=["spend", "shops", "logins"], time="at", workers=2)
    assert threading.active_count() == before
    # Rows that need nothing of what is damaged are read; whether one is an event of the log, all of the log says.
    early = spine.filter(pa.array([t < BASE + 1000 * SECOND for t in spine["at"].to_pylist()]))
    with pytest.raises(LogError, match=r"\d+: a record does not check"):
        training_set(SHOP, log, early, features=["shops"], time="at")
    assert training_set(SHOP, log, early, features=["shops"], time="at", own="never").num_rows == early.num_rows


def test_a_gap_in_the_log_is_named(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        fill(engine, 40)
    spine = as_spine(tmp_path / "log")
    rewritten(tmp_path / "log", lambda records: [r for r in records if r[:2] != ("event", 7)])
    with pytest.raises(LogError, match=r"\.log: events 7 to 7 are missing before offset"):
        training_set(SHOP, tmp_path / "log", spine, sequence="before")


# spines


class Pay(Event, max_skew="1d"):
    who: str
    amount: float
    at: Timestamp


SMALL = {
    "spend": FeatureView(
        "spend",
        entity="customer",
        key="who",
        source=Pay,
        aggregations=[
            Aggregation("count", windows=["10s", "1h", Lifetime]),
            Aggregation("last", "amount", windows=[Lifetime], ttl="1h", default=-1.0),
        ],
    ),
    "own": FeatureView(
        "own",
        entity="customer",
        key="who",
        source=Pay,
        include_request_event=True,
        aggregations=[Aggregation("count", windows=["1h"]), Aggregation("sum", "amount", windows=["1h"])],
    ),
}


HOUR = {
    "hour": FeatureView("hour", entity="who", source=Pay, aggregations=[Aggregation("sum", "amount", windows=["1h"])])
}


@pytest.fixture
def small(tmp_path):
    """Events of a, b, a, at 0, 10 and 20 seconds, ingested as they happened."""
    with Engine(SMALL, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        for i, who in enumerate(["a", "b", "a"]):
            engine.ingest({"who": who, "amount": 1.5 * (i + 1), "at": BASE + 10 * SECOND * i})
    return tmp_path / "log"


def test_keys_duplicates_unknown_and_null(small):
    spine = pa.table(
        {
            "customer": pa.array(["a", None, "a", "zz", "b", "a"]).dictionary_encode(),
            "x": [1, 2, 3, 4, 5, 6],
            "when": pa.array([BASE + 20 * SECOND] * 5 + [BASE - 1], type=pa.timestamp("us")),
        }
    )
    found = training_set(SMALL, small, spine, features=["spend"], statuses=True, own="never")
    assert found.select(spine.column_names).equals(spine)
    assert found["spend.count_1h"].to_pylist() == [2, 0, 2, 0, 1, 0]
    assert found["spend.count_10s"].to_pylist() == [1, 0, 1, 0, 0, 0]
    assert found["spend.last_amount_lifetime"].to_pylist() == [4.5, -1.0, 4.5, -1.0, 3.0, -1.0]
    unknown = training_set(SMALL, small, spine, features="spend.count_lifetime", time="when")
    assert unknown.column_names == [*spine.column_names, "spend.count_lifetime"]
    # Nanoseconds are floored, a naive time is UTC, integers are microseconds (S1).
    for times in (
        pa.array([(BASE + 20 * SECOND) * 1000 - 1] * 6, type=pa.timestamp("ns")),
        pa.array([BASE + 20 * SECOND - 1] * 6),
    ):
        again = training_set(SMALL, small, spine.set_column(2, "when", times), features=["spend"], time="when")
        assert again["spend.count_1h"].to_pylist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("kind", [int, str])
def test_keys_of_an_entity_with_a_type_are_read_as_that_type(tmp_path, kind):
    class Visit(Event):
        shop: kind
        at: Timestamp

    app = {
        "v": FeatureView(
            "v",
            entity=Entity("shop", type=kind),
            source=Visit,
            aggregations=[Aggregation("count", windows=["1h"])],
        )
    }
    with Engine(app, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        for shop in (-12, -12, 7):
            engine.ingest({"shop": kind(shop), "at": BASE})
    for keys in (pa.array([-12, 7, 8, None], type=pa.int16()), pa.array(["-12", "7", "07", None])):
        spine = {"shop": keys, "at": [BASE] * 4}
        found = training_set(app, tmp_path / "log", spine, features=["v"], time="at", own="never")
        assert found["v.count_1h"].to_pylist() == [2, 1, 0, 0]
        told = []
        found = training_set(app, tmp_path / "log", spine, features=["v"], time="at", summary=told.append)
        assert found["v.count_1h"].to_pylist() == [0, 0, 0, 0]  # each is the first event of its key
        assert told[0].own == 2


def test_ttl_and_a_default_in_place_of_what_is_too_old(small):
    spine = {"who": ["a"], "at": pa.array([BASE + 3620 * SECOND + 1], type=UTC)}
    found = training_set(SMALL, small, spine, features=["spend.last_amount_lifetime"], statuses=True).to_pylist()[0]
    assert (found["spend.last_amount_lifetime"], found["spend.last_amount_lifetime__status"]) == (
        -1.0,
        "OUTSIDE_MAX_AGE",
    )


def test_empty_sides(small, tmp_path):
    none = pa.table({"who": pa.array([], type=pa.string()), "at": pa.array([], type=UTC)})
    found = training_set(SMALL, small, none, features=["spend"])
    assert found.num_rows == 0
    assert found.schema.field("spend.count_1h").type == pa.int64()
    assert training_set(SMALL, small, none, features=["spend"], out=tmp_path / "none.parquet") == 0
    with Engine(SMALL, log=tmp_path / "empty", log_options=OPTIONS):
        pass
    spine = {"who": ["a", None], "at": pa.array([BASE, BASE], type=UTC)}
    for backfill in (False, True):
        found = training_set(SMALL, tmp_path / "empty", spine, features=["spend"], statuses=True, backfill=backfill)
        assert found["spend.count_1h"].to_pylist() == [0, 0]
        assert found["spend.last_amount_lifetime__status"].to_pylist() == ["PRESENT", "PRESENT"]


def test_the_row_itself_counts_where_the_view_says_so(small):
    """S8: its own event; a row that is none of the log's (another amount) is the newest one at T, but with backfill."""
    spine = {
        "who": ["a", "b"],
        "amount": [100.0, 200.0],
        "at": pa.array([BASE + 20 * SECOND, BASE + 20 * SECOND], type=UTC),
    }
    found = training_set(SMALL, small, spine, features=["own", "spend.count_1h"])
    assert found["own.count_1h"].to_pylist() == [3, 2]
    assert found["own.sum_amount_1h"].to_pylist() == [106.0, 203.0]
    assert found["spend.count_1h"].to_pylist() == [2, 1]
    found = training_set(SMALL, small, spine, features=["own"], backfill=True)
    assert found["own.count_1h"].to_pylist() == [2, 1]
    logged = {"customer": ["a", "b"], "at": pa.array([BASE + 20 * SECOND, BASE + 10 * SECOND], type=UTC)}
    for how in ({}, {"backfill": True}):
        # The log has what the spine has not: amounts.
        found = training_set(SMALL, small, logged, features=["own", "spend.count_1h"], **how)
        assert found["own.count_1h"].to_pylist() == [2, 1]
        assert found["own.sum_amount_1h"].to_pylist() == [6.0, 3.0]
        assert found["spend.count_1h"].to_pylist() == [1, 0]
    bare = {"customer": ["a"], "at": pa.array([BASE + 1], type=UTC)}
    with pytest.raises(PenstockError, match=r"the spine has no column amount, needed by own: its rows are read as Pay"):
        training_set(SMALL, small, bare, features=["own"])
    assert training_set(SMALL, small, bare, features=["own.count_1h"])["own.count_1h"].to_pylist() == [2]
    assert training_set(SMALL, small, bare, features=["own"], backfill=True)["own.sum_amount_1h"].to_pylist() == [1.5]


def test_a_row_older_than_online_state_reaches_is_exact(tmp_path):
    """max_skew beyond lateness: an event from the future moves the watermark, and T falls behind what is kept (S14)."""
    with Engine(SMALL, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        for i in range(1000):
            engine.ingest({"who": "a", "amount": 1.0, "at": BASE + i * SECOND})
        engine.ingest({"who": "a", "amount": 1.0, "at": BASE + 80_000 * SECOND})
        for i in range(900):
            engine.ingest({"who": "a", "amount": 1.0, "at": BASE + 80_000 * SECOND + i})

    def change(records):
        return [
            (kind, sequence, data[:24] + (BASE + min(sequence, 1000) * SECOND).to_bytes(8, "little") + data[32:])
            if kind == "event"
            else (kind, sequence, data)
            for kind, sequence, data in records
        ]

    rewritten(tmp_path / "log", change)
    spine = {"who": ["a", "a"], "at": pa.array([BASE + 1000 * SECOND, BASE + 500 * SECOND], type=UTC)}
    found = training_set(SMALL, tmp_path / "log", spine, features=["spend"], statuses=True, own="never")
    assert found["spend.count_10s"].to_pylist() == [9, 10]
    assert found["spend.count_1h"].to_pylist() == [1000, 501]
    assert found["spend.last_amount_lifetime__status"].to_pylist() == ["PRESENT", "PRESENT"]


def test_integers_beyond_64_bits_make_the_whole_column_float(tmp_path, monkeypatch):
    class Big(Event):
        who: str
        n: int
        at: Timestamp

    view = FeatureView("v", entity="who", source=Big, aggregations=[Aggregation("sum", "n", windows=["1h"])])
    with Engine({"v": view}, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        for who, n in [("a", 2**63 - 1), ("a", 2**63 - 1), ("b", 5)]:
            engine.ingest({"who": who, "n": n, "at": BASE})
    monkeypatch.setattr(training, "CHUNK", 1)
    spine = {"who": ["b", "a", "c"], "at": pa.array([BASE] * 3, type=UTC)}
    found = training_set({"v": view}, tmp_path / "log", spine, features=["v"], own="never")
    assert found["v.sum_n_1h"].to_pylist() == [5.0, float(2**64 - 2), None]


TYPED = {"who": ["a"], "at": pa.array([BASE], type=UTC)}


@pytest.mark.parametrize(
    ("spine", "ask", "said"),
    [
        (TYPED, {"features": ["spnd"]}, r"no view or feature 'spnd'; did you mean spend\?"),
        (TYPED, {"features": []}, "say at least one view or feature"),
        (TYPED, {"features": ["spend"], "pipeline": "p"}, "say either features= or pipeline="),
        (TYPED, {}, r"say features= or pipeline=; have none"),
        (TYPED, {"pipeline": "p"}, "no pipeline 'p'; have none"),
        (TYPED, {"features": ["spend"], "time": "ta"}, r"time: the spine has no column 'ta'; have who, at"),
        (TYPED, {"features": ["spend"], "sequence": "k"}, "sequence: the spine has no column 'k'"),
        (TYPED, {"features": ["spend"], "sequence": "who"}, "who: expected a column of int64, got string"),
        (TYPED, {"features": ["spend"], "sequence": "who", "backfill": True}, "either backfill=True or sequence="),
        ({"at": TYPED["at"]}, {"features": ["spend"]}, "view spend: the spine has no key column 'who' or 'customer'"),
        ({"who": ["a"], "x": [1]}, {"features": ["spend"]}, "the spine has no timestamp column; say which is the time"),
        (
            {"who": ["a"], "x": TYPED["at"], "y": TYPED["at"]},
            {"features": ["spend"]},
            r"several timestamp columns \(x, y\)",
        ),
        ({"who": [1], "at": TYPED["at"]}, {"features": ["spend"]}, "key who is int64 in the spine but string in Pay"),
        ({"who": [1.5], "at": TYPED["at"]}, {"features": ["spend"]}, "who: expected a column of string, got double"),
        (
            {"who": ["a", "b"], "at": pa.array([BASE, None], type=UTC)},
            {"features": ["spend"]},
            r"\[1\].at: the time is missing \(null\)",
        ),
        ({"who": ["a"], "at": [2**61]}, {"features": ["spend"]}, "at: expected a time between the years 1 and 9999"),
        (
            {**TYPED, "spend.count_1h": [1]},
            {"features": ["spend"]},
            "has a column 'spend.count_1h', the name of a feature",
        ),
        ({**TYPED, "who": [None], "amount": [1.0]}, {"features": ["own"]}, r"\[0\].who: expected a value, got null"),
        ({**TYPED, "amount": [math.inf]}, {"features": ["own"]}, r"\[0\].amount: expected a finite number"),
        ({"who": ["x" * 1025], "at": TYPED["at"]}, {"features": ["spend"]}, r"\[0\].who: expected at most 1024 bytes"),
        (TYPED, {"features": ["spend"], "workers": 0}, "workers: expected at least 1"),
        (TYPED, {"features": ["spend"], "memory": "lots"}, "memory: expected a size such as"),
        (TYPED, {"features": ["spend"], "on": "spark"}, 'on: expected "threads" or "ray"'),
        (TYPED, {"features": ["spend"], "own": "no"}, 'own: expected "auto" or "never"'),
        (
            {**TYPED, "amount": ["much"]},
            {"features": ["spend"]},
            "amount: string in the spine, but float64 in Pay: whether a row is one of the log's own events cannot be",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(small, spine, ask, said):
    with pytest.raises((PenstockError, EventError, ValueError), match=said):
        training_set(SMALL, small, spine, **ask)


def test_two_columns_of_a_name_and_a_folder_that_is_no_log(small, tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), TYPED["at"], pa.array(["a"])], names=["who", "at", "who"])
    with pytest.raises(EventError, match="who: two columns of this name"):
        training_set(SMALL, small, twice, features=["spend"])
    with pytest.raises(LogError, match="no event log here"):
        training_set(SMALL, tmp_path / "nowhere", TYPED, features=["spend"])
