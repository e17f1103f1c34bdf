"""The event log's writer: what was ingested is what the records say, whatever it is, over any number of segments.

Shared syncs, rolls, sizes; and what is refused has changed nothing. Records are read by an oracle that shares no code.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.log_app import APP, SECOND, T0, Payment, count, open_engine, payment, segment_files, visit
from oracles.log_files import HEAD, OUTCOMES, events_of, read_log
from penstock import Aggregation, Engine, Event, FeatureView, Timestamp
from penstock._ext import log as native
from penstock.errors import LogError
from penstock.offline.recovery import LogOptions

TESTS = Path(__file__).parents[1]

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["", "\0", "é" * 100, "x" * 65536, "𝄞" * 16000, " ", "null"]
)
whole = st.integers(-(2**63), 2**63 - 1)
payments = st.fixed_dictionaries(
    {
        "customer": st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
        "terminal": whole,
        "amount": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "note": st.none() | texts,
        "paid": st.none() | st.booleans(),
        "due": st.none() | st.integers(-(10**15), 10**17),
    }
)
visits = st.fixed_dictionaries({"customer": st.sampled_from("abc"), "page": texts})


def ordered(values):
    return {name: value for name, value in values.items() if name != "at"}


@settings(max_examples=60, deadline=None)
@given(st.lists(payments | visits, max_size=25), st.booleans())
def test_records_say_what_was_ingested(events, scored):
    """Every type, nulls, empty and long and any Unicode strings; rolling every few records; read again by recovery."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_engine(folder, segment_bytes=1 << 18, sync="never") as engine:
            for i, values in enumerate(events):
                event = values | ({"id": f"e{i}"} if "terminal" in values else {}) | {"at": T0 + i}
                if scored:
                    engine.score(event, pipeline="pay" if "id" in event else "look")
                else:
                    engine.ingest(event, event="Payment" if "id" in event else "Visit")
        records = read_log(folder)
        found = [r for r in records if r.kind == "event"]
        assert [r.sequence for r in found] == list(range(len(events)))
        for i, (record, values) in enumerate(zip(found, events)):
            expected = values | ({"id": f"e{i}"} if "terminal" in values else {}) | {"at": T0 + i}
            assert {k: v for k, v in record.values.items() if v is not None} == {
                k: v for k, v in expected.items() if v is not None
            }
            assert OUTCOMES[record.outcome] == "applied"
        scores = [r for r in records if r.kind == "score"]
        assert [s.sequence for s in scores] == (list(range(len(events))) if scored else [])
        with open_engine(folder) as engine:
            assert engine.recovery.events == len(events)
            assert engine.recovery.damages == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=200), st.integers(14, 18))
