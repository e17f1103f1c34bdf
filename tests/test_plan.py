"""Compiling an app: every wrong definition is named with its place, all at once; names, types, steps, fingerprints."""

import inspect
import types
from datetime import datetime, timedelta

import pytest

from penstock import (
    Aggregation,
    DefinitionError,
    Entity,
    Event,
    Experiment,
    FeatureView,
    Lifetime,
    Model,
    Pipeline,
    Rule,
    Timestamp,
    by_arm,
    on_demand_feature_view,
)
from penstock.plan import MAX_COLUMNS, MAX_EXPERIMENTS, MAX_RULES, MAX_STORES, MAX_WHERES, compile_plan


class Transaction(Event, event_id="id"):
    id: str
    customer: str
    terminal: int
    amount: float
    at: Timestamp
    note: str | None = None
    count: int | None = None
    flag: bool = False


class Label(Event):
    terminal: int
    fraud: bool
    at: Timestamp


def view(name="spend", **changes):
    given = {"entity": "customer", "source": Transaction, "aggregations": [Aggregation("count", windows=["1d"])]}
    return FeatureView(name, **{**given, **changes})


def aggregated(*args, **kwargs):
    """A view of one aggregation."""
    return view(aggregations=[Aggregation(*args, **{"windows": ["1d"], **kwargs})])


def pipeline(name="fraud", **changes):
    return Pipeline(name, **{"event": Transaction, "features": ["amount"], **changes})


def problems(*definitions):
    with pytest.raises(DefinitionError) as caught:
        compile_plan({str(i): d for i, d in enumerate(definitions)}, "shop")
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def problem(*definitions):
    found = problems(*definitions)
    assert len(found) == 1, found
    return found[0]


def event(name, annotations, defaults=None, **options):
    """An event class made in place."""
    body = {"__annotations__": annotations, "__module__": __name__, **(defaults or {})}
    return types.new_class(name, (Event,), options, lambda ns: ns.update(body))


def on(source):
    """A view of an event, so that the event is compiled."""
    return FeatureView("v", entity="k", source=source, aggregations=[Aggregation("count", windows=["1d"])])


# events


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (event("E", {"k": str}), "event E: no Timestamp field; say which is the event time"),
        (event("E", {"k": str, "a": Timestamp, "b": Timestamp}), "event E: several Timestamp fields (a, b); say"),
        (event("E", {"k": str, "a": Timestamp}, time="b"), "event E: time='b' is not a Timestamp field; have a"),
        (event("E", {"k": str, "a": Timestamp}, time="k"), "event E: time='k' is not a Timestamp field"),
        (event("E", {"k": str, "a": Timestamp | None}), "event E.a: the event time may not be optional (S1)"),
        (event("E", {"k": str, "a": Timestamp, "l": list}), "event E.l: expected str, int, float, bool or Timestamp"),
        (event("E", {"k": str, "a": Timestamp, "l": str | int}), "event E.l: expected str, int, float, bool"),
        (event("E", {"k": str, "a": Timestamp, "l": "Nowhere"}), "event E: name 'Nowhere' is not defined"),
        (event("E", {"k": str, "a": Timestamp}, event_id="kk"), "event E: event_id='kk'; did you mean k?"),
        (event("E", {"k": str, "a": Timestamp}, event_id="a"), "event E.a: an event id is a str or an int"),
        (event("E", {"k": str, "i": str | None, "a": Timestamp}, event_id="i"), "event E.i: an event id is a str"),
        (
            event("E", {"k": str, "a": Timestamp, "x": float}, {"x": "much"}),
            "event E.x: default 'much' does not fit a float64 field",
        ),
        (event("E", {"k": str, "a": Timestamp, "x": int}, {"x": True}), "event E.x: default True does not fit a int64"),
    ],
)
def test_wrong_events(source, said):
    assert problem(on(source)).startswith(said)


@pytest.mark.parametrize("option", ["lateness", "max_skew", "retry_window"])
def test_wrong_lengths_fail_in_the_class_line(option):
    with pytest.raises(TypeError, match=rf'event E: {option}: expected a length such as "90s".*, got \'soon\''):
        event("E", {"a": Timestamp}, **{option: "soon"})
    with pytest.raises(TypeError, match="from 0 to 200 years"):
        event("E", {"a": Timestamp}, **{option: timedelta(days=-1)})


