"""Whoever reads a log folder while rounds of snapshot, compaction, erasure and retention work on it; and children that
end with their parent.

What must hold: a reader finds every event once, wherever it is by then; a start does not fail because a segment became
Parquet under it; a keeper and its round do not outlive their server.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from offline.compacting import records_of, shop_log, state_of
from offline.shop_log import OPTIONS, SHOP, fill

from penstock import Engine
from penstock._ext import log as native
from penstock.errors import LogError
from penstock.features.snapshot import load_snapshot
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase_closed
from penstock.offline.history import History
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.retention import retain

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")


def round_of(folder: Path) -> None:
    take_snapshot(folder)
    compact(folder)


def elsewhere(folder: Path) -> None:
    """The first compaction says where history is kept from then on."""
    take_snapshot(folder)
    compact(folder, str(folder.with_name("elsewhere")))


@pytest.mark.parametrize("work", [round_of, elsewhere])
def test_a_start_while_its_segments_become_parquet(tmp_path: Path, work: Callable[[Path], None]) -> None:
    """Between what it has seen of the folder and what it seals: what a killed server's keeper does."""
    folder = shop_log(tmp_path / "log", runs=4)
    with Engine(str(SHOP), log=shutil.copytree(folder, tmp_path / "copy"), log_options=OPTIONS) as engine:
        expected = state_of(engine)
    done: list[int] = []

    def progress(at: int, of: int) -> None:
        if not done:
            done.append(at)
            work(folder)

    numbers = LogFolder(folder).numbers()
    with Engine(str(SHOP), log=folder, log_options=OPTIONS, progress=progress) as engine:
        assert done
        assert state_of(engine) == expected
        assert len(LogFolder(folder).numbers()) == 2  # the newest of before, and its own
        assert LogFolder(folder).numbers()[0] == numbers[-1]
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        assert engine.recovery is not None
        assert not engine.recovery.damages


@pytest.mark.parametrize("work", [round_of, elsewhere])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_pieces_while_segments_become_parquet(tmp_path: Path, work: Callable[[Path], None], after: int) -> None:
    folder = shop_log(tmp_path / "log", runs=4, n=40)
    expected = records_of(folder)
    history = History(LogFolder(folder))
    history.check()
    found = []
    for i, piece in enumerate(history.pieces(0, 1 << 62)):
        if i == after:
            work(folder)
        at = piece.start
        while at < piece.end:
            record = native.record_at(piece.data, piece.log_id, piece.number, at)
            assert record is not None
            if record.kind in ("event", "score"):
                found.append(bytes(piece.data[at + 4 : at + record.length]))
            at += record.length
    assert found == expected


def test_pieces_while_a_batch_is_written_anew(tmp_path: Path) -> None:
    """Erasure writes a batch's files under other names, and removes the old ones."""
    folder = shop_log(tmp_path / "log", runs=3, n=40)
    round_of(folder)
    history = History(LogFolder(folder))
    history.check()
    pieces = history.pieces(0, 1 << 62)
    assert erase_closed(LogFolder(folder), "customer", "c1").batches == 1
    sequences = []
    for piece in pieces:
        scan = native.scan(piece.data, piece.log_id, piece.number, piece.start)
        assert scan.end == piece.end
        sequences += [scan.first_sequence, scan.last_sequence]
    assert sequences[0] == 0
    assert sequences[-1] == history.last_sequence


def test_pieces_that_retention_has_dropped_are_said_to_be(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=2, n=40)
    round_of(folder)
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        fill(engine, 40, seed=3, first=2000)  # so much later that the ids of before are forgotten
    take_snapshot(folder)
    history = History(LogFolder(folder))
    history.check()
    assert retain(folder, 1).batches == 1
    with pytest.raises(LogError, match=r"the events before \d+ were dropped \(retention\) while history was read"):
        list(history.pieces(0, 1 << 62))
    history.check()
    assert history.first_sequence > 0