def test_segments_begin_with_schemas_and_marks(sizes, power):
    """Each segment can be read by itself: every schema, then the watermarks as they stood where it begins."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_engine(folder, segment_bytes=1 << power, sync="never") as engine:
            for i, (size, late) in enumerate(sizes):
                # A late payment leaves the watermark where it was.
                engine.ingest(
                    payment(f"e{i}", at=i - 400 * 86400 * SECOND * (late and i > 0), note="x" * size), "Payment"
                )
        records = read_log(folder, check=power == 14 and len(sizes) < 30)
        assert [r.sequence for r in records if r.kind == "event"] == list(range(len(sizes)))
        watermark = -(1 << 61)
        log_id = json.loads((folder / "log.json").read_bytes())["log_id"]
        expected_first = 0
        for path in segment_files(folder):
            data = path.read_bytes()
            head = native.segment_head(data)
            mine = [r for r in records if r.segment == head.number]
            assert head.whole
            assert (head.log_id, head.first_sequence) == (log_id, expected_first)
            mark = native.segment_mark(data)
            assert mark.end == mark.synced == len(data) == mine[-1].offset + mine[-1].length
            kinds = [r.kind for r in mine]
            assert kinds[:5] == ["schema"] * 4 + ["mark"]
            assert kinds[5:] == ["event"] * (len(mine) - 5)
            assert mine[4].values == {0: watermark, 1: -(1 << 61)}
            for record in mine[5:]:
                if OUTCOMES[record.outcome] == "applied":
                    watermark = max(watermark, record.values["at"])
            expected_first = mine[-1].sequence + 1 if len(mine) > 5 else expected_first
            assert mark.last_sequence == expected_first - 1


def test_checksums_are_those_of_the_oracle(tmp_path):
    with open_engine(tmp_path, segment_bytes=1 << 14) as engine:
        for i in range(40):
            engine.score(payment(f"e{i}", at=i, note="é" * i), pipeline="pay")
            engine.ingest(visit(at=i), event="Visit")
    assert len(segment_files(tmp_path)) > 1
    assert len([r for r in read_log(tmp_path, check=True) if r.kind == "event"]) == 80


def wide(names):
    """An app with one event type of many fields."""
    Wide = type("Wide", (Event,), {"__annotations__": {**names, "at": Timestamp}, "__module__": __name__})
    view = FeatureView("wide", entity="f002", source=Wide, aggregations=[Aggregation("count", windows=["1h"])])
    return {"Wide": Wide, "view": view}


def test_many_fields(tmp_path):
    names = {f"f{i:03d}": [int, float, str, bool][i % 4] for i in range(240)}
    app = wide(names)
    values = {n: {int: i, float: i / 3, str: f"text {i}", bool: i % 8 > 3}[t] for i, (n, t) in enumerate(names.items())}
    with Engine(app, log=tmp_path, log_options=LogOptions(keeper=False, segment_bytes=1 << 18)) as engine:
        for i in range(100):
            engine.ingest({**values, "at": T0 + i})
    found = events_of(tmp_path)
    assert [r.values for r in found] == [{**values, "at": T0 + i} for i in range(100)]


def test_a_record_larger_than_a_segment_is_refused(tmp_path):
    """It says so, nothing has changed, and what fits goes on: the same id too."""
    with open_engine(tmp_path, segment_bytes=1 << 15) as engine:
        engine.ingest(payment("a"), "Payment")
        for _ in range(2):
            with pytest.raises(LogError, match=r"too large for a segment.*not ingested"):
                engine.ingest(payment("b", at=1, note="x" * 40000), "Payment")
            with pytest.raises(LogError, match="too large for a segment"):
                engine.score(payment("b", at=1, note="x" * 40000), pipeline="pay")
        assert count(engine) == 1
        assert engine.ingest(payment("b", at=1), "Payment") == "applied"
    assert [r.values["id"] for r in events_of(tmp_path)] == ["a", "b"]


def test_a_record_over_the_longest_is_refused(tmp_path):
    """Longer than a reader takes, in a segment that would have room for it."""
    names = {f"f{i:03d}": str for i in range(140)}
    app = wide(names)
    with Engine(app, log=tmp_path, log_options=LogOptions(keeper=False, segment_bytes=1 << 25)) as engine:
        engine.ingest({**dict.fromkeys(names, ""), "at": T0})
        with pytest.raises(LogError, match="too large"):
            engine.ingest({**dict.fromkeys(names, "x" * 65536), "f002": "", "at": T0 + 1})
        engine.ingest({**dict.fromkeys(names, "y"), "at": T0 + 2})
    assert [r.values["at"] - T0 for r in events_of(tmp_path)] == [0, 2]


def test_segments_too_small_for_the_app_are_refused(tmp_path):
    with pytest.raises(LogError, match="no room for the schemas"):
        open_engine(tmp_path, segment_bytes=4096)


def test_a_segment_that_holds_a_score_alone_is_kept(tmp_path):
    """The decision on the last event of a segment may be the first record of the next one."""
    long = "x" * 8000
    with open_engine(tmp_path, segment_bytes=1 << 15) as engine:
        made = {}
        for i in range(60):
            made[f"e{i}"] = engine.score(payment(f"e{i}", at=i, note=long), pipeline="pay").id
            last = [r.kind for r in read_log(tmp_path) if r.segment == engine.core.log.stats().number]
            if last[5:] == ["score"]:
                break
        else:
            pytest.fail("no score began a segment")
    with open_engine(tmp_path) as engine:
        for i in range(len(made)):
            again = engine.score(payment(f"e{i}", at=i, note=long), pipeline="pay")
            assert (again.outcome, again.id) == ("duplicate", made[f"e{i}"])


def test_an_empty_log_leaves_no_segment(tmp_path):
    for _ in range(3):
        open_engine(tmp_path).close()
    assert segment_files(tmp_path) == []
    assert [p.name for p in (tmp_path / "segments").iterdir()] == []


def test_syncs_are_shared(tmp_path):
    """With sync="always", calls that wait at once wait for the same sync."""
    with open_engine(tmp_path, sync="always", segment_bytes=1 << 20) as engine:
        errors = []

        def work(n):
            try:
                for i in range(60):
                    engine.score(payment(f"{n}-{i}", at=i, customer=f"c{n}"), pipeline="pay")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.core.log.stats()
        assert errors == []
        assert stats.synced == stats.position
        assert stats.syncs < 480 * 0.7
    assert len(events_of(tmp_path)) == 480


def test_an_answer_under_always_is_on_disk(tmp_path):
    """Position and `synced` after each call, and what the mark in the file says is never more than that."""
    with open_engine(tmp_path, sync="always") as engine:
        log = engine.core.log
        for i in range(50):
            engine.ingest(payment(f"e{i}", at=i), "Payment")
            stats = log.stats()
            assert stats.synced == stats.position
        path = segment_files(tmp_path)[-1]
        mark = native.segment_mark(path.read_bytes())
        assert HEAD < mark.synced <= stats.position
        assert mark.end == 0


@pytest.mark.parametrize("sync", ["1ms", "10ms", "50ms"])
def test_the_interval_of_syncs_is_kept(tmp_path, sync):
    with open_engine(tmp_path, sync=sync) as engine:
        engine.ingest(payment("a"), "Payment")
        deadline = time.monotonic() + 5
        while engine.core.log.stats().synced < engine.core.log.position and time.monotonic() < deadline:
            time.sleep(0.001)
        stats = engine.core.log.stats()
        assert stats.synced == stats.position
        time.sleep(0.05)
        assert engine.core.log.stats().syncs == stats.syncs  # nothing new, nothing synced


def test_never_syncs_when_asked_and_when_closed(tmp_path):
    with open_engine(tmp_path, sync="never", segment_bytes=1 << 14) as engine:
        for i in range(300):
            engine.ingest(payment(f"e{i}", at=i), "Payment")
        assert engine.core.log.stats().syncs == 0
        assert engine.core.log.stats().rolls > 1
        engine.sync()
        stats = engine.core.log.stats()
        assert stats.synced == stats.position
    for path in segment_files(tmp_path):
        mark = native.segment_mark(path.read_bytes())
        assert mark.synced == mark.end == path.stat().st_size


def test_closing_while_others_wait(tmp_path):
    """Whoever waits for a sync is let out, and what was acknowledged is in the log."""
    for round in range(15):
        folder = tmp_path / str(round)
        engine = open_engine(folder, sync="always", segment_bytes=1 << 14)
        acknowledged = []
        others = []

        def work(n, engine=engine, acknowledged=acknowledged, others=others):
            for i in range(10_000):
                try:
                    engine.ingest(payment(f"{n}-{i}", at=i), "Payment")
                    acknowledged.append(f"{n}-{i}")
                except LogError as error:
                    others.append(str(error))
                    return

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.01 + 0.002 * round)
        engine.close()
        for thread in threads:
            thread.join()
        assert len(others) == 4
        assert all("closed" in text for text in others)
        held = {r.values["id"] for r in events_of(folder)}
        assert held >= set(acknowledged)
        with pytest.raises(LogError, match="closed"):
            engine.ingest(payment("late"), "Payment")
        assert engine.features("spend", ["c"], as_of=T0 + 10**12).rows  # reads go on
        engine.close()


def test_rolling_when_asked_and_by_age(tmp_path):
    with open_engine(tmp_path, segment_seconds=0.05) as engine:
        engine.core.log.roll()
        engine.ingest(payment("a"), "Payment")
        engine.ingest(payment("b"), "Payment")
        assert engine.core.log.stats().number == 1  # an empty segment is not rolled
        engine.core.log.roll()
        engine.ingest(payment("c"), "Payment")
        assert engine.core.log.stats().number == 2
        deadline = time.monotonic() + 5
        while engine.core.log.stats().number == 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            engine.ingest(visit(), event="Visit")
        assert engine.core.log.stats().number == 3
    found = {r.values["id"]: r.segment for r in events_of(tmp_path) if "id" in r.values}
    assert found == {"a": 1, "b": 1, "c": 2}


def test_late_and_quarantined_events_are_logged_as_judged(tmp_path):
    class Ping(Event, lateness="1m", max_skew="1m"):
        who: str
        at: Timestamp

    pings = FeatureView("pings", entity="who", source=Ping, aggregations=[Aggregation("count", windows=["1h"])])
    now = time.time_ns() // 1000
    with Engine({"pings": pings}, log=tmp_path, log_options=LogOptions(keeper=False)) as engine:
        for at in (now, now - 61 * SECOND, now + 120 * SECOND, now - 59 * SECOND):
            engine.ingest({"who": "w", "at": at})
    assert [OUTCOMES[r.outcome] for r in events_of(tmp_path)] == ["applied", "late", "quarantined", "applied"]
    with Engine({"pings": pings}, log=tmp_path, log_options=LogOptions(keeper=False)) as engine:
        assert engine.core.watermark(0) == now


def test_a_table_is_logged_row_by_row(tmp_path):
    rows = [payment(f"e{i % 700}", at=i, amount=i / 7, note=None if i % 5 else "n" * (i % 50)) for i in range(1000)]
    types = {"amount": pa.float64(), "due": pa.int64(), "terminal": pa.int64(), "at": pa.int64()}
    table = pa.table({name: pa.array([r[name] for r in rows], types.get(name)) for name in rows[0]})
    with open_engine(tmp_path) as engine:
        assert engine.ingest(table, event="Payment")["applied"] == 700
        result = engine.score_batch(table, pipeline="pay")
        assert set(result["outcome"].to_pylist()) == {"duplicate"}
    found = events_of(tmp_path)
    assert [r.values["id"] for r in found[:700]] == [f"e{i}" for i in range(700)]
    assert [r.values["note"] for r in found[:700]] == [r["note"] for r in rows[:700]]
    assert all(math.isclose(r.values["amount"], row["amount"]) for r, row in zip(found[:700], rows))


def test_signals_do_not_stop_the_log(tmp_path):
    """A signal that arrives while a segment is allocated does not make it fail: it goes to the process's threads."""
    program = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from oracles.log_app import open_engine, payment
