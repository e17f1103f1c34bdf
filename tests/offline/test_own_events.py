"""Training over the log's own events: which event a row is, and that it gets what scoring it gave (S5, S8, S14).

What must stay true: the oracle (oracles/own_events.py) and scoring itself judge, and no split of the work shows.
"""

import math
import random

import pytest
from offline.shop_log import OPTIONS, SHOP, fill, rewritten

from oracles import own_events as oracle
from oracles.log_files import events_of
from penstock import (
    Aggregation,
    Engine,
    Entity,
    Event,
    EventError,
    FeatureView,
    Lifetime,
    PenstockError,
    Pipeline,
    Timestamp,
    parity,
    training_set,
)
from penstock.cli import main

pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SECOND = 10**6
BASE = 1_700_000_000 * SECOND
UTC = pa.timestamp("us", "UTC")
OUTCOMES = {"applied": 1, "duplicate": 2, "late": 3, "quarantined": 4}


class Buy(Event, time="at", event_id="id", lateness="5s"):
    id: str
    k: str
    z: int
    x: float | None
    n: int
    note: str | None
    flag: bool | None
    since: Timestamp | None
    at: Timestamp


class Visit(Event, time="at", lateness="20s"):
    k: str
    y: float
    at: Timestamp


def view(name, source, key, include, *aggregations):
    return FeatureView(name, entity=key, source=source, include_request_event=include, aggregations=list(aggregations))


VIEWS = {
    "by_k": view(
        "by_k", Buy, "k", False,
        Aggregation("count", windows=["10s", Lifetime]),
        Aggregation("sum", "n", windows=["1m"]),
        Aggregation("last", "note", windows=[Lifetime], default="none"),
    ),
    "with_k": view(
        "with_k", Buy, "k", True,
        Aggregation("count", windows=["10s"]),
        Aggregation("sum", "n", windows=["1m"]),
        Aggregation("last", "note", windows=[Lifetime]),
        Aggregation("max", "x", windows=["1m"]),
    ),
    "by_z": view(
        "by_z", Buy, "z", False, Aggregation("count", windows=["1m"]), Aggregation("first", "x", windows=["1m"])
    ),
    "visits": view(
        "visits", Visit, "k", False, Aggregation("count", windows=["10s"]), Aggregation("last", "y", windows=[Lifetime])
    ),
    "with_visits": view("with_visits", Visit, "k", True, Aggregation("count", windows=["1m"], name="seen")),
}  # fmt: skip
APP = {"Buy": Buy, "Visit": Visit, **VIEWS, "p": Pipeline("p", event=Buy, features=list(VIEWS.values()))}
KINDS = {"Buy": oracle.Kind("id", 5 * SECOND), "Visit": oracle.Kind(None, 20 * SECOND)}
SLOW = {
    "by_k": oracle.View("by_k", "Buy", "k", False, (
        ("by_k.count_10s", "count", None, 10 * SECOND, None),
        ("by_k.count_lifetime", "count", None, None, None),
        ("by_k.sum_n_1m", "sum", "n", 60 * SECOND, None),
        ("by_k.last_note_lifetime", "last", "note", None, "none"),
    )),
    "with_k": oracle.View("with_k", "Buy", "k", True, (
        ("with_k.count_10s", "count", None, 10 * SECOND, None),
        ("with_k.sum_n_1m", "sum", "n", 60 * SECOND, None),
        ("with_k.last_note_lifetime", "last", "note", None, None),
        ("with_k.max_x_1m", "max", "x", 60 * SECOND, None),
    )),
    "by_z": oracle.View("by_z", "Buy", "z", False, (
        ("by_z.count_1m", "count", None, 60 * SECOND, None),
        ("by_z.first_x_1m", "first", "x", 60 * SECOND, None),
    )),
    "visits": oracle.View("visits", "Visit", "k", False, (
        ("visits.count_10s", "count", None, 10 * SECOND, None),
        ("visits.last_y_lifetime", "last", "y", None, None),
    )),
    "with_visits": oracle.View("with_visits", "Visit", "k", True, (
        ("with_visits.seen", "count", None, 60 * SECOND, None),
    )),
}  # fmt: skip
TYPES = {
    "id": pa.string(), "k": pa.string(), "z": pa.int64(), "x": pa.float64(), "n": pa.int64(), "note": pa.string(),
    "flag": pa.bool_(), "since": UTC, "at": UTC, "y": pa.float64(), "seen": pa.int64(), "label": pa.bool_(),
}  # fmt: skip


