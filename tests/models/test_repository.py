"""The repository: what the folder holds is served, whatever happens to the folder, and serving goes on meanwhile.

What must stay true: a load that fails changes nothing that serves; a swap is between two requests; nothing is written.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from models.folders import N_INPUTS, expected, put, trained

from penstock.models.folder import ModelError
from penstock.models.repository import ModelRepository, UnknownModel


def score(repository, name, version=""):
    """The model's score of the row that `expected` scores."""
    model = repository.model(name, version)
    if model is None:
        return None
    row = np.random.default_rng(99).normal(size=(1, N_INPUTS)).tobytes()
    (answer,) = model.infer([(model.inputs[0].name, "FP64", [1, N_INPUTS], row)])
    return answer[3]


def right(seed, **options):
    return expected(trained(seed, **options))[1]


def states(repository):
    return {f"{row['name']}@{row['version']}": row["state"] for row in repository.index()}


def reason(repository, ref):
    return next(row["reason"] for row in repository.index() if f"{row['name']}@{row['version']}" == ref)


def serving(root, test, **options):
    """Run a test with a started repository on a loop of its own."""

    async def run():
        repository = ModelRepository(root, **options)
        try:
            repository.start()
            return await test(repository)
        finally:
            await repository.close()

    return asyncio.run(run())


def tree_of(root):
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*")}


@pytest.fixture
def root(tmp_path):
    put(tmp_path, "fraud", "1", trained(1))
    put(tmp_path, "fraud", "2", trained(2))
    put(tmp_path, "fraud", "10", trained(3))
    put(tmp_path, "churn", "1", trained(4))
    return tmp_path


# at the start


def test_every_version_is_served_and_the_newest_without_one(root):
    async def test(repository):
        assert repository.versions("fraud") == ["1", "2", "10"]
        assert score(repository, "fraud", "1") == right(1)
        assert score(repository, "fraud", "2") == right(2)
        assert score(repository, "fraud", "10") == score(repository, "fraud") == right(3)
        assert score(repository, "churn") == right(4)
        assert repository.model("fraud", "3") is None
        assert repository.model("other") is None
        assert repository.table.target("fraud", "3") is None
        assert repository.table.target("fraud").version == ""
        assert repository.table.target("fraud").name == "fraud"
        assert [(row["name"], row["version"], row["state"], row["reason"]) for row in repository.index()] == [
            ("churn", "1", "READY", ""),
            ("fraud", "1", "READY", ""),
            ("fraud", "2", "READY", ""),
            ("fraud", "10", "READY", ""),
        ]
        with pytest.raises(ModelError, match="stay as they were"):
            await repository.load("fraud")
        with pytest.raises(ModelError, match="stay as they were"):
            await repository.unload("fraud")

    before = tree_of(root)
    serving(root, test)
    assert tree_of(root) == before


def test_explicit_serves_what_was_named(root):
    async def test(repository):
        assert states(repository) == {
            "churn@1": "READY",
            "fraud@1": "UNAVAILABLE",
            "fraud@2": "UNAVAILABLE",
            "fraud@10": "UNAVAILABLE",
        }
        assert [row["name"] for row in repository.index(ready=True)] == ["churn"]
        target = repository.table.target("fraud")
        assert target.model is None
        await repository.load("fraud")
        assert target.model is repository.model("fraud", "10")
        assert score(repository, "fraud") == right(3)

    serving(root, test, control="explicit", names=["churn"])
    with pytest.raises(UnknownModel, match=r"model nothing is not in .*models there are churn, fraud"):
        serving(root, test, control="explicit", names=["nothing"])


def test_a_broken_model_does_not_keep_the_others_from_serving(root):
    put(root, "fraud", "11", "tree\nbroken")
    (root / "empty" / "1").mkdir(parents=True)

    async def test(repository):
        assert states(repository)["fraud@11"] == states(repository)["empty@1"] == "UNAVAILABLE"
        assert "model.txt" in reason(repository, "fraud@11")
        assert "found nothing" in reason(repository, "empty@1")
        assert score(repository, "fraud") == right(3)  # the newest that loads
        assert repository.table.target("empty").model is None

    serving(root, test)


def test_a_folder_that_is_not_there(tmp_path):
    async def test(repository):
        raise AssertionError

    with pytest.raises(ModelError, match="the model folder is not there"):
        serving(tmp_path / "nothing", test)
    with pytest.raises(ModelError, match="model control 'all': expected one of none, explicit, poll"):
        ModelRepository(tmp_path, control="all")


# on request


