"""The loader's child: what it makes is what loading in one process gives; whatever happens to it, an answer comes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.folders import N_INPUTS, expected, put, trained

from penstock._ext.trees import TreeModel, compile_form
from penstock.models import loader as loader_module
from penstock.models.folder import ModelError
from penstock.models.loader import Loader, Scan, build
from penstock.models.runtime import load
from penstock.models.trees import load_trees, read_ensemble


@pytest.fixture(scope="module")
def loader():
    found = Loader()
    yield found
    found.stop()


def test_what_the_child_makes_gives_the_bits_of_the_file(loader, tmp_path):
    x = np.random.default_rng(3).normal(size=(50, N_INPUTS))
    x[x > 1.5] = np.nan
    for text in (trained(1), trained(2, 30, 16), trained(3, classes=3)):
        path = put(tmp_path, "m", "1", text)
        compiled, memory = loader.compile(str(path), "m@1")
        runtime = build(compiled, memory, "m@1")
        mine, theirs = runtime.predict(x), load(path).predict(x)
        assert mine.tobytes() == theirs.tobytes()
        assert (runtime.inputs, runtime.n_inputs, runtime.n_outputs) == (None, N_INPUTS, theirs.shape[1])
        assert compiled.size == len(text.encode())


def test_names_of_the_features_come_with_it(loader, tmp_path):
    text = trained(1).replace("Column_", "feature.")
    path = put(tmp_path, "m", "1", text)
    compiled, memory = loader.compile(str(path), "m@1")
    names = tuple(f"feature.{i}" for i in range(N_INPUTS))
    assert build(compiled, memory, "m@1").inputs == names == tuple(compiled.inputs)
    assert TreeModel(memory).feature_names == load_trees(path).feature_names
    with pytest.raises(ModelError, match=r"model m@1: inputs do not match.*missing: feature\.5; surplus: x"):
        loader.compile(str(path), "m@1", [*names[:5], "x"])


def test_onnx_that_holds_no_trees(loader, tmp_path):
    helper = pytest.importorskip("onnx").helper
    pytest.importorskip("onnxruntime")
    ports = [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in "xp"]
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["p"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path = put(tmp_path, "m", "1", model.SerializeToString(), "model.onnx")
    compiled, memory = loader.compile(str(path), "m@1", ["a", "b", "c"])
    runtime = build(compiled, memory, "m@1")
    x = np.random.default_rng(1).normal(size=(4, 3))
    assert runtime.predict(x).tobytes() == load(path, ["a", "b", "c"]).predict(x).tobytes()
    assert runtime.inputs == ("a", "b", "c")
    assert runtime.kind == "onnx"


@pytest.mark.parametrize(
    ("content", "file", "why"),
    [
        ("", "model.txt", "model m@1: .*model.txt"),
        ("tree\nnonsense", "model.txt", "model m@1"),
        (trained(1)[:700], "model.txt", "model m@1"),
        ("{}", "model.json", "model m@1"),
        (b"\xff\xfe", "model.txt", "not UTF-8"),
        (b"\x00\x01", "model.ubj", "model m@1"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(loader, tmp_path, content, file, why):
    path = put(tmp_path, "m", "1", content, file)
    with pytest.raises(ModelError, match=why):
        loader.compile(str(path), "m@1")


def test_a_file_that_is_not_there(loader, tmp_path):
    with pytest.raises(ModelError, match=r"model m@1: cannot read .*: No such file"):
        loader.compile(str(tmp_path / "model.txt"), "m@1")
    with pytest.raises(ModelError, match=r"no model file; expected one of \.onnx"):
        loader.compile(str(tmp_path / "model.pkl"), "m@1")


def test_a_folder_that_cannot_be_read_is_no_other_models_problem(tmp_path, monkeypatch):
    for name in ("a", "b"):
        put(tmp_path, name, "1", trained(1))
    closed = {"b"}

    def versions(root, name):
        if name in closed:
            raise PermissionError(13, "Permission denied")
        return ["1"]

    monkeypatch.setattr(loader_module, "versions", versions)
    child, look = loader_module._Child(), Scan(root=str(tmp_path))
    a, b = child.scan(look).found
    assert ([v.version for v in a.versions], a.unread, a.problem) == (["1"], False, "")
    assert (b.versions, b.unread, b.gone) == ([], True, False)
    assert b.problem == "model b: cannot read its folder: Permission denied"
    assert child.scan(look).found == []
    closed.clear()
    assert [one.name for one in child.scan(look).found] == ["b"]  # moving, until the next look
    (b,) = child.scan(look).found
    closed.add("b")
    (held,) = child.scan(look).found
    assert (held.versions, held.unread, held.gone) == (b.versions, True, False)


def test_model_files_in_the_wrong_place_are_told(tmp_path):
    put(tmp_path, "sp ace", "1", trained(1))
    put(tmp_path, "flat", ".", trained(1))
    put(tmp_path, ".hidden", "1", trained(1))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("")
    child, look = loader_module._Child(), Scan(root=str(tmp_path))
    flat, space = child.scan(look).found
    assert "not served: model.txt belongs in a version's folder, flat/1/model.txt" in flat.problem
    assert "sp ace: not served: names are letters" in space.problem
    assert flat.gone
    assert space.gone
    assert child.scan(look).found == []


def test_content_that_is_in_no_folder(loader):
    text = trained(4)
    compiled, memory = loader.compile("given/m/1/model.txt", "m@1", content=text.encode())
    row, score = expected(text)
    x = np.frombuffer(row).reshape(1, -1)
    assert build(compiled, memory, "m@1").predict(x).tobytes() == score


def test_a_child_that_is_killed_is_started_again(tmp_path):
    loader = Loader()
    path = str(put(tmp_path, "m", "1", trained(1)))
    try:
        first = loader.compile(path, "m@1")[0]
        for _ in range(3):
            pid = loader.pid
            os.kill(pid, signal.SIGKILL)
            assert loader.compile(path, "m@1")[0] == first
            assert loader.pid != pid
        assert loader.restarts == 3
    finally:
        loader.stop()
    with pytest.raises(ModelError, match="stopped"):
        loader.compile(path, "m@1")


def test_a_child_that_dies_of_every_file_is_an_error(tmp_path):
    """It is asked twice; then whoever asked is told."""
    loader = Loader()
    path = put(tmp_path, "m", "1", trained(1, 60, 31))
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            pid = loader.pid
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(ModelError, match=r"model m@1: the loader ended while reading it \(signal 9\)"):
            loader.compile(str(path), "m@1")
    finally:
        stop.set()
        killer.join()
    assert loader.compile(str(path), "m@1")
    loader.stop()


def test_no_room_for_what_it_makes(tmp_path):
    """A full disk or memory, as far as the child can see: its files may not grow."""
    loader = Loader()
    path = str(put(tmp_path, "m", "1", trained(1, 60, 31)))
    try:
        loader.start()
        resource.prlimit(loader.pid, resource.RLIMIT_FSIZE, (1000, 1 << 30))
        with pytest.raises(ModelError, match=r"model m@1: no room for its .* bytes in memory: File too large"):
            loader.compile(path, "m@1")
        resource.prlimit(loader.pid, resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        assert loader.compile(path, "m@1")
        assert loader.restarts == 0
    finally:
        loader.stop()


def test_the_child_ends_with_its_parent(tmp_path):
    script = (
        "import os, sys, time; from penstock.models.loader import Loader\n"
        "loader = Loader(); loader.start()\n"
        "if os.fork(): print(loader.pid, flush=True)\n"  # a forked child may hold the other end of its channel
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, process_group=0)
    pid = int(parent.stdout.readline())
    assert os.getsid(pid) == os.getsid(0)  # no session of its own: see offline/keeper.py
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z"):
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}").exists()
    os.killpg(parent.pid, signal.SIGKILL)


def test_nothing_is_left_open(loader, tmp_path):
    path = str(put(tmp_path, "m", "1", trained(1)))
    loader.compile(path, "m@1")
    ours, its = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{loader.pid}/fd"))
    for i in range(20):
        compiled, memory = loader.compile(path, "m@1", content=trained(1).encode() if i % 2 else None)
        build(compiled, memory, "m@1")
        memory.close()
        with pytest.raises(ModelError):
            loader.compile(path, "m@1", ["one"])
    assert len(os.listdir("/proc/self/fd")) == ours
    assert len(os.listdir(f"/proc/{loader.pid}/fd")) <= its + 1  # the last may still be on its way out


# the compiled form


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    path = put(tmp_path_factory.mktemp("form"), "m", "1", trained(2, 3, 5).replace("Column_", "a"))
    return compile_form(read_ensemble(path))


def test_a_block_is_cut_off_anywhere(block):
    for size in range(0, len(block), 7):
        with pytest.raises(ValueError, match="cut off"):
            TreeModel(block[:size])
    with pytest.raises(ValueError, match="cut off"):
        TreeModel(block + b"\0")
    with pytest.raises(ValueError, match="not a compiled form"):
        TreeModel(bytes(len(block)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bit_that_flips_is_seen(block, data):
    damaged = bytearray(block)
    at = data.draw(st.integers(0, len(block) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError):
        TreeModel(bytes(damaged))
