"""The folder of a log: full and read-only disks, other users of it, the clock, live readers, and a stored sample.

What must hold: what cannot be written is refused, with the reason, and has changed nothing; reads go on; and whoever
reads a log that is written reads every record that was there when it began.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from oracles.log_app import APP, SECOND, T0, count, open_engine, payment, segment_files, visit
from oracles.log_files import OUTCOMES, events_of, read_log
from oracles.make_log_v1 import APP as APP_V1
from penstock import Engine, Rule
from penstock._ext import log as native
from penstock.errors import LogError
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity
from penstock.offline.recovery import recover_state

TESTS = Path(__file__).parents[1]
DATA = TESTS / "data" / "log_v1"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", where], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def table_of(rows):
    types = {"amount": pa.float64(), "due": pa.int64(), "terminal": pa.int64(), "at": pa.int64()}
    return pa.table({name: pa.array([r[name] for r in rows], types.get(name)) for name in rows[0]})


# A full disk


@as_root
def test_a_full_disk(small_disk):
    """Ingest refuses and has changed nothing, reads go on, and so does ingest when there is room again."""
    ballast = small_disk / "ballast"
    with open_engine(small_disk / "log", segment_bytes=1 << 18) as engine:
        engine.ingest(payment("first"), "Payment")
        with ballast.open("wb") as stream, pytest.raises(OSError, match="No space"):
            while True:
                os.write(stream.fileno(), bytes(4096))
        accepted, refusal = 1, ""
        for i in range(10000):
            try:
                engine.score(payment(f"e{i}", at=i), pipeline="pay")
                accepted += 1
            except LogError as error:
                refusal = str(error)
                break
        assert "No space left" in refusal
        assert "not ingested" in refusal
        assert str(small_disk) in refusal
        refused = f"e{i}"

        def changed():
            return engine.core.next_sequence, engine.stats()["outcomes"], [s[:2] for s in engine.core.store_stats()]

        before = changed()
        for _ in range(3):
            with pytest.raises(LogError, match="No space left"):
                engine.score(payment(refused, at=i, customer="new", terminal=99), pipeline="pay")
        assert changed() == before
        assert count(engine) == accepted
        assert engine.features("spend", ["new"], as_of=T0 + 10**12).statuses[0]["spend.sum_amount_3000d"] == "NOT_FOUND"
        assert engine.score(payment("other", at=i), ingest=False, pipeline="pay").outcome == "off"
        assert engine.core.log.stats().error
        ballast.unlink()
        assert engine.ingest(payment(refused, at=i), "Payment") == "applied"
        assert engine.core.log.stats().error == 0
        assert count(engine) == accepted + 1
    with open_engine(small_disk / "log", segment_bytes=1 << 18) as engine:
        assert count(engine) == accepted + 1
        assert engine.recovery.damages == []


@as_root
def test_a_start_on_a_full_disk_serves_reads(small_disk):
    """What the log holds is there, events are refused until there is room; then nothing has to be started again."""
    log, ballast = small_disk / "log", small_disk / "ballast"
    with open_engine(log, segment_bytes=1 << 18) as engine:
        for i in range(3):
            engine.ingest(payment(f"e{i}", at=i), "Payment")
    with ballast.open("wb") as stream, pytest.raises(OSError, match="No space"):
        while True:
            os.write(stream.fileno(), bytes(4096))
    with open_engine(log, segment_bytes=1 << 18) as engine:
        assert count(engine) == 3
        assert engine.core.log.state == "refusing"
        assert "No space left" in engine.check_log()[0]
        assert engine.check_log() == []
        with pytest.raises(LogError, match=r"No space left.*not ingested"):
            engine.ingest(payment("e3", at=3), "Payment")
        ballast.unlink()
        until(lambda: engine.core.log.state == "ok")  # by itself: nobody would send events to who is not ready
        assert engine.check_log() == ["the event log is taking events again"]
        assert engine.ingest(payment("e3", at=3), "Payment") == "applied"
    with open_engine(log, segment_bytes=1 << 18) as engine:
        assert count(engine) == 4
        assert engine.recovery.damages == []


# A folder that is taken away


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("what", ["folder", "segments", "segment", "lock", "moved", "replaced"])
@pytest.mark.parametrize("sync", ["always", "10ms", "never"])
def test_nothing_is_ingested_into_a_folder_that_is_gone(tmp_path, monkeypatch, what, sync):
    monkeypatch.chdir(tmp_path)
    log, aside = Path("log"), Path("aside")
    with open_engine(log, sync=sync) as engine:
        engine.ingest(payment("before"), "Payment")
        monkeypatch.chdir("/")  # a relative path names what it named at the start
        time.sleep(0.1)
        assert engine.core.log.state == "ok"
        monkeypatch.chdir(tmp_path)
        if what in ("folder", "segments"):
            shutil.rmtree(log if what == "folder" else log / "segments")
        elif what == "segment":
            segment_files(log)[-1].unlink()
        elif what == "lock":
            (log / "lock").unlink()
        else:
            log.rename(aside)
            if what == "replaced":
                shutil.copytree(aside, log)
        until(lambda: engine.core.log.state == "gone", 2.0)
        before = engine.core.next_sequence, count(engine)
        refused = pytest.raises(LogError, match=r"removed or replaced.*not ingested")
        with refused:
            engine.ingest(payment("after"), "Payment")
        with refused:
            engine.score(payment("after"), pipeline="pay")
        assert (engine.core.next_sequence, count(engine)) == before
        assert "removed or replaced" in engine.check_log()[0]
        assert engine.check_log() == []
        if what == "moved":
            aside.rename(log)
            until(lambda: engine.core.log.state == "ok")
            assert engine.check_log() == ["the event log is taking events again"]
            assert engine.ingest(payment("after"), "Payment") == "applied"
    if what == "moved":
        assert [e.values["id"] for e in events_of(log)] == ["before", "after"]


def test_an_event_that_is_too_large_says_nothing_of_the_log(tmp_path):
    with open_engine(tmp_path, segment_bytes=1 << 15) as engine:
        with pytest.raises(LogError, match="too large"):
            engine.ingest(payment("a", note="x" * 40000), "Payment")
        assert engine.core.log.state == "ok"
        assert engine.core.log.taking is None


@as_root
def test_a_disk_that_fills_under_a_table(small_disk):
    """How many rows are in is said; those that are not may be sent again."""
    rows = [payment(f"e{i}", at=i, note="x" * 900) for i in range(6000)]
    table = table_of(rows)
    for scored in (False, True):
        log = small_disk / f"log{scored}"
        with open_engine(log, segment_bytes=1 << 18, sync="never") as engine:
            with pytest.raises(LogError, match=r"the first \d+ of 6000 rows were ingested") as caught:
                engine.score_batch(table, pipeline="pay") if scored else engine.ingest(table, event="Payment")
            n = int(re.search(r"first (\d+) of", str(caught.value))[1])
            assert 100 < n < 6000
            assert count(engine) == n == engine.core.next_sequence
            ids = [e.values["id"] for e in events_of(log)]
            assert ids == [f"e{i}" for i in range(n)]
        shutil.rmtree(log)


@as_root
def test_rows_that_were_refused_are_no_duplicates(small_disk):
    """The rows behind the refusal are ingested when the table is sent again, the ones before it are duplicates."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    rows = [payment(f"e{i}", at=i, note="x" * 900) for i in range(2000)]
    table = table_of(rows)
    with open_engine(small_disk / "log", segment_bytes=1 << 18, scores=0.0) as engine:
        with pytest.raises(LogError, match="rows were ingested") as caught:
            engine.score_batch(table, pipeline="pay")
        n = int(re.search(r"first (\d+) of", str(caught.value))[1])
        assert 0 < n < 2000
        ballast.unlink()
        outcomes = engine.score_batch(table, pipeline="pay")["outcome"].to_pylist()
        assert outcomes == ["duplicate"] * n + ["applied"] * (2000 - n)
        assert count(engine) == 2000
    # A row that was in but not decided on is logged again, as a duplicate.
    events = events_of(small_disk / "log")
    assert sorted({e.values["id"] for e in events}) == sorted(r["id"] for r in rows)
    assert sum(OUTCOMES[e.outcome] == "applied" for e in events) == 2000