def test_load_unload_and_load_again(root):
    async def test(repository):
        table = repository.table
        target, version = table.target("fraud"), table.version
        first = target.model
        await repository.load("fraud")
        assert target.model is first
        assert table.version == version
        put(root, "fraud", "10", trained(5))
        put(root, "fraud", "11", trained(6))
        shutil.rmtree(root / "fraud" / "2")
        await repository.load("fraud")
        assert table.version == version + 1
        assert repository.versions("fraud") == ["1", "10", "11"]
        assert score(repository, "fraud") == right(6)
        assert score(repository, "fraud", "10") == right(5)
        assert table.target("fraud") is target
        assert table.target("fraud", "2").model is None
        await repository.unload("fraud")
        assert target.model is None
        assert repository.versions("fraud") == []
        assert states(repository)["fraud@11"] == "UNAVAILABLE"
        assert reason(repository, "fraud@11") == "unloaded"
        assert states(repository)["churn@1"] == "READY"
        await repository.unload("fraud")
        await repository.load("fraud")
        assert score(repository, "fraud") == right(6)
        assert table.target("fraud") is target

    serving(root, test, control="explicit", names=["churn", "fraud"])


def test_a_load_that_fails_keeps_what_serves(root):
    async def test(repository):
        first = repository.model("fraud", "10")
        for content in ("", "tree\nbroken", trained(5)[:900]):
            put(root, "fraud", "10", content)
            with pytest.raises(ModelError, match=r"model\.txt"):
                await repository.load("fraud")
            assert repository.model("fraud", "10") is first
            assert states(repository)["fraud@10"] == "READY"
            assert "model.txt" in reason(repository, "fraud@10")
        put(root, "fraud", "12", "nonsense")
        put(root, "fraud", "10", trained(5))
        with pytest.raises(ModelError, match="12"):
            await repository.load("fraud")
        assert score(repository, "fraud") == right(5)
        assert reason(repository, "fraud@10") == ""
        assert states(repository)["fraud@12"] == "UNAVAILABLE"

    serving(root, test, control="poll")


