"""Compaction: what is read back from Parquet are the records that were in the segments, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offline.compacting import Killed, every_kill, is_tidy, killed_at, records_of, recovered, shop_log, state_of
from offline.shop_log import OPTIONS, SHOP, fill

from oracles.log_app import T0, open_engine, payment, visit
from penstock import Aggregation, Engine, Event, FeatureView, Pipeline, Timestamp
from penstock._ext import log as native
from penstock.errors import EventError, LogError, PenstockError
from penstock.offline.batches import BatchStore, records_from_batch
from penstock.offline.compaction import compact, newest_snapshot
from penstock.offline.history import History
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")

WIDE = (1 << 63) - 1
texts = st.one_of(st.none(), st.sampled_from(["", "\x00", "späť", "😀" * 9, "a" * 300]), st.text(max_size=20))
keys = st.text(st.characters(codec="utf-8"), max_size=12)
integers = st.one_of(st.sampled_from([0, -1, WIDE, -WIDE - 1]), st.integers(-WIDE - 1, WIDE))
numbers = st.one_of(st.none(), st.just(-0.0), st.floats(allow_nan=True, allow_infinity=False))
payments = st.fixed_dictionaries(
    {
        "customer": keys,
        "terminal": integers,
        "amount": numbers,
        "note": texts,
        "paid": st.one_of(st.none(), st.booleans()),
        "due": st.one_of(st.none(), st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999)),
        "at": st.integers(T0 - 10**12, T0 + 10**12),
    }
)


def only_batch(folder: Path) -> tuple[BatchStore, Any]:
    store = BatchStore.of(LogFolder(folder))
    (batch,) = store.batches()
    return store, batch


def segment_bytes(folder: Path, number: int = 1) -> bytes:
    segment = LogFolder(folder).segment(number)
    try:
        return bytes(segment.data)
    finally:
        segment.close()


def closed_behind(folder: Path) -> None:
    """A further segment, so that the one before may be compacted."""
    with open_engine(folder) as engine:
        engine.ingest(visit(), "Visit")


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(payments, min_size=1, max_size=12))
def test_any_events_come_back_bit_for_bit(events: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_engine(folder) as engine:
            for i, event in enumerate(events):
                try:
                    engine.score(payment(f"i{i % 7}", **event, page="") | event, pipeline="pay")
                except EventError:
                    engine.score(payment(f"i{i % 7}"), pipeline="pay")
            engine.score(visit(), pipeline="look")
        closed_behind(folder)
        before = segment_bytes(folder)
        report = compact(folder)
        assert report.segments == 1
        store, batch = only_batch(folder)
        assert bytes(records_from_batch(store, batch).data[native.HEAD :]) == before[native.HEAD :]
        assert batch.whole == 0  # what an engine writes needs no copy beside its columns


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), max_size=9))
def test_any_bits_of_a_record_come_back(fuzzed_log: Path, changes: list[tuple[int, int, bytes]]) -> None:
    """Records as no engine writes them: any status, bits behind a null, offsets out of place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "log"
        shutil.copytree(fuzzed_log, folder)
        logs = LogFolder(folder)
        path = logs.segment_path(1)
        data = bytearray(path.read_bytes())
        places = []
        at = native.HEAD
        while (record := native.record_at(data, logs.log_id, 1, at)) is not None:
            if record.kind in ("event", "score"):
                places.append((at, record))
            at += record.length
        for which, where, put in changes:
            at, record = places[which % len(places)]
            # flags, ingest time, and the body
            places_in_it = [15, *range(24, record.length)]
            for i, byte in enumerate(put):
                data[at + places_in_it[(where + i) % len(places_in_it)]] = byte
            native.put_record(data, logs.log_id, 1, at, record.length)
        path.write_bytes(data)
        refused = ""
        try:
            compact(folder)
        except LogError as error:
            refused = str(error)
        if refused:  # of no schema: test_crafted_records.py
            assert f"{path} at offset " in refused
            assert BatchStore.of(logs).batches() == []
            assert not list(folder.rglob("*.parquet"))
            return
        store, batch = only_batch(folder)
        assert bytes(records_from_batch(store, batch).data[native.HEAD :]) == bytes(data[native.HEAD :])


