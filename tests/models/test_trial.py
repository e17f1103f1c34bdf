"""Files on which ONNX Runtime dies, never ends, or takes all memory: the process that loads them lives and says why."""

from __future__ import annotations

import asyncio
import itertools
import re
import time

import numpy as np
import pytest
from models.folders import N_INPUTS, put, trained

from penstock import Engine, Event, Model, Pipeline, Timestamp
from penstock.errors import PenstockError
from penstock.models import trial
from penstock.models.folder import ModelError, set_alias
from penstock.models.loader import Loader
from penstock.models.repository import ModelRepository
from penstock.models.runtime import load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper = onnx.helper


def port(name, kind=1, dims=(None, N_INPUTS)):
    return helper.make_tensor_value_info(name, kind, list(dims))


def model(nodes, inputs, outputs, initializers=(), opsets=(("", 18), ("ai.onnx.ml", 3))):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid(*opset) for opset in opsets])
    return made.SerializeToString()


def good(scale=1.0):
    value = onnx.numpy_helper.from_array(np.float32([scale]), "w")
    return model([helper.make_node("Mul", ["x", "w"], ["y"])], [port("x")], [port("y")], [value])


def aborts():
    """A classifier of one class with a text: ONNX Runtime reads beyond its list of two labels."""
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0], nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
        class_treeids=[0, 0], class_nodeids=[1, 2], class_ids=[0, 0], class_weights=[2.0, 2.0],
        classlabels_strings=["yes"], post_transform="NONE",
    )  # fmt: skip
    return model([node], [port("x")], [port("label", 8, (None,)), port("scores", 1, (None, None))])


def never_ends():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])],
        "b",
        [port("i", 7, ()), port("c", 9, ()), port("v", 1, (1, N_INPUTS))],
        [port("c2", 9, ()), port("v2", 1, (1, N_INPUTS))],
    )
    values = [onnx.numpy_helper.from_array(np.array(v), name) for v, name in ((2**60, "m"), (True, "t"))]
    x, y = port("x", 1, (1, N_INPUTS)), port("y", 1, (1, N_INPUTS))
    return model([helper.make_node("Loop", ["m", "t", "x"], ["y"], body=body)], [x], [y], values)


def takes_all_memory():
    values = [onnx.numpy_helper.from_array(np.array([2**40]), "n")]
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return model(nodes, [port("x")], [port("y")], values)


BAD = {
    "aborts": (aborts, "ONNX Runtime ended the process"),
    "never": (never_ends, r"took longer than \d+ s"),
    "memory": (takes_all_memory, r"needs more than \d+ MB of memory"),
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 1)
    trial.REFUSED.clear()
    yield
    trial.REFUSED.clear()


def not_again(monkeypatch):
    def tried(*_):
        raise AssertionError("it was tried again")

    monkeypatch.setattr(trial, "_started", tried)
    monkeypatch.setattr(trial, "_forked", tried)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_of_load_and_tried_once(tmp_path, monkeypatch, kind):
    make, why = BAD[kind]
    path = put(tmp_path, "m", "1", make(), "model.onnx")
    with pytest.raises(ModelError, match=rf"^model m@1: .*1/model\.onnx: .*{why}.*not tried again"):
        load(path)
    not_again(monkeypatch)
    with pytest.raises(ModelError, match=why):
        load(path)
    with pytest.raises(ModelError, match=why):
        load(put(tmp_path, "other", "7", make(), "model.onnx"))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_of_the_loader(tmp_path, kind):
    make, why = BAD[kind]
    path = str(put(tmp_path, "m", "1", make(), "model.onnx"))
    first, second = Loader(), Loader()
    try:
        for whole in (False, True):
            with pytest.raises(ModelError, match=why):
                first.compile(path, "m@1", whole=whole)
        assert len(trial.REFUSED) == 2
        pid = first.pid
        began = time.monotonic()
        with pytest.raises(ModelError, match=why):  # another child is told
            second.compile(path, "m@1", whole=True)
        with pytest.raises(ModelError, match=why):
            first.compile(path, "m@1", whole=True)
        assert (first.pid, first.restarts) == (pid, 0)
        assert kind != "never" or time.monotonic() - began < 30
        assert first.compile(str(put(tmp_path, "m", "2", good(), "model.onnx")), "m@2", whole=True)[0].trial is None
    finally:
        first.stop()
        second.stop()


def test_what_passes_gives_the_scores_it_gave(tmp_path):
    x = np.random.default_rng(1).normal(size=(3, N_INPUTS))
    runtime = load(put(tmp_path, "m", "1", good(2.0), "model.onnx"))
    np.testing.assert_array_equal(runtime.predict(x), x.astype(np.float32) * np.float32(2))
    assert not trial.REFUSED