taken = []
signal.signal(signal.SIGUSR1, lambda *_: taken.append(threading.current_thread().name))
engine = open_engine(Path({str(tmp_path)!r}), segment_bytes=1 << 22)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
signal.signal(signal.SIGALRM, lambda *_: taken.append("alarm"))
for i in range(3000):
    engine.ingest(payment(f"e{{i}}", at=i, note="x" * 60000), "Payment")
signal.setitimer(signal.ITIMER_REAL, 0)
print(engine.core.log.stats().rolls, len(taken) > 3)
engine.close()
"""
    program = program.replace("range(3000)", "range(700)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rolls, interrupted = done.stdout.split()
    assert int(rolls) > 8
    assert interrupted == "True"
    assert len(events_of(tmp_path)) == 700


def forked(action):
    """The exit code of `action` in a forked child that is not allowed to hang."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            code = 0 if action() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_leaves_the_log_alone(tmp_path):
    engine = open_engine(tmp_path)
    engine.ingest(payment("a"), "Payment")

    def child():
        log = engine.core.log
        try:
            engine.ingest(payment("child"), "Payment")
            return False
        except Exception as error:
            if "reopen" not in str(error):
                return False
        for call in (log.wait, log.stats):
            try:
                call()
                return False
            except LogError as error:
                if "forked" not in str(error):
                    return False
        engine.reopen()
        del log
        engine.ingest(payment("child"), "Payment")
        return count(engine) == 2 and engine.core.log is None

    for _ in range(3):
        assert forked(child) == 0
    assert engine.ingest(payment("b", at=1), "Payment") == "applied"
    assert engine.core.log.stats().error == 0
    engine.sync()
    engine.close()
    assert [r.values["id"] for r in events_of(tmp_path)] == ["a", "b"]


