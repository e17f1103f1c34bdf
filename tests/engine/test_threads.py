"""Many threads on one engine, and forks: the results are those of some serial order.

What must stay true: every event is applied once, its own count is one of 1..n, and a child of a fork refuses.
"""

import multiprocessing
import os
import random
import sys
import threading
import traceback

import pyarrow as pa
import pytest

from oracles.engine import SlowAggregation, SlowApp, SlowEngine, SlowEvent, SlowPipeline, SlowView, definitions
from penstock import Engine, EngineError, Lifetime, on_demand_feature_view
from penstock.definitions import Aggregation, Event, FeatureView, Pipeline
from penstock.timestamp import Timestamp

SECOND = 10**6
T0 = 1_700_000_000 * SECOND
FIELDS = {"who": "string", "x": "int64", "at": "timestamp"}
COUNTS = (SlowAggregation("count", None, ("1h", "lifetime")), SlowAggregation("sum", "x", ("1h",)))
APP = SlowApp(
    (SlowEvent("E", FIELDS, "1h"),),
    (
        SlowView("all", "E", "who", "who", COUNTS, include=True),
        SlowView("before", "E", "who", "who", COUNTS[:1]),
    ),
    SlowPipeline("p", "E", ("x", "all", "before")),
    {"who": None},
)
KEYS = [f"k{i}" for i in range(6)]


def run_all(workers):
    """Run functions in threads at once, switching often; any exception fails the test."""
    errors = []
    barrier = threading.Barrier(len(workers))

    def guarded(work):
        try:
            barrier.wait()
            work()
        except BaseException:
            errors.append(traceback.format_exc())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(w,)) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors[0]
    assert not any(t.is_alive() for t in threads)


def test_eight_threads_add_up_to_a_serial_order():
    """score, score_many, score_batch, ingest, ingest(table), features and ingest=False, all at once."""
    engine = Engine(definitions(APP), clock="event")
    seen = {key: [] for key in KEYS}  # per key: the count that each scored event had, itself included
    given = []  # every event that went in
    lock = threading.Lock()

    def worker(number):
        rng = random.Random(number)

        def row():
            return {"who": rng.choice(KEYS), "x": rng.randrange(100), "at": T0 + rng.randrange(600) * SECOND}

        def note(rows, counts):
            with lock:
                given.extend(rows)
                for r, n in zip(rows, counts):
                    seen[r["who"]].append(n)

        def work():
            for _ in range(60):
                kind = rng.randrange(6)
                if kind == 0:
                    r = row()
                    decision = engine.score(r, explain=True)
                    f = decision.features
                    assert f["all.count_lifetime"] == f["before.count_lifetime"] + 1
                    note([r], [f["all.count_lifetime"]])
                elif kind == 1:
                    rows = [row() for _ in range(rng.randrange(1, 700))]
                    table = engine.score_batch(pa.Table.from_pylist(rows), explain=True)
                    note(rows, table["all.count_lifetime"].to_pylist())
                elif kind == 2:
                    rows = [row() for _ in range(rng.randrange(1, 300))]
                    engine.ingest(pa.Table.from_pylist(rows))
                    note(rows, [None] * len(rows))
                elif kind == 3:
                    r = row()
                    assert engine.ingest(r) == "applied"
                    note([r], [None])
                elif kind == 4:
                    rows = [row() for _ in range(5)]
                    found = engine.core.score_many(0, rows, True, True)
                    note(rows, [d.features["all.count_lifetime"] for d in found])
                else:
                    key = rng.choice(KEYS)
                    n = engine.features("all", [key], as_of=T0 + 600 * SECOND).rows[0]["all.count_lifetime"]
                    again = engine.features("all", [key], as_of=T0 + 600 * SECOND).rows[0]["all.count_lifetime"]
                    assert again >= n
                    engine.score({"who": key, "x": 1, "at": T0}, ingest=False)
                    engine.stats()

        return work

    run_all([worker(i) for i in range(8)])
    # The order of events decides nothing about the state: any serial order gives what the slow engine gives.
    slow = SlowEngine(APP)
    for r in given:
        slow.ingest("E", r)
    for key in KEYS:
        at = T0 + 600 * SECOND
        assert engine.features("all", [key], as_of=at).rows[0] == {
            n: v for n, (v, _) in slow.features("all", key, at).items()
        }
        total = sum(r["who"] == key for r in given)
        counts = [n for n in seen[key] if n is not None]
        assert all(1 <= n <= total for n in counts)
    assert engine.core.counters()["outcomes"]["E"]["applied"] == len(given)
    assert engine.core.store_stats()[0][1] == len(given)


def test_one_key_s_counts_are_one_to_n():
    """All events have the same time, so every one sees exactly those that were applied before it."""
    engine = Engine(definitions(APP), clock="event")
    counts = []

    def one():
        for _ in range(400):
            counts.append(engine.score({"who": "k", "x": 1, "at": T0}, explain=True).features["all.count_lifetime"])

    def table():
        rows = pa.Table.from_pylist([{"who": "k", "x": 1, "at": T0}] * 700)
        counts.extend(engine.score_batch(rows, explain=True)["all.count_lifetime"].to_pylist())

    run_all([one, table] * 4)
    assert sorted(counts) == list(range(1, 4 * 400 + 4 * 700 + 1))