def test_a_limit_of_file_size(tmp_path):
    """The same where no small disk can be mounted: files may not grow, in a process of its own."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from oracles.log_app import count, open_engine, payment
from penstock.errors import LogError
engine = open_engine(Path({str(tmp_path)!r}), segment_bytes=1 << 16)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
accepted = 0
for i in range(10000):
    try:
        engine.ingest(payment(f"e{{i}}", at=i), "Payment")
        accepted += 1
    except LogError as error:
        print(error)
        break
assert count(engine) == accepted
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert engine.ingest(payment("again", at=i), "Payment") == "applied"
engine.close()
print(accepted)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refusal, accepted = done.stdout.splitlines()
    assert "File too large" in refusal
    assert "not ingested" in refusal
    assert len(events_of(tmp_path)) == int(accepted) + 1


@as_root
def test_a_disk_without_room_for_a_log(small_disk):
    with pytest.raises(LogError, match="No space left"):
        open_engine(small_disk / "log", segment_bytes=1 << 23)
    assert segment_files(small_disk / "log") == []
    with open_engine(small_disk / "log", segment_bytes=1 << 18) as engine:
        assert engine.ingest(payment("a"), "Payment") == "applied"


# A folder that cannot be used


@as_root
def test_a_read_only_disk(small_disk):
    log = small_disk / "log"
    with open_engine(log, segment_bytes=1 << 16) as engine:
        engine.ingest(payment("a"), "Payment")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LogError, match="Read-only file system"):
        open_engine(log)
    with pytest.raises(LogError, match="Read-only file system"):
        open_engine(small_disk / "new")
    # Reading is possible.
    engine = Engine(APP)
    assert recover_state(engine, LogFolder(log)).events == 1
    assert count(engine) == 1


def test_permission_denied(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o500)
    tmp_path.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.chdir(tmp_path)  # nobody may not walk there
                os.setgid(65534)
                os.setuid(65534)
            for name in ("mine", "mine/log"):
                try:
                    open_engine(Path(os.path.relpath(tmp_path / name)))
                except LogError as error:
                    os.write(write, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as stream:
        lines = stream.read().splitlines()
    os.waitpid(child, 0)
    assert len(lines) == 2
    assert all("cannot be used as a log folder" in line and "Permission denied" in line for line in lines)


def test_a_folder_in_use(tmp_path):
    """By this process, by another, and free again when that one is gone."""
    with open_engine(tmp_path), pytest.raises(LogError, match="this process has the log folder open already"):
        open_engine(tmp_path)
    program = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from oracles.log_app import open_engine
engine = open_engine(Path({str(tmp_path)!r}))
print("ready", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(LogError, match=f"process {other.pid}"):
        open_engine(tmp_path)
    other.kill()
    other.wait()
    open_engine(tmp_path).close()


@pytest.mark.parametrize("what", ["file", "segments", "lock"])
def test_a_path_that_is_no_folder(tmp_path, what):
    log = tmp_path / "log"
    if what == "file":
        log.write_text("x")
    else:
        log.mkdir()
        if what == "segments":
            (log / "segments").write_text("x")
        else:
            (log / "lock").mkdir()
    with pytest.raises(LogError, match="cannot be used as a log folder"):
        open_engine(log)


def test_segments_without_an_identity(tmp_path):
    with open_engine(tmp_path) as engine:
        engine.ingest(payment("a"), "Payment")
    (tmp_path / "log.json").unlink()
    with pytest.raises(LogError, match=r"log\.json: missing"):
        open_engine(tmp_path)
    with pytest.raises(LogError, match="no event log here"):
        LogFolder(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    open_engine(tmp_path).close()
    (tmp_path / "segments" / "spare-12345").write_bytes(bytes(1 << 16))
    open_engine(tmp_path).close()
    assert list((tmp_path / "segments").iterdir()) == []


# The clock


def test_ingest_time_never_goes_back(tmp_path):
    """A log whose last event is of the future: said, and new events are not before it."""
    with open_engine(tmp_path) as engine:
        for i in range(3):
            engine.ingest(payment(f"e{i}", at=i), "Payment")
    ahead = time.time_ns() // 1000 + 3600 * SECOND
    log_id = json.loads((tmp_path / "log.json").read_bytes())["log_id"]
    path = segment_files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    last = next(r for r in reversed(read_log(tmp_path)) if r.kind == "event")
    struct.pack_into("<q", data, last.offset + 24, ahead)
    native.put_record(data, log_id, 1, last.offset, last.length)
    path.write_bytes(data)
    with open_engine(tmp_path) as engine:
        assert 3590 * SECOND < engine.recovery.clock_behind_us <= 3600 * SECOND
        assert any("clock" in line for line in engine.recovery.lines())
        engine.ingest(payment("new", at=5), "Payment")
        engine.ingest(payment("newer", at=6), "Payment")
    times = [e.ingest_time for e in events_of(tmp_path)]
    assert times[-3:] == [ahead] * 3
    assert times == sorted(times)


def test_clock_steps(tmp_path):
    """A step of the wall clock is counted. It is faked below the program, by a library that adds to what clock_gettime
    says."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "step.c"
    source.write_text("""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
long penstock_step;
int clock_gettime(clockid_t which, struct timespec *t) {
    int code = (int)syscall(SYS_clock_gettime, which, t);
    if (which == CLOCK_REALTIME) t->tv_sec += penstock_step;
    return code;
}
""")
    library = tmp_path / "step.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    program = f"""