def test_a_fork_while_threads_append(tmp_path):
    engine = open_engine(tmp_path, sync="1ms", segment_bytes=1 << 14)
    stop = threading.Event()
    made = []

    def work(n):
        i = 0
        while not stop.is_set():
            engine.ingest(payment(f"{n}-{i}", at=i), "Payment")
            made.append(f"{n}-{i}")
            i += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()

    def child():
        engine.reopen()
        return engine.ingest(payment("child"), "Payment") == "applied"

    codes = [forked(child) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join()
    engine.close()
    assert codes == [0] * 10
    assert sorted(r.values["id"] for r in events_of(tmp_path)) == sorted(made)


def test_a_child_does_not_keep_the_folder_locked(tmp_path):
    """A forked child that lives on lets its parent's folder be opened again."""
    engine = open_engine(tmp_path)
    engine.ingest(payment("a"), "Payment")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent says so
        os._exit(0)
    os.close(read)
    try:
        engine.close()
        with open_engine(tmp_path) as again:
            assert count(again) == 1
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_descriptors_and_memory_are_given_back(tmp_path):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def mapped():
        return sum("segments" in line for line in Path("/proc/self/maps").read_text().splitlines())

    open_engine(tmp_path).close()
    before = descriptors(), mapped()
    for round in range(5):
        with open_engine(tmp_path, segment_bytes=1 << 14) as engine:
            for i in range(200):
                engine.ingest(payment(f"{round}-{i}", at=i), "Payment")
    for _ in range(5):
        with pytest.raises(LogError):
            open_engine(tmp_path, segment_bytes=4096)
    assert (descriptors(), mapped()) == before


def test_names_of_the_event_types(tmp_path):
    """The schemas as an outsider reads them."""
    with open_engine(tmp_path) as engine:
        engine.ingest(payment("a"), "Payment")
    schemas = [r.schema for r in read_log(tmp_path) if r.kind == "schema"]
    assert [s.get("name") or s.get("pipeline") for s in schemas] == ["Payment", "Visit", "pay", "look"]
    assert [f["name"] for f in schemas[0]["fields"]] == list(Payment.__struct_fields__)
    assert set(APP) >= {"Payment", "Visit", "pay", "look"}