def test_names_are_no_paths(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    put(outside, "secret", "1", trained(1))

    async def test(repository):
        for name in (
            "../outside/secret",
            "..",
            ".",
            "",
            "/etc",
            "a/b",
            "fraud/1",
            "a\0b",
            "-x",
            str(outside),
            "x" * 5000,
        ):
            with pytest.raises(UnknownModel):
                await repository.load(name)
        with pytest.raises(UnknownModel, match=r"model new is not in .*; there are churn, fraud"):
            await repository.load("new")
        assert {row["name"] for row in repository.index()} == {"churn", "fraud"}
        for key in (
            "model.txt",
            "1/../../model.txt",
            "../1/model.txt",
            "1/other.txt",
            "a/model.txt",
            "1/model.exe",
            "1/",
        ):
            with pytest.raises(ModelError, match="expected a version and a file name"):
                await repository.load("fraud", None, {key: b"x"})
        with pytest.raises(UnknownModel):
            await repository.unload("new")

    serving(root, test, control="explicit")


def test_files_that_come_with_a_load(root):
    async def test(repository):
        await repository.load(
            "fraud", "{}", {"file:7/model.txt": trained(7).encode(), "8/model.txt": trained(8).encode()}
        )
        assert repository.versions("fraud") == ["7", "8"]
        assert score(repository, "fraud") == right(8)
        assert score(repository, "fraud", "7") == right(7)
        await repository.load("brand_new", None, {"1/model.txt": trained(9).encode()})
        assert score(repository, "brand_new") == right(9)
        put(root, "fraud", "20", trained(1))
        await repository.look()
        await repository.look()
        assert repository.versions("fraud") == ["7", "8"]  # the watch leaves it alone
        await repository.load("fraud")
        assert repository.versions("fraud") == ["1", "2", "10", "20"]
        with pytest.raises(ModelError, match="version 1 was given two files"):
            await repository.load("fraud", None, {"1/model.txt": b"", "file:1/model.txt": b""})
        with pytest.raises(ModelError, match=r"given/fraud/3/model\.txt"):
            await repository.load("fraud", None, {"3/model.txt": b"tree\nnonsense"})
        assert repository.versions("fraud") == []  # what came replaces the folder's; the folder can be loaded again
        await repository.load("fraud")
        assert repository.versions("fraud") == ["1", "2", "10", "20"]

    before = tree_of(root)
    serving(root, test, control="poll")
    after = tree_of(root)
    assert {k: v for k, v in after.items() if k in before and k != "fraud"} == {
        k: v for k, v in before.items() if k != "fraud"
    }
    assert set(after) - set(before) == {"fraud/20", "fraud/20/model.txt"}


def test_onnx_as_the_file_has_it(root):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    ports = [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in "xpq"]
    nodes = [helper.make_node("Tanh", ["x"], ["p"]), helper.make_node("Neg", ["x"], ["q"])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    put(root, "net", "1", model, "model.onnx")

    async def test(repository):
        await repository.load("given", None, {"3/model.onnx": model})
        for name in ("net", "given"):
            served = repository.model(name)
            assert served.platform == "onnxruntime_onnx"
            assert [port.name for port in served.outputs] == ["p", "q"]
            x = np.arange(3, dtype=np.float32)
            answers = served.infer([("x", "FP32", [1, 3], x.tobytes())])
            assert np.frombuffer(answers[1][3], np.float32).tolist() == [0, -1, -2]
        elsewhere = onnx.ModelProto.FromString(model)
        weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
        onnx.external_data_helper.set_external_data(weight, "5")
        weight.ClearField("raw_data")
        elsewhere.graph.initializer.append(weight)
        with pytest.raises(ModelError, match="has tensors in other files"):
            await repository.load("given", None, {"4/model.onnx": elsewhere.SerializeToString()})
        with pytest.raises(ModelError, match="net@1: config: platform: the file is run by onnxruntime_onnx"):
            put(root, "net", "1", model + b"\x12\x00", "model.onnx")
            await repository.load("net", '{"platform": "penstock_trees"}')

    serving(root, test, control="explicit", names=["net"])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "config: "),
        ("[]", "config: "),
        (
            '{"max_batch_size": 8}',
            "unknown field `max_batch_size`; it can hold name, platform, backend and version_policy",
        ),
        ('{"name": "other"}', "config: name: expected 'fraud', got 'other'"),
        (
            '{"platform": "tensorrt_plan"}',
            "config: platform: the file is run by penstock_trees, not by 'tensorrt_plan'",
        ),
        ('{"backend": "python"}', "config: backend: the file is run by penstock"),
        ('{"version_policy": {"newest": {}}}', "config: version_policy: expected one of"),
        ('{"version_policy": {}}', "config: version_policy: expected one of"),
        ('{"version_policy": {"latest": {"num_versions": 0}}}', "config: version_policy: expected one of"),
        ('{"version_policy": {"specific": {"versions": ["../1"]}}}', "config: version_policy: expected one of"),
    ],
)
def test_a_config_that_cannot_be_kept_to_is_refused(root, config, why):
    async def test(repository):
        put(root, "fraud", "10", trained(5))
        with pytest.raises(ModelError, match="fraud") as caught:
            await repository.load("fraud", config)
        assert why in str(caught.value)
        assert score(repository, "fraud") == right(3)

    serving(root, test, control="explicit", names=["fraud"])


def test_a_version_policy(root):
    async def test(repository):
        await repository.load("fraud", json.dumps({"name": "fraud", "version_policy": {"latest": {"num_versions": 2}}}))
        assert repository.versions("fraud") == ["2", "10"]
        assert reason(repository, "fraud@1") == "left out by version_policy"
        await repository.load("fraud", json.dumps({"version_policy": {"specific": {"versions": [1, "2"]}}}))
        assert repository.versions("fraud") == ["1", "2"]
        assert score(repository, "fraud") == right(2)
        await repository.load("fraud", '{"platform": "penstock_trees", "version_policy": {"all": {}}}')
        assert repository.versions("fraud") == ["1", "2", "10"]

    serving(root, test, control="explicit")


def test_loads_and_unloads_at_once_come_one_after_the_other(root):
    async def test(repository):
        calls = []
        for i in range(30):
            put(root, "fraud", "10", trained(20 + i % 3))
            calls.append(repository.load("fraud"))
            if i % 5 == 4:
                calls.append(repository.unload("fraud"))
            calls.append(repository.load("churn"))
        results = await asyncio.gather(*(asyncio.ensure_future(call) for call in calls), return_exceptions=True)
        assert [r for r in results if r is not None] == []
        await repository.load("fraud")
        assert score(repository, "fraud", "10") == right(20 + 29 % 3)

    serving(root, test, control="explicit", names=["churn", "fraud"])


# the watch


async def settled(repository):
    """The watch reads a file once it is the same in two looks."""
    await repository.look()
    await repository.look()


