"""A Plan as text: what the tables say where there is little to say (the whole output stands in test_cli.py)."""

from penstock import Aggregation, Event, Experiment, FeatureView, Lifetime, Model, Pipeline, Timestamp, by_arm
from penstock.describe import describe_plan, text_table
from penstock.plan import compile_plan


class Ping(Event, lateness="0s", max_skew="1500ms"):
    who: str
    at: Timestamp


def lines(**app):
    return describe_plan(compile_plan(app, "tiny")).splitlines()


def test_columns_are_aligned_and_nothing_trails():
    table = text_table(["a", "bb"], [["xxx", ""], ["", "y"]], indent="")
    assert table == "a    bb\n---  --\nxxx\n     y"


def test_an_app_without_pipelines_or_ids():
    view = FeatureView("v", entity="who", source=Ping, aggregations=[Aggregation("count", windows=[Lifetime])])
    found = lines(v=view)
    assert found[0].startswith("app tiny: plan ")
    assert "  Ping   at    -   0         1500ms    who: string, at: timestamp" in found
    assert "  v     who (Ping.who)                 v.count_lifetime  int64  lifetime  (T-W, T]  -        -" in found
    assert any(line.startswith("  Ping    who     -        for ever: ") for line in found)
    assert not any("Pipeline" in line for line in found)


def test_an_app_without_views():
    found = lines(p=Pipeline("p", event=Ping, default_action="pass"))
    assert "Pipeline p on Ping: 0 features" in found
    assert "Feature views" not in found
    assert "State" not in found
    assert any(line.split() == ["else", "pass"] for line in found)


def test_models_by_arm_and_for_units_outside():
    split = Experiment("e", unit="who", arms={"a": 0.5, "b": 0.5}, coverage=0.5)
    model = by_arm(split, a="m@1", b=Model("m@2"), otherwise="m@3")
    found = lines(p=Pipeline("p", event=Ping, experiments=[split], model=model))
    steps = [line.split() for line in found if line.split()[:1] == ["model"]]
    assert [s[1] for s in steps] == ["m@1", "m@2", "m@3"]
    assert steps[0][2:] == ["e", "=", "a", "decides"]
    assert steps[2][-1] == "decides"
    assert steps[2] != steps[1]
