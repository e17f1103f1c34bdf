"""Decisions on what cannot be known: late events, sources that ran ahead, values beyond a double (S14, S17)."""

import json

import msgspec
import pyarrow as pa
import pytest

from penstock import Aggregation, DefinitionError, Event, FeatureView, Lifetime, Pipeline, Rule, Timestamp
from penstock.describe import warnings_of
from penstock.engine import Engine
from penstock.plan import compile_plan


class Buy(Event, time="at", lateness="10s"):
    who: str
    amount: float
    at: Timestamp(unit="s")


class Label(Event, time="at", lateness="0s", max_skew="0s"):
    who: str
    fraud: float
    at: Timestamp(unit="s")


spend = FeatureView(
    "spend",
    entity="who",
    source=Buy,
    aggregations=[Aggregation("count", windows=["1m"]), Aggregation("sum", "amount", windows=[Lifetime], default=0.0)],
)
labels = FeatureView(
    "labels", entity="who", source=Label, aggregations=[Aggregation("max", "fraud", windows=["1h"], default=0.5)]
)


def app(**changes):
    pipeline = Pipeline("p", event=Buy, **{"features": ["amount", spend, labels], **changes})
    return {"Buy": Buy, "Label": Label, "spend": spend, "labels": labels, "p": pipeline}


def engine(**changes):
    made = Engine(app(**changes), clock="event")
    for t in (100, 130, 160):
        made.ingest({"who": "a", "amount": 5.0, "at": t}, event="Buy")
    made.ingest({"who": "a", "fraud": 1.0, "at": 155}, event="Label")
    return made


def test_a_late_event_is_scored_on_nothing_that_state_does_not_hold():
    made = engine()
    late = made.score({"who": "a", "amount": 1.0, "at": 149}, explain=True)
    assert (late.outcome, late.degraded) == ("late", True)
    assert dict(late.features) == {
        "amount": 1.0,
        "spend.count_1m": None,
        "spend.sum_amount_lifetime": None,
        "labels.max_fraud_1h": None,
    }
    assert late.statuses["spend.sum_amount_lifetime"] == "INVALID", "default= does not stand for what cannot be known"
    assert json.loads(late.json())["degraded"] is True
    assert msgspec.msgpack.decode(late.msgpack())["degraded"] is True
    assert msgspec.msgpack.decode(late.msgpack(explain=True))["statuses"]["spend.count_1m"] == "INVALID"
    assert "degraded=True" in repr(late)


def test_a_source_that_is_ahead_makes_only_its_own_views_invalid():
    made = engine()
    early = made.score({"who": "a", "amount": 1.0, "at": 152}, explain=True)
    assert (early.outcome, early.degraded) == ("applied", True)
    assert early.statuses == {
        "amount": "PRESENT",
        "spend.count_1m": "PRESENT",
        "spend.sum_amount_lifetime": "PRESENT",
        "labels.max_fraud_1h": "INVALID",
    }
    known = made.score({"who": "a", "amount": 1.0, "at": 155}, explain=True)
    assert (known.degraded, known.features["labels.max_fraud_1h"]) == (False, 1.0)
    assert b"degraded" not in known.json()
    assert made.stats()["degraded"] == {"p": 1}


