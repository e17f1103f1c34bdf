"""Window state against the slow oracle, bit for bit, on generated streams (hot path under test).

Streams hold ties, nulls, late, ancient and future events, floats of mixed scale, integers near 2^63, where masks,
request events, reads at an older T, also beyond what state reaches, copies of the state in mid-stream and sweeps. Every
bit of a read must agree.
"""

import math
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.windows import WindowOracle
from penstock._ext.windows import FUNCTIONS, Output, WindowStore

KEYS = ["a", "1", 1, "a key that does not fit into the header of a blob"]
ARITHMETIC = {"sum", "mean", "var_samp", "var_pop", "stddev_samp", "stddev_pop"}


def bits(row):
    """Values that compare equal only if they are the same bits (a float NaN never occurs)."""
    return [(struct.pack("<d", v) if isinstance(v, float) else (type(v), v), status) for v, status in row]


def allowed(function, kind):
    if function in ARITHMETIC:
        return kind in ("float64", "int64", "bool")
    return not (function in ("min", "max") and kind == "string")


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 12.34, 1e300, -1e300, 1e-300, 5e-324, 1.7976931348623157e308]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**6), 10**6).map(lambda cents: cents / 100),
)
VALUES = {
    "float64": st.one_of(st.none(), FLOATS, st.just(math.nan)),
    "int64": st.one_of(st.none(), st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1), st.just(2**63 - 1)),
    "bool": st.one_of(st.none(), st.booleans()),
    "timestamp": st.one_of(st.none(), st.integers(-(2**60), 2**60)),
    "string": st.one_of(st.none(), st.sampled_from(["", "a", "b", "ü€", "x" * 40])),
}


@st.composite
def layouts(draw):
    columns = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3))
    n_where = draw(st.sampled_from([0, 0, 1, 3]))
    outputs = []
    for _ in range(draw(st.integers(1, 10))):
        function = draw(st.sampled_from(FUNCTIONS))
        closed = draw(st.sampled_from(["right", "both", "left"]))
        fitting = [c for c, kind in enumerate(columns) if function == "count" or allowed(function, kind)]
        if not fitting:
            function = "count"
        outputs.append(
            Output(
                function=function,
                column=None if function == "count" else draw(st.sampled_from(fitting)),
                where=draw(st.sampled_from([None, *range(n_where)])),
                window=draw(st.sampled_from([None, 1, 5, 20, 100] + [0] * (closed == "both"))),
                closed=closed,
                ttl=draw(st.sampled_from([None, 0, 3])) if function in ("first", "last") else None,
            )
        )
    split = draw(st.integers(0, len(outputs)))
    lateness = draw(st.sampled_from([0, 10, 60]))
    # Not shorter than any window.
    retention = draw(st.sampled_from([None, 100, 130])) if any(o.window is None for o in outputs) else None
    return columns, outputs, [split, len(outputs) - split], n_where, lateness, retention


@st.composite
def streams(draw):
    columns, outputs, groups, n_where, lateness, retention = draw(layouts())
    row = st.tuples(*[VALUES[kind] for kind in columns])
    mask = st.integers(0, 2**n_where - 1)
    keys = st.sampled_from(KEYS)
    step = st.one_of(
        st.tuples(st.just("event"), keys, st.sampled_from([0, 0, 1, 3, 40, 500]), st.integers(0, 70), row, mask),
        st.tuples(st.just("event"), st.just("a"), st.just(0), st.just(0), row, mask),
        st.tuples(st.just("read"), keys, st.integers(-70, 30), st.none() | st.tuples(st.integers(-9, 9), row, mask)),
        st.just(("copy",)),
        st.just(("sweep",)),
    )
    return columns, outputs, groups, n_where, lateness, retention, draw(st.lists(step, max_size=60))


@settings(max_examples=400, deadline=None)
@given(streams())
def test_stream_equals_oracle(stream):
    columns, outputs, groups, n_where, lateness, retention, steps = stream

    def make():
        return WindowStore(columns, outputs, groups, lateness, n_where, fingerprint=11, retention=retention)

    store, oracle = make(), WindowOracle(columns, outputs, groups, lateness, retention)
    watermark = 0
    for step in steps:
        if step[0] == "event":
            _, key, ahead, behind, values, mask = step
            event_time = watermark + ahead if ahead else watermark - behind
            if event_time < watermark - lateness:
                continue  # the caller drops or quarantines it
            version = store.version(key)
            assert store.apply(key, event_time, values, mask) == version + 1
            oracle.apply(key, event_time, values, mask)
            watermark = max(watermark, event_time)
            for group in range(2):
                assert bits(store.read(key, group, event_time)) == bits(oracle.read(key, group, event_time))
        elif step[0] == "read":
            _, key, offset, extra = step
            as_of = watermark + offset  # also what state no longer reaches: INVALID
            if extra is not None:
                extra = (as_of + extra[0], *extra[1:])
            for group in range(2):
                expected = bits(oracle.read(key, group, as_of, extra))
                assert bits(store.read(key, group, as_of, extra)) == expected
        elif step[0] == "copy":
            moved = make()
            moved.load(store.dump())
            store = moved
        else:
            before = store.stats().entities
            released = store.sweep(watermark, 2)
            assert store.stats().entities == before - released
            oracle.advance(watermark)
    for key in KEYS:
        for group in range(2):
            for as_of in (watermark, watermark - lateness, watermark - lateness - 1, watermark + 7):
                assert bits(store.read(key, group, as_of)) == bits(oracle.read(key, group, as_of))


