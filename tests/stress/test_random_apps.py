"""Random apps for some seconds (`make stress` runs them for as long as is said), and that a fault would be seen.

What must stay true: each fault that is planted here is found; the seed of an app that differs is in the failure.
"""

import random
import time
from dataclasses import replace

import pytest

from stress import check, exact, run, sql, stream
from stress.apps import BASE, Aggregate, App, Case, Field, Op, Source, View, definitions, draw, shown
from stress.shrink import shrink

SECOND = 10**6
BUDGET = 20.0  # seconds


def test_random_apps_give_what_two_other_implementations_give():
    first = random.SystemRandom().randrange(10**9)
    end, seed = time.monotonic() + BUDGET, first
    while seed == first or time.monotonic() < end:
        case = draw(seed, most_events=300)
        found = check.Checker(case, most_reads=60, most_cells=2_000).run()
        again = f"make stress ARGS='--seed {seed} --apps 1 --events 300 --reads 60 --cells 2000'"
        assert not found.differences, f"{found.differences[0]}\n{again}"
        assert found.values
        seed += 1


FIELDS = (Field("card", "string"), Field("card2", "string"), Field("shop", "int64"), Field("x", "float64", True))


def small(*aggregates, ops=(), include=False, lateness=0):
    """A case of one source and one view over `x`; ops: (kind, second, x)."""
    source = Source("A", (*FIELDS, Field("at", "timestamp")), lateness, 0, None)
    view = View("v", "A", "card", None, aggregates, include)
    app = App((source,), (("card", None), ("shop", None)), (view,), ("A",))
    rows = [
        Op(kind, "A", {"card": "k", "card2": "k", "shop": 1, "x": x, "at": BASE + at * SECOND}) for kind, at, x in ops
    ]
    return Case(app, tuple(rows))


STREAM = [("score", at, x) for at, x in ((0, 0.1), (1, None), (2, 0.2), (3, 0.3), (3, 0.7), (13, 5.0))]
BY_HAND = [
    (Aggregate("count", None, (3 * SECOND,)), [0, 1, 2, 2, 3, 0]),
    (Aggregate("count", "x", (3 * SECOND,)), [0, 1, 1, 1, 2, 0]),
    (Aggregate("sum", "x", (3 * SECOND,), closed="both"), [None, 0.1, 0.1, 0.1 + 0.2, 0.6, None]),
    (Aggregate("sum", "x", (None,)), [None, 0.1, 0.1, 0.1 + 0.2, 0.6, 1.3]),
    (Aggregate("max", "x", (None,), closed="left"), [None, 0.1, 0.1, 0.2, 0.2, 0.7]),
    (Aggregate("first", "x", (None,), ttl=2 * SECOND), [None, 0.1, 0.1, None, None, None]),
    (Aggregate("last", "x", (5 * SECOND,), where=("<", "x", 0.25), default=-1.0), [-1.0, 0.1, 0.1, 0.2, 0.2, -1.0]),
]


@pytest.mark.parametrize(("aggregate", "expected"), BY_HAND, ids=[f"{a.function}" for a, _ in BY_HAND])
def test_both_oracles_give_what_a_hand_computes(aggregate, expected):
    case = small(aggregate, ops=STREAM)
    streamed = stream.run(case)
    reads = [v.reads["v"] for v in streamed.verdicts]
    found = exact.read_all(streamed, reads)
    name = exact.names_of(case.app.views[0])[0][0]
    assert [found[r][name][0] for r in reads] == expected
    plan = check.compile_plan(definitions(case.app))
    for read, name, value, status, slack in sql.read_all(plan, streamed, reads):
        assert (sql.close(found[read][name][0], value, slack), found[read][name][1]) == (True, status)


def test_a_late_event_of_its_own_future_reads_invalid():
    case = small(Aggregate("count", None, (None,), default=5), ops=[("score", 10, 1.0), ("score", 9, 1.0)])
    streamed = stream.run(case)
    read = streamed.verdicts[1].reads["v"]
    assert streamed.verdicts[1].outcome == "late"
    assert exact.read_all(streamed, [read])[read] == {"v.count_lifetime": (None, "INVALID")}
    plan = check.compile_plan(definitions(case.app))
    assert [row[2:4] for row in sql.read_all(plan, streamed, [read])] == [(None, "INVALID")]


PLANTED = {
    "a value one bit off": lambda v, s: (v + 2**-52, s) if isinstance(v, float) else (v, s),
    "a count one too many": lambda v, s: (v + 1, s) if type(v) is int else (v, s),
    "another status": lambda v, s: (v, "NOT_FOUND" if s == "NULL_VALUE" else s),
}


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize("way", ["score", "batch", "replay", "log"])
def test_a_planted_fault_is_found(monkeypatch, fault, way):
    """What differs by one bit, one count or one status is told, whichever way in."""
    case = small(Aggregate("count", None, (3 * SECOND,)), Aggregate("mean", "x", (None, SECOND)), ops=STREAM)
    assert check.Checker(case).run((way,)).differences == []
    if way in ("batch", "replay") and fault == "another status":
        return  # a table has no statuses
    right = check.Checker.expect

    def wrong(self, streamed, reads):
        found = right(self, streamed, reads)
        return {r: {n: PLANTED[fault](v, s) for n, (v, s) in values.items()} for r, values in found.items()}

    monkeypatch.setattr(check.Checker, "expect", wrong)
    assert check.Checker(case).run((way,)).differences


def test_the_oracles_see_each_other(monkeypatch):
    """A rule that only one of them has is told."""
    case = small(Aggregate("count", None, (3 * SECOND,), closed="both"), ops=STREAM)
    monkeypatch.setattr(exact, "bisect_left", exact.bisect_right)
    assert any(d.startswith("the oracles differ") for d in check.Checker(case).run(("score",)).differences)


def test_a_difference_is_made_small():
    case = draw(11, 300)
    marked = next(o for o in case.ops if o.kind == "score")

    def differs(case):
        return any(o.row["at"] == marked.row["at"] for o in case.ops)

    made = shrink(case, differs, 30.0)
    assert len(made.ops) == 1
    assert len(made.app.views) == 1
    assert len(made.app.views[0].aggregates) == 1
    compile(shown(made), "shown", "exec")


def test_a_crash_is_a_difference(monkeypatch):
    worker = run.start()
    worker.since = time.monotonic()
    worker.process.kill()
    worker.process.join()
    assert run.answer(worker) == (0, 0, ["crashed: the process ended with -9"])


def test_a_seed_gives_the_same_case():
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert replace(draw(5), seed=6) != draw(5)