def test_a_trial_that_is_given_up_is_not_held_against_the_file(tmp_path):
    path = put(tmp_path, "m", "1", never_ends(), "model.onnx")
    loader = Loader()
    try:
        with pytest.raises(ModelError, match="not over after 0"):
            loader.compile(str(path), "m@1", whole=True, patience=0.05)
        assert not trial.REFUSED
    finally:
        loader.stop()


def states(repository):
    return {(row["name"], row["version"]): (row["state"], row["reason"]) for row in repository.index()}


def test_a_server_starts_with_bad_files_and_loads_others_beside_them(tmp_path, monkeypatch):
    for kind, (make, _) in BAD.items():
        put(tmp_path, kind, "1", make(), "model.onnx")
    put(tmp_path, "trees", "1", trained(1))
    monkeypatch.setattr("penstock.models.repository.START_PATIENCE", 60.0)
    repository = ModelRepository(tmp_path, control="poll")
    repository.start()

    async def later():
        found = states(repository)
        assert found["trees", "1"] == ("READY", "")
        for kind, (_, why) in BAD.items():
            state, reason = found[kind, "1"]
            assert state == "UNAVAILABLE"
            assert re.search(why, reason), reason
        not_again(monkeypatch)
        for one in repository._models.values():
            one.retry_at = 0.0  # the watch tries again what failed
        await repository.look()
        assert states(repository) == found
        await repository.close()

    asyncio.run(later())


def test_a_trial_holds_up_no_other_model(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.models.repository.SOON", 0.05)
    put(tmp_path, "trees", "1", trained(1))
    repository = ModelRepository(tmp_path, control="poll")
    repository.start()
    release = []
    real = trial._started

    def waits(given, data, seconds, until, stop):
        while not release and not stop.is_set():
            time.sleep(0.01)
        return real(given, data, seconds, until, stop)

    monkeypatch.setattr(trial, "_started", waits)

    async def later():
        put(tmp_path, "net", "1", good(), "model.onnx")
        put(tmp_path, "trees", "2", trained(2))
        await repository.look()
        await repository.look()
        assert repository.versions("trees") == ["1", "2"]
        state, reason = states(repository)["net", "1"]
        assert state == "UNAVAILABLE"
        assert "trial" in reason
        release.append(True)
        await asyncio.wait_for(asyncio.gather(*repository._tasks), 60)
        assert states(repository)["net", "1"] == ("READY", "")
        await repository.close()

    asyncio.run(later())


def test_an_explicit_load_of_a_bad_file(tmp_path):
    put(tmp_path, "m", "1", good(), "model.onnx")
    repository = ModelRepository(tmp_path, control="explicit", names=["m"])
    repository.start()

    async def later():
        put(tmp_path, "m", "2", aborts(), "model.onnx")
        with pytest.raises(ModelError, match="ended the process"):
            await repository.load("m")
        with pytest.raises(ModelError, match="ended the process"):
            await repository.load("m", files={"3/model.onnx": aborts()})
        assert states(repository)["m", "3"][0] == "UNAVAILABLE"
        put(tmp_path, "m", "2", good(3.0), "model.onnx")
        await repository.load("m")
        assert repository.versions("m") == ["1", "2"]
        await repository.close()

    asyncio.run(later())


class Txn(Event):
    who: str
    at: Timestamp
    a: float
    b: float


def wide(make):
    """The graph over the two fields of Txn."""
    return make().replace(bytes([0x08, N_INPUTS]), bytes([0x08, 2]))


def test_pipelines_keep_what_they_run_and_none_starts_with_a_bad_file(tmp_path):
    times = itertools.count(1_700_000_000_000_000)

    def score(engine):
        return engine.score(Txn(who="u", at=next(times), a=1.0, b=2.0)).score

    chosen = Model("m@live", inputs=["a", "b"], output=0)
    app = {"Txn": Txn, "p": Pipeline("p", event=Txn, features=["a", "b"], model=chosen)}
    put(tmp_path, "m", "1", wide(good), "model.onnx")
    put(tmp_path, "m", "2", wide(aborts), "model.onnx")
    set_alias(tmp_path, "m", "live", "2")
    with pytest.raises(PenstockError, match="ended the process"):
        Engine(app, models=tmp_path)
    set_alias(tmp_path, "m", "live", "1")
    engine = Engine(app, models=tmp_path)
    assert score(engine) == 1.0
    repository = ModelRepository(tmp_path, control="poll", engine=engine)
    repository.start()

    async def later():
        set_alias(tmp_path, "m", "live", "2")
        await repository.look()
        await repository.look()
        assert score(engine) == 1.0
        assert any("ended the process" in text for text in repository.warnings)
        await repository.close()

    asyncio.run(later())