def test_ids_are_unique_over_threads_and_repeated_events_are_applied_once():
    app = APP._replace(events=(SlowEvent("E", {"id": "int64", **FIELDS}, "1h", "id"),))
    engine = Engine(definitions(app), clock="event")
    found = []

    def work(number):
        rng = random.Random(number)

        def run():
            ids = list(range(500))
            rng.shuffle(ids)
            rows = [{"id": i, "who": "k", "x": 1, "at": T0} for i in ids]
            if number % 2:
                found.extend(zip(ids, engine.score_batch(pa.Table.from_pylist(rows))["id"].to_pylist()))
            else:
                found.extend((r["id"], engine.score(r).id) for r in rows)

        return run

    run_all([work(i) for i in range(8)])
    # Every thread got the same first decision for an event, and no two events the same one.
    assert len(set(found)) == len({i for i, _ in found}) == len({d for _, d in found}) == 500
    assert engine.core.counters()["outcomes"]["E"] == {
        "off": 0, "applied": 500, "duplicate": 3500, "late": 0, "quarantined": 0,
    }  # fmt: skip


class Ping(Event):
    who: str
    at: Timestamp


pings = FeatureView("pings", entity="who", source=Ping, aggregations=[Aggregation("count", windows=[Lifetime])])


def test_a_function_in_python_lets_other_threads_in_and_not_into_the_engine():
    started, release = threading.Event(), threading.Event()

    @on_demand_feature_view(mode="python")
    def slow(at: Timestamp) -> int:
        if at == T0 + 1:
            started.set()
            assert release.wait(30)
        return 1

    engine = Engine({"v": pings, "p": Pipeline("p", event=Ping, features=[slow, pings])}, clock="event")
    order = []

    def blocked():
        engine.score(Ping("k", Timestamp(T0 + 1)))
        order.append("first")

    def waiting():
        assert started.wait(30)
        threading.Timer(0.05, release.set).start()
        order.append(engine.features("pings", ["k"], as_of=T0 + 2).rows[0]["pings.count_lifetime"])

    run_all([blocked, waiting])
    assert sorted(map(str, order)) == ["1", "first"]


# forks


def in_child(check):
    """Fork; run check in the child; the child's complaint, or None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = b""
        try:
            check()
        except BaseException:
            said = traceback.format_exc().encode()
        os.write(writer, said[-4000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert not said, said.decode()


def refuses(call):
    with pytest.raises(EngineError, match=r"made before a fork; call Engine\.reopen\(\)"):
        call()


def lifetime(engine, key="k"):
    return engine.features("pings", [key], as_of=T0 + 10).rows[0]["pings.count_lifetime"]


@pytest.fixture
def engine():
    return Engine({"v": pings, "p": Pipeline("p", event=Ping, features=[pings])}, clock="event")


def test_a_child_refuses_until_it_reopens_and_the_parent_goes_on(engine):
    event = Ping("k", Timestamp(T0))
    first = engine.score(event)
    table = pa.table({"who": ["k"], "at": [T0]})

    def check():
        for call in (
            lambda: engine.score(event),
            lambda: engine.score_batch(table),
            lambda: engine.ingest(event),
            lambda: engine.ingest(table),
            lambda: engine.features("pings", ["k"]),
            lambda: engine.core.score_many(0, [event]),
            lambda: engine.core.ingest_many(0, [event]),
            lambda: engine.replay({"Ping": table}),
            engine.stats,
        ):
            refuses(call)
        assert engine.reopen() is engine
        assert lifetime(engine) == 1
        there = engine.score(event)
        # A node of its own: the last 11 characters of an id name it.
        assert there.id[-11:] != first.id[-11:]
        assert lifetime(engine) == 2
        fresh = Engine({"v": pings, "p": Pipeline("p", event=Ping, features=[pings])})
        assert lifetime(fresh) == 0

    in_child(check)
    assert lifetime(engine) == 1
    assert engine.score(event).id[-11:] == first.id[-11:]
    in_child(lambda: refuses(lambda: engine.score(event)))
    assert lifetime(engine) == 2


def test_a_grandchild_refuses_too(engine):
    def child():
        engine.reopen()
        in_child(lambda: refuses(lambda: lifetime(engine)))
        assert lifetime(engine) == 0

    in_child(child)


def test_forks_while_threads_score_tables(engine):
    """The fork waits for the slice that is running, so the child never finds a half-applied event or a held lock."""
    stop = threading.Event()
    table = pa.table({"who": ["k"] * 2000, "at": [T0] * 2000})
    done = []

    def batches():
        n = 0
        while not stop.is_set():
            engine.score_batch(table)
            n += 2000
        done.append(n)

    def forks():
        try:
            for _ in range(6):
                in_child(check)
        finally:
            stop.set()

    def check():
        refuses(lambda: lifetime(engine))
        engine.reopen()
        n = lifetime(engine)
        engine.score(Ping("k", Timestamp(T0)))
        assert lifetime(engine) == n + 1
        assert engine.core.store_stats()[0][1] == n + 1

    run_all([batches, batches, forks])
    assert lifetime(engine) == sum(done)


def test_two_threads_fork_at_once_with_several_engines(engine):
    others = [Engine({"v": pings}, clock="event") for _ in range(3)]

    def forks():
        for _ in range(8):
            in_child(lambda: [refuses(lambda e=e: lifetime(e)) for e in (engine, *others)])

    def work():
        for i in range(500):
            for e in (engine, *others):
                e.ingest(Ping("k", Timestamp(T0 + i % 7)))

    run_all([forks, forks, work])
    assert [lifetime(e) for e in (engine, *others)] == [500] * 4


def worker(engine, results):
    engine.reopen()
    engine.score(Ping("k", Timestamp(T0)))
    results.put(lifetime(engine))


def test_preload_and_fork(engine):
    """A server that loads its app once and forks its workers."""
    engine.ingest(Ping("k", Timestamp(T0)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(engine, results)) for _ in range(3)]
    for process in workers:
        process.start()
    assert [results.get(timeout=30) for _ in workers] == [2, 2, 2]
    for process in workers:
        process.join(30)
    assert lifetime(engine) == 1