@pytest.fixture(scope="module")
def fuzzed_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "log"
    with open_engine(folder) as engine:
        for i in range(6):
            engine.score(payment(f"i{i}", at=i, note=["ä", None, "", "xyz"][i % 4]), pipeline="pay")
    closed_behind(folder)
    return folder


def test_nan_payloads_and_negative_zero_keep_their_bits(tmp_path: Path) -> None:
    """Parquet's dictionaries take one NaN for another: floats are written without."""
    with open_engine(tmp_path) as engine:
        for i in range(50):
            engine.score(payment(f"i{i}", amount=1.0), pipeline="pay")
    closed_behind(tmp_path)
    logs = LogFolder(tmp_path)
    path = logs.segment_path(1)
    data = bytearray(path.read_bytes())
    at, bits = native.HEAD, 0x7FF8000000000000
    while (record := native.record_at(data, logs.log_id, 1, at)) is not None:
        if record.kind == "event":
            slot = at + 32 + 8 * len(record.versions) + 8 * 3  # amount
            data[slot : slot + 8] = (bits if bits % 3 else 1 << 63).to_bytes(8, "little")
            bits += 1
            native.put_record(data, logs.log_id, 1, at, record.length)
        at += record.length
    path.write_bytes(data)
    compact(tmp_path)
    store, batch = only_batch(tmp_path)
    assert bytes(records_from_batch(store, batch).data[native.HEAD :]) == bytes(data[native.HEAD :])
    assert batch.whole == 0


def test_times_that_no_date_can_name_come_back(tmp_path: Path) -> None:
    """No engine writes them. Several such days share a date, and each date is one file."""
    far = [-(1 << 61), -(1 << 60), -62_135_596_800_000_001, T0, 253_402_300_800_000_000, 1 << 60, 1 << 61]
    with open_engine(tmp_path) as engine:
        for i in range(len(far)):
            engine.score(payment(f"i{i}"), pipeline="pay")
    closed_behind(tmp_path)
    logs = LogFolder(tmp_path)
    path = logs.segment_path(1)
    data = bytearray(path.read_bytes())
    at, times = native.HEAD, iter(far)
    while (record := native.record_at(data, logs.log_id, 1, at)) is not None:
        if record.kind == "event":
            slot = at + 32 + 8 * len(record.versions) + 8 * 7  # at
            data[slot : slot + 8] = next(times).to_bytes(8, "little", signed=True)
            native.put_record(data, logs.log_id, 1, at, record.length)
        at += record.length
    path.write_bytes(data)
    compact(tmp_path)
    store, batch = only_batch(tmp_path)
    assert bytes(records_from_batch(store, batch).data[native.HEAD :]) == bytes(data[native.HEAD :])
    dates = [Path(f.path).parent.name for f in batch.files if f.path.startswith("events/")]
    assert dates == ["date=0001-01-01", "date=2026-09-21", "date=9999-12-31"]
    assert batch.whole == 0


def test_wide_integers_and_aged_values_of_scores_come_back(tmp_path: Path) -> None:
    class Deposit(Event):
        customer: str
        cents: int
        at: Timestamp

    view = FeatureView(
        "v",
        entity="customer",
        source=Deposit,
        include_request_event=True,
        aggregations=[
            Aggregation("sum", "cents", windows=["1d"]),
            Aggregation("last", "cents", windows=["30d"], ttl="1h", default=7, name="recent"),
        ],
    )
    app = {"Deposit": Deposit, "v": view, "p": Pipeline("p", event=Deposit, features=[view])}
    for run in range(2):
        with Engine(app, log=tmp_path, log_options=OPTIONS) as engine:
            for i in range(4):
                engine.score({"customer": "c", "cents": WIDE - i, "at": T0 + run * 10**10 + i}, pipeline="p")
    before = segment_bytes(tmp_path)
    compact(tmp_path)
    store, batch = only_batch(tmp_path)
    assert bytes(records_from_batch(store, batch).data[native.HEAD :]) == before[native.HEAD :]
    table = store.read_table(next(f.path for f in batch.files if f.path.startswith("scores/")))
    assert [len(w) for w in table["_wide"].to_pylist()] == [0, 1, 1, 1]
    assert table["v.sum_cents_1d"].to_pylist()[1:] == [None] * 3


