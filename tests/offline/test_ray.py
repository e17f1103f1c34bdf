"""Training sets on a real local Ray cluster of two workers: the bits of the local run, also when a worker dies.

What must stay true: a killed worker's partition is done again, and an error of a worker is the error of the call.
"""

import os
import runpy
import threading
import time
from pathlib import Path

import pytest
from offline.shop_log import OPTIONS, SHOP, fill

from oracles.log_files import events_of
from penstock import Engine, LogError, PenstockError
from penstock.offline.training import training_set

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'penstock[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")

# An app whose first worker to load it dies, as a worker does that runs out of memory: nothing is raised, it is gone.
DIES_ONCE = """
import os, signal
from pathlib import Path

marker = Path({marker!r})
if os.getpid() != {driver}:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGKILL)

"""
# An app whose workers say who they are and take their time, so that one can be killed from outside.
SLOW = """
import os, time
from pathlib import Path

if os.getpid() != {driver}:
    (Path({folder!r}) / str(os.getpid())).touch()
    time.sleep(2)

"""


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        decisions = fill(engine, 300)
    return folder, decisions


def as_spine(folder):
    """The logged orders, with K just before each."""
    rows = [{**e.values, "before": e.sequence} for e in events_of(folder) if "id" in e.values]
    return pa.Table.from_pylist(rows)


def test_ray_gives_what_the_local_run_gives(cluster, log, tmp_path):
    import pyarrow.parquet as pq

    folder, decisions = log
    spine = as_spine(folder)
    ask = {"pipeline": "orders", "sequence": "before", "statuses": True, "workers": 2}
    local = training_set(SHOP, folder, spine, **ask).combine_chunks()
    told = []
    on_ray = training_set(SHOP, folder, spine, on="ray", progress=lambda *done: told.append(done), **ask)
    assert on_ray.combine_chunks().equals(local)
    assert on_ray["spend.count_1h"].to_pylist() == [d.features["spend.count_1h"] for d in decisions]
    assert told[-1][0] == told[-1][1]
    assert training_set(SHOP, folder, spine, on="ray", out=tmp_path / "out.parquet", **ask) == local.num_rows
    assert pq.read_table(tmp_path / "out.parquet").equals(local)
    for backfill in (False, True):
        ask = {"features": ["spend", "shops", "logins"], "time": "at", "backfill": backfill, "workers": 3}
        local = training_set(SHOP, folder, spine, **ask)
        assert training_set(SHOP, folder, spine, on="ray", **ask).combine_chunks().equals(local.combine_chunks())


def test_a_worker_that_dies_is_replaced(cluster, log, tmp_path):
    folder, _ = log
    spine = as_spine(folder)
    app = tmp_path / "dies.py"
    marker = tmp_path / "died"
    app.write_text(DIES_ONCE.format(marker=str(marker), driver=os.getpid()) + SHOP.read_text())
    ask = {"features": ["spend", "shops"], "time": "at", "workers": 2}
    found = training_set(app, folder, spine, on="ray", **ask)
    assert marker.exists()
    assert found.combine_chunks().equals(training_set(SHOP, folder, spine, **ask).combine_chunks())


def test_a_worker_that_is_killed_while_it_works(cluster, log, tmp_path):
    folder, _ = log
    spine = as_spine(folder)
    app = tmp_path / "slow.py"
    started = tmp_path / "pids"
    started.mkdir()
    app.write_text(SLOW.format(folder=str(started), driver=os.getpid()) + SHOP.read_text())
    killed = []

    def kill_one():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for path in started.iterdir():
                os.kill(int(path.name), 9)
                killed.append(path.name)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    ask = {"features": ["spend", "shops"], "time": "at", "workers": 2}
    found = training_set(app, folder, spine, on="ray", **ask)
    thread.join()
    assert killed
    assert found.combine_chunks().equals(training_set(SHOP, folder, spine, **ask).combine_chunks())
    assert len(list(started.iterdir())) >= 2  # another process did it again


def test_what_a_worker_cannot_do_is_said(cluster, log, tmp_path):
    folder, _ = log
    spine = as_spine(folder)
    app = tmp_path / "always.py"
    app.write_text(f"import os\nif os.getpid() != {os.getpid()}:\n    os._exit(3)\n" + SHOP.read_text())
    with pytest.raises(PenstockError, match=r"part \d of \d was not computed, 4 times"):
        training_set(app, folder, spine, features=["logins"], time="at", on="ray", workers=1)
    damaged = tmp_path / "damaged"
    with Engine(str(SHOP), log=damaged, log_options=OPTIONS) as engine:
        fill(engine, 20)
    with Engine(str(SHOP), log=damaged, log_options=OPTIONS) as engine:
        fill(engine, 20, first=20)
    first = sorted(Path(damaged, "segments").glob("*.log"))[0]
    data = bytearray(first.read_bytes())
    data[6000] ^= 1
    first.write_bytes(data)
    with pytest.raises(LogError, match="a record does not check"):
        training_set(SHOP, damaged, spine, features=["logins"], time="at", backfill=True, on="ray", workers=1)
    with pytest.raises(PenstockError, match="is a path to a Python file or a module, not a mapping"):
        training_set(runpy.run_path(str(SHOP)), folder, spine, on="ray", time="at")