def test_two_event_types_of_one_name():
    other = event("Label", {"k": str, "a": Timestamp})
    found = problems(on(other), view(source=Label, entity="terminal"), Label)
    assert found == ["event Label: two event types have this name"]


def test_event_options_are_inherited_and_in_microseconds():
    class Base(Event, lateness="2h", max_skew=timedelta(seconds=3)):
        k: str
        at: Timestamp

    class Derived(Base, retry_window="1ms"):
        x: float | None = None

    plan = compile_plan({"v": on(Derived)})
    options = plan.events["Derived"].options
    assert (options.lateness, options.max_skew, options.retry_window) == (7200 * 10**6, 3 * 10**6, 1000)
    assert [f.name for f in plan.events["Derived"].fields] == ["k", "at", "x"]


def test_field_types_units_and_defaults():
    class E(Event):
        k: str
        at: Timestamp(unit="ms")  # type: ignore[valid-type]
        when: "Timestamp | None" = None
        until: Timestamp | None = datetime(2020, 1, 1)
        n: int | None = 3
        x: float = 1

    # Two Timestamp fields: the event time has to be named.
    assert problem(on(E)).startswith("event E: several Timestamp fields (at, when, until)")

    class F(E, time="at"):
        pass

    fields = {f.name: f for f in compile_plan({"v": on(F)}).events["F"].fields}
    assert {n: (f.type, f.optional, f.required, f.unit) for n, f in fields.items()} == {
        "k": ("string", False, True, None),
        "at": ("timestamp", False, True, "ms"),
        "when": ("timestamp", True, False, None),
        "until": ("timestamp", True, False, None),
        "n": ("int64", True, False, None),
        "x": ("float64", False, False, None),
    }
    assert fields["n"].default == 3


# views


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (view("a b"), 'view "a b": a view\'s name is letters, digits and _'),
        (view(source=int), "view \"spend\": source is not an Event class, got <class 'int'>"),
        (
            view(entity="custmer"),
            "view \"spend\": Transaction has no field 'custmer' for the key of custmer; did you mean customer?",
        ),
        (view(entity="amount"), 'view "spend": key amount is float64; a key is a str or an int'),
        (view(entity="note"), 'view "spend": key note is optional; a key may not be None'),
        (view(entity=Entity("customer", type=float)), "entity \"customer\": type is str or int, got <class 'float'>"),
        (view(aggregations=[]), 'view "spend": no aggregations'),
        (aggregated("median", "amount"), "view \"spend\" aggregation 1: unknown function 'median'; did you mean mean?"),
        (aggregated("sum"), 'view "spend" aggregation 1: sum needs a column'),
        (
            aggregated("sum", "amnt"),
            "view \"spend\" aggregation 1: Transaction has no field 'amnt'; did you mean amount?",
        ),
        (aggregated("sum", "note"), 'view "spend" aggregation 1: sum of note (string); it takes float64, int64, bool'),
        (aggregated("mean", "at"), 'view "spend" aggregation 1: mean of at (timestamp); it takes'),
        (aggregated("count", windows=[]), 'view "spend" aggregation 1: no windows'),
        (aggregated("count", windows=["1y"]), 'view "spend" aggregation 1: window: expected a length such as "90s"'),
        (
            aggregated("count", windows=["0s"]),
            "view \"spend\" aggregation 1: window: expected a length above 0, got '0s'",
        ),
        (
            aggregated("count", windows=["80000d"]),
            'view "spend" aggregation 1: window: expected a length from 0 to 200',
        ),
        (
            aggregated("count", ttl="1h"),
            'view "spend" aggregation 1: ttl is for first and last; a window already bounds',
        ),
        (aggregated("last", "amount", ttl="x"), 'view "spend" aggregation 1: ttl: expected a length'),
        (
            aggregated("count", closed="up"),
            "view \"spend\" aggregation 1: closed: expected right, both or left, got 'up'",
        ),
        (aggregated("count", default=0.5), 'view "spend" aggregation 1: default 0.5 does not fit a int64 feature'),
        (aggregated("mean", "amount", default="0"), "view \"spend\" aggregation 1: default '0' does not fit a float64"),
        (aggregated("mean", "amount", default=True), 'view "spend" aggregation 1: default True does not fit a float64'),
        (aggregated("mean", "amount", default=float("nan")), 'view "spend" aggregation 1: default nan does not fit'),
        (aggregated("sum", "terminal", default=2**63), 'view "spend" aggregation 1: default 9223372036854775808'),
        (aggregated("count", where="amount >"), 'view "spend" aggregation 1 where: '),
        (aggregated("count", where="amout > 1"), 'view "spend" aggregation 1 where: '),
        (aggregated("count", where="amount"), 'view "spend" aggregation 1 where: expected a condition, got a float64'),
        (aggregated("count", windows=["1d", "1 d"]), 'view "spend": two features are named spend.count_1d; give one'),
    ],
)
def test_wrong_views(wrong, said):
    assert problem(wrong).startswith(said)