import ctypes, sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from oracles.log_app import open_engine, payment
step = ctypes.c_long.in_dll(ctypes.CDLL({str(library)!r}), "penstock_step")
engine = open_engine(Path({str(tmp_path / "log")!r}))
def wait(n):
    until = time.monotonic() + 10
    while engine.core.log.stats().clock_steps < n and time.monotonic() < until:
        time.sleep(0.01)
    return engine.core.log.stats()
engine.ingest(payment("a"), "Payment")
time.sleep(0.1)
assert engine.core.log.stats().clock_steps == 0
step.value = -100
stats = wait(1)
print(stats.clock_steps, round(stats.last_step_us / 1e6))
engine.ingest(payment("b", at=1), "Payment")
step.value = 50
stats = wait(2)
print(stats.clock_steps, round(stats.last_step_us / 1e6))
engine.ingest(payment("c", at=2), "Payment")
engine.close()
"""
    env = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["1 -100", "2 150"]
    times = [e.ingest_time for e in events_of(tmp_path / "log")]
    assert times == sorted(times)
    assert times[1] - times[0] < 5 * SECOND
    assert times[2] - times[1] > 40 * SECOND


# Reading while another writes


def test_live_readers(tmp_path):
    """A log that is written, rolled and sealed all the time reads as of some moment: a whole prefix, never damage."""
    engine = open_engine(tmp_path, segment_bytes=1 << 16, sync="1ms")
    stop = threading.Event()
    written = [0]

    def write():
        while not stop.is_set():
            i = written[0]
            if i % 3:
                engine.score(payment(f"e{i}", at=i, note="n" * (i % 40)), pipeline="pay")
            else:
                engine.ingest(visit(at=i), event="Visit")
            written[0] = i + 1
            if i % 20 == 0:
                time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until = time.monotonic() + 1.5
        reads = 0
        while time.monotonic() < until:
            before = written[0]
            reader = Engine(APP)
            found = recover_state(reader, LogFolder(tmp_path))
            assert before <= found.history.last_sequence + 1 <= written[0] + 1
            assert found.damages == []
            assert found.events == found.history.last_sequence + 1
            reads += 1
    finally:
        stop.set()
        thread.join()
        engine.close()
    assert reads > 3
    assert len(segment_files(tmp_path)) > 5


def test_a_segment_that_is_cut_while_it_is_read(tmp_path):
    """The writer seals, and so shortens, the file that somebody reads: the reader's memory stays as it was."""
    engine = open_engine(tmp_path, segment_bytes=1 << 20)
    for i in range(100):
        engine.ingest(payment(f"e{i}", at=i), "Payment")
    folder = LogFolder(tmp_path)
    segment = folder.segment(1)
    engine.close()
    assert segment_files(tmp_path)[0].stat().st_size < 1 << 17
    end, damages, scan = folder.check(segment)
    assert (scan.events, damages) == (100, [])
    assert bytes(segment.data[(1 << 20) - 8 :]) == bytes(8)
    segment.close()
    with folder.segment(1).data as data:
        assert len(data) == end


