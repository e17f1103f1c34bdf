"""Layouts as data: the plan made from them has the same stores, in order; otherwise it is an error (control path)."""

import importlib.util
import json
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import (
    Aggregation,
    Entity,
    Event,
    FeatureView,
    Lifetime,
    PenstockError,
    Pipeline,
    Timestamp,
    on_demand_feature_view,
)
from penstock._ext.windows import CLOSED
from penstock.definitions.feature_view import FUNCTIONS
from penstock.features.layouts import describe_layouts, plan_from_layouts
from penstock.plan import compile_plan

ROOT = Path(__file__).parents[2]


class Transaction(Event, time="at", event_id="id", lateness="2h", max_skew=timedelta(seconds=3), retry_window="0s"):
    id: str
    customer: str
    terminal: int
    amount: float
    at: Timestamp
    note: str | None = None
    count: int | None = 2**63 - 1
    flag: bool = False
    rate: float = 1
    seen: Timestamp | None = datetime(2026, 1, 2, 3, tzinfo=UTC)
    sent: Timestamp = "2026-01-02T03:00:00Z"
    other: Timestamp = Timestamp(12)


class Click(Event, time="at", kw_only=True):
    page: str = "home"
    user: int
    at: Timestamp(unit="ms")
    before: Timestamp(unit="s") | None


class Base(Event, lateness="0s"):
    k: str
    at: Timestamp


class Derived(Base, retry_window="1ms"):
    x: float | None = None


def same_stores(plan):
    data = describe_layouts(plan)
    again = plan_from_layouts(data)
    assert [s.fingerprint for s in again.stores] == [s.fingerprint for s in plan.stores]
    for old, new in zip(plan.stores, again.stores):
        assert (new.index, new.event, new.entity, new.key, new.key_type) == (
            old.index,
            old.event,
            old.entity,
            old.key,
            old.key_type,
        )
        assert new.outputs == old.outputs
        assert (new.columns, new.wheres, new.groups, new.lateness) == (
            old.columns,
            old.wheres,
            old.groups,
            old.lateness,
        )
    assert list(again.events) == list(plan.events)
    for old, new in zip(plan.events.values(), again.events.values()):
        assert (new.name, new.index, new.time, new.event_id, new.options, new.stores) == (
            old.name,
            old.index,
            old.time,
            old.event_id,
            old.options,
            old.stores,
        )
        for a, b in zip(old.fields, new.fields, strict=True):
            assert (a.name, a.type, a.optional, a.required, a.unit) == (b.name, b.type, b.optional, b.required, b.unit)
            if not isinstance(a.default, datetime):
                assert a.default == b.default
                assert type(b.default) in (type(a.default), int)
    assert again.views == plan.views
    assert again.pipelines == {}
    assert describe_layouts(again) == data
    return again


def view(name="spend", source=Transaction, entity="customer", **more):
    given = {"aggregations": [Aggregation("count", windows=["1d"])], **more}
    return FeatureView(name, entity=entity, source=source, **given)


EVERYTHING = {
    "spend": view(
        include_request_event=True,
        aggregations=[
            Aggregation("count", windows=["1d", timedelta(hours=36), Lifetime]),
            Aggregation("count", "note", windows=["1d"]),
            Aggregation("mean", "amount", windows=["1d", "90s"], default=0.5, closed="left"),
            Aggregation("mean", "amount", windows=["1d", "90s"], default=0, closed="both", name="middle"),
            Aggregation("sum", "count", windows=["1w"], where="amount > 10 and note == 'ü'", name="large"),
            Aggregation("last", "note", windows=[Lifetime], ttl="1h", default="none"),
            Aggregation("first", "flag", windows=["2d"], ttl=timedelta(0), default=True),
            Aggregation("max", "at", windows=["3us"], default=5, where="flag"),
            Aggregation("distinct_count", "terminal", windows="1h", where="amount > 10 and note == 'ü'"),
        ],
    ),
    "by_terminal": view("by_terminal", entity=Entity("place", key="terminal", type=str)),
    "same_place": view("same_place", entity=Entity("place", key="terminal", type=str), key="terminal"),
    "receiver": view("receiver", key="id"),
    "clicks": view("clicks", source=Click, entity=Entity("customer_id", type=int), key="user"),
    "derived": view("derived", source=Derived, entity="k", aggregations=[Aggregation("sum", "x", windows=["1d"])]),
    "more_spend": view("more_spend", aggregations=[Aggregation("stddev_pop", "rate", windows=["1d"])]),
}


def test_every_kind_of_definition_comes_back():
    plan = compile_plan(EVERYTHING, "shop")
    assert len(plan.stores) == 5
    again = same_stores(plan)
    assert again.app == "shop"


def test_order_of_definitions_is_kept():
    names = list(EVERYTHING)
    for turn in range(len(names)):
        same_stores(compile_plan({n: EVERYTHING[n] for n in names[turn:] + names[:turn]}))


@on_demand_feature_view
def night(at: Timestamp) -> bool:
    return at.hour <= 6


def test_pipelines_are_left_out_and_an_app_without_views_has_no_stores():
    pipeline = Pipeline("p", event=Transaction, features=["amount", night])
    plan = compile_plan({"p": pipeline, "Click": Click})
    again = same_stores(plan)
    assert (again.stores, again.views) == ([], {})
    assert set(again.events) == {"Click", "Transaction"}
    with_view = compile_plan({"p": pipeline, "v": EVERYTHING["spend"], "Click": Click})
    assert list(same_stores(with_view).events) == list(with_view.events)