def test_views_and_entities_defined_twice():
    assert problem(view(), view()) == 'view "spend": defined twice'
    assert problem(Entity("customer"), Entity("customer", type=str), view()) == 'entity "customer": defined twice'
    assert problem(view(entity=Entity("customer", type=str)), view("other", entity=Entity("customer"))) == (
        'view "other": entity "customer" is defined in two ways'
    )


def test_limits_of_the_core_are_found_at_load():
    wide = event("W", {"k": str, "at": Timestamp, **{f"x{i}": float for i in range(MAX_COLUMNS + 1)}})
    every = [Aggregation("sum", f"x{i}", windows=["1d"]) for i in range(MAX_COLUMNS + 1)]
    assert problem(FeatureView("v", entity="k", source=wide, aggregations=every)) == (
        f"event W: more than {MAX_COLUMNS} fields are aggregated for entity k"
    )
    keys = event("K", {"at": Timestamp, **{f"k{i}": str for i in range(MAX_STORES + 1)}})
    one = [Aggregation("count", windows=["1d"])]
    many = [FeatureView(f"v{i}", entity=f"k{i}", source=keys, aggregations=one) for i in range(MAX_STORES + 1)]
    assert problem(*many) == f"event K: more than {MAX_STORES} entities"
    wheres = [Aggregation("count", windows=["1d"], where=f"amount > {i}", name=f"c{i}") for i in range(MAX_WHERES + 1)]
    assert f"more than {MAX_WHERES} different where=" in problem(view(aggregations=wheres))
    rules = [Rule(f"r{i}", when=f"amount > {i}", action="a") for i in range(MAX_RULES + 1)]
    assert problem(pipeline(rules=rules)) == f'pipeline "fraud": more than {MAX_RULES} rules'
    splits = [Experiment(f"e{i}", unit="customer", arms={"a": 1.0}) for i in range(MAX_EXPERIMENTS + 1)]
    assert problem(pipeline(experiments=splits)) == f'pipeline "fraud": more than {MAX_EXPERIMENTS} experiments'
    arms = {f"a{i}": 1 / 65 for i in range(65)}
    assert problem(pipeline(experiments=[Experiment("e", unit="customer", arms=arms)])) == (
        'pipeline "fraud": experiment "e": more than 64 arms'
    )


# pipelines


@on_demand_feature_view
def night(at: Timestamp) -> bool:
    return at.hour <= 6