# A log that was written by the first version


def test_a_log_of_version_1_opens(tmp_path):
    """tests/data/log_v1, made by tests/oracles/make_log_v1.py: it must open for ever, with these values."""
    log = Path(shutil.copytree(DATA, tmp_path / "log"))
    assert len(segment_files(log)) > 1
    entries = read_log(log, check=True)
    events = [e for e in entries if e.kind == "event"]
    assert [e.sequence for e in events] == list(range(40))
    engine = open_engine(log, app=APP_V1)
    with engine:
        assert engine.recovery.events == 40
        assert engine.recovery.damages == []
        rows = engine.features("spend", ["c0", "c1", "ünï"], as_of=T0 + 10**9).rows
        assert rows == [
            {"spend.count_1h": 13, "spend.sum_amount_1h": 7.5, "spend.last_note_1h": "note 33"},
            {"spend.count_1h": 13, "spend.sum_amount_1h": 11.0, "spend.last_note_1h": "note 37"},
            {"spend.count_1h": 12, "spend.sum_amount_1h": 13.0, "spend.last_note_1h": "note 35"},
        ]
        again = engine.score({**events[0].values})
        first = next(e for e in entries if e.kind == "score" and e.sequence == 0)
        assert (again.outcome, again.id, again.action) == ("duplicate", first.score_id, "approve")
        assert engine.core.watermark(0) == T0 + 39 * SECOND
    with open_engine(log, app=APP_V1) as engine:
        assert engine.core.next_sequence == 40


