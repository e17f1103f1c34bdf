"""The engine against the slow engine, on generated apps and streams: ties, nulls, late and repeated events, typed keys.

Times that state no longer reaches are compared like any other.

What must stay true: the same outcomes, actions, reasons, arms, values (bit for bit) and statuses, whichever way in.
"""

import math
import struct
import tempfile
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracles import expressions
from oracles.engine import (
    SlowAggregation,
    SlowApp,
    SlowEngine,
    SlowEvent,
    SlowPipeline,
    SlowView,
    definitions,
    output_type,
)
from penstock import Engine, ReplayNeeded, parity
from penstock.offline.options import LogOptions

SECOND = 10**6
BASE = 1_700_000_000 * SECOND
FIELDS_A = {
    "eid": "int64",
    "customer": "string",
    "terminal": "int64",
    "amount": "float64?",
    "qty": "int64",
    "flag": "bool?",
    "label": "string?",
    "at": "timestamp",
}
FIELDS_B = {"customer": "string", "code": "string", "loss": "float64?", "label": "string?", "at": "timestamp"}
ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.int64(),
}
NUMERIC = ("sum", "mean", "var_samp", "var_pop", "stddev_samp", "stddev_pop", "min", "max")
WHERES_A = (
    None,
    (">", ("slot", "amount"), ("literal", 2.0)),
    ("slot", "flag"),
    ("or", ("is null", ("slot", "amount")), ("not", ("slot", "flag"))),
    ("in", ("slot", "label"), ("literal", "x"), ("literal", "é")),
    ("and", ("<", ("slot", "qty"), ("literal", 3)), ("==", ("second", ("slot", "at")), ("literal", 4))),
)
WHERES_B = (None, (">=", ("slot", "loss"), ("literal", 0.0)), ("is not null", ("slot", "label")))
quick = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@st.composite
def aggregations(draw, fields, wheres):
    function = draw(st.sampled_from(("count", "first", "last", "distinct_count", *NUMERIC)))
    numeric = [f for f, k in fields.items() if k.rstrip("?") in ("float64", "int64", "bool") and f != "eid"]
    other = [f for f in fields if f != "eid"]
    column = draw(st.sampled_from(numeric if function in NUMERIC else other))
    if function == "count" and draw(st.booleans()):
        column = None
    chosen = draw(st.lists(st.sampled_from(["3s", "10s", "1m", "lifetime"]), min_size=1, max_size=3, unique=True))
    ttl = draw(st.sampled_from([None, None, "2s", "20s"])) if function in ("first", "last") else None
    closed = draw(st.sampled_from(["right", "both", "left"]))
    if closed == "both" and draw(st.booleans()):
        chosen.append("0s")
    made = SlowAggregation(function, column, tuple(chosen), draw(st.sampled_from(wheres)), None, closed, ttl)
    if draw(st.integers(0, 3)) == 0:
        kinds = {"float64": -1.5, "int64": 7, "bool": True, "string": "none", "timestamp": 5}
        made = made._replace(default=kinds[output_type(made, fields)])
    return made


def distinct(aggregations):
    """Without those whose names would clash."""
    kept, names = [], set()
    for a in aggregations:
        mine = {(a.function, a.column, w) for w in a.windows}
        if not mine & names:
            kept.append(a)
            names |= mine
    return tuple(kept)


