"""Recovery: snapshot plus tail gives the state, the ids and the counters' absence that the log says; the keeper works.

Damage, kills and changed schemas are in test_damage.py, test_crash.py and test_schema_change.py.
"""

import shutil
import time

import msgspec
import pytest
from offline.shop_log import OPTIONS, SHOP, START, fill

from penstock import (
    Aggregation,
    Engine,
    Event,
    FeatureView,
    Lifetime,
    LogError,
    LogOptions,
    Pipeline,
    Timestamp,
)
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder

KEYS = [f"c{i}" for i in range(20)]
LATER = START + 10**11


def state(engine):
    views = {"spend": KEYS, "logins": KEYS, "shops": list(range(-3, 4))}
    return {v: (found.rows, found.statuses) for v, k in views.items() for found in [engine.features(v, k, as_of=LATER)]}


def grown(tmp_path, *snapshots, n=300):
    """A log with a snapshot after some of the orders; the state that a live engine had at its end."""
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        done = 0
        for at in [*snapshots, n]:
            fill(engine, at - done, seed=at, first=done)
            done = at
            if at in snapshots:
                assert take_snapshot(tmp_path / "log") is not None
        return state(engine), engine.core.next_sequence, [engine.core.watermark(i) for i in range(2)]


@pytest.mark.parametrize("snapshots", [(), (100,), (100, 200), (50, 120, 180, 299)])
def test_state_is_what_it_was(tmp_path, snapshots):
    was, following, watermarks = grown(tmp_path, *snapshots)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert state(engine) == was
        assert engine.core.next_sequence == following
        assert [engine.core.watermark(i) for i in range(2)] == watermarks
        assert all(n == 0 for counts in engine.stats()["outcomes"].values() for n in counts.values())
        assert engine.recovery.snapshot is None if not snapshots else engine.recovery.snapshot < following - 1
        assert engine.recovery.events == following - 1 - (engine.recovery.snapshot if snapshots else -1)
        assert not engine.recovery.damages
        # And it goes on as if nothing had been.
        fill(engine, 50, seed=9, first=300)
        on = state(engine)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert state(engine) == on


def test_a_repeated_event_gives_its_first_decision_after_a_restart(tmp_path):
    event = {"id": "same", "customer": "c", "shop": 1, "amount": 2.0, "note": None, "at": START}
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        first = engine.score(event, pipeline="orders")
        engine.ingest({**event, "id": "in"}, "Order")
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        again = engine.score(event, pipeline="orders")
        assert (again.id, again.action, again.outcome) == (first.id, first.action, "duplicate")
        assert engine.ingest({**event, "id": "in"}, "Order") == "duplicate"
        assert engine.features("spend", ["c"], as_of=START).rows[0]["spend.count_1h"] == 2
    assert take_snapshot(tmp_path / "log") is not None
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert engine.recovery.events == 0
        assert engine.score(event, pipeline="orders").id == first.id