def test_a_segment_that_is_lost_is_said_to_be(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=3, n=40)
    history = History(LogFolder(folder))
    history.check()
    LogFolder(folder).segment_path(2).unlink()
    with pytest.raises(LogError, match=r"000000000002\.log: was removed while history was read"):
        list(history.pieces(0, 1 << 62))


def test_a_snapshot_while_newer_ones_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.features import snapshot

    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        folder = tmp_path / "log"
        fill(engine, 30)
        take_snapshot(folder)
        real, turns = snapshot._read_manifest, []

        def read(path: Path) -> object:
            if not turns:
                turns.append(path)
                for i in range(1, 4):
                    fill(engine, 30, seed=i, first=30 * i)
                    take_snapshot(folder)
                monkeypatch.setattr(snapshot, "_read_manifest", real)
            return real(path)

        monkeypatch.setattr(snapshot, "_read_manifest", read)
        other = Engine(str(SHOP))
        stores = {store.fingerprint: other.stores[store.index] for store in other.plan.stores}
        skipped: list[str] = []
        found = load_snapshot(folder / "snapshots", stores, skipped=skipped)
        assert turns
        assert found is not None
        assert found.position.sequence > int(turns[0].parent.name)
        assert skipped == []


# ---- children


SERVER = """
import sys, threading, time, msgspec
from offline.shop_log import OPTIONS, SHOP, fill
from penstock import Engine
engines = []
def begin():
    options = msgspec.structs.replace(OPTIONS, keeper=True, snapshot_bytes=1 << 16)
    engines.append(Engine(str(SHOP), log=sys.argv[1], log_options=options))
if sys.argv[2] == "thread":
    thread = threading.Thread(target=begin); thread.start(); thread.join()
else:
    begin()
fill(engines[0], 900)
engines[0].sync()
print(engines[0]._keeper.process.pid, flush=True)
time.sleep(60)
"""


def children_of(pid: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, is_so: Callable[[], object]) -> bool:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_keeper_and_its_round_end_with_a_killed_server(tmp_path: Path, where: str) -> None:
    """Also where the thread that started the keeper ended long ago."""
    folder = tmp_path / "log"
    folder.mkdir()
    here = Path(__file__).resolve().parents[1]
    with (folder / "keeper.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the round waits for as long as it lives
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), where],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{here}:{here.parent / 'engine'}"},
        )
        try:
            assert server.stdout is not None
            keeper = int(server.stdout.readline())
            assert within(20, lambda: children_of(keeper))
            (work,) = children_of(keeper)
            time.sleep(1.5)
            assert lives(keeper)
            assert lives(work)
            server.kill()
            server.wait()
            assert within(5, lambda: not lives(keeper) and not lives(work))
        finally:
            server.kill()
            server.communicate()


def test_a_round_ends_with_its_keeper(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    options = msgspec.structs.replace(OPTIONS, keeper=True, snapshot_bytes=1 << 16)
    folder.mkdir()
    with (folder / "keeper.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Engine(str(SHOP), log=folder, log_options=options) as engine:
            fill(engine, 900)
            engine.sync()
            keeper = engine._keeper.process
            assert within(20, lambda: children_of(keeper.pid))
            (work,) = children_of(keeper.pid)
            os.kill(keeper.pid, signal.SIGKILL)
            keeper.wait()
            assert within(5, lambda: not lives(work))
            began = time.monotonic()
        assert time.monotonic() - began < 3


def test_a_child_whose_parent_is_gone_already_ends_at_once(tmp_path: Path) -> None:
    """The parent died between its fork and the child's first look."""
    shop_log(tmp_path / "log", runs=1, n=5)
    engine = Path(__file__).resolve().parents[2] / "engine"
    for arguments in (["--parent-thread-lasts"], []):
        done = subprocess.run(
            [sys.executable, "-m", "penstock.offline.keeper", str(tmp_path / "log"), "--parent", "1", *arguments],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(engine)},
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