def make_log(rng, folder):
    """Buys and visits with ties, equal rows, repeated ids, late ones; then ingest times, and some quarantined."""
    log = []
    at = BASE
    with Engine(APP, clock="event", log=folder, log_options=OPTIONS) as engine:
        for i in range(rng.randrange(1, 60)):
            at += rng.choice([0, 0, 1, SECOND, 3 * SECOND, 15 * SECOND])
            when = at - rng.choice([0, 0, 0, 2 * SECOND, 30 * SECOND])
            if rng.random() < 0.3:
                type_, row = "Visit", {"k": rng.choice("ab"), "y": rng.choice([0.0, -0.0, 1.5]), "at": when}
            else:
                type_, row = "Buy", {
                    "id": f"i{rng.randrange(i + 1) if rng.random() < 0.1 else i}",
                    "k": rng.choice("ab"),
                    "z": rng.choice([1, -7]),
                    "x": rng.choice([None, 0.0, -0.0, 2.5]),
                    "n": rng.randrange(2),
                    "note": rng.choice([None, "", "é", "a longer note"]),
                    "flag": rng.choice([None, True, False]),
                    "since": rng.choice([None, BASE]),
                    "at": when,
                }  # fmt: skip
            if log and rng.random() < 0.15:
                # The same once more, but for the id.
                type_, row, _, _ = log[-1]
                row = {**row, "id": f"again {i}"} if type_ == "Buy" else dict(row)
            outcome = engine.ingest(row, event=type_)
            if outcome == "duplicate":
                continue  # is not in the log
            if outcome == "applied" and rng.random() < 0.1:
                outcome = rng.choice(["quarantined", "duplicate"])
            log.append(oracle.Logged(type_, row, outcome, 0))
    ingest = BASE - SECOND
    for i, logged in enumerate(log):
        ingest += rng.choice([0, 0, SECOND, 4 * SECOND, 20 * SECOND, -SECOND])
        log[i] = logged._replace(ingest=ingest)

    def change(records):
        changed = []
        for kind, sequence, data in records:
            if kind == "event":
                new = bytearray(data)
                new[9] = OUTCOMES[log[sequence].outcome]
                new[24:32] = log[sequence].ingest.to_bytes(8, "little", signed=True)
                data = bytes(new)
            changed.append((kind, sequence, data))
        return changed

    rewritten(folder, change)
    return log


def make_spine(rng, log):
    """Rows of the log, some changed, some twice, and rows of one's own; the columns that the spine has."""
    rows = []
    nothing = dict.fromkeys(TYPES)
    for _ in range(rng.randrange(25)):
        logged = rng.choice(log)
        row = {**nothing, "z": 1, "n": 0, **logged.row, "seen": rng.randrange(len(log) + 2), "label": True}
        change = rng.random()
        if change < 0.15:
            row["at"] += rng.choice([-1, 1, 5 * SECOND])
        elif change < 0.3:
            others = {"k": "a", "x": 2.5, "n": 1, "note": "z", "flag": False}
            row.update({f: v for f, v in others.items() if rng.random() < 0.2})
        elif change < 0.4:
            row["id"] = rng.choice([None, "nobody"])
        elif change < 0.5:
            row["seen"] = log.index(logged)
        elif change < 0.6:
            row["at"] = logged.ingest
        rows += [row] * rng.choice([1, 1, 1, 2])
    rng.shuffle(rows)
    more = [f for f in ("flag", "since", "y", "label") if rng.random() < 0.4]
    more += ["n", "x", "note"] if rng.random() < 0.7 else []
    columns = ["k", "z", "at", "seen", *more, *(["id"] if rng.random() < 0.5 else [])]
    return rows, columns