def function(annotations, **options):
    """An on-demand feature called f, whose annotations are given."""

    def f(**kwargs):
        return 0

    empty = inspect.Parameter.empty
    parameters = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=empty if a is None else a)
        for n, a in annotations.items()
        if n != "return"
    ]
    f.__signature__ = inspect.Signature(parameters, return_annotation=annotations.get("return", empty))
    return on_demand_feature_view(**options)(f)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"event": str}, "event is not an Event class, got <class 'str'>"),
        ({"features": ["amuont"]}, "unknown feature 'amuont'; did you mean amount?"),
        ({"features": [1]}, "a feature is a name, a FeatureView or an on-demand feature, got 1"),
        ({"features": [function({"amount": float})]}, 'function "f": give its return type: -> float, int, bool or'),
        (
            {"features": [function({"amont": float, "return": float})]},
            'function "f": no feature for parameter amont; did',
        ),
        (
            {"features": [function({"amount": int, "return": float})]},
            'function "f": amount is annotated int64, but amount',
        ),
        ({"features": [function({"amount": list, "return": float})]}, 'function "f": parameter amount is annotated'),
        ({"features": [function({"amount": float, "return": dict})]}, 'function "f": the return value is annotated'),
        (
            {"features": [function({"note": str, "return": float})]},
            'function "f": note is a str; strings need @on_demand',
        ),
        ({"features": [night, function({"amount": float, "return": int}, name="night")]}, "two things are named night"),
        (
            {"experiments": [Experiment("e", unit="cust", arms={"a": 1.0})]},
            "experiment \"e\": Transaction has no field 'cust'",
        ),
        (
            {"experiments": [Experiment("e", unit="amount", arms={"a": 1.0})]},
            'experiment "e": unit amount is float64; a',
        ),
        ({"experiments": [Experiment("e", unit="customer", arms={"a": 0.4})]}, 'experiment "e"'),
        ({"experiments": [Experiment("e", unit="customer", arms={"a": 1.0}, hash="md4")]}, 'experiment "e"'),
        ({"experiments": [Experiment("amount", unit="customer", arms={"a": 1.0})]}, "two things are named amount"),
        ({"model": by_arm("e", a="m@1")}, "by_arm names experiment 'e'; have none"),
        (
            {
                "experiments": [Experiment("e", unit="customer", arms={"a": 1.0})],
                "model": by_arm("e", a="m@1", b="m@2"),
            },
            "by_arm names arm 'b' of e; have a",
        ),
        (
            {
                "experiments": [Experiment("e", unit="customer", arms={"a": 0.5, "b": 0.5})],
                "model": by_arm("e", a="m@1"),
            },
            "by_arm of e gives no model for arm b",
        ),
        (
            {
                "experiments": [Experiment("e", unit="customer", arms={"a": 1.0}, coverage=0.5)],
                "model": by_arm("e", a="m@1"),
            },
            "by_arm of e (coverage 0.5) gives no model for units outside it; say otherwise=",
        ),
        (
            {
                "experiments": [Experiment("e", unit="note", arms={"a": 1.0})],
                "model": by_arm("e", a="m@1"),
            },
            "by_arm of e gives no model where the unit note is None; say otherwise=",
        ),
        ({"model": "fraud"}, "model 'fraud': expected name@version or name@alias"),
        ({"models": ["../x@1"]}, "model '../x@1': expected name@version or name@alias"),
        ({"rules": [Rule("r", when="amount >", action="a")]}, 'rule "r": '),
        ({"rules": [Rule("r", when="amount + 1", action="a")]}, 'rule "r": expected a condition, got a float64 value'),
        ({"rules": [Rule("r", when="score > 1", action="a")]}, 'rule "r": '),
        (
            {"rules": [Rule("r", when="flag", action="a"), Rule("r", when="flag", action="b")]},
            'rule "r": defined twice',
        ),
    ],
)
def test_wrong_pipelines(changes, said):
    assert problem(pipeline(**changes)).removeprefix('pipeline "fraud": ').startswith(said)


def test_keys_of_views_in_a_pipeline():
    labels = view("risk", entity="terminal", source=Label)
    text = event("Text", {"terminal": str, "at": Timestamp})
    said = problem(labels, pipeline(event=text, features=[labels]))
    assert said == (
        'pipeline "fraud": key terminal is string in Text but int64 in Label; '
        'say Entity("terminal", type=str) (or int) where they are the same key'
    )
    absent = event("Absent", {"terminals": int, "at": Timestamp})
    assert problem(labels, pipeline(event=absent, features=[labels])) == (
        "pipeline \"fraud\": view risk needs a field 'terminal' in Absent; did you mean terminals?"
    )
    maybe = event("Maybe", {"terminal": int | None, "at": Timestamp}, {})
    assert "it must be a str or an int, not None" in problem(labels, pipeline(event=maybe, features=[labels]))
    typed = view("risk", entity=Entity("terminal", type=int), source=Label)
    plan = compile_plan({"v": typed, "p": pipeline(event=text, features=[typed])})
    assert plan.views["risk"].key_type == "int64"
    assert plan.typed_entities == {"terminal"}