@st.composite
def apps(draw, with_ids=None):
    lateness = draw(st.sampled_from(["0s", "5s", "30s"]))
    with_ids = draw(st.booleans()) if with_ids is None else with_ids
    fields_a = dict(FIELDS_A)
    a = SlowEvent("A", fields_a, lateness, "eid" if with_ids else None)
    b = SlowEvent("B", FIELDS_B, draw(st.sampled_from(["0s", "20s"])))
    terminal = draw(st.sampled_from([int, str]))
    views = []
    for i in range(draw(st.integers(1, 4))):
        event = draw(st.sampled_from([a, a, b]))
        entity = draw(st.sampled_from(["customer", "terminal"]))
        key = entity if event is a or entity == "customer" else "code"
        made = draw(st.lists(aggregations(event.fields, WHERES_A if event is a else WHERES_B), min_size=1, max_size=3))
        kept = distinct(made)
        # At least the longest window.
        bounded = any("lifetime" in a.windows for a in kept) and draw(st.integers(0, 2)) == 0
        retention = draw(st.sampled_from(["60s", "90s"])) if bounded else None
        views.append(SlowView(f"v{i}", event.name, entity, key, kept, draw(st.booleans()), retention))
    app = SlowApp(
        (a, b), tuple(views), SlowPipeline("p", "A", ("amount", "label")), {"terminal": terminal, "customer": None}
    )
    slow = SlowEngine(app)
    numbers = [o.name for v in views for o in slow.outputs(v) if o.result in ("float64", "int64")]
    experiments = [
        {"name": "e1", "unit": "customer", "arms": {"a": 0.5, "b": 0.5}, "hash": "growthbook-v2", "coverage": 1.0},
        {"name": "e2", "unit": "terminal", "arms": {"x": 0.2, "ÿ": 0.8}, "hash": "md5-32/eppo", "coverage": 0.5},
    ][: draw(st.integers(0, 2))]
    trees = [
        (">", ("slot", "amount"), ("literal", 3.0)),
        ("and", ("slot", "flag"), ("<=", ("slot", "qty"), ("literal", 2))),
        ("is null", ("slot", "label")),
        ("slot", "degraded"),
        *((">", ("slot", n), ("literal", 1)) for n in numbers),
        *(("==", ("slot", e["name"]), ("literal", next(iter(e["arms"])))) for e in experiments),
    ]
    rules = [
        (f"r{i}", tree, draw(st.sampled_from(["review", "decline"])), draw(st.sampled_from([None, 'wh"y ü'])))
        for i, tree in enumerate(draw(st.lists(st.sampled_from(trees), max_size=4)))
    ]
    names = tuple(v.name for v in views)
    return app._replace(pipeline=SlowPipeline("p", "A", ("amount", "label", *names), tuple(experiments), tuple(rules)))


numbers = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 0.1, 2.5, 1e16, -1e16, 1e-300, 3.0, math.nan]))
offsets = st.one_of(st.integers(0, 12), st.integers(0, 70), st.sampled_from([200, -100]))
keys = st.sampled_from(["a", "b", "1", "2"])


def rows_a(ids):
    return st.fixed_dictionaries(
        {
            "eid": ids,
            "customer": keys,
            "terminal": st.sampled_from([1, 2, -(2**63)]),
            "amount": numbers,
            "qty": st.sampled_from([0, 1, 5, 2**63 - 1, -(2**63)]),
            "flag": st.sampled_from([None, True, False]),
            "label": st.sampled_from([None, "x", "é", "", "long " * 40]),
            "at": st.builds(lambda s, us: BASE + s * SECOND + us, offsets, st.sampled_from([0, 0, 1])),
        }
    )


rows_b = st.fixed_dictionaries(
    {
        "customer": keys,
        "code": st.sampled_from(["1", "2", "01", "x", str(-(2**63))]),
        "loss": numbers,
        "label": st.sampled_from([None, "x", "ß" * 30]),
        "at": st.builds(lambda s: BASE + s * SECOND, offsets),
    }
)


def bits(value):
    return (float, struct.pack("<d", value)) if isinstance(value, float) else (type(value) is bool, value)


def same(decision, slow):
    """Compare a Decision that was explained with a SlowDecision; what state no longer reaches too (S14)."""
    assert decision.outcome == slow.outcome
    assert decision.arms == slow.arms
    assert decision.statuses == slow.statuses
    got = {name: bits(value) for name, value in decision.features.items()}
    assert got == {name: bits(value) for name, value in slow.features.items()}
    assert (decision.action, decision.reasons, decision.degraded) == (slow.action, slow.reasons, slow.degraded)


def table(rows, fields):
    return pa.table(
        {f: pa.array([r[f] for r in rows], type=ARROW[k.rstrip("?")], from_pandas=False) for f, k in fields.items()}
    )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("score"), rows_a(st.integers(0, 6))),
        st.tuples(st.just("score"), rows_a(st.integers(0, 10**9))),
        st.tuples(st.just("try"), rows_a(st.integers(0, 6))),
        st.tuples(st.just("ingest A"), rows_a(st.integers(0, 20))),
        st.tuples(st.just("ingest B"), rows_b),
    ),
    max_size=30,
)