def may_be(columns, names, pipeline):
    """The event types that a row may be (training_set's docstring says which)."""
    if pipeline:
        return {"Buy"}
    types = {SLOW[name].type for name in names}
    fields = {"Buy": set(Buy.__struct_fields__), "Visit": set(Visit.__struct_fields__)}
    score = {t: (KINDS[t].id in columns, len(fields[t] & set(columns))) for t in types}
    return {t for t in types if score[t] == max(score.values())}


@pytest.mark.parametrize("seed", range(60))
def test_any_log_and_spine_give_what_the_oracle_gives(tmp_path, seed):
    rng = random.Random(seed)
    log = make_log(rng, tmp_path / "log")
    spine, columns = make_spine(rng, log)
    table = pa.table({f: pa.array([row[f] for row in spine], type=TYPES[f]) for f in columns})
    for mode in ("ingest_time", "backfill", "seen"):
        for own in ("auto", "never"):
            pipeline = rng.random() < 0.4
            names = list(SLOW) if pipeline else rng.sample(list(SLOW), rng.randrange(1, 6))
            asked = {"pipeline": "p"} if pipeline else {"features": names}
            how = {"backfill": {"backfill": True}, "seen": {"sequence": "seen"}}.get(mode, {})
            told = []
            ask = {**asked, **how, "own": own, "workers": rng.choice([1, 3]), "summary": told.append}
            views = [
                SLOW[n] if not pipeline or SLOW[n].type == "Buy" else SLOW[n]._replace(include=False) for n in names
            ]
            expected, numbers = oracle.training_set(
                KINDS, views, log, spine, columns, "at", may_be(columns, names, pipeline), mode, own
            )
            known = [n is not None and (mode != "seen" or n <= row["seen"]) for n, row in zip(numbers, spine)]
            if "x" not in columns and "with_k" in names and mode != "backfill" and not all(known):
                with pytest.raises(PenstockError, match=r"the spine has no column x.* none of the log's own events"):
                    training_set(APP, tmp_path / "log", table, time="at", **ask)
                continue
            got = training_set(APP, tmp_path / "log", table, time="at", statuses=True, **ask)
            assert got.select(columns).equals(table)
            assert told[0].own == sum(n is not None for n in numbers)
            assert told[0].own + told[0].as_of_time + told[0].nothing == told[0].rows == len(spine)
            for output in [o[0] for v in views for o in v.outputs]:
                found = list(zip(got[output].to_pylist(), got[f"{output}__status"].to_pylist()))
                found = [(v, s if s in ("PRESENT", "INVALID") else "absent") for v, s in found]
                assert found == [row[output] for row in expected], (mode, own, output, numbers)


def bits(value):
    return value.hex() if isinstance(value, float) else int(value) if isinstance(value, Timestamp) else value


@pytest.mark.parametrize("columns", [["id"], ["customer", "shop", "at"], None])
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_what_scoring_gave(tmp_path, columns, workers):
    """Late events too; told by id, by keys and time, or by all."""
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        decisions = fill(engine, 400)
    rows = [e.values for e in events_of(tmp_path / "log") if "id" in e.values]
    spine = pa.Table.from_pylist(rows)
    spine = spine.set_column(spine.column_names.index("at"), "at", spine["at"].cast(UTC))
    ask = {"time": "at", "features": ["spend", "shops", "logins"]}
    if columns == ["id"]:
        # What the id does not say may be anything.
        spine = spine.set_column(spine.column_names.index("note"), "note", pa.array(["other"] * len(rows)))
    elif columns is not None:
        spine = spine.select(columns)
    told = []
    found = training_set(SHOP, tmp_path / "log", spine, statuses=True, workers=workers, summary=told.append, **ask)
    assert {d.outcome for d in decisions} == {"applied", "late"}
    assert told[0].own == len(rows)
    for name in (n for n in decisions[0].features if "." in n):
        assert list(map(bits, found[name].to_pylist())) == [bits(d.features[name]) for d in decisions], name
        assert found[f"{name}__status"].to_pylist() == [d.statuses[name] for d in decisions], name