def test_every_problem_is_reported_together():
    found = problems(
        on(event("E", {"k": str})),
        aggregated("median", "amount"),
        pipeline(features=["x"], rules=[Rule("r", when="y > 1", action="a")]),
        pipeline(),
    )
    assert len(found) == 5
    assert [f.split(":")[0] for f in found] == [
        "event E",
        'view "spend" aggregation 1',
        'pipeline "fraud"',
        'pipeline "fraud"',
        'pipeline "fraud"',
    ]


def test_an_app_defines_something():
    assert problem(Transaction) == "app shop: no FeatureView and no Pipeline; an app defines at least one"


# what a right app compiles to


def test_feature_names_and_types():
    spend = view(
        aggregations=[
            Aggregation("count", windows=["1d", timedelta(days=7), Lifetime]),
            Aggregation("count", "note", windows="90s"),
            Aggregation("sum", "terminal", windows=[timedelta(hours=36)]),
            Aggregation("sum", "flag", windows=[timedelta(microseconds=1500)]),
            Aggregation("mean", "amount", windows=["1d"], name="average"),
            Aggregation("max", "amount", windows=["1d", "2w"], name="top"),
            Aggregation("last", "note", windows=[Lifetime], ttl="1h"),
            Aggregation("first", "at", windows=["1 h"]),
            Aggregation("distinct_count", "note", windows=["1d"]),
            Aggregation("min", "flag", windows=["1d"]),
        ]
    )
    outputs = compile_plan({"v": spend}).views["spend"].outputs
    assert [(o.name, o.type) for o in outputs] == [
        ("spend.count_1d", "int64"),
        ("spend.count_7d", "int64"),
        ("spend.count_lifetime", "int64"),
        ("spend.count_note_90s", "int64"),
        ("spend.sum_terminal_36h", "int64"),
        ("spend.sum_flag_1500us", "int64"),
        ("spend.average", "float64"),
        ("spend.top_1d", "float64"),
        ("spend.top_2w", "float64"),
        ("spend.last_note_lifetime", "string"),
        ("spend.first_at_1h", "timestamp"),
        ("spend.distinct_count_note_1d", "int64"),
        ("spend.min_flag_1d", "bool"),
    ]


def test_views_of_one_source_and_entity_share_one_store():
    plan = compile_plan(
        {
            "a": view("a", aggregations=[Aggregation("sum", "amount", windows=["1d"], where="flag")]),
            "b": view("b", aggregations=[Aggregation("mean", "amount", windows=["1h"], where="flag")]),
            "c": view("c", entity="terminal"),
            "d": view("d", entity="terminal", source=Label),
        }
    )
    assert [(s.event, s.entity, s.groups, s.wheres) for s in plan.stores] == [
        ("Transaction", "customer", [1, 1], ["flag"]),
        ("Transaction", "terminal", [1], []),
        ("Label", "terminal", [1], []),
    ]
    assert plan.stores[0].columns == [3]
    assert plan.stores[0].retention == (24 + 1) * 3600 * 10**6
    assert plan.events["Transaction"].stores == [0, 1]


def test_steps_of_a_pipeline():
    spend = view()
    risk = view("risk", entity="terminal", source=Label, aggregations=[Aggregation("mean", "fraud", windows=["7d"])])

    @on_demand_feature_view
    def ratio(amount: float, spend__count_1d: int) -> float:
        return amount / spend__count_1d

    fraud = pipeline(
        features=["amount", "spend.count_1d", ratio],
        experiments=[Experiment("e", unit="customer", arms={"a": 0.5, "b": 0.5})],
        model=by_arm("e", a="m@1", b=Model("m@2", inputs=["amount"])),
        models=["shadow@3"],
        rules=[Rule("r", when="risk.mean_fraud_7d > 0.5 and score > 0.9 and e == 'a'", action="review")],
        fallback="review",
    )
    plan = compile_plan({"s": spend, "r": risk, "p": fraud}).pipelines["fraud"]
    # A view that only a rule names is read, but is no feature.
    assert [plan.slots[i].name for i in plan.features] == ["amount", "spend.count_1d", "ratio"]
    assert [r.view for r in plan.reads] == ["spend", "risk"]
    assert [(m.model.ref, m.decides, m.guard) for m in plan.models] == [
        ("m@1", True, (0, 0)),
        ("m@2", True, (0, 1)),
        ("shadow@3", False, None),
    ]
    assert [plan.slots[i].name for i in plan.functions[0].arguments] == ["amount", "spend.count_1d"]
    assert [(s.name, s.type, s.kind) for s in plan.slots[8:]] == [
        ("spend.count_1d", "int64", "view"),
        ("risk.mean_fraud_7d", "float64", "view"),
        ("ratio", "float64", "function"),
        ("e", "string", "arm"),
        ("score.m_1", "float64", "score"),
        ("score.m_2", "float64", "score"),
        ("score.shadow_3", "float64", "score"),
        ("score", "float64", "score"),
    ]
    assert plan.slots[plan.score].name == "score"


