"""A log and an app that has changed: what can still be read is, with today's words; what cannot is refused, and why.

Fields added, removed and changed; views rebuilt from the log or started empty; pipelines whose old decisions stand.
"""

from pathlib import Path

import pyarrow as pa
import pytest

from oracles.log_app import T0
from oracles.log_files import events_of
from penstock import Aggregation, Engine, Event, Experiment, FeatureView, Pipeline, Rule, Timestamp
from penstock.errors import LogError
from penstock.offline.keeper import take_snapshot
from penstock.offline.recovery import LogOptions

LATER = T0 + 10**9
BASE = {"id": str, "who": str, "amount": float, "note": str | None}
ABSENT = object()
PLAIN = [Aggregation("count", windows=["9d"]), Aggregation("sum", "amount", windows=["9d"])]


def app(fields=None, defaults=None, aggregations=None, name="Payment", rules=(), pipeline=True):
    """An app with one event type of these fields and one view."""
    fields = {**BASE, **(fields or {}), "at": Timestamp}
    fields = {n: t for n, t in fields.items() if t is not ABSENT}
    last = {n: t for n, t in fields.items() if n in (defaults or {})}
    fields = {n: t for n, t in fields.items() if n not in last} | last
    options = {"event_id": "id", "lateness": "30d", "max_skew": "3650d", "retry_window": "30d"}
    namespace = {"__annotations__": fields, "__module__": __name__, **(defaults or {})}
    kind = type(Event)(name, (Event,), namespace, **options)
    view = FeatureView(
        "spend",
        entity="who",
        source=kind,
        include_request_event=True,
        aggregations=aggregations or PLAIN,
    )
    made = {name: kind, "spend": view}
    if pipeline:
        made["pay"] = Pipeline("pay", event=kind, features=["amount", view], rules=list(rules))
    return made


def opened(folder, definitions, **options):
    options = LogOptions(**{"keeper": False, "segment_bytes": 1 << 14, **options})
    return Engine(definitions, log=folder, log_options=options)


def events(n, first=0):
    return [
        {"id": f"e{i}", "who": f"w{i % 3}", "amount": i / 4, "note": None if i % 2 else f"n{i}", "at": T0 + i}
        for i in range(first, first + n)
    ]


def spend(engine):
    return engine.features("spend", ["w0", "w1", "w2"], as_of=LATER).rows


@pytest.fixture
def log(tmp_path) -> Path:
    """150 events in several segments, scored."""
    with opened(tmp_path / "log", app()) as engine:
        for event in events(150):
            engine.score(event)
        assert engine.core.log.stats().segments > 2
    return tmp_path / "log"


def test_an_optional_field_was_added(log):
    """Old events have it as null, or as the default that it has today; new ones have their own."""
    changed = app(
        {"city": str | None, "fee": float | None, "vip": bool, "rate": int, "label": str},
        {"city": None, "fee": 2.5, "vip": True, "rate": 7, "label": "ä none"},
        [
            Aggregation("count", windows=["9d"]),
            *(Aggregation("count", c, windows=["9d"]) for c in ("city", "fee", "label")),
            Aggregation("sum", "fee", windows=["9d"]),
            Aggregation("sum", "rate", windows=["9d"]),
            Aggregation("last", "label", windows=["9d"]),
            Aggregation("last", "note", windows=["9d"]),
        ],
    )
    with opened(log, changed) as engine:
        assert spend(engine)[0] == {
            "spend.count_9d": 50,
            "spend.count_city_9d": 0,
            "spend.count_fee_9d": 50,
            "spend.count_label_9d": 50,
            "spend.sum_fee_9d": 125.0,
            "spend.sum_rate_9d": 350,
            "spend.last_label_9d": "ä none",
            "spend.last_note_9d": "n144",
        }
        assert [engine.score(e).outcome for e in events(3, 148)] == ["duplicate", "duplicate", "applied"]
        engine.ingest({**events(1, 153)[0], "city": "x", "fee": 1.0, "label": "new"})
        after = spend(engine)
    # Segments of both schemas, read by either.
    with opened(log, changed) as engine:
        assert spend(engine) == after
        assert after[0]["spend.count_city_9d"] == 1
        assert after[0]["spend.last_label_9d"] == "new"
    with opened(log, app()) as engine:
        assert spend(engine)[0] == {"spend.count_9d": 52, "spend.sum_amount_9d": (sum(range(0, 154, 3))) / 4}


def test_fields_in_another_order(log):
    reordered = app({}, {"amount": 0.0, "id": ""})
    with opened(log, app()) as engine:
        before = spend(engine)
    with opened(log, reordered) as engine:
        assert spend(engine) == before
        assert engine.score(events(1)[0]).outcome == "duplicate"


