"""SIGKILL under load, again and again on the same folder: what was acknowledged is there, once, and nothing is wrong.

A forked child scores and ingests from several threads, singly and in tables, over segments that roll all the time, and
writes each acknowledged id to a pipe. 40 kills; 300 where CI=true, PENSTOCK_CRASHES where it is set.
"""

import os
import random
import signal
import threading
import time

import pyarrow as pa
import pytest

from oracles.log_app import APP, T0, open_engine, payment, segment_files, visit
from oracles.log_files import OUTCOMES, read_log
from penstock import Engine

CRASHES = int(os.environ.get("PENSTOCK_CRASHES") or (300 if os.environ.get("CI") == "true" else 40))
CHAIN = 8  # kills of one folder
THREADS = 4
KEYS = [f"c{i}" for i in range(7)]


def work(engine, name, out, rng):
    """One thread's load. Event ids are new; what is acknowledged goes into the pipe, with its decision's id."""
    i = 0
    while True:
        kind = rng.random()
        key = rng.choice(KEYS)
        at = time.time_ns() // 1000 - 1_700_000_000_000_000
        if kind < 0.05:
            rows = [payment(f"{name}-{i + j}", at=at + j, customer=rng.choice(KEYS), due=1) for j in range(40)]
            table = pa.Table.from_pylist(rows)
            ids = engine.score_batch(table, pipeline="pay")["id"].to_pylist()
            os.write(out, "".join(f"{row['id']} {id}\n" for row, id in zip(rows, ids)).encode())
            i += 40
            continue
        if kind < 0.3:
            engine.ingest(visit(at=at, customer=key, page=f"{name}-{i}"), event="Visit")
            answer = "-"
        else:
            event = payment(f"{name}-{i}", at=at, customer=key, amount=i / 7, note="n" * rng.randrange(60))
            if kind < 0.5:
                engine.ingest(event, event="Payment")
                answer = "-"
            else:
                answer = engine.score(event, pipeline="pay").id
        os.write(out, f"{name}-{i} {answer}\n".encode())
        i += 1


def child(folder, round, out, options):
    def failed(what):
        # Anything that goes wrong is said to the parent, and ends the child.
        os.write(out, f"error {what.exc_type.__name__}:{str(what.exc_value)[:200].replace(' ', '_')}\n".encode())
        os._exit(1)

    threading.excepthook = failed
    engine = open_engine(folder, **options)
    os.write(out, b"ready -\n")
    for n in range(THREADS):
        rng = random.Random(f"{round} {n}")
        threading.Thread(target=work, args=(engine, f"r{round}t{n}", out, rng), daemon=True).start()
    time.sleep(60)