def test_an_event_from_the_future_is_degraded():
    made = Engine(app(), clock="wall")
    decision = made.score({"who": "a", "amount": 1.0, "at": int(Timestamp.now()) // 10**6 + 3600})
    assert (decision.outcome, decision.degraded) == ("quarantined", True)


WHY = "degraded: a feature cannot be known as of the event's time, or the event was not applied"


@pytest.mark.parametrize(
    ("changes", "action", "reasons"),
    [
        ({}, "decline", ("any",)),
        ({"fallback": "review"}, "review", (WHY,)),
        ({"fallback": "review", "on_degraded": "fallback"}, "review", (WHY,)),
        ({"fallback": "review", "on_degraded": "score"}, "decline", ("any",)),
        ({"on_degraded": "hold"}, "hold", (WHY,)),
        ({"fallback": "review", "on_degraded": "hold"}, "hold", (WHY,)),
    ],
)
def test_on_degraded_says_what_then(changes, action, reasons):
    """An old event time must not be a way around a rule."""
    made = engine(rules=[Rule("any", when="amount > 0", action="decline")], **changes)
    late = {"who": "a", "amount": 1.0, "at": 100}
    decision = made.score(late)
    assert (decision.action, decision.reasons, decision.degraded) == (action, reasons, True)
    table = made.score_batch(pa.Table.from_pylist([late, {**late, "at": 161}]))
    assert table["action"].to_pylist() == [action, "decline"]
    assert table["reasons"].to_pylist() == [list(reasons), ["any"]]
    assert table["degraded"].to_pylist() == [True, False]


def test_a_rule_can_ask():
    made = engine(rules=[Rule("old", when="degraded and amount > 3", action="review")])
    assert [made.score({"who": "a", "amount": x, "at": 100}).action for x in (1.0, 9.0)] == ["approve", "review"]
    assert made.score({"who": "a", "amount": 9.0, "at": 170}).action == "approve"


def test_a_field_of_that_name_is_the_field():
    class Own(Event, time="at"):
        who: str
        degraded: bool
        at: Timestamp(unit="s")

    rules = [Rule("own", when="degraded", action="x")]
    made = Engine({"Own": Own, "p": Pipeline("p", event=Own, features=["degraded"], rules=rules)}, clock="event")
    assert [made.score({"who": "a", "degraded": d, "at": 1}).action for d in (True, False)] == ["x", "approve"]


def test_a_sum_beyond_a_double_is_invalid_everywhere():
    made = engine(rules=[Rule("big", when="spend.sum_amount_lifetime > 1", action="deny")])
    for t in (161, 162):
        made.ingest({"who": "b", "amount": 1.7e308, "at": t}, event="Buy")
    event = {"who": "b", "amount": 1.0, "at": 163}
    decision = made.score(event, explain=True)
    assert (decision.action, decision.degraded) == ("approve", True)
    assert json.loads(decision.json(True))["features"]["spend.sum_amount_lifetime"] is None
    table = made.score_batch(pa.Table.from_pylist([event]), explain=True)
    assert table["spend.sum_amount_lifetime"].to_pylist() == [None]
    rows = made.features("spend", ["b"], as_of=Timestamp(163 * 10**6))
    assert rows.statuses[0]["spend.sum_amount_lifetime"] == "INVALID"
    assert rows.rows[0]["spend.sum_amount_lifetime"] is None


def test_wrong_policies_are_refused():
    with pytest.raises(DefinitionError, match='on_degraded="fallback", but there is no fallback'):
        compile_plan(app(on_degraded="fallback"))
    with pytest.raises(DefinitionError, match='on_degraded: expected "fallback", "score" or an action, got 3'):
        compile_plan(app(on_degraded=3))


def test_check_warns_of_what_is_seldom_meant():
    found = warnings_of(compile_plan(app()))
    assert [w.split(":")[0] for w in found] == ['pipeline "p"', 'pipeline "p"']
    assert 'say on_degraded="score" if that is meant, or an action' in found[0]
    assert "it reads Label, whose lateness (0) is below the lateness of Buy (10s)" in found[1]
    assert 'say class Label(Event, lateness="10s")' in found[1]
    assert [w for w in warnings_of(compile_plan(app(fallback="review"))) if "on_degraded" in w] == []


def test_retention_of_a_view():
    """S9: it bounds Lifetime; views of different retention keep state of their own."""
    own = [
        FeatureView(
            name,
            entity="who",
            source=Buy,
            retention=retention,
            aggregations=[Aggregation("count", windows=[Lifetime]), Aggregation("last", "amount", windows=[Lifetime])],
        )
        for name, retention in (("ever", None), ("month", "30d"))
    ]
    made = Engine(
        {"Buy": Buy, "ever": own[0], "month": own[1], "p": Pipeline("p", event=Buy, features=own)}, clock="event"
    )
    day = 86_400
    for t in (0, 20 * day, 30 * day, 60 * day, 100 * day):
        decision = made.score({"who": "a", "amount": 1.0, "at": t}, explain=True)
    assert decision.features == {
        "ever.count_lifetime": 4,
        "ever.last_amount_lifetime": 1.0,
        "month.count_lifetime": 0,
        "month.last_amount_lifetime": None,
    }
    assert decision.statuses["month.last_amount_lifetime"] == "NOT_FOUND"
    assert made.score({"who": "a", "amount": 1.0, "at": 130 * day}, explain=True).features["month.count_lifetime"] == 1


@pytest.mark.parametrize(
    ("retention", "windows", "text"),
    [
        ("1h", [Lifetime, "2h"], "retention '1h' is shorter than its longest window"),
        ("1d", ["2h"], "retention is for Lifetime windows"),
        ("soon", [Lifetime], "retention: expected a length such as"),
        ("0s", [Lifetime], "retention '0s' is shorter"),
    ],
)
def test_wrong_retention_is_refused(retention, windows, text):
    view = FeatureView(
        "v", entity="who", source=Buy, retention=retention, aggregations=[Aggregation("count", windows=windows)]
    )
    with pytest.raises(DefinitionError, match=text):
        compile_plan({"Buy": Buy, "v": view})
