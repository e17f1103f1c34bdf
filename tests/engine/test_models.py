"""Models in the engine: inputs by name, arms, shadows, failures; a table gives the bits of its rows one by one.

What must stay true: the score of a decision is what the runtime gives for the row's features, bit for bit.
"""

import math
import struct

import numpy as np
import pyarrow as pa
import pytest

from penstock import (
    Aggregation,
    DefinitionError,
    Engine,
    Event,
    Experiment,
    FeatureView,
    Model,
    Pipeline,
    Rule,
    ScoringError,
    Timestamp,
    by_arm,
    on_demand_feature_view,
)
from penstock.models.runtime import load

SECOND = 10**6
T0 = 1_700_000_000 * SECOND


class Txn(Event):
    who: str
    amount: float
    at: Timestamp
    rate: float | None = None
    n: int | None = None
    night: bool = False


spend = FeatureView(
    "spend",
    entity="who",
    source=Txn,
    include_request_event=True,
    aggregations=[Aggregation("count", windows=["1h"]), Aggregation("mean", "amount", windows=["1h"])],
)
INPUTS = ["amount", "rate", "n", "night", "spend.count_1h", "spend.mean_amount_1h"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """small@1, small@2: LightGBM trees; wide@1: three classes; blind@1: no feature names; line@1: ONNX, not trees."""
    lightgbm = pytest.importorskip("lightgbm")
    home = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(7)
    x = rng.normal(size=(400, 6)) * 3
    x[rng.random(x.shape) < 0.2] = np.nan
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 4]) > 0.5).astype(float)

    def save(name, version, parameters, labels, names):
        place = home / name / version
        place.mkdir(parents=True)
        data = lightgbm.Dataset(x, labels, feature_name=names, params={"verbose": -1})
        given = {"verbose": -1, "num_leaves": 7, "min_data_in_leaf": 5, "num_threads": 1, **parameters}
        lightgbm.train(given, data, num_boost_round=12).save_model(place / "model.txt")

    written = [name.replace(".", "__") for name in INPUTS]
    save("small", "1", {"objective": "binary"}, y, written)
    save("small", "2", {"objective": "regression"}, y * 5, written[::-1])
    save("wide", "1", {"objective": "multiclass", "num_class": 3}, rng.integers(0, 3, 400), written)
    save("blind", "1", {"objective": "regression"}, y, [f"Column_{i}" for i in range(6)])
    save("alien", "1", {"objective": "regression"}, y, [*written[:-1], "moon"])
    return home


def app(**changes):
    given = {
        "features": [*INPUTS[:4], spend],
        "model": "small@1",
        "rules": [Rule("sure", "score > 0.5", "decline"), Rule("unknown", "score is null", "review")],
    }
    return {"spend": spend, "p": Pipeline("p", event=Txn, **{**given, **changes})}


def rows(n=600):
    rng = np.random.default_rng(3)
    return [
        {
            "who": f"w{rng.integers(0, 20)}",
            "amount": float(rng.normal() * 3),
            "at": T0 + i * SECOND,
            "rate": None if rng.random() < 0.3 else float(rng.normal()),
            "n": None if rng.random() < 0.3 else int(rng.integers(-3, 4)),
            "night": bool(rng.random() < 0.5),
        }
        for i in range(n)
    ]


def bits(x):
    return None if x is None else struct.pack("<d", x)


def expected(folder, reference, features):
    runtime = load(folder / reference.replace("@", "/") / "model.txt")
    values = [features[name.replace("__", ".", 1)] for name in runtime.inputs]
    return runtime.predict([[math.nan if v is None else float(v) for v in values]])[0]


def test_the_score_is_the_runtime_s_on_the_row_s_features(folder):
    engine = Engine(app(), models=folder, clock="event")
    for row in rows(200):
        decision = engine.score(row, explain=True)
        assert bits(decision.score) == bits(expected(folder, "small@1", decision.features)[0])
        assert decision.action == ("decline" if decision.score > 0.5 else "approve")
        assert (decision.model, decision.model_version) == ("small", "1")