def test_the_watch_follows_the_folder(root):
    async def test(repository):
        version = repository.table.version
        await settled(repository)
        assert repository.table.version == version
        put(root, "fraud", "10", trained(5))  # replaced
        put(root, "churn", "3", trained(6))  # a new version
        put(root, "third", "1", trained(7))  # a new model
        shutil.rmtree(root / "fraud" / "2")  # a version that goes
        await repository.look()
        assert score(repository, "fraud") == right(3)  # it may still be written
        await repository.look()
        assert score(repository, "fraud") == right(5)
        assert repository.versions("fraud") == ["1", "10"]
        assert score(repository, "churn") == right(6)
        assert repository.versions("churn") == ["1", "3"]
        assert score(repository, "third") == right(7)
        shutil.rmtree(root / "churn")
        target = repository.table.target("churn")
        await repository.look()
        assert target.model is None
        assert "churn@1" not in states(repository)
        put(root, "churn", "1", trained(8))
        await settled(repository)
        assert score(repository, "churn") == right(8)
        assert repository.table.target("churn") is target
        await repository.unload("churn")
        put(root, "churn", "1", trained(9))
        await settled(repository)
        assert repository.model("churn") is None  # unloaded on request: load it again
        await repository.load("churn")
        assert score(repository, "churn") == right(9)

    serving(root, test, control="poll")


def test_a_file_that_is_being_written_is_not_read(root):
    async def test(repository):
        path = root / "fraud" / "10" / "model.txt"
        text = trained(5)
        with path.open("w") as file:
            for at in range(0, len(text), 997):
                file.write(text[at : at + 997])
                file.flush()
                os.utime(path, ns=(at, at))  # clocks of file systems are coarse
                await repository.look()
                assert score(repository, "fraud") == right(3)
        await settled(repository)
        assert score(repository, "fraud") == right(5)
        assert repository.warnings == []

    serving(root, test, control="poll")


def test_a_broken_file_in_a_watched_folder(root):
    async def test(repository):
        put(root, "fraud", "10", "tree\nbroken")
        await settled(repository)
        assert score(repository, "fraud") == right(3)
        assert "model.txt" in reason(repository, "fraud@10")
        assert len(repository.warnings) == 1
        put(root, "fraud", "10", trained(5))
        await settled(repository)
        assert score(repository, "fraud") == right(5)
        assert reason(repository, "fraud@10") == ""

    serving(root, test, control="poll")


def test_the_folder_vanishes_and_comes_back(root):
    async def test(repository):
        away = root.with_name("away")
        root.rename(away)
        await settled(repository)
        assert score(repository, "fraud") == right(3)
        assert "not there" in repository.warnings[0]
        away.rename(root)
        put(root, "fraud", "10", trained(5))
        await settled(repository)
        assert score(repository, "fraud") == right(5)

    serving(root, test, control="poll")


def test_the_loader_is_killed_under_the_watch(root):
    async def test(repository):
        for seed in (5, 6, 7):
            os.kill(repository.loader.pid, signal.SIGKILL)
            put(root, "fraud", "10", trained(seed))
            shutil.rmtree(root / "churn", ignore_errors=True)
            await settled(repository)
            assert score(repository, "fraud") == right(seed)
            assert repository.model("churn") is None
        assert repository.loader.restarts == 3

    serving(root, test, control="poll")


def test_watching_is_a_task_that_ends_with_the_repository(root):
    async def test(repository):
        watch = asyncio.ensure_future(repository.watch(0.02))
        put(root, "fraud", "11", trained(5))
        for _ in range(500):
            await asyncio.sleep(0.02)
            if score(repository, "fraud") == right(5):
                break
        assert score(repository, "fraud") == right(5)
        await repository.close()
        await asyncio.wait_for(watch, 5)
        assert score(repository, "fraud") == right(5)
        with pytest.raises(ModelError, match="closed"):
            await repository.load("fraud")

    serving(root, test, control="poll")


def test_a_version_that_failed_is_tried_again(root):
    """The file was good: what failed was the room for it. The watch tries again, less and less often."""

    async def test(repository):
        resource.prlimit(repository.loader.pid, resource.RLIMIT_FSIZE, (100, 1 << 30))
        put(root, "fraud", "10", trained(5))
        await settled(repository)
        assert score(repository, "fraud") == right(3)
        assert "no room" in reason(repository, "fraud@10")
        resource.prlimit(repository.loader.pid, resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        await repository.look()
        assert score(repository, "fraud") == right(3)  # not yet
        now = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: now + 60)
            await repository.look()
        assert score(repository, "fraud") == right(5)
        assert reason(repository, "fraud@10") == ""

    serving(root, test, control="poll")