def test_a_field_was_removed(log):
    with opened(log, app()) as engine:
        before = spend(engine)
    with opened(log, app({"note": ABSENT})) as engine:
        assert spend(engine) == before
        new = events(1, 200)[0]
        del new["note"]
        assert engine.ingest(new) == "applied"
        with_new = spend(engine)
    # And came back.
    with opened(log, app(aggregations=None)) as engine:
        assert spend(engine) == with_new
    assert events_of(log)[-1].values.get("note", "absent") == "absent"


@pytest.mark.parametrize(
    ("fields", "defaults", "words"),
    [
        ({"amount": int}, {}, ["amount was float64 and is int64 now"]),
        ({"amount": str}, {}, ["amount was float64 and is string now"]),
        ({"note": bool | None}, {}, ["note was string and is bool now"]),
        ({"note": str}, {}, ["note could be null and cannot now"]),
        ({"city": str}, {}, ["city was added without a default"]),
        ({"city": str, "amount": int}, {}, ["city was added without a default", "amount was float64 and is int64 now"]),
    ],
)
def test_what_cannot_be_read_is_refused(log, fields, defaults, words):
    """With every difference and what would be right; nothing has changed, and the app as it was opens."""
    files = {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != "lock"}
    aggregations = [Aggregation("count", windows=["9d"])]
    with pytest.raises(LogError) as caught:
        opened(log, app(fields, defaults, aggregations))
    for text in [*words, "Payment", "new name"]:
        assert text in str(caught.value)
    assert {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != "lock"} == files
    with opened(log, app()) as engine:
        assert spend(engine)[0]["spend.count_9d"] == 50


def test_an_event_type_with_a_new_name_begins_anew(log):
    """The old type's events stay in the log, and are passed over."""
    with opened(log, app(name="Purchase")) as engine:
        assert spend(engine)[0]["spend.count_9d"] == 0
        assert engine.recovery.events == 150
        assert engine.ingest(events(1)[0]) == "applied"
    with opened(log, app(name="Purchase")) as engine:
        assert spend(engine)[0]["spend.count_9d"] == 1
        assert engine.core.next_sequence == 151
    with opened(log, app()) as engine:
        assert spend(engine)[0]["spend.count_9d"] == 50


def test_a_type_was_added_before_the_first(log):
    """Schema numbers move; watermarks and outcomes go by name."""

    class Alpha(Event, lateness="1h", max_skew="3650d"):
        who: str
        at: Timestamp

    more = FeatureView("alphas", entity="who", source=Alpha, aggregations=[Aggregation("count", windows=["9d"])])
    changed = {"Alpha": Alpha, "alphas": more, **app()}
    with opened(log, app()) as engine:
        before = spend(engine), engine.core.watermark(0)
    with opened(log, changed) as engine:
        index = engine.plan.events["Payment"].index
        assert (spend(engine), engine.core.watermark(index)) == before
        assert engine.core.watermark(engine.plan.events["Alpha"].index) is None
        engine.ingest({"who": "w0", "at": T0 + 5}, event="Alpha")
    with opened(log, changed) as engine:
        assert engine.features("alphas", ["w0"], as_of=LATER).rows == [{"alphas.count_9d": 1}]
        assert (spend(engine), engine.core.watermark(index)) == before
    with opened(log, app()) as engine:
        assert (spend(engine), engine.core.watermark(0)) == before


# Views

WIDER = [Aggregation("count", windows=["9d"]), Aggregation("max", "amount", windows=["9d"])]


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_changed_view_is_rebuilt_from_the_log(log, snapshot):
    """Where a snapshot holds other layouts, this one is computed from all of history, before the engine is ready."""
    if snapshot:
        assert take_snapshot(log) is not None
        with opened(log, app()) as engine:
            assert engine.recovery.loaded == ["Payment by who"]
            assert engine.recovery.events == 0
            for event in events(20, 150):
                engine.score(event)
    n = 170 if snapshot else 150
    with opened(log, app(aggregations=WIDER)) as engine:
        assert engine.recovery.loaded == []
        assert spend(engine) == [
            {"spend.count_9d": len(ids), "spend.max_amount_9d": ids[-1] / 4}
            for ids in ([i for i in range(n) if i % 3 == k] for k in range(3))
        ]
        assert engine.score(events(1)[0]).outcome == "duplicate"