class Pay(Event, time="at"):
    who: str
    amount: float
    at: Timestamp


PAY = {
    "Pay": Pay,
    "v": FeatureView("v", entity="who", source=Pay, aggregations=[Aggregation("count", windows=[Lifetime])]),
    "p": Pipeline("p", event=Pay, features=["v.count_lifetime"]),
}
PAY["p"] = Pipeline("p", event=Pay, features=[PAY["v"]])


def pays(folder, rows, clock="event"):
    with Engine(PAY, clock=clock, log=folder, log_options=OPTIONS) as engine:
        for row in rows:
            engine.ingest(row, event="Pay")
    return folder


def counts(folder, spine, **how):
    told = []
    found = training_set(PAY, folder, spine, features=["v"], time="at", summary=told.append, **how)
    return found["v.count_lifetime"].to_pylist(), told[0]


def test_times_of_every_unit_and_null_are_told(tmp_path):
    rows = [{"who": "a", "amount": 1.0, "at": BASE + i * SECOND} for i in range(3)]
    log = pays(tmp_path / "log", rows)
    for unit, factor in (("s", 10**-6), ("ms", 10**-3), ("us", 1), ("ns", 1000)):
        for zone in (None, "UTC", "Europe/Berlin"):
            times = pa.array([round(row["at"] * factor) for row in rows], type=pa.timestamp(unit, zone))
            found, told = counts(log, {"who": ["a"] * 3, "at": times})
            assert (found, told.own) == ([0, 1, 2], 3), (unit, zone)
    at = pa.array([row["at"] for row in rows], type=UTC)
    # A null key is nobody's; null and NaN equal no amount that was logged.
    found, told = counts(log, {"who": ["a", None, "a"], "at": at})
    assert (found, told.own, told.nothing) == ([0, 0, 2], 2, 1)
    found, told = counts(log, {"who": ["a"] * 3, "at": at, "amount": [1.0, None, math.nan]})
    assert (found, told.own) == ([0, 2, 3], 1)
    assert "2 rows have the key and time of a logged event but are none, for they differ in amount" in told.warnings[0]
    # Integers and half floats are compared as the field's own type.
    for amounts in (pa.array([1, 1, 2]), pa.array([1.0, 1.0, 2.0], type=pa.float32())):
        assert counts(log, {"who": ["a"] * 3, "at": at, "amount": amounts})[0] == [0, 1, 3]
    # By number of the row, by an id: a text is no number, and the other way round.
    with pytest.raises(EventError, match="id: int64 in the spine, but string in Buy"):
        training_set(APP, log, {"k": ["a"], "at": at[:1], "id": [1]}, features=["by_k"], time="at")


def test_a_row_more_than_once_is_the_same_event(tmp_path):
    """Rows that are repeated (oversampling, several labels) do not see the event that they are."""
    rows = [{"who": "a", "amount": 1.0, "at": BASE + i * SECOND} for i in (0, 1, 1)]
    log = pays(tmp_path / "log", rows)
    at = pa.array([BASE + SECOND] * 4 + [BASE] * 2, type=UTC)
    for how in ({}, {"backfill": True}):
        assert counts(log, {"who": ["a"] * 6, "at": at}, **how)[0] == [1, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("amount", ["much"], "amount: string in the spine, but float64 in Pay"),
        ("amount", [True], "amount: bool in the spine, but float64 in Pay"),
    ],
)
def test_a_column_of_another_type_is_said(tmp_path, name, values, said):
    log = pays(tmp_path / "log", [{"who": "a", "amount": 1.0, "at": BASE}])
    spine = {"who": ["a"], "at": pa.array([BASE], type=UTC), name: values}
    with pytest.raises(EventError, match=said):
        counts(log, spine)
    assert counts(log, spine, own="never")[0] == [1]