# fingerprints


def layout(*views, **options):
    plan = compile_plan({v.name: v for v in views})
    return [s.fingerprint for s in plan.stores], plan.fingerprint


def test_a_layout_has_one_fingerprint():
    assert layout(view()) == layout(view())
    # What is not in the state does not change its layout: names, defaults, the request event, what a pipeline does.
    base = layout(aggregated("mean", "amount"))[0]
    assert layout(aggregated("mean", "amount", name="x"))[0] == base
    assert layout(aggregated("mean", "amount", default=1.0))[0] == base
    assert layout(view(aggregations=[Aggregation("mean", "amount", windows=["24h"])]))[0] == base
    assert layout(view("other", aggregations=[Aggregation("mean", "amount", windows=["1d"])]))[0] == base
    assert layout(view(include_request_event=True, aggregations=aggregated("mean", "amount").aggregations))[0] == base


def test_every_part_of_a_layout_changes_the_fingerprint():
    late = event(
        "Transaction", Transaction.__annotations__, {"note": None, "count": None, "flag": False}, lateness="2h"
    )
    layouts = [
        view(),
        aggregated("count", "amount"),
        aggregated("count", "terminal"),
        aggregated("sum", "terminal"),
        aggregated("count", windows=["2d"]),
        aggregated("count", windows=[Lifetime]),
        aggregated("count", windows=["1d", "2d"]),
        aggregated("count", closed="both"),
        aggregated("count", where="flag"),
        aggregated("count", where="not flag"),
        aggregated("last", "amount"),
        aggregated("last", "amount", ttl="1h"),
        view(entity="terminal"),
        view(entity=Entity("customer", type=int)),
        view(source=late),
    ]
    found = [layout(v)[0][0] for v in layouts]
    assert len(set(found)) == len(found)
    assert all(0 < f < 2**64 for f in found)


def test_a_pipeline_s_fingerprint_covers_all_that_scores_depend_on():
    def make(spend=None, **changes):
        spend = spend or view()
        given = {
            "features": ["amount", spend],
            "experiments": [Experiment("e", unit="customer", arms={"a": 0.5, "b": 0.5})],
            "model": by_arm("e", a="m@1", b="m@2"),
            "rules": [Rule("r", when="score > 0.9", action="review")],
        }
        return compile_plan({"v": spend, "p": pipeline(**{**given, **changes})}).pipelines["fraud"].fingerprint

    assert make() == make()
    changed = [
        make(),
        make(features=["amount"]),
        make(features=["amount", "terminal", "spend"]),
        make(features=["amount", "spend", night]),
        make(spend=view(include_request_event=True)),
        make(spend=aggregated("count", default=1)),
        make(experiments=[Experiment("e", unit="customer", arms={"a": 0.4, "b": 0.6})]),
        make(experiments=[Experiment("e", unit="customer", arms={"a": 0.5, "b": 0.5}, salt="s")]),
        make(model=by_arm("e", a="m@1", b="m@3")),
        make(model=by_arm("e", a="m@1", b=Model("m@2", output=1))),
        make(model=by_arm("e", a="m@1", b=Model("m@2", inputs=["amount"]))),
        make(models=["m@9"]),
        make(rules=[Rule("r", when="score > 0.8", action="review")]),
        make(rules=[Rule("r", when="score > 0.9", action="decline")]),
        make(rules=[Rule("r", when="score > 0.9", action="review", reason="sure")]),
        make(default_action="review"),
        make(fallback="review"),
    ]
    assert len(set(changed)) == len(changed)