def test_one_layout_loads_and_one_is_rebuilt(log):
    """A view by another key is added: its layout alone is computed anew, up to the snapshot; the tail is for all."""
    assert take_snapshot(log) is not None
    with opened(log, app()) as engine:
        for event in events(20, 150):
            engine.score(event)
        before = spend(engine)
    definitions = app()
    counts = [Aggregation("count", windows=["9d"])]
    by_id = FeatureView("by_id", entity="id", source=definitions["Payment"], aggregations=counts)
    with opened(log, {**definitions, "by_id": by_id}) as engine:
        assert engine.recovery.loaded == ["Payment by who"]
        assert engine.recovery.rebuilt == ["Payment by id"]
        assert (engine.recovery.events, engine.recovery.history_events) == (20, 150)
        assert any("rebuilt" in line for line in engine.recovery.lines())
        assert spend(engine) == before
        rows = engine.features("by_id", [f"e{i}" for i in range(171)], as_of=LATER).rows
        assert [r["by_id.count_9d"] for r in rows] == [1] * 170 + [0]


@pytest.mark.parametrize("snapshot", [False, True])
def test_start_cold(log, snapshot):
    """As asked, a layout that no snapshot holds starts empty, which is said; ids and watermarks are known anyway."""
    if snapshot:
        assert take_snapshot(log) is not None
    with opened(log, app(aggregations=WIDER), start_cold=True) as engine:
        assert engine.recovery.cold == ["Payment by who"]
        assert any("started empty" in line for line in engine.recovery.lines())
        assert [r["spend.count_9d"] for r in spend(engine)] == [0, 0, 0]
        assert engine.core.next_sequence == 150
        assert engine.core.watermark(0) == T0 + 149
        assert engine.ingest(events(1, 149)[0]) == "duplicate"
        assert engine.ingest(events(1, 150)[0]) == "applied"
        assert [r["spend.count_9d"] for r in spend(engine)] == [1, 0, 0]
    # The log holds everything: without the option it is all there again.
    with opened(log, app(aggregations=WIDER)) as engine:
        assert [r["spend.count_9d"] for r in spend(engine)] == [51, 50, 50]


# Pipelines


@pytest.mark.parametrize("snapshot", [False, True])
def test_decisions_of_ids_after_the_pipeline_changed(log, snapshot):
    """The same pipeline gives first decisions; a changed one decides anew, once, and applies nothing twice."""
    if snapshot:
        assert take_snapshot(log) is not None
    with opened(log, app()) as engine:
        first = engine.score(events(1)[0])
        assert (first.outcome, first.action) == ("duplicate", "approve")
        assert engine.score(events(1)[0]).id == first.id
        before = spend(engine)
    changed = app(rules=[Rule("all", "amount >= 0", "review", "all")])
    with opened(log, changed) as engine:
        again = engine.score(events(1)[0])
        assert (again.outcome, again.action) == ("duplicate", "review")
        assert again.id != first.id
        assert engine.score(events(1)[0]).id == again.id
        assert spend(engine) == before
    with opened(log, changed) as engine:
        assert engine.score(events(1)[0]).id == again.id
        assert spend(engine) == before
    with opened(log, app(pipeline=False)) as engine:
        assert engine.ingest(events(1)[0]) == "duplicate"
        assert spend(engine) == before


def test_a_pipeline_was_added(log):
    """Another pipeline decides on the event for itself; what the first one decided stands beside it."""
    definitions = app()
    arms = Experiment("arms", unit="who", arms={"a": 0.5, "b": 0.5})
    second = Pipeline("second", event=definitions["Payment"], features=["amount"], experiments=[arms])
    with opened(log, app()) as engine:
        first = engine.score(events(1)[0])
    with opened(log, {**definitions, "second": second}) as engine:
        other = engine.score(events(1)[0], pipeline="second")
        assert other.id != first.id
        assert engine.score(events(1)[0], pipeline="pay").id == first.id
        assert engine.score(events(1)[0], pipeline="second").id == other.id
        fresh = {name: engine.score(events(1, 300)[0], pipeline=name) for name in ("second", "pay")}
    with opened(log, {**definitions, "second": second}) as engine:
        for name, decision in fresh.items():
            again = engine.score(events(1, 300)[0], pipeline=name)
            assert (again.id, again.arms, again.outcome) == (decision.id, decision.arms, "duplicate")
        assert engine.score(events(1)[0], pipeline="second").id == other.id
        assert engine.score(events(1)[0], pipeline="pay").id == first.id


def test_a_batch_over_the_end_of_a_segment(tmp_path):
    """Decisions of a table are logged behind its events, maybe in the next segment: none is forgotten."""
    folder = tmp_path / "log"
    table = pa.Table.from_pylist(events(256))
    with opened(folder, app(), segment_bytes=1 << 15) as engine:
        ids = engine.score_batch(table)["id"].to_pylist()
        assert engine.core.log.stats().segments > 2
    with opened(folder, app(), segment_bytes=1 << 15) as engine:
        result = engine.score_batch(table)
        assert result["outcome"].to_pylist() == ["duplicate"] * 256
        assert result["id"].to_pylist() == ids
