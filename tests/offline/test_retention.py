"""Retention: what goes is old, whole, and in a snapshot; what stays is read without a hole."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from offline.compacting import every_kill, is_tidy, records_of

from penstock import Aggregation, Engine, Event, FeatureView, Pipeline, Timestamp
from penstock.offline.compaction import compact
from penstock.offline.history import History
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.options import LogOptions
from penstock.offline.retention import retain

pytest.importorskip("pyarrow", reason="compaction needs pyarrow")

OPTIONS = LogOptions(segment_bytes=1 << 16, keeper=False)
DAY = 86_400_000_000
T0 = 1_790_000_000_000_000


class Visit(Event, lateness="1h", max_skew="1d"):
    user: str
    at: Timestamp


class Payment(Event, event_id="id", lateness="1h", retry_window="3d"):
    id: str
    user: str
    at: Timestamp


visits = FeatureView("visits", entity="user", source=Visit, aggregations=[Aggregation("count", windows=["2d"])])
APP: dict[str, Any] = {"Visit": Visit, "visits": visits, "p": Pipeline("p", event=Visit, features=[visits])}


def day_of(folder: Path, day: int, extra: dict[str, Any] | None = None, app: dict[str, Any] = APP) -> None:
    """A segment with five events of a day."""
    with Engine(app, log=folder, log_options=OPTIONS) as engine:
        for i in range(5):
            engine.score({"user": f"u{i}", "at": T0 + day * DAY + i})
        if extra is not None:
            engine.ingest(extra, "Payment" if "id" in extra else "Visit")


def days(folder: Path, n: int = 6, app: dict[str, Any] = APP) -> Path:
    for day in range(n):
        day_of(folder, day, app=app)
    take_snapshot(folder)
    return folder


def begins(folder: Path) -> int:
    history = History(LogFolder(folder))
    history.check()
    assert len(records_of(folder)) == 2 * (history.last_sequence + 1 - history.first_sequence)
    return history.first_sequence


@pytest.mark.parametrize("compacted", [False, True])
def test_what_is_older_goes_and_history_begins_later(tmp_path: Path, compacted: bool) -> None:
    folder = days(tmp_path / "log")
    if compacted:
        compact(folder, batch_bytes=1)
    report = retain(folder, 2 * DAY)
    assert (report.batches, report.segments) == ((3, 0) if compacted else (0, 3))
    assert (report.events, report.first_sequence) == (15, 15)
    assert begins(folder) == 15
    assert is_tidy(folder)
    assert "history begins at event 15" in str(report)
    with Engine(APP, log=folder, log_options=OPTIONS) as engine:
        assert engine.features("visits", ["u0"], as_of=T0 + 5 * DAY + 9).rows[0]["visits.count_2d"] == 2
    assert retain(folder, "2d").events == retain(folder, timedelta(days=2)).events == 0


def test_the_newest_segment_and_what_no_snapshot_holds_stay(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    for day in range(4):
        day_of(folder, day)
    assert "no complete snapshot" in str(retain(folder, 0))
    take_snapshot(folder)
    day_of(folder, 9)
    day_of(folder, 10)
    # Not even what is long past: the snapshot ends with the fourth segment, and its clock with the fourth day.
    report = retain(folder, 0)
    assert (report.segments, report.first_sequence) == (3, 15)
    take_snapshot(folder)
    assert retain(folder, 0).segments == 2
    assert LogFolder(folder).numbers() == [6]


def test_age_is_by_event_time_and_the_clock_is_the_older_one(tmp_path: Path) -> None:
    folder = days(tmp_path / "log")
    compact(folder, batch_bytes=1)
    assert retain(folder, DAY, now=T0).batches == 0  # the wall clock is behind the watermark
    assert retain(folder, DAY, now=T0 + 2 * DAY).batches == 1


def test_one_late_young_event_keeps_its_segment_and_a_quarantined_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    day_of(folder, 0, {"user": "q", "at": 4_000_000_000_000_000})  # beyond max_skew: quarantined
    for day in (1, 9, 2, 10, 11):  # the fourth segment's events are late
        day_of(folder, day)
    take_snapshot(folder)
    compact(folder, batch_bytes=1)
    report = retain(folder, 3 * DAY)
    assert (report.batches, report.first_sequence) == (2, 11)


def test_ids_that_may_be_asked_for_again_keep_their_events(tmp_path: Path) -> None:
    payments = FeatureView(
        "payments", entity="user", source=Payment, aggregations=[Aggregation("count", windows=["1d"])]
    )
    app = APP | {"Payment": Payment, "payments": payments}
    folder = tmp_path / "log"
    for day in range(6):
        day_of(folder, day, {"id": f"i{day}", "user": "u", "at": T0 + day * DAY}, app)
    take_snapshot(folder)
    compact(folder, batch_bytes=1)
    report = retain(folder, 0)
    assert (report.batches, report.first_sequence) == (2, 12)
    assert "event ids are remembered" in str(report)


def test_a_kill_at_any_file_operation_leaves_history_without_a_hole(tmp_path: Path) -> None:
    folder = days(tmp_path / "log", 4)
    compact(folder, batch_bytes=1)
    whole = set(records_of(folder))

    def check(copy: Path) -> None:
        assert begins(copy) in (0, 5, 10)
        assert set(records_of(copy)) <= whole

    assert every_kill(folder, lambda copy: retain(copy, DAY), check) > 5


def test_a_log_of_which_only_an_empty_segment_is_left_goes_on(tmp_path: Path) -> None:
    folder = days(tmp_path / "log", 3)
    LogFolder(folder).begin_at(15)
    with Engine(APP, log=folder, log_options=OPTIONS):  # its segment holds nothing yet
        for number in (1, 2, 3):
            LogFolder(folder).segment_path(number).unlink()
        shutil.copytree(folder, tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
    with Engine(APP, log=tmp_path / "killed", log_options=OPTIONS) as engine:
        assert engine.core.next_sequence == 15
        engine.score({"user": "u0", "at": T0 + 3 * DAY})
    assert begins(tmp_path / "killed") == 15