def test_the_first_decision_is_repeated_though_the_pipeline_is_another_now(tmp_path):
    """S16: as long as its words mean the same; the plan, and so parity's comparison, is another."""
    with open_engine(tmp_path / "log") as engine:
        decisions = [engine.score(payment(f"p{i}", i), pipeline="pay") for i in range(6)]
    assert [d.action for d in decisions] == ["approve"] * 3 + ["review"] * 3

    def changed(**rule):
        rule = {"name": "many", "when": "spend.count_3000d > 3", "action": "review", "reason": "many"} | rule
        return APP | {"pay": msgspec.structs.replace(APP["pay"], rules=[Rule(**rule)])}

    app = changed(when="spend.count_3000d > 100")
    with open_engine(tmp_path / "log", app=app) as engine:
        again = [engine.score(payment(f"p{i}", i), pipeline="pay") for i in range(6)]
        assert [(d.outcome, d.id, d.action) for d in again] == [("duplicate", d.id, d.action) for d in decisions]
        assert engine.score(payment("p6", 6), pipeline="pay").action == "approve"
    assert parity(app, tmp_path / "log").pipelines[0].other_plans == 6
    # Other words: it is decided anew, and not applied again.
    with open_engine(tmp_path / "log", app=changed(action="decline")) as engine:
        anew = engine.score(payment("p5", 5), pipeline="pay")
        assert (anew.outcome, anew.action) == ("duplicate", "decline")
        assert anew.id != decisions[5].id