def test_changed_layouts_are_rebuilt_and_the_others_loaded(tmp_path):
    was, _, _ = grown(tmp_path, 200)
    app = tmp_path / "changed.py"
    app.write_text(
        SHOP.read_text().replace('Aggregation("count", windows=["1h"]),', 'Aggregation("count", windows=["1h", "1d"]),')
    )
    with Engine(str(app), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert engine.recovery.rebuilt == ["Order by shop"]
        assert sorted(engine.recovery.loaded) == ["Login by customer", "Order by customer"]
        assert any("rebuilt from" in line for line in engine.recovery.lines())
        now = state(engine)
        assert now["spend"] == was["spend"]
        assert now["logins"] == was["logins"]
        for row, old in zip(now["shops"][0], was["shops"][0]):
            assert {k: row[k] for k in old} == old
            assert row["shops.count_1d"] is not None
    with Engine(
        str(app), log=tmp_path / "log", log_options=msgspec.structs.replace(OPTIONS, start_cold=True)
    ) as engine:
        assert engine.recovery.cold == ["Order by shop"]
        assert state(engine)["spend"] == was["spend"]
        assert any("started empty as asked: Order by shop" in line for line in engine.recovery.lines())


def test_cold_without_a_snapshot_keeps_watermarks_and_ids(tmp_path):
    _, following, watermarks = grown(tmp_path)
    with Engine(
        str(SHOP), log=tmp_path / "log", log_options=msgspec.structs.replace(OPTIONS, start_cold=True)
    ) as engine:
        assert len(engine.recovery.cold) == 3
        assert engine.core.next_sequence == following
        assert [engine.core.watermark(i) for i in range(2)] == watermarks
        assert engine.stats()["stores"][0]["entities"] == 0
        repeated = {"id": "o299", "customer": "c1", "shop": 1, "amount": 2.0, "note": None, "at": watermarks[0]}
        assert engine.score(repeated, pipeline="orders").outcome == "duplicate"


def test_segments_that_are_missing_are_missed(tmp_path):
    options = msgspec.structs.replace(OPTIONS, segment_bytes=1 << 16)
    with Engine(str(SHOP), log=tmp_path / "log", log_options=options) as engine:
        fill(engine, 900)
    folder = LogFolder(tmp_path / "log")
    numbers = folder.numbers()
    assert len(numbers) > 4
    kept = folder.segment_path(numbers[2]).read_bytes()
    folder.segment_path(numbers[2]).unlink()
    with pytest.raises(LogError, match="missing"):
        Engine(str(SHOP), log=tmp_path / "log", log_options=options)
    folder.segment_path(numbers[2]).write_bytes(kept)
    folder.segment_path(numbers[0]).unlink()
    with pytest.raises(LogError, match=r"missing|begins"):
        Engine(str(SHOP), log=tmp_path / "log", log_options=options)


def test_the_keeper_takes_snapshots_and_ends_with_its_parent(tmp_path):
    options = msgspec.structs.replace(OPTIONS, keeper=True, snapshot_bytes=1 << 16)
    engine = Engine(str(SHOP), log=tmp_path / "log", log_options=options)
    process = engine._keeper.process
    try:
        for i in range(120):
            fill(engine, 20, seed=i, first=20 * i)
            engine.sync()
            if list((tmp_path / "log" / "snapshots").glob("[0-9]*/manifest.json")):
                break
            time.sleep(0.1)
        else:
            pytest.fail("no snapshot within 12 s")
        was = state(engine)
    finally:
        engine.close()
    assert process.poll() is not None
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert engine.recovery.snapshot is not None
        assert state(engine) == was


def test_the_keeper_tells_what_it_does(tmp_path):
    options = msgspec.structs.replace(OPTIONS, keeper=True, snapshot_bytes=1)
    folder = tmp_path / "log"
    with Engine(str(SHOP), log=folder, log_options=options) as engine:
        fill(engine, 200)

        def told(holds):
            deadline = time.monotonic() + 120  # it runs only where nothing else does
            while engine.keeper_status is None or not holds(engine.keeper_status):
                assert time.monotonic() < deadline, engine.keeper_status
                time.sleep(0.05)
            return engine.keeper_status

        status = told(lambda s: s.rounds >= 1)
        written = next((folder / "snapshots").glob("0*"))
        assert status.failures == 0
        assert not status.error
        assert abs(status.snapshot_created / 1e6 - time.time()) < 60
        assert status.snapshot_bytes == sum(f.stat().st_size for f in written.iterdir() if f.suffix == ".base")
        assert status.free > 0
        told(lambda s: s.behind == 0)
    assert engine.keeper_status is None
    shutil.rmtree(folder / "snapshots")
    (folder / "snapshots").write_text("no folder")
    with Engine(str(SHOP), log=folder, log_options=options) as engine:
        fill(engine, 50)
        status = told(lambda s: s.failures == 1)
        assert status.rounds == 1
        assert "no snapshot" in status.error
        assert status.snapshot_created is status.snapshot_bytes is None
        assert status.behind > 0


def test_a_keeper_that_was_killed_is_started_again(tmp_path):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=msgspec.structs.replace(OPTIONS, keeper=True)) as engine:
        assert engine.check_log() == []
        engine._keeper.process.kill()
        engine._keeper.process.wait()
        assert not engine.keeper_alive
        assert engine.check_log() == ["the keeper had ended; it is started again"]
        assert engine.keeper_alive
        assert engine.check_log() == []


def test_a_keeper_that_cannot_be_started_is_said_once_and_tried_again(tmp_path, monkeypatch):
    with Engine(str(SHOP), log=tmp_path / "log", log_options=msgspec.structs.replace(OPTIONS, keeper=True)) as engine:
        engine._keeper.process.kill()
        engine._keeper.process.wait()
        with monkeypatch.context() as broken:

            def refuse(*_, **__):
                raise BlockingIOError(11, "Resource temporarily unavailable")

            broken.setattr("penstock.offline.keeper.subprocess.Popen", refuse)
            assert "no snapshots are taken until the keeper can be started" in engine.check_log()[0]
            assert engine.check_log() == []
            assert not engine.keeper_alive
        assert engine.check_log() == ["the keeper had ended; it is started again"]
        assert engine.keeper_alive