ALL = [
    Output(function, None if function == "count" else 0, None, window, closed)
    for function in FUNCTIONS
    for window, closed in [(None, "right"), (50, "right"), (1000, "both"), (1000, "left")]
]


def mixed_value(rng):
    return rng.choice(
        [
            None,
            round(rng.uniform(0, 500), 2),
            rng.gauss(0, 1),
            rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300),
            -0.0,
        ]
    )


@pytest.mark.parametrize("seed", range(6))
def test_any_arrival_order_within_lateness_gives_the_same_bits(seed):
    """S13, S14: features(as_of) once everything is in; ties keep their relative order."""
    rng = random.Random(seed)
    lateness = 400
    events = sorted((rng.randint(0, 3000) if rng.random() < 0.7 else 1500, i) for i in range(500))
    events = [(t, i, mixed_value(rng)) for t, i in events]
    reads = {}
    for order in range(4):
        if order == 0:
            arrival = list(events)
        else:
            delay = rng.choice([5, 100, lateness // 2])
            # a tie keeps its order: the delay is a function of the event time
            delays = {}
            arrival = sorted(events, key=lambda e: (e[0] + delays.setdefault(e[0], rng.uniform(0, delay)), e[0], e[1]))
        store = WindowStore(["float64"], ALL, lateness=lateness)
        for t, _, value in arrival:
            store.apply("k", t, [value])
            if order == 2 and rng.random() < 0.3:
                store.read("k", 0, t)
            if order == 3 and rng.random() < 0.1:
                store.read("k", 0, store.stats().watermark + rng.randint(-lateness, 5000))
        newest = max(t for t, _, _ in events)
        reads[order] = [bits(store.read("k", 0, newest - back)) for back in (0, 1, 17, 49, 50, 399, 400)]
    oracle = WindowOracle(["float64"], ALL, lateness=lateness)
    for t, _, value in events:
        oracle.apply("k", t, [value])
    assert reads[0] == [bits(oracle.read("k", 0, newest - back)) for back in (0, 1, 17, 49, 50, 399, 400)]
    assert reads[1] == reads[0]
    assert reads[2] == reads[0]
    assert reads[3] == reads[0]


def test_long_stream_with_full_chunks_late_events_and_strings_equals_oracle():
    """Enough events for several full chunks, splits, dropped chunks, sealed summaries and a grown value table."""
    rng = random.Random(5)
    columns = ["float64", "int64", "string"]
    outputs = [
        Output(function, column, where, window)
        for function in ("sum", "min", "max", "first", "last", "distinct_count", "var_samp", "count_col")
        for column, where in ((0, None), (1, 0), (2, None))
        if allowed(function, columns[column])
        for window in (60, 4000, None)
    ]
    lateness = 500
    store = WindowStore(columns, outputs, lateness=lateness, n_where=1)
    oracle = WindowOracle(columns, outputs, lateness=lateness)
    watermark = 0
    for i in range(4000):
        watermark += rng.choice([0, 0, 1, 5])
        t = watermark if rng.random() < 0.7 else watermark - rng.randint(0, lateness)
        row = [mixed_value(rng), rng.choice([None, 3, rng.randint(-(2**63), 2**63 - 1)]), str(rng.randint(0, 400))]
        mask = int(rng.random() < 0.01 or i < 50)
        store.apply("k", t, row, mask)
        oracle.apply("k", t, row, mask)
        if i % 199 == 0:
            as_of = watermark - rng.choice([0, 1, 300, lateness])
            extra = (as_of, row, 1) if i % 2 else None
            assert bits(store.read("k", 0, as_of, extra)) == bits(oracle.read("k", 0, as_of, extra))
            assert bits(store.read("k", 0, watermark)) == bits(oracle.read("k", 0, watermark))
            moved = WindowStore(columns, outputs, lateness=lateness, n_where=1)
            moved.load(store.dump())
            store = moved
    stats = store.stats()
    assert stats.applied == 4000
    assert stats.events < 3300, "events beyond longest window + lateness must leave"


def test_request_event_equals_apply_then_read_and_leaves_no_trace():
    rng = random.Random(9)
    store = WindowStore(["float64"], ALL, lateness=100)
    t = 0
    for _ in range(600):
        t += rng.choice([0, 1, 30])
        value = mixed_value(rng)
        state = store.dump()
        with_extra = store.read("k", 0, t, (t, [value]))
        twin = WindowStore(["float64"], ALL, lateness=100)
        twin.load(state)
        twin.apply("k", t, [value])
        assert bits(with_extra) == bits(twin.read("k", 0, t))
        plain = WindowStore(["float64"], ALL, lateness=100)
        plain.load(state)
        assert bits(store.read("k", 0, t)) == bits(plain.read("k", 0, t))
        assert store.version("k") == plain.version("k")
        if rng.random() < 0.8:
            store.apply("k", t, [value])