@pytest.mark.parametrize("path", ["bench/app/fraud_bench.py", "engine/penstock/demo/fraud.py"])
def test_the_apps_of_the_benchmark_and_the_demo(path):
    spec = importlib.util.spec_from_file_location("app_of_layouts", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = compile_plan(module)
    assert plan.stores
    same_stores(plan)


TYPES = {"string": str, "int64": int, "float64": float, "bool": bool, "timestamp": Timestamp}
KINDS = {
    "sum": ("float64", "int64", "bool"),
    "min": ("float64", "int64", "bool", "timestamp"),
    "first": tuple(TYPES),
    "count": tuple(TYPES),
}


@st.composite
def apps(draw):
    found = {}
    for e in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=6))
        annotations = {"k": draw(st.sampled_from([str, int])), "j": int, "at": Timestamp}
        defaults = {}
        for i, kind in enumerate(kinds):
            annotations[f"f{i}"] = TYPES[kind] | None if draw(st.booleans()) else TYPES[kind]
            if annotations[f"f{i}"] is not TYPES[kind] and draw(st.booleans()):
                defaults[f"f{i}"] = None
        options = {
            "time": "at",
            "lateness": timedelta(microseconds=draw(st.integers(0, 10**12))),
            "kw_only": True,
            **draw(st.sampled_from([{}, {"event_id": "k"}, {"retry_window": "3h"}, {"max_skew": "0s"}])),
        }
        body = {"__annotations__": annotations, "__module__": __name__, **defaults}
        event = types.new_class(f"E{e}", (Event,), options, lambda ns, body=body: ns.update(body))
        found[f"E{e}"] = event
        for v in range(draw(st.integers(0, 3))):
            aggregations = []
            for a in range(draw(st.integers(1, 4))):
                function = draw(st.sampled_from(list(FUNCTIONS)))
                group = KINDS.get(
                    {"max": "min", "last": "first", "distinct_count": "first"}.get(function, function), KINDS["sum"]
                )
                fitting = [f"f{i}" for i, kind in enumerate(kinds) if kind in group]
                if function == "count" and draw(st.booleans()):
                    fitting = []
                if FUNCTIONS[function] and not fitting:
                    function = "count"
                aggregations.append(
                    Aggregation(
                        function,
                        draw(st.sampled_from(fitting)) if fitting else None,
                        windows=draw(
                            st.lists(
                                st.sampled_from(["1d", "24h", "5us", Lifetime]), min_size=1, max_size=3, unique=True
                            )
                        ),
                        where=draw(st.sampled_from([None, "j > 0", "j > 1 and k == k"])),
                        closed=draw(st.sampled_from(CLOSED)),
                        ttl=draw(st.sampled_from([None, "1h"])) if function in ("first", "last") else None,
                        name=f"n{a}",
                    )
                )
            found[f"v{e}{v}"] = FeatureView(
                f"v{e}{v}",
                entity=draw(st.sampled_from(["k", Entity("who", "j"), Entity("typed", "j", str)])),
                source=event,
                include_request_event=draw(st.booleans()),
                aggregations=aggregations,
            )
    found["p"] = Pipeline("p", event=found["E0"])
    return found


@settings(max_examples=150, deadline=None)
@given(apps())
def test_any_app_comes_back(app):
    same_stores(compile_plan(app))


def test_stores_hold_the_same_state():
    """The engine's own stores and the rebuilt ones read each other's dumps."""
    from penstock.engine import _window_store

    plan = compile_plan(EVERYTHING)
    again = plan_from_layouts(describe_layouts(plan))
    for old, new in zip(plan.stores, again.stores):
        a, b = (
            _window_store(store, events[store.event], bytes(range(16)))
            for store, events in ((old, plan.events), (new, again.events))
        )
        b.load(a.dump())
        assert a.outputs == b.outputs


def changed(data, change):
    layouts = json.loads(data)
    change(layouts)
    return json.dumps(layouts).encode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.update(format=2), "format 2; this version of Penstock reads formats up to 1"),
        (lambda x: x.update(fingerprints=[]), "the number of stores is laid out in another way"),
        (lambda x: x["fingerprints"].reverse(), "Transaction by customer"),
        (lambda x: x["views"][0]["aggregations"][0].update(window=7), "Transaction by customer is laid out"),
        (lambda x: x["views"][0]["aggregations"][0].update(function="median"), "unknown function 'median'"),
        (lambda x: x["views"][0].update(event="Nothing"), "Nothing"),
        (lambda x: x["events"][0]["fields"][0].update(type="decimal"), "decimal"),
        (lambda x: x["events"][0]["options"].update(lateness=-1), "lateness"),
        (lambda x: x.pop("views"), "views"),
        (lambda x: x.update(events=[], views=[], fingerprints=[]), "no FeatureView"),
    ],
)
def test_what_differs_is_an_error(change, said):
    data = describe_layouts(compile_plan(EVERYTHING))
    with pytest.raises(PenstockError, match=said):
        plan_from_layouts(changed(data, change))


def test_text_that_is_no_layout_is_an_error():
    for data in (b"", b"[]", b"{", b"\xff", msgspec.json.encode({})):
        with pytest.raises(PenstockError, match="layouts"):
            plan_from_layouts(data)