def test_history_is_the_same_from_either_form(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log")
    records, state = records_of(folder), recovered(folder)
    report = compact(folder)
    assert (report.segments, report.batches, report.removed, report.kept) == (2, 1, 0, 2)
    assert records_of(folder) == records
    take_snapshot(folder)
    report = compact(folder)
    assert (report.batches, report.removed, report.kept) == (0, 2, 0)
    assert LogFolder(folder).numbers() == [3]
    assert records_of(folder) == records
    assert recovered(folder) == state  # from the snapshot
    shutil.rmtree(folder / "snapshots")
    assert recovered(folder) == state  # from Parquet and the tail
    assert parity(str(SHOP), folder).ok
    history = History(LogFolder(folder))
    history.check()
    assert history.first_sequence == 0
    assert len(history.batches) == 1
    assert records_of(folder, first=history.last_sequence)[0] == next(
        r for r in records if int.from_bytes(r[12:20], "little") >= history.known[1].first
    )


def test_batches_hold_whole_segments_and_no_mark_of_theirs_is_lost(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=5, n=60)
    logs = LogFolder(folder)
    marks = {s.number: s.watermarks() for s in logs.segments()}
    size = logs.segment_path(1).stat().st_size
    report = compact(folder, batch_bytes=5 * size // 2)
    assert (report.segments, report.batches) == (4, 2)
    history = History(logs)
    history.check()
    assert [[s.number for s in b.segments] for b in history.batches] == [[1, 2], [3, 4]]
    assert [m for k in history.known for _, m in k.starts] == list(marks.values())
    assert history.watermarks() == marks[5]
    assert history.first_sequence_with(lambda m: m == marks[2]) == history.batches[0].segments[1].first_sequence


def test_segments_with_other_schemas_are_other_batches(tmp_path: Path) -> None:
    class Click(Event):
        user: str
        at: Timestamp

    def view(window: str) -> dict[str, Any]:
        v = FeatureView("v", entity="user", source=Click, aggregations=[Aggregation("count", windows=[window])])
        return {"Click": Click, "v": v, "p": Pipeline("p", event=Click, features=[v])}

    for window in ("1h", "1h", "1d", "1d"):
        with Engine(view(window), log=tmp_path, log_options=OPTIONS) as engine:
            engine.score({"user": "u", "at": T0})
    assert compact(tmp_path).batches == 2
    assert len(records_of(tmp_path)) == 8


def test_polars_and_duckdb_read_the_files(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    folder = shop_log(tmp_path / "log")
    compact(folder)
    _, batch = only_batch(folder)
    events = f"{folder}/parquet/events/Order/**/*.parquet"
    scores = f"{folder}/parquet/scores/orders/**/*.parquet"
    frame = polars.scan_parquet(events, hive_partitioning=True).sort("_sequence").collect()
    assert frame["_outcome"].cast(polars.String).is_in(["applied", "late", "duplicate"]).all()
    assert (frame["at"].dt.date() == frame["date"]).all()
    rows = duckdb.sql(
        f'select e.amount, s._score, s._action, s."spend.count_1h", s._arm_limit, e._versions[1] '
        f"from read_parquet('{events}') e join read_parquet('{scores}') s using (_sequence) order by _sequence"
    ).fetchall()
    assert len(rows) == frame.height == 300
    assert [row[0] for row in rows] == frame["amount"].to_list()
    assert {row[4] for row in rows} == {"low", "high"}
    assert {row[2] for row in rows} <= {"approve", "decline", "review"}
    assert batch.events == frame.height + len(polars.read_parquet(f"{folder}/parquet/events/Login/**/*.parquet"))


def test_a_kill_at_any_file_operation_loses_and_doubles_nothing(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", n=25)
    take_snapshot(folder)
    records = records_of(folder)

    def check(copy: Path) -> None:
        assert records_of(copy) == records

    assert every_kill(folder, lambda copy: compact(copy, batch_bytes=1), check) > 20


def test_leftovers_of_a_killed_round_are_removed(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", n=40)
    with pytest.raises(Killed), killed_at(5):
        compact(folder)
    assert not is_tidy(folder)
    compact(folder)
    assert is_tidy(folder)


def test_no_segment_goes_that_a_snapshot_does_not_hold(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log")
    assert newest_snapshot(LogFolder(folder)) is None
    take_snapshot(folder)
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        fill(engine, 50, first=450)
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
        fill(engine, 50, first=500)
    snapshot = next((folder / "snapshots").iterdir()) / "manifest.json"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-40])
    assert compact(folder).removed == 0  # it cannot be read
    snapshot.write_bytes(whole)
    report = compact(folder)
    assert (report.removed, report.kept) == (3, 1)
    assert LogFolder(folder).numbers() == [4, 5]


def test_a_segment_that_is_compacted_between_check_and_reading_is_read_from_its_batch(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=4, n=50)
    expected = records_of(folder)
    take_snapshot(folder)
    history = History(LogFolder(folder))
    history.check()
    pieces = history.pieces(0, 1 << 62)
    first = next(pieces)
    assert first.number == 1
    compact(folder)
    found = [(piece.number, piece.start, piece.end) for piece in pieces]
    assert LogFolder(folder).numbers() == [4]
    assert len(found) == 3
    assert found[0][2] == found[1][1]  # where one segment ends in the batch, the next begins
    assert records_of(folder) == expected


def test_damage_of_the_files_is_named(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log")
    take_snapshot(folder)
    compact(folder)
    store, batch = only_batch(folder)
    file = folder / "parquet" / batch.files[0].path
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(25):  # a flipped bit is refused, or is none that matters
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        with contextlib.suppress(LogError):
            damaged = records_from_batch(store, batch)
            file.write_bytes(whole)
            assert (damaged.data == records_from_batch(store, batch).data).all()
    file.unlink()
    with pytest.raises(LogError, match=r"\.parquet: missing; events 0 to"):
        records_of(folder)
    file.write_bytes(whole)
    manifest = folder / "parquet" / "batches" / f"{batch.name}.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text.replace(b'"events":', b'"eventz":'))
    with pytest.raises(LogError, match="checksum"):
        History(LogFolder(folder)).check()
    manifest.write_bytes(text)
    assert len(records_of(folder))


def test_a_hole_between_batches_and_segments_is_an_error(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log", runs=5, n=40)
    compact(folder, batch_bytes=1)
    store = BatchStore.of(LogFolder(folder))
    batches = store.batches()
    assert len(batches) == 4
    for number in (1, 2, 3):
        LogFolder(folder).segment_path(number).unlink()
    assert len(records_of(folder))
    middle = folder / "parquet" / "batches" / f"{batches[1].name}.json"
    text = middle.read_bytes()
    middle.unlink()
    missing = f"events {batches[1].first_sequence} to {batches[1].last_sequence} are missing"
    with pytest.raises(LogError, match=missing):
        History(LogFolder(folder)).check()
    middle.write_bytes(text)
    (folder / "parquet" / "batches" / f"{batches[3].name}.json").unlink()
    LogFolder(folder).segment_path(4).unlink()
    with pytest.raises(LogError, match=r"000000000004\.log is missing \(events"):
        History(LogFolder(folder)).check()


def test_the_place_is_kept_in_the_folder(tmp_path: Path) -> None:
    folder = shop_log(tmp_path / "log")
    records = records_of(folder)
    elsewhere = tmp_path / "store"
    compact(folder, str(elsewhere))
    assert (elsewhere / "batches").is_dir()
    assert not (folder / "parquet").exists()
    take_snapshot(folder)
    compact(folder)
    assert records_of(folder) == records
    with pytest.raises(LogError, match="move it there"):
        compact(folder, str(tmp_path / "third"))
    assert compact(folder, str(elsewhere)).reason is None


def test_a_batch_of_another_log_is_refused(tmp_path: Path) -> None:
    one, other = shop_log(tmp_path / "one", n=20), shop_log(tmp_path / "other", n=20)
    compact(one, str(tmp_path / "store"))
    with pytest.raises(LogError, match="of another log"):
        compact(other, str(tmp_path / "store"))


def test_without_the_extra_segments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shop_log(tmp_path / "log")
    records = records_of(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        report = compact(folder)
        assert "penstock[offline]" in str(report)
        assert not report.batches
        assert records_of(folder) == records
    take_snapshot(folder)
    compact(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    history = History(LogFolder(folder))
    history.check()
    assert history.first_sequence == 0
    with pytest.raises(PenstockError, match=r"penstock\[offline\]"):
        list(history.pieces(0, 10))
    with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:  # the snapshot and the tail are enough
        assert state_of(engine)["next"] == history.last_sequence + 1