@quick
@given(apps(), operations)
def test_any_stream_gives_what_the_slow_engine_gives(app, operations):
    slow = SlowEngine(app)
    engine = Engine(definitions(app), clock="event")
    kinds = engine.plan.events
    for position, (what, row) in enumerate(operations):
        if what in ("score", "try"):
            ingest = what == "score"
            # As a Struct or as a dict: the same.
            event = kinds["A"].type(**row) if position % 2 else row
            same(engine.score(event, ingest, explain=True), slow.score(row, ingest))
        else:
            name = what[-1]
            assert engine.ingest(kinds[name].type(**row)) == slow.ingest(name, row)
    assert engine.core.counters()["outcomes"] == slow.outcomes
    for view in app.views:
        event = next(e for e in app.events if e.name == view.event)
        newest = slow.watermark[view.event]
        if newest == -math.inf:
            continue
        for key in ["a", "1", "-1", 1, 2, -(2**63)]:
            for at in (newest, newest + 3 * SECOND):
                found = engine.features(view.name, [key], as_of=int(at))
                expected = slow.features(view.name, key, at)
                got = {n: (bits(v), found.statuses[0][n]) for n, v in found.rows[0].items()}
                assert got == {n: (bits(v), s) for n, (v, s) in expected.items()}
        with pytest.raises(ReplayNeeded, match="replay"):
            engine.features(view.name, ["a"], as_of=int(newest) - length(event.lateness) - 1)


@settings(quick, max_examples=25)
@given(apps(), operations)
def test_parity_by_another_route_agrees(app, operations):
    """Late and repeated events among them: every logged value, by raw events and the compiled app alone."""
    made = definitions(app)
    with tempfile.TemporaryDirectory() as folder:
        with Engine(made, clock="event", log=folder, log_options=LogOptions(keeper=False)) as engine:
            for what, row in operations:
                if what == "score":
                    engine.score(row)
                elif what != "try":
                    engine.ingest(row, event=what[-1])
        report = parity(made, folder, independent=True)
    assert report.ok, str(report)
    for feature in report.pipelines[0].features:
        assert feature.compared == report.pipelines[0].scores


def length(text):
    return int(text[:-1]) * SECOND


def decision_rows(decisions, engine):
    """Decisions as the rows that score_batch gives, without the id."""
    return [
        {
            "action": d.action,
            "score": d.score,
            "reasons": list(d.reasons),
            "model": d.model,
            "model_version": d.model_version,
            **{f"arm.{e}": arm for e, arm in d.arms.items()},
            "outcome": d.outcome,
        }
        for d in decisions
    ]


@quick
@given(apps(), st.lists(rows_a(st.integers(0, 400)), max_size=40), st.booleans())
def test_a_table_gives_the_bits_of_its_rows_one_by_one(app, rows, ingest):
    one, many = (Engine(definitions(app), clock="event") for _ in range(2))
    decisions = [one.score(row, ingest, explain=True) for row in rows]
    result = many.score_batch(table(rows, FIELDS_A), ingest, explain=True)
    names = list(one.plan.pipelines["p"].features)
    names = [one.plan.pipelines["p"].slots[i].name for i in names]
    got = [{n: plain(v) for n, v in row.items()} for row in result.to_pylist()]
    for (row, decision), record in zip(zip(rows, decisions), got):
        # A column of integers with one beyond 64 bits is float64 (S13).
        wide = [n for n in names if pa.types.is_floating(result.schema.field(n).type)]
        expected = {n: plain(v) for n, v in decision.features.items()}
        expected |= {n: float(expected[n]) for n in wide if expected[n] is not None}
        if decision.outcome != "duplicate":
            assert {n: bits(record[n]) for n in names} == {n: bits(v) for n, v in expected.items()}, row
    for record, decision in zip(got, decision_rows(decisions, one)):
        assert {n: record[n] for n in decision} == decision
    ids = [d.id for d in decisions]
    # A repeated id gets its first decision's id in both.
    assert [ids.index(i) for i in ids] == [[r["id"] for r in got].index(r["id"]) for r in got]
    assert one.core.counters()["outcomes"] == many.core.counters()["outcomes"]
    assert [s[:2] for s in one.core.store_stats()] == [s[:2] for s in many.core.store_stats()]


