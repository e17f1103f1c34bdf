"""The deployment table, and what reloading costs those who are served meanwhile: nothing that they would notice.

The machine may be shared and slow, so lag is judged by what reloading adds: time that the loop spent neither running
nor waiting for a core (the kernel counts both), which is time that it waited for the GIL or a lock.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvloop
from models.folders import put, trained

from penstock._ext.infer import ServedModel, Target
from penstock.models.deployment import Deployment, Worker
from penstock.models.repository import ModelRepository
from penstock.models.runtime import load

CI = os.environ.get("CI") == "true"
RELOADS = 1000 if CI else 150
MODELS = 1000 if CI else 100


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Small models by version."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for version in ("1", "2", "2.1", "10"):
        path = put(root, "m", version, trained(1))
        made[version] = ServedModel("m", version, load(path), path=path)
    return made


# the table


def test_the_newest_is_served_without_a_version(served):
    table = Deployment()
    assert table.target("m") is None
    assert table.put("m", {"2": served["2"], "10": served["10"], "1": served["1"]}) == []
    assert table.version == 1
    assert table.target("m").model is served["10"]
    assert list(table.models("m")) == ["1", "2", "10"]
    assert isinstance(table.target("m", "2"), Target)
    assert table.target("m", "3") is None
    assert table.target("other", "1") is None


def test_targets_stay_the_same_objects(served):
    table = Deployment()
    table.put("m", {"1": served["1"], "2": served["2"]})
    targets = table.target("m"), table.target("m", "1"), table.target("m", "2")
    assert set(map(id, table.put("m", {"1": served["1"], "2.1": served["2.1"]}))) == {id(served["2"])}
    assert [target.model for target in targets] == [served["2.1"], served["1"], None]
    assert table.version == 2
    assert table.put("m", {"1": served["1"], "2.1": served["2.1"]}) == []
    assert table.version == 2  # nothing changed
    assert len(table.put("m", {})) == 2
    assert [target.model for target in targets] == [None] * 3
    assert (table.target("m"), table.target("m", "1"), table.target("m", "2")) == targets
    assert table.version == 3


def test_one_lane_per_model(served):
    from penstock._ext.flow import Lane

    lanes = []

    def lane(name):
        lanes.append(Lane(name))
        return lanes[-1]

    table = Deployment(lane)
    table.put("m", {"1": served["1"], "2": served["2"]})
    table.put("m", {"10": served["10"]})
    table.put("other", {"1": served["1"]})
    assert [made.name for made in lanes] == ["m", "other"]
    assert table.target("m").lane is table.target("m", "10").lane is lanes[0]
    assert lanes[0].row_ns > 0  # what a row of the model costs is known before the first request


# the thread


class Large:
    """Counts where it is let go."""

    def __init__(self, gone):
        self.gone = gone

    def __del__(self):
        self.gone.append(threading.current_thread().name)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_last_reference_goes_in_the_worker():
    worker, gone = Worker(), []
    try:
        one, two = Large(gone), Large(gone)
        in_flight = two
        worker.retire(one)
        worker.retire(two)
        del one, two
        assert until(lambda: len(gone) == 1)
        time.sleep(0.1)
        assert gone == ["penstock-models"]  # the other is still used
        del in_flight
        assert until(lambda: len(gone) == 2)
        assert gone == ["penstock-models"] * 2
        assert worker.freed == 2
    finally:
        worker.close()


def test_jobs_run_in_order_and_their_errors_come_back():
    async def run():
        worker = Worker()
        loop = asyncio.get_running_loop()
        order = []
        jobs = [worker.run(loop, lambda i=i: order.append(i) or i) for i in range(50)]
        wrong = worker.run(loop, lambda: 1 // 0)
        cancelled = worker.run(loop, lambda: time.sleep(0.05))
        cancelled.cancel()
        assert await asyncio.gather(*jobs) == list(range(50)) == order
        with pytest.raises(ZeroDivisionError):
            await wrong
        await worker.run(loop, lambda: None)
        worker.close()
        with pytest.raises(RuntimeError, match="closed"):
            worker.run(loop, lambda: None)

    asyncio.run(run())


# reloading beside requests


class Beat:
    """A timer of 1 ms on the loop, and what became of it."""

    def __init__(self):
        self.stat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self.lags = []
        self.stop = False

    def now(self):
        ran, waited, _ = os.pread(self.stat, 100, 0).split()
        return time.perf_counter_ns(), int(ran) + int(waited)

    async def run(self):
        while not self.stop:
            at, counted = self.now()
            await asyncio.sleep(0.001)
            later, recounted = self.now()
            # Slept, ran and waited for a core: what is left, it was held up.
            self.lags.append((later - at - 1_000_000 - (recounted - counted)) / 1e6)
        os.close(self.stat)


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the kernel counts no waits of threads")
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_reloading_a_model_of_100_trees_over_and_over(tmp_path, monkeypatch):
    texts = [trained(1, 100, 31, 30), trained(2, 100, 31, 30)]
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for source, text in zip(sources, texts):
        source.write_text(text)
    root = tmp_path / "models"
    path = put(root, "m", "1", texts[0])
    row = np.random.default_rng(0).normal(size=(1, 30)).tobytes()
    right = {load(source).predict(np.frombuffer(row).reshape(1, 30)).tobytes() for source in sources}
    held = []

    def timed(swap):
        def run(self, *given):
            began = time.thread_time_ns()
            swap(self, *given)
            held.append((time.thread_time_ns() - began) / 1e6)

        return run

    monkeypatch.setattr(ModelRepository, "_swap", timed(ModelRepository._swap))
    answers, wrong = 0, 0

    async def requests(target, beat):
        nonlocal answers, wrong
        while not beat.stop:
            for _ in range(3):
                answers += 1
                wrong += target.model.infer([("input", "FP64", [1, 30], row)])[0][3] not in right
            await asyncio.sleep(0.002)

    async def phase(repository, work):
        beat = Beat()
        tasks = [asyncio.ensure_future(beat.run()), asyncio.ensure_future(requests(repository.table.target("m"), beat))]
        await work
        beat.stop = True
        await asyncio.gather(*tasks)
        return np.array(beat.lags)

    async def run():
        repository = ModelRepository(root, control="explicit", names=["m"])
        repository.start()
        memory = []

        async def reload():
            for i in range(RELOADS):
                link = tmp_path / "link"
                os.link(sources[(i + 1) % 2], link)
                os.replace(link, path)
                await repository.load("m")
                memory.append(rss())

        try:
            gc.collect()
            quiet = await phase(repository, asyncio.sleep(1))
            began = time.perf_counter()
            busy = await phase(repository, reload())
            took = time.perf_counter() - began
            assert repository.table.version == RELOADS + 1
            assert repository.loader.restarts == 0
            for _ in range(500):  # the last goes once nobody uses it
                if repository.worker.freed == RELOADS:
                    break
                await asyncio.sleep(0.01)
            assert repository.worker.freed == RELOADS
        finally:
            await repository.close()
        return quiet, busy, memory, took

    quiet, busy, memory, took = uvloop.run(run())
    print(
        f"\n{RELOADS} reloads, {took / RELOADS * 1e3:.1f} ms each; {answers} inferences; the swap ran "
        f"{np.median(held):.3f} ms, at most {max(held):.3f}; held up, 95th and 99th percentile: "
        f"{np.percentile(quiet, 95):.3f} {np.percentile(quiet, 99):.3f} ms without, "
        f"{np.percentile(busy, 95):.3f} {np.percentile(busy, 99):.3f} with; "
        f"memory {memory[99] >> 20} MiB after 100, {memory[-1] >> 20} at the end"
    )
    assert answers > RELOADS / 10
    assert wrong == 0
    # The table of one such model takes 0.9 MB: 1,000 that stay would be seen.
    assert max(memory[99:]) - memory[99] < 12 << 20
    assert np.percentile(held, 99) < 1
    # A thread that computes in Python would hold it up 5 ms each time.
    assert np.percentile(busy, 95) < 1 + max(0, np.percentile(quiet, 95))
    assert np.percentile(busy, 99) < 3 + max(0, np.percentile(quiet, 99))


def test_many_models(tmp_path):
    text = trained(1)
    for i in range(MODELS):
        put(tmp_path, f"m{i}", "1", text)
    repository = ModelRepository(tmp_path)
    before = rss()
    repository.start()
    each = (rss() - before) / MODELS
    assert len(repository.index(ready=True)) == MODELS
    assert len({id(repository.model(f"m{i}")) for i in range(MODELS)}) == MODELS
    one = repository.model("m0")
    print(f"\n{MODELS} models: {each / 1024:.0f} KiB each, of which {one.nbytes / 1024:.0f} are tables")
    # A model costs its tables and little else.
    assert each < one.nbytes + (48 << 10)
    asyncio.run(repository.close())
