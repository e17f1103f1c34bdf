"""Loading an app: files, modules, mappings; one file is one set of classes; nothing half-loaded stays behind."""

import sys
import types

import pytest

from penstock import DefinitionError, Engine, Event, FeatureView, Timestamp
from penstock.app import load_app, load_plan

APP = """
from __future__ import annotations
from penstock import Aggregation, Event, FeatureView, Pipeline, Timestamp

class Ping(Event):
    who: str
    at: Timestamp
    x: float | None = None

pings = FeatureView("pings", entity="who", source=Ping, aggregations=[Aggregation("count", windows=["1h"])])
pipe = Pipeline("pipe", event=Ping, features=[pings])
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "my-app.v1.py"
    file.write_text(APP)
    return file


def test_a_file_by_text_or_path(path):
    for given in (str(path), path):
        module, name = load_app(given)
        assert name == "my-app.v1"
        assert load_plan(given).app == "my-app.v1"
        assert isinstance(module, types.ModuleType)


def test_annotations_as_text_are_resolved_in_the_app_s_own_module(path):
    event = load_plan(path).events["Ping"]
    assert [(f.name, f.type, f.optional) for f in event.fields] == [
        ("who", "string", False),
        ("at", "timestamp", False),
        ("x", "float64", True),
    ]


def test_an_unchanged_file_gives_the_same_classes_and_a_changed_one_new_ones(path):
    first, again = load_app(path)[0], load_app(str(path))[0]
    assert first is again
    engine = Engine(path, clock="event")
    assert engine.score(first.Ping(who="a", at=Timestamp(5))).outcome == "applied"
    path.write_text(APP.replace("1h", "2h"))
    changed = load_app(path)[0]
    assert changed is not first
    assert load_plan(path).views["pings"].outputs[0].name == "pings.count_2h"


def test_two_files_of_one_name_do_not_meet(tmp_path):
    plans = []
    for folder, window in (("a", "1h"), ("b", "2h")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "app.py").write_text(APP.replace("1h", window))
        plans.append(load_plan(tmp_path / folder / "app.py"))
    assert [p.views["pings"].outputs[0].name for p in plans] == ["pings.count_1h", "pings.count_2h"]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_a_module_its_name_and_a_mapping(path, tmp_path, monkeypatch):
    (tmp_path / "named_app.py").write_text(APP)
    monkeypatch.syspath_prepend(tmp_path)
    by_name = load_plan("named_app")
    module = sys.modules["named_app"]
    assert by_name.app == "named_app"
    assert load_plan(module).fingerprint == by_name.fingerprint
    assert load_plan({"v": module.pings, "p": module.pipe}).fingerprint == by_name.fingerprint
    assert load_plan(vars(module)).app == "app"
    del sys.modules["named_app"]


def test_what_cannot_be_loaded_leaves_no_module_behind(tmp_path):
    before = set(sys.modules)
    for text, said in (
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("x = (", "line 1: "),
        ("from penstock import DefinitionError\nraise DefinitionError('mine')", "mine"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("x = 1\0", r"broken\.py: source code .*null"),
    ):
        file = tmp_path / "broken.py"
        file.write_text(text)
        for _ in range(2):
            with pytest.raises(DefinitionError, match=said):
                load_app(file)
    assert not [m for m in set(sys.modules) - before if "broken" in m]


def test_a_module_that_fails_when_imported(tmp_path, monkeypatch):
    (tmp_path / "failing_app.py").write_text("raise ValueError('no')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DefinitionError, match=r"^app failing_app: ValueError: no$"):
        load_app("failing_app")


def test_the_error_names_the_app_s_own_line(tmp_path):
    file = tmp_path / "deep.py"
    file.write_text("from penstock import Timestamp\n\ndef f():\n    Timestamp.parse('x')\n\nf()\n")
    with pytest.raises(DefinitionError, match=r"deep\.py, line 4: ValueError: expected a time"):
        load_app(file)


def test_a_file_s_name_without_py(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    (path.parent / "plain_one.py").write_text(APP)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with pytest.raises(DefinitionError, match=r"app plain_one: no such module; for the file say plain_one\.py"):
        load_app("plain_one")
    assert load_plan("plain_one.py").app == "plain_one"


def test_imported_definitions_count_once(tmp_path, monkeypatch):
    """`from shared import view` in an app: the same objects under several names."""
    (tmp_path / "shared_views.py").write_text(APP)
    (tmp_path / "main_app.py").write_text(
        "from shared_views import *\nimport shared_views\nagain = pings\nalso = pipe\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = load_plan(tmp_path / "main_app.py")
    assert list(plan.views) == ["pings"]
    assert list(plan.pipelines) == ["pipe"]
    assert isinstance(load_app(tmp_path / "main_app.py")[0].again, FeatureView)
    assert issubclass(plan.events["Ping"].type, Event)