def plain(value):
    """Times as integers, wide integers as they are."""
    if isinstance(value, datetime):
        return (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return int(value) if type(value).__name__ == "Timestamp" else value


@quick
@given(apps(with_ids=False), st.lists(rows_a(st.integers(0, 400)), max_size=30), st.lists(rows_b, max_size=10))
def test_replay_equals_scoring_in_order(app, rows, others):
    """B before A of the same time; the result in the table's own order."""
    order = sorted([(r["at"], 0, i) for i, r in enumerate(others)] + [(r["at"], 1, i) for i, r in enumerate(rows)])
    one, many = (Engine(definitions(app), clock="event") for _ in range(2))
    decisions = {}
    for _, which, i in order:
        if which:
            decisions[i] = one.score(rows[i], explain=True)
        else:
            one.ingest(one.plan.events["B"].type(**others[i]))
    tables = {"B": table(others, FIELDS_B), "A": table(rows, FIELDS_A)}
    result = many.replay(tables, out="p", decisions=True)
    schema, result = result.schema, result.to_pylist()
    assert len(result) == len(rows)
    for i, record in enumerate(result):
        expected = decisions[i]
        values = {n: plain(v) for n, v in expected.features.items()}
        wide = [n for n in values if pa.types.is_floating(schema.field(n).type)]
        values |= {n: float(values[n]) for n in wide if values[n] is not None}
        assert {n: bits(plain(record[n])) for n in values} == {n: bits(v) for n, v in values.items()}
        assert record["action"] == expected.action
        assert record["reasons"] == list(expected.reasons)
        assert record["outcome"] == expected.outcome == "applied"


@quick
@given(apps(), st.lists(rows_a(st.integers(0, 6)), min_size=1, max_size=12), rows_a(st.integers(0, 9)))
def test_trying_an_event_leaves_no_trace(app, rows, probe):
    """ingest=False, singly and as a table, between the events of a stream: the stream does not notice."""
    plain_engine, probed = (Engine(definitions(app), clock="event") for _ in range(2))
    far = {**probe, "at": probe["at"] + 10**6 * SECOND, "eid": 10**6}
    for row in rows:
        before = traces(probed)
        probed.score(probe, ingest=False)
        probed.score(far, ingest=False)
        probed.score_batch(table([far, probe, probe], FIELDS_A), ingest=False)
        assert traces(probed) == before
        a, b = plain_engine.score(row, explain=True), probed.score(row, explain=True)
        assert (a.outcome, a.action, a.reasons, a.arms) == (b.outcome, b.action, b.reasons, b.arms)
        assert {n: bits(v) for n, v in a.features.items()} == {n: bits(v) for n, v in b.features.items()}
        assert a.statuses == b.statuses


def traces(engine):
    counters = engine.core.counters()
    counters["outcomes"] = {
        e: {o: n for o, n in counts.items() if o in ("applied", "late", "quarantined")}
        for e, counts in counters["outcomes"].items()
    }
    return counters, engine.core.store_stats(), [engine.core.watermark(i) for i in range(2)]


@quick
@given(apps(), st.lists(st.tuples(st.booleans(), rows_a(st.integers(0, 12)), st.booleans()), max_size=25))
def test_events_from_the_future_are_quarantined(app, operations):
    """Wall clock: an event days ahead is scored with itself counted, and neither applied nor the watermark (S14)."""
    now = time.time_ns() // 1000
    slow = SlowEngine(app, clock="wall")
    engine = Engine(definitions(app), clock="wall")
    for is_score, row, ahead in operations:
        row = {**row, "at": row["at"] - BASE + now // SECOND * SECOND + (2 if ahead else -1) * 86400 * SECOND}
        if is_score:
            same(engine.score(row, explain=True), slow.score(row, now=now))
        else:
            assert engine.ingest(row, event="A") == slow.ingest("A", row, now)
    assert engine.core.counters()["outcomes"] == slow.outcomes
    newest = slow.watermark["A"]
    assert engine.core.watermark(0) == (None if newest == -math.inf else newest)


def test_the_oracle_can_fail():
    """The comparison sees a value of one bit more, and a zero of the other sign."""
    assert bits(0.0) != bits(-0.0)
    assert bits(1.0) != bits(math.nextafter(1.0, 2.0))
    assert bits(1) != bits(1.0)
    assert bits(True) != bits(1)
    assert expressions.text((">", ("slot", "a"), ("literal", 1))) == "(a > 1)"