class Typed(Event, time="at"):
    shop: int
    big: int | None
    on: bool | None
    seen: Timestamp | None
    rate: float = 2.0
    at: Timestamp = Timestamp(0)


def test_fields_of_all_types(tmp_path):
    entity = Entity("store", type=str)
    view = FeatureView(
        "v", entity=entity, key="shop", source=Typed, aggregations=[Aggregation("count", windows=[Lifetime])]
    )
    app = {"Typed": Typed, "v": view}
    rows = [
        {"shop": 7, "big": 2**63 - 1, "on": True, "seen": BASE, "at": BASE},
        {"shop": 7, "big": None, "on": None, "seen": None, "at": BASE + 1},
        {"shop": 7, "big": -1, "on": False, "seen": BASE + 5, "rate": 0.0, "at": BASE + 2},
    ]
    with Engine(app, clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        for row in rows:
            engine.ingest(row, event="Typed")
    at = pa.array([row["at"] for row in rows], type=UTC)

    def found(**columns):
        told = []
        table = training_set(
            app, tmp_path / "log", {"at": at, **columns}, features=["v"], time="at", summary=told.append
        )
        return table["v.count_lifetime"].to_pylist(), told[0].own

    shops = pa.array([7, 7, 7])
    assert found(shop=shops) == ([0, 1, 2], 3)
    # The entity's name, and its type: the same key as a text, and none that is written otherwise.
    assert found(store=pa.array(["7", "7", "7"])) == ([0, 1, 2], 3)
    assert found(store=pa.array(["07", "7", "7"]).dictionary_encode()) == ([0, 1, 2], 2)
    big = [row["big"] for row in rows]
    assert found(shop=shops, big=pa.array(big, type=pa.int64())) == ([0, 1, 2], 3)
    assert found(shop=shops, big=pa.array([2**64 - 1, None, 1], type=pa.uint64())) == ([1, 1, 3], 1)
    # As pandas writes integers where one is missing.
    assert found(shop=shops, big=pa.array([1.5, math.nan, -1.0])) == ([1, 1, 2], 2)
    assert found(shop=shops, on=pa.array([True, None, True])) == ([0, 1, 3], 2)
    assert found(shop=shops, seen=pa.array([BASE // SECOND, None, 0], type=pa.timestamp("s"))) == ([0, 1, 3], 2)
    # A field that cannot be null: no event has a null there, whatever its default is.
    assert found(shop=shops, rate=pa.array([2.0, None, -0.0])) == ([0, 2, 2], 2)
    assert found(shop=shops, rate=pa.nulls(3)) == ([1, 2, 3], 0)
    assert found(shop=shops, big=pa.nulls(3)) == ([1, 1, 3], 1)


def test_the_command_says_what_the_rows_were(tmp_path, capsys, monkeypatch):
    """The summary line, --own, --sequence, and a loud word where history came in after its time."""
    import pyarrow.parquet as pq

    app = tmp_path / "app.py"
    app.write_text(
        "from penstock import *\n"
        "class Pay(Event, time='at'):\n    who: str\n    amount: float\n    at: Timestamp\n"
        "v = FeatureView('v', entity='who', source=Pay, aggregations=[Aggregation('count', windows=[Lifetime])])\n"
    )
    rows = [{"who": "ab"[i % 2], "amount": 1.0, "at": BASE + i * SECOND} for i in range(4)]
    pays(tmp_path / "log", rows, clock="wall")
    times = pa.array([row["at"] for row in rows], type=UTC)
    pq.write_table(pa.table({"who": ["a", "b", "a", "b"], "at": times, "k": [4, 4, 4, 4]}), tmp_path / "own.parquet")
    later = pa.array([row["at"] + 1 for row in rows], type=UTC)
    pq.write_table(pa.table({"who": ["a", "b", "a", "b"], "at": later}), tmp_path / "later.parquet")

    def train(spine, *more):
        out = str(tmp_path / "out.parquet")
        arguments = ["train", str(app), "--log", str(tmp_path / "log"), "--spine", str(tmp_path / spine), "--out", out]
        assert main([*arguments, "--features", "v", *more]) == 0
        said = capsys.readouterr()
        return pq.read_table(out)["v.count_lifetime"].to_pylist(), said.out, said.err

    found, out, err = train("own.parquet")
    assert found == [0, 0, 1, 1]
    assert "4 rows: 4 found their own event in the log, 0 are as of their time, 0 found nothing" in out
    assert "history was loaded after its time" in err
    found, out, err = train("own.parquet", "--backfill")
    assert found == [0, 0, 1, 1]
    assert "warning" not in err
    found, out, err = train("later.parquet")
    assert found == [0, 0, 0, 0]
    assert "4 rows: 0 found their own event in the log, 0 are as of their time, 4 found nothing" in out
    assert "every feature of every row is null or 0: history was ingested after its time" in err
    assert "--backfill" in err
    found, out, err = train("later.parquet", "--backfill")
    assert found == [1, 1, 2, 2]
    assert "0 found their own event in the log, 4 are as of their time" in out
    found, out, err = train("own.parquet", "--own", "never", "--backfill")
    assert found == [1, 1, 2, 2]
    assert train("own.parquet", "--sequence", "k")[0] == [1, 1, 2, 2]


def test_python_hears_it_as_a_warning(tmp_path):
    log = pays(tmp_path / "log", [{"who": "a", "amount": 1.0, "at": BASE}], clock="wall")
    with pytest.warns(UserWarning, match="history was ingested after its time"):
        training_set(PAY, log, {"who": ["a"], "at": pa.array([BASE + 1], type=UTC)}, features=["v"])


def test_parity_by_time_alone_where_events_come_in_at_their_time(tmp_path):
    """The scored event itself is then among what had come in by T: another K, and no mismatch."""
    with Engine(str(SHOP), clock="event", log=tmp_path / "log", log_options=OPTIONS) as engine:
        fill(engine, 100)
    report = parity(str(SHOP), tmp_path / "log", by_time=True)
    assert report.ok, str(report)
    by_time = report.pipelines[0].by_time
    assert by_time.equal + by_time.in_flight == by_time.compared == 100


def test_what_dropped_history_held_is_invalid(tmp_path):
    """After retention no window that reaches back to it is a number, by whatever way a row is read."""
    from penstock.offline.log_folder import LogFolder
    from penstock.offline.options import LogOptions

    options = LogOptions(keeper=False, segment_bytes=1 << 20)
    view = FeatureView(
        "v", entity="who", source=Pay, aggregations=[Aggregation("count", windows=["10s", Lifetime], closed="both")]
    )
    app = {"Pay": Pay, "v": view}
    n = 20_000
    table = pa.table({"who": ["a"] * n, "amount": [1.0] * n, "at": [BASE + i * SECOND for i in range(n)]})
    with Engine(app, clock="event", log=tmp_path / "log", log_options=options) as engine:
        engine.ingest(table, event="Pay")
    folder = LogFolder(tmp_path / "log")
    number = folder.numbers()[0]
    segment = folder.segment(number)
    begins = segment.mark.last_sequence + 1
    segment.close()
    folder.begin_at(begins)
    folder.segment_path(number).unlink()
    rows = [begins + 5, begins + 9, begins + 10, begins + 11, n - 1]
    spine = {"who": ["a"] * 5, "at": pa.array([BASE + i * SECOND for i in rows], type=UTC)}
    for how, own in (({}, 1), ({"backfill": True}, 1), ({"own": "never"}, 0)):
        told = []
        found = training_set(
            app, tmp_path / "log", spine, features=["v"], time="at", statuses=True, summary=told.append, **how
        )
        assert found["v.count_lifetime"].null_count == 5
        assert set(found["v.count_lifetime__status"].to_pylist()) == {"INVALID"}
        assert found["v.count_10s"].to_pylist() == [None, None, 11 - own, 11 - own, 11 - own], how
        assert f"history begins at event {begins:,}" in told[0].warnings[-1]
