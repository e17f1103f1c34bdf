"""Erasure: no file holds the key any more, all else has the bits it had, and parity says which rows are erased."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from offline.compacting import LATER, every_kill, is_tidy, records_of, shop_log
from offline.shop_log import OPTIONS, SHOP, START, fill

from oracles.log_files import read_log
from penstock import Aggregation, Engine, Entity, Event, FeatureView, Pipeline, Timestamp
from penstock._ext import log as native
from penstock.errors import LogError
from penstock.offline.batches import BatchStore
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")

SECRET = "somebody-who-wants-to-be-forgotten"
ERASED = 0x20
NOBODY = {"spend.count_1h": 0, "spend.count_1d": 0, "spend.mean_amount_1d": -1.0, "spend.last_note_1d": None}


def secrets_of(engine: Engine, first: int, n: int = 5) -> None:
    """Events of the one who is erased: strings as short and as long as they come."""
    at = START + first * 30_000_000
    for i in range(n):
        engine.ingest({"customer": SECRET, "ok": False, "at": at + i}, "Login")
        order = {"id": f"s{first}-{i}", "customer": SECRET, "shop": 2, "amount": 1.0 + i, "note": "x" * i, "at": at + i}
        engine.score(order, pipeline="orders")


def shop_with_secret(folder: Path, runs: int = 3, n: int = 60) -> Path:
    for run in range(runs):
        with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
            fill(engine, n // 2, seed=run, first=run * n)
            secrets_of(engine, run * n + n // 2)
            fill(engine, n // 2, seed=run + 99, first=run * n + n // 2)
    return folder


def holding(folder: Path, what: bytes = SECRET.encode()) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and what in p.read_bytes()]


def features(folder: Path) -> dict[str, Any]:
    copy = folder.with_name(f"{folder.name}-read")
    shutil.copytree(folder, copy)
    with Engine(str(SHOP), log=copy, log_options=OPTIONS) as engine:
        found = {
            "spend": engine.features("spend", [f"c{i}" for i in range(20)], as_of=LATER).rows,
            "shops": engine.features("shops", list(range(-3, 4)), as_of=LATER).rows,
            "secret": engine.features("spend", [SECRET], as_of=LATER).rows
            + engine.features("logins", [SECRET], as_of=LATER).rows,
        }
    shutil.rmtree(copy)
    return found


@pytest.mark.parametrize("form", ["segments", "both", "parquet", "no snapshot"])
def test_the_key_is_nowhere_and_nothing_else_has_changed(tmp_path: Path, form: str) -> None:
    folder = shop_with_secret(tmp_path / "log")
    if form == "both":
        compact(folder)
    if form != "no snapshot":
        take_snapshot(folder)
    if form == "parquet":
        compact(folder)
        assert LogFolder(folder).numbers() == [3]
    before, mine = features(folder), records_of(folder)
    assert before["secret"][0]["spend.count_1d"]
    assert len(holding(folder)) > 1
    report = erase(folder, "customer", SECRET)
    assert holding(folder) == []
    assert is_tidy(folder)
    assert len(report.tombstone) == 32
    assert SECRET not in str(report)
    assert (report.snapshots, report.states) == ((0, 0) if form == "no snapshot" else (1, 2))
    after = features(folder)
    assert after["secret"] == [NOBODY, {"logins.count_1d": 0}]
    assert {k: v for k, v in after.items() if k != "secret"} == {k: v for k, v in before.items() if k != "secret"}
    now = records_of(folder)
    assert len(now) == len(mine)
    changed = [i for i, (a, b) in enumerate(zip(mine, now)) if a != b]
    assert all(SECRET.encode() in mine[i] and report.tombstone.encode() in now[i] for i in changed)
    assert len(changed) == 30
    found = parity(str(SHOP), folder)
    assert found.ok
    assert {f.name: f.erased for f in found.pipelines[0].features}["spend.count_1d"] == 15
    again = erase(folder, "customer", SECRET)
    assert (again.events, again.segments, again.batches) == (0, 0, 0)


def test_segments_are_written_anew_with_their_places(tmp_path: Path) -> None:
    folder = shop_with_secret(tmp_path / "log")
    before = read_log(folder)
    heads = [native.segment_head(p.read_bytes()) for p in sorted((folder / "segments").glob("*.log"))]
    report = erase(folder, "customer", SECRET)
    assert (report.segments, report.events, report.batches) == (3, 30, 0)
    after = read_log(folder, check=True)  # an independent reader, with its own checksum
    assert len(before) == len(after)
    for old, new in zip(before, after):
        assert (old.kind, old.sequence, old.ingest_time, old.versions, old.outcome, old.score_id) == (
            new.kind,
            new.sequence,
            new.ingest_time,
            new.versions,
            new.outcome,
            new.score_id,
        )
        gone = old.kind == "event" and old.values["customer"] == SECRET
        assert new.values == (old.values | {"customer": report.tombstone} if gone else old.values)
        if old.kind == "event":
            assert new.statuses["customer"] == old.statuses["customer"] | (ERASED if gone else 0)
    assert heads == [native.segment_head(p.read_bytes()) for p in sorted((folder / "segments").glob("*.log"))]


def test_parquet_names_what_was_erased(tmp_path: Path) -> None:
    folder = shop_with_secret(tmp_path / "log")
    compact(folder)
    report = erase(folder, "customer", SECRET)
    store = BatchStore.of(LogFolder(folder))
    (batch,) = store.batches()
    assert batch.generation == 1
    assert all(".1.parquet" in f.path for f in batch.files)
    rows = [
        row
        for file in batch.files
        if file.path.startswith("events/")
        for row in store.read_table(file.path).select(["customer", "_erased"]).to_pylist()
    ]
    assert {row["customer"] for row in rows if row["_erased"]} == {report.tombstone}
    assert {tuple(row["_erased"]) for row in rows if row["_erased"]} == {("customer",)}
    assert sum(row["_erased"] is not None for row in rows) == 20
    erase(folder, "customer", "c1")
    (batch,) = store.batches()
    assert batch.generation == 2
    assert is_tidy(folder)


def test_a_kill_at_any_file_operation_leaves_a_log_that_opens(tmp_path: Path) -> None:
    folder = shop_with_secret(tmp_path / "log", n=16)
    compact(folder)
    take_snapshot(folder)
    kept = [r for r in records_of(folder) if SECRET.encode() not in r]

    def work(copy: Path) -> None:
        erase(copy, "customer", SECRET)
        assert holding(copy) == []

    def check(copy: Path) -> None:
        found = records_of(copy)
        assert len(found) == len(kept) + 30
        assert [r for r in found if r in set(kept)] == kept

    assert every_kill(folder, work, check) > 15


def test_a_running_engine_forgets(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        fill(engine, 40)
        secrets_of(engine, 40)
        fill(engine, 40, first=40)
        take_snapshot(folder)
        report = engine.erase("customer", SECRET)
        assert report is not None
        assert (report.events, report.segments, report.snapshots) == (10, 1, 1)
        assert holding(folder) == []
        fill(engine, 20, first=80)
    assert features(folder)["secret"][0]["spend.count_1d"] == 0
    assert parity(str(SHOP), folder).ok


def test_an_open_folder_and_unknown_names_are_refused(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=1, n=10)
    with (
        Engine(str(SHOP), log=folder, log_options=OPTIONS),
        pytest.raises(LogError, match="this process has the log folder open already"),
    ):
        erase(folder, "customer", "c1")
    with pytest.raises(LogError, match="no view has the entity 'custumer'; did you mean customer"):
        erase(folder, "custumer", "c1")
    with pytest.raises(LogError, match="its key is an integer"):
        erase(folder, "shop", "c1")
    with pytest.raises(LogError, match="no event log here"):
        erase(tmp_path / "nothing", "customer", "c1")
    assert not (tmp_path / "nothing").exists()
    assert erase(folder, "customer", "nobody").events == 0


class Tap(Event):
    user: int
    text: str
    shop: str
    at: Timestamp


class Note(Event):
    user: str
    at: Timestamp


def test_integer_keys_and_entities_with_a_type(tmp_path: Path) -> None:
    """1 and "1" are one key where the entity says so; integers become integers."""
    user = Entity("user", type=str)
    taps = FeatureView("taps", entity=user, source=Tap, aggregations=[Aggregation("count", windows=["1d"])])
    notes = FeatureView("notes", entity=user, source=Note, aggregations=[Aggregation("count", windows=["1d"])])
    app = {
        "Tap": Tap,
        "Note": Note,
        "taps": taps,
        "notes": notes,
        "p": Pipeline("p", event=Tap, features=[taps, notes]),
    }
    key, other = 7_111_222_333_444, 8_111_222_333_444
    for run in range(2):
        with Engine(app, log=tmp_path / "log", log_options=OPTIONS) as engine:
            for i in range(3):
                for who in (key, other):
                    engine.ingest({"user": str(who), "at": START + i}, "Note")
                    engine.score({"user": who, "text": str(other), "shop": "s", "at": START + run * 9 + i})
    folder = tmp_path / "log"
    compact(folder)
    take_snapshot(folder)
    report = erase(folder, "user", str(key))
    assert report.events == 12
    assert report.tombstone.isdigit()
    assert not holding(folder, str(key).encode())
    assert not holding(folder, key.to_bytes(8, "little"))
    assert holding(folder, str(other).encode())
    with Engine(app, log=folder, log_options=OPTIONS) as engine:
        rows = engine.features("taps", [str(key), str(other)], as_of=START + 99).rows
        assert [row["taps.count_1d"] for row in rows] == [0, 6]


def test_features_that_carry_the_key_are_erased_and_their_state_is_rebuilt(tmp_path: Path) -> None:
    visitors = FeatureView(
        "visitors",
        entity="shop",
        source=Tap,
        include_request_event=True,
        aggregations=[Aggregation("last", "text", windows=["1d"])],
    )
    texts = FeatureView("texts", entity="text", source=Tap, aggregations=[Aggregation("count", windows=["1d"])])
    app = {"Tap": Tap, "visitors": visitors, "texts": texts, "p": Pipeline("p", event=Tap, features=[visitors, texts])}
    folder = tmp_path / "log"
    for run in range(2):
        with Engine(app, log=folder, log_options=OPTIONS) as engine:
            for i in range(3):
                engine.score({"user": i, "text": SECRET, "shop": f"shop{run}", "at": START + i})
    compact(folder)
    take_snapshot(folder)
    report = erase(folder, "text", SECRET)
    assert report.scores == 6
    assert "Tap by shop" in report.warnings[0]
    assert holding(folder) == []
    with Engine(app, log=folder, log_options=OPTIONS) as engine:
        assert engine.recovery is not None
        assert engine.recovery.rebuilt == ["Tap by shop"]
        row = engine.features("visitors", ["shop0"], as_of=START + 9).rows[0]
        assert row["visitors.last_text_1d"] == report.tombstone
    assert parity(app, folder).ok


def test_what_was_kept_of_a_damaged_segment_goes_where_it_holds_the_key(tmp_path: Path) -> None:
    folder = shop_with_secret(tmp_path / "log", runs=1)
    (folder / "segments" / "000000000009.log.cut").write_bytes(b"\0" * 100 + SECRET.encode())
    (folder / "segments" / "000000000010.log.cut").write_bytes(b"\0" * 100)
    report = erase(folder, "customer", SECRET)
    assert len(report.removed) == 1
    assert holding(folder) == []
    assert (folder / "segments" / "000000000010.log.cut").exists()


def test_events_that_only_read_the_entity_are_erased_too(tmp_path: Path) -> None:
    """A pipeline on an event type without views reads another type's view: its events name the entity as well."""
    from offline.shop_log import OPTIONS as SHOP_OPTIONS
    from offline.shop_log import SHOP, START

    from penstock.offline.parity import parity

    text = SHOP.read_text()
    start, end = text.index("logins = FeatureView"), text.index("@on_demand")
    text = text[:start] + text[end : text.index("orders = Pipeline")]
    app = tmp_path / "reads.py"
    app.write_text(text + 'checks = Pipeline("checks", event=Login, features=[spend])\n')
    order = {"id": "o", "customer": "a-customer-to-forget", "shop": 1, "amount": 2.0, "note": None, "at": START}
    with Engine(str(app), log=tmp_path / "log", log_options=SHOP_OPTIONS) as engine:
        engine.ingest(order, "Order")
        engine.score({"customer": order["customer"], "ok": True, "at": START + 1}, pipeline="checks")
    report = erase(tmp_path / "log", "customer", order["customer"])
    assert report.events == 2
    assert b"a-customer-to-forget" not in b"".join(p.read_bytes() for p in (tmp_path / "log").rglob("*") if p.is_file())
    found = parity(str(app), tmp_path / "log")
    assert found.ok
    assert sum(f.erased for f in found.pipelines[0].features) == 4
    assert "no event of the log has this key" in str(erase(tmp_path / "log", "customer", "nobody"))
    # The app has dropped the view; the log has not.
    app.write_text(
        text[: text.index("spend = FeatureView")] + text[text.index("shops = FeatureView") : text.index("@on_demand")]
    )
    with Engine(str(app), log=tmp_path / "log", log_options=SHOP_OPTIONS):
        pass
    assert erase(tmp_path / "log", "customer", report.tombstone).events >= 1