def test_a_folder_is_opened_once_and_by_name(tmp_path):
    already = pytest.raises(LogError, match="this process has the log folder open already")
    with Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS), already:
        Engine(str(SHOP), log=tmp_path / "log", log_options=OPTIONS)
    with pytest.raises(LogError, match="expected a folder, got an empty text"):
        Engine(str(SHOP), log="")
    with pytest.raises(ValueError, match="there is no log"):
        Engine(str(SHOP), log_options=OPTIONS)
    with pytest.raises(TypeError, match="expected LogOptions, got dict"):
        Engine(str(SHOP), log=tmp_path / "log", log_options={"sync": "never"})


def test_an_app_without_views_gets_snapshots_too(tmp_path):
    app = tmp_path / "rules.py"
    text = SHOP.read_text()
    app.write_text(
        text[: text.index("spend = FeatureView")] + 'orders = Pipeline("orders", event=Order, features=["amount"])\n'
    )
    event = {"id": "a", "customer": "c", "shop": 1, "amount": 2.0, "note": None, "at": START}
    with Engine(str(app), log=tmp_path / "log", log_options=OPTIONS) as engine:
        first = engine.score(event)
    assert take_snapshot(tmp_path / "log") is not None
    with Engine(str(app), log=tmp_path / "log", log_options=OPTIONS) as engine:
        assert (engine.recovery.snapshot, engine.recovery.events) == (0, 0)
        assert engine.score(event).id == first.id
    assert take_snapshot(tmp_path / "log") is None


def test_what_retention_dropped_is_never_counted_as_if_it_had_not_been(tmp_path):
    """Without a snapshot: refused with the numbers; or INVALID until windows have refilled, over restarts too."""

    class Ev(Event, time="at", lateness="0s"):
        k: str
        at: Timestamp(unit="s")

    windows = [Lifetime, "1m", "1h"]
    view = FeatureView("v", entity="k", source=Ev, aggregations=[Aggregation("count", windows=windows, name="n")])
    app = {"Ev": Ev, "v": view, "p": Pipeline("p", event=Ev, features=[view], on_degraded="score")}
    folder, options = tmp_path / "log", LogOptions(keeper=False, segment_bytes=1 << 14)
    with Engine(app, clock="event", log=folder, log_options=options) as engine:
        for t in range(400):
            engine.ingest({"k": "a", "at": t})
    held = LogFolder(folder)
    number = held.numbers()[0]
    segment = held.segment(number)
    last = segment.mark.last_sequence
    segment.close()
    held.begin_at(last + 1)
    held.segment_path(number).unlink()
    with pytest.raises(
        LogError, match=rf"events 0 to {last:,} were dropped.*Ev by k.*events {last + 1:,} to 399 alone"
    ):
        Engine(app, clock="event", log=folder, log_options=options)
    assert [s.name for s in sorted(held.snapshots_path.glob("*"))] == []
    partial = msgspec.structs.replace(options, start_partial=True)
    expected = {"v.n_lifetime": ("INVALID", None), "v.n_1m": ("PRESENT", 60), "v.n_1h": ("INVALID", None)}
    with Engine(app, clock="event", log=folder, log_options=partial) as engine:
        assert engine.recovery.partial == ["Ev by k"]
        found = engine.features("v", ["a"], as_of=Timestamp(399 * 10**6))
        assert {n: (found.statuses[0][n], found.rows[0][n]) for n in expected} == expected
        assert engine.score({"k": "a", "at": last + 3600}).degraded
    take_snapshot(folder, start_partial=True)
    with Engine(app, clock="event", log=folder, log_options=options) as engine:
        found = engine.features("v", ["a"], as_of=Timestamp((last + 3600) * 10**6))
        assert found.statuses[0] == {"v.n_lifetime": "INVALID", "v.n_1m": "PRESENT", "v.n_1h": "PRESENT"}
        assert found.rows[0]["v.n_1h"] == 400 - last
    short = {**app, "v": FeatureView("v", entity="k", source=Ev, aggregations=[Aggregation("count", windows=["1m"])])}
    short["p"] = Pipeline("p", event=Ev, features=[short["v"]])
    with Engine(short, clock="event", log=folder, log_options=options) as engine:
        assert engine.recovery.rebuilt == ["Ev by k"], "what is left of history is all that its window needs"