def crash(folder, round, rng, options):
    """Start a child, kill it somewhere; {id: decision's id or "-"} of what it acknowledged."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            child(folder, round, write, options)
        finally:
            os._exit(1)
    os.close(write)
    text = b""
    try:
        if rng.random() < 0.9:
            text = os.read(read, 1 << 16)  # it has opened the log
            assert text.startswith(b"ready"), "the child could not open the log"
            time.sleep(rng.expovariate(1 / 0.04))
        else:
            time.sleep(rng.random() * 0.02)  # while it recovers
    finally:
        os.kill(pid, signal.SIGKILL)
        while part := os.read(read, 1 << 16):
            text += part
        os.close(read)
        status = os.waitpid(pid, 0)[1]
    lines = text.decode().splitlines(keepends=True)
    pairs = [line.split() for line in lines if line.endswith("\n")]
    assert [pair for pair in pairs if pair[0] == "error"] == []
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return {id: answer for id, answer in pairs if id != "ready"}


def state(engine):
    views = [engine.features(view, KEYS, as_of=T0 + 10**15).rows for view in ("spend", "visits")]
    views.append(engine.features("terminals", [1], as_of=T0 + 10**15).rows)
    return views, [engine.core.watermark(i) for i in range(2)]


def check(folder, acknowledged, rng):
    """Everything that must hold after a kill; the folder is opened, used and closed."""
    with open_engine(folder) as engine:
        assert {d.kind for d in engine.recovery.damages} <= {"tail"}
        entries = read_log(folder)
        events = [e for e in entries if e.kind == "event"]
        assert [e.sequence for e in events] == list(range(len(events)))
        assert engine.core.next_sequence == len(events)
        times = [e.ingest_time for e in events]
        assert times == sorted(times)
        ids = [e.values.get("id") or e.values["page"] for e in events]
        assert len(set(ids)) == len(ids), "an event is there twice"
        assert set(acknowledged) <= set(ids), "an acknowledged event is lost"
        # What a score says was answered, and of which event.
        decided = {e.score_id: ids[e.sequence] for e in entries if e.kind == "score"}
        for id, answer in acknowledged.items():
            assert answer == "-" or decided.get(answer) == id
        # Every value: an engine that never saw a crash ingests the same events.
        fresh = Engine(APP)
        for event in events:
            values = {name: value for name, value in event.values.items() if value is not None}
            nulls = dict.fromkeys(("amount", "note", "paid", "due")) if "id" in values else {}
            outcome = fresh.ingest({**nulls, **values}, event=event.schema["name"])
            assert outcome == OUTCOMES[event.outcome]
        assert state(engine) == state(fresh)
        # Sent again, an event is applied once more nowhere, and gets its first decision.
        scored = [id for id, answer in acknowledged.items() if answer != "-"]
        before = state(engine)
        for id in rng.sample(scored, min(10, len(scored))):
            again = engine.score(payment(id), pipeline="pay")
            assert (again.outcome, again.id) == ("duplicate", acknowledged[id])
        plain = [id for id, answer in acknowledged.items() if answer == "-" and id in ids]
        for id in rng.sample(plain, min(5, len(plain))):
            if events[ids.index(id)].schema["name"] == "Payment":
                assert engine.ingest(payment(id), event="Payment") == "duplicate"
        assert state(engine) == before
    assert not list((folder / "segments").glob("spare-*"))
    assert not list((folder / "segments").glob("*.cut"))


@pytest.mark.timeout(900)
def test_kills(tmp_path):
    rng = random.Random(os.environ.get("PENSTOCK_SEED", "7"))
    # What is imported when first used is imported here, not in every child.
    Engine(APP).score_batch(pa.Table.from_pylist([payment("x", due=1)]), pipeline="pay")
    acknowledged = {}
    total = rolled = 0
    for round in range(CRASHES):
        folder = tmp_path / f"log{round // CHAIN}"
        if round % CHAIN == 0:
            acknowledged = {}
        options = {
            "sync": rng.choice(["10ms", "1ms", "always", "never"]),
            "segment_bytes": rng.choice([1 << 14, 1 << 15, 1 << 17]),
        }
        found = crash(folder, round, rng, options)
        acknowledged |= found
        total += len(found)
        # Now and then the next child opens what a killed one left, without a clean closing in between.
        if rng.random() < 0.7 or round % CHAIN == CHAIN - 1:
            check(folder, acknowledged, rng)
            rolled = max(rolled, len(segment_files(folder)))
    assert total > 20 * CRASHES
    assert rolled > 5


def test_a_kill_between_two_steps(tmp_path):
    """Stopped by a debugger's hand: at every point where the files change, what a kill leaves opens."""
    engine = open_engine(tmp_path / "log", segment_bytes=1 << 14, sync="1ms")
    acknowledged = []
    copies = 0
    for i in range(400):
        engine.ingest(payment(f"e{i}", at=i, note="n" * (i % 90)), "Payment")
        acknowledged.append(f"e{i}")
        if i % 20 == 0:
            # A copy of the folder while the log's thread rolls, seals and cuts.
            target = tmp_path / f"copy{i}"
            (target / "segments").mkdir(parents=True)
            for name in ("log.json", "layouts.json"):
                (target / name).write_bytes((tmp_path / "log" / name).read_bytes())
            for path in segment_files(tmp_path / "log"):
                (target / "segments" / path.name).write_bytes(path.read_bytes())
            with open_engine(target, segment_bytes=1 << 14) as again:
                assert again.core.next_sequence == len(acknowledged)
            copies += 1
    engine.close()
    assert copies == 20