def test_a_table_gives_the_bits_of_its_rows(folder):
    split = Experiment("e", unit="who", arms={"one": 0.5, "two": 0.5}, coverage=0.8)
    changes = {
        "experiments": [split],
        "model": by_arm(split, one="small@1", two="small@2", otherwise=Model("wide@1", output=2)),
        "models": [Model("blind@1", inputs=INPUTS)],
        "rules": [
            Rule("shadow", "score.blind_1 > 0.4", "review", "the shadow thinks so"),
            Rule("one", "e == 'one' and score > 0.5 and score.small_2 is null", "decline"),
        ],
    }
    one, many = (Engine(app(**changes), models=folder, clock="event") for _ in range(2))
    decisions = [one.score(row, explain=True) for row in rows()]
    result = many.score_batch(pa.Table.from_pylist(rows())).to_pylist()
    assert [bits(r["score"]) for r in result] == [bits(d.score) for d in decisions]
    for name in ("action", "model", "model_version", "outcome"):
        assert [r[name] for r in result] == [getattr(d, name) for d in decisions]
    assert [r["reasons"] for r in result] == [list(d.reasons) for d in decisions]
    assert [r["arm.e"] for r in result] == [d.arms["e"] for d in decisions]
    seen = {(d.arms["e"], d.model, d.model_version) for d in decisions}
    assert seen == {("one", "small", "1"), ("two", "small", "2"), (None, "wide", "1")}
    for d in decisions:
        index = 2 if d.model == "wide" else 0
        assert bits(d.score) == bits(expected(folder, f"{d.model}@{d.model_version}", d.features)[index])
    counts = one.core.counters()
    assert counts == many.core.counters()
    assert sum(counts["arms"]["p"]["e"].values()) == 600
    assert counts["models"]["p"]["blind@1"] == 600
    assert sum(n for m, n in counts["models"]["p"].items() if m != "blind@1") == 600


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "smal@1"}, r'pipeline "p": model smal@1: .*small'),
        ({"model": "small@9"}, r'pipeline "p": model small@9: '),
        ({"model": "alien@1"}, r"input 'moon' is no feature"),
        ({"model": "blind@1"}, r"say Model\('blind@1', inputs=\[\.\.\.\]\), its 6 features"),
        ({"model": Model("blind@1", inputs=INPUTS[:5])}, r"takes 6 inputs, 5 are named"),
        (
            {"model": Model("small@1", inputs=[*INPUTS[:5], "who"])},
            r"missing: spend__mean_amount_1h; surplus: who|inputs",
        ),
        ({"model": Model("blind@1", inputs=[*INPUTS[:5], "who"])}, r"input 'who' is a string; models take numbers"),
        ({"model": "wide@1"}, r"has 3 outputs; say which is the score: output="),
        ({"model": Model("wide@1", output=3)}, r"output=3: it has outputs 0 to 2"),
    ],
)
def test_a_model_that_does_not_fit_is_a_load_error(folder, changes, said):
    with pytest.raises(DefinitionError, match=said):
        Engine(app(**changes), models=folder)


def test_every_model_s_problem_is_reported_together(folder):
    with pytest.raises(DefinitionError) as caught:
        Engine(app(model="wide@1", models=["alien@1", "nowhere@1"]), models=folder)
    assert [p.split(": ")[1] for p in caught.value.problems] == ["model wide@1", "model alien@1", "model nowhere@1"]


def test_models_in_use_are_listed(folder):
    engine = Engine(app(models=["small@1"]), models=str(folder), clock="event")
    assert engine.models["small@1"]["version"] == "1"
    assert engine.models["small@1"]["inputs"] == tuple(name.replace(".", "__") for name in INPUTS)


def test_ties_of_scores_and_rules_of_shadows_see_their_own_slots(folder):
    changes = {"models": ["small@2"], "rules": [Rule("both", "score == score.small_1 and score.small_2 > -100", "x")]}
    assert Engine(app(**changes), models=folder, clock="event").score(rows(1)[0]).action == "x"


def test_an_onnx_model_in_a_table_equals_its_rows(folder, tmp_path):
    """Not trees: ONNX Runtime, whose batch may round differently, so the engine takes its rows singly."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    place = tmp_path / "line" / "1"
    place.mkdir(parents=True)
    helper = onnx.helper
    weights = np.random.default_rng(1).normal(size=(6, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Sigmoid", ["z"], ["y"])],
        "line",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 1])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, place / "model.onnx")
    changes = {"model": Model("line@1", inputs=INPUTS), "rules": []}
    filled = [{**r, "rate": r["rate"] or 0.5, "n": r["n"] or 1} for r in rows(300)]
    one, many = (Engine(app(**changes), models=tmp_path, clock="event") for _ in range(2))
    scores = [one.score(r).score for r in filled]
    table = many.score_batch(pa.Table.from_pylist(filled))
    assert [bits(s) for s in table["score"].to_pylist()] == [bits(s) for s in scores]
    assert len(set(scores)) > 250
    # A null input is NaN, and so is the score: a failed model (S17), and the reason names the input.
    with pytest.raises(ScoringError, match="model line@1 gave no score: rate is null"):
        one.score({**filled[0], "rate": None})
    assert one.stats()["failed"] == {"p": 1}
    careful = Engine(app(**changes, fallback="manual"), models=tmp_path, clock="event")
    missing = careful.score({**filled[0], "rate": None})
    reasons = ("model line@1 gave no score: rate is null",)
    assert (missing.score, missing.action, missing.reasons) == (None, "manual", reasons)
    table = careful.score_batch(pa.Table.from_pylist([{**filled[1], "n": None}, filled[2]]))
    assert table["action"].to_pylist() == ["manual", "approve"]
    assert table["reasons"].to_pylist() == [["model line@1 gave no score: n is null"], []]


def test_a_function_s_failure_leaves_the_model_s_score_out(folder):
    @on_demand_feature_view(mode="python")
    def risky(amount: float) -> float:
        raise ValueError("no")

    changes = {"features": [*INPUTS[:4], spend, risky]}
    failing = Engine(app(**changes), models=folder, clock="event")
    with pytest.raises(ScoringError, match="function risky failed: ValueError: no"):
        failing.score(rows(1)[0])
    decision = Engine(app(**changes, fallback="manual"), models=folder, clock="event").score(rows(1)[0])
    assert (decision.action, decision.score, decision.reasons) == ("manual", None, ("function risky failed",))
