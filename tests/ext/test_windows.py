"""Window state, rule by rule: edges, nulls, statuses, exactness, keys, errors, memory, release (hot path under test).

Each expectation is written out by hand; the generated comparisons are in test_windows_oracle.py.
"""

import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from oracles.windows import WindowOracle
from penstock._ext.windows import INVALID, NOT_FOUND, NULL_VALUE, OUTSIDE_MAX_AGE, PRESENT, Output, WindowStore

DAY = 86_400_000_000


def store_of(*outputs, columns=("float64",), **more):
    return WindowStore(list(columns), list(outputs), **more)


def values(store, key="k", as_of=0, **more):
    return [value for value, _ in store.read(key, 0, as_of, **more)]


def test_edges_of_the_three_closed_forms():
    """S2: right is T-W < t <= T, both is T-W <= t <= T, left is T-W <= t < T."""
    store = store_of(*[Output("count", window=10, closed=closed) for closed in ("right", "both", "left")])
    for t in (90, 91, 95, 100):
        store.apply("k", t, [1.0])
    assert values(store, as_of=100) == [3, 4, 3]
    assert values(store, as_of=101) == [2, 3, 3]
    assert values(store, as_of=110) == [0, 1, 1]
    assert values(store, as_of=111) == [0, 0, 0]


def test_nulls_are_skipped_and_an_empty_window_is_null():
    """S11: count() counts rows, count(col) values; NaN is null; empty: 0 for counts, null for the rest."""
    names = ["count", "count_col", "sum", "mean", "min", "max", "var_pop", "first", "last", "distinct_count"]
    store = store_of(*[Output(n, None if n == "count" else 0, window=10) for n in names])
    store.apply("k", 1, [None])
    store.apply("k", 2, [math.nan])
    assert store.read("k", 0, 2) == [
        (2 if n == "count" else 0, PRESENT) if n in ("count", "count_col", "distinct_count") else (None, NULL_VALUE)
        for n in names
    ]
    store.apply("k", 3, [4.0])
    assert values(store, as_of=3) == [3, 1, 4.0, 4.0, 4.0, 4.0, 0.0, 4.0, 4.0, 1]
    assert store.read("k", 0, 13)[2] == (None, NULL_VALUE)


def test_unknown_entity():
    store = store_of(Output("count"), Output("sum", 0), Output("distinct_count", 0))
    assert store.read("nobody", 0, 5) == [(0, PRESENT), (None, NOT_FOUND), (0, PRESENT)]
    assert store.read("nobody", 0, 5, (5, [2.5])) == [(1, PRESENT), (2.5, PRESENT), (1, PRESENT)]
    assert store.read("nobody", 0, 5, (5, [None])) == [(1, PRESENT), (None, NULL_VALUE), (0, PRESENT)]
    assert store.stats().entities == 0


def test_first_and_last_follow_the_total_order_and_ttl():
    """S6: among equal times the later arrival is newer; an older event written late is no news. S9: ttl."""
    store = store_of(Output("first", 0), Output("last", 0), Output("last", 0, ttl=5), Output("last", 0, window=3))
    store.apply("k", 10, [1.0])
    store.apply("k", 10, [2.0])
    store.apply("k", 7, [3.0])
    store.apply("k", 10, [None])
    assert values(store, as_of=10) == [3.0, 2.0, 2.0, 2.0]
    assert store.read("k", 0, 15)[2:] == [(2.0, PRESENT), (None, NULL_VALUE)]
    assert store.read("k", 0, 16)[1:3] == [(2.0, PRESENT), (None, OUTSIDE_MAX_AGE)]


def test_where_masks_select_events():
    store = store_of(Output("sum", 0, where=0), Output("count", where=1), Output("max", 0), n_where=2)
    store.apply("k", 1, [5.0], where_mask=0b01)
    store.apply("k", 2, [7.0], where_mask=0b10)
    store.apply("k", 3, [9.0], where_mask=0b00)
    assert values(store, as_of=3) == [5.0, 1, 9.0]


def test_sums_are_exact_and_rounded_once():
    """S13: the sum of 0.1 ten times is not 1.0 when rounded once from the exact value; nothing is lost to 1e300."""
    store = store_of(Output("sum", 0, window=100), Output("mean", 0, window=100), Output("sum", 0))
    for t in range(10):
        store.apply("k", t, [0.1])
    exact = float(Fraction(0.1) * 10)
    assert values(store, as_of=9) == [exact, exact / 10.0, exact]
    for t, value in ((10, 1e300), (11, 5e-324), (12, -1e300)):
        store.apply("k", t, [value])
    assert values(store, as_of=12)[0] == float(Fraction(0.1) * 10 + Fraction(5e-324))
    assert values(store, as_of=110)[:2] == [-1e300, -1e300 / 2.0]  # 1e300 has left the window
    assert values(store, as_of=112)[0] is None


def test_sum_of_negative_zeros_is_positive_zero_and_extremes_order_zeros():
    store = store_of(Output("sum", 0), Output("min", 0), Output("max", 0), Output("distinct_count", 0))
    store.apply("k", 1, [-0.0])
    assert [math.copysign(1, v) for v in values(store, as_of=1)[:3]] == [1, -1, -1]
    store.apply("k", 2, [0.0])
    assert [math.copysign(1, v) for v in values(store, as_of=2)[:3]] == [1, -1, 1]
    assert values(store, as_of=2)[3] == 1


def test_rounding_of_sums_subnormals_ties_and_overflow():
    tiny, huge = 5e-324, 1.7976931348623157e308
    store = store_of(Output("sum", 0, window=1))
    cases = [
        ([tiny, tiny], 2 * tiny),
        ([1.0, 2.0**-53], 1.0),  # a tie goes to even
        ([1.0, 2.0**-53, tiny], 1.0 + 2.0**-52),
        ([1.0 + 2.0**-52, 2.0**-53], 1.0 + 2.0**-51),
        ([huge, huge], None),  # INVALID
        ([-huge, -huge], None),
        ([huge, huge, -huge], huge),
        ([2.2250738585072014e-308, -tiny], 2.225073858507201e-308),
        ([huge, 2.0**970], None),
        ([huge, 2.0**969], huge),
    ]
    for t, (terms, expected) in enumerate(cases):
        for term in terms:
            store.apply("one entity", t, [term])
            store.apply(f"its own {t}", t, [term])
        assert values(store, "one entity", t) == [expected]
        assert values(store, f"its own {t}", t) == [expected]


def test_narrow_sums_widen_before_their_headroom_is_used_up():
    """2^24 terms fit a narrow sum; the count is set in the dump instead of applied one by one."""
    fingerprint = 0x5EED_F00D_1234_5678
    outputs = [Output(f, c, window=w) for f in ("sum", "var_pop") for c in (0, 1) for w in (20, None)]
    store = WindowStore(["float64", "int64"], outputs, fingerprint=fingerprint)
    oracle = WindowOracle(["float64", "int64"], outputs)

    def feed(begin, end):
        for t in range(begin, end):
            row = [t * 0.1 - 3.0, (t % 3 - 1) * (2**63 - 1)]
            store.apply("k", t, row)
            oracle.apply("k", t, row)
            assert store.read("k", 0, t) == oracle.read("k", 0, t)

    feed(0, 37)
    dump = bytearray(store.dump())
    at = dump.find(fingerprint.to_bytes(8, "little"))
    while int.from_bytes(dump[at - 40 : at - 32], "little") != 37:  # a blob's version lies 40 bytes before it
        at = dump.find(fingerprint.to_bytes(8, "little"), at + 8)
    dump[at - 40 : at - 32] = (2**24 - 5).to_bytes(8, "little")
    store.load(dump)
    assert store.version("k") == 2**24 - 5
    used = store.stats().bytes_used
    feed(37, 80)
    assert store.version("k") == 2**24 + 38
    assert store.stats().bytes_used > used, "the sums have moved out of the blob"
    dump = bytearray(store.dump())
    dump[at - 40 : at - 32] = (2**40).to_bytes(8, "little")
    store.load(dump)
    with pytest.raises(ValueError, match="2\\^40"):
        store.apply("k", 80, [1.0, 1])


def test_lifetime_at_an_older_time_remembers_what_has_left_the_ring():
    """The extreme and the last value before T may have left the ring while a newer one after T holds the record."""
    outputs = [Output(f, 0) for f in ("last", "max", "min", "first", "distinct_count")]
    outputs += [Output(f, 1) for f in ("last", "first", "distinct_count")]
    store = WindowStore(["float64", "string"], outputs, lateness=10)
    oracle = WindowOracle(["float64", "string"], outputs, lateness=10)
    for t in range(4000):
        # extremes at 5 and in the last few events; no value at all in between but for a null now and then
        row = [{5: 100.0, 6: -100.0, 3995: 1000.0, 3996: -1000.0}.get(t), {5: "early", 3995: "late"}.get(t)]
        store.apply("k", t, row)
        oracle.apply("k", t, row)
    assert store.stats().events < 1000
    for as_of in (3989, 3994, 3995, 3999):
        assert store.read("k", 0, as_of) == oracle.read("k", 0, as_of)
    assert values(store, as_of=3990)[:3] == [-100.0, 100.0, -100.0]


@pytest.mark.parametrize("noise", [[0], [0, 0, 0, 20, 60, 150]])
def test_extremes_over_many_full_chunks_with_late_spikes(noise):
    """Falling values make every read look again; late spikes go into sealed chunks and split the tail's own."""
    rng = random.Random(2)
    window, lateness = 1500, 4000
    store = WindowStore(
        ["float64"], [Output("max", 0, window=window), Output("min", 0, window=3000)], lateness=lateness
    )
    times, amounts = np.zeros(0, dtype=np.int64), np.zeros(0)
    for i in range(9000):
        t, value = i, float(-i + rng.choice(noise))
        if i > 3000 and rng.random() < 0.15:
            t = i - rng.choice([rng.randint(0, window), window - 20, window - 5, 2990])
            value = float(-t + rng.choice([-40, 0.5, 30]))
        store.apply("k", t, [value])
        times, amounts = np.append(times, t), np.append(amounts, value)
        if i > 2000 and i % 3 == 0:
            expected = [amounts[times > i - window].max(), amounts[times > i - 3000].min()]
            assert values(store, as_of=i) == expected


def test_integer_sums_are_exact_and_leave_int64_as_doubles():
    store = store_of(Output("sum", 0, window=10), Output("mean", 0, window=10), columns=["int64"])
    top = 2**63 - 1
    store.apply("k", 1, [top])
    assert values(store, as_of=1) == [top, float(top)]
    store.apply("k", 2, [1])
    assert values(store, as_of=2) == [float(2**63), float(2**63) / 2.0]
    assert isinstance(values(store, as_of=2)[0], float)
    store.apply("k", 3, [-(2**63)])
    assert values(store, as_of=3)[0] == 0
    assert values(store, as_of=11) == [1 - 2**63, float(1 - 2**63) / 2.0]
    assert values(store, as_of=12) == [-(2**63), -float(2**63)]


def test_variance_survives_a_large_offset():
    """S12, S13: exact; samp needs two rows."""
    names = ["var_samp", "var_pop", "stddev_samp", "stddev_pop"]
    store = store_of(*[Output(n, 0) for n in names])
    store.apply("k", 1, [1e9 + 4])
    assert store.read("k", 0, 1) == [(None, NULL_VALUE), (0.0, PRESENT), (None, NULL_VALUE), (0.0, PRESENT)]
    for t, value in enumerate((7, 13, 16)):
        store.apply("k", t + 2, [1e9 + value])
    assert values(store, as_of=9) == [30.0, 22.5, math.sqrt(30.0), math.sqrt(22.5)]
    for scale in (1e-200, 1e200, 1e-320):
        store.apply(str(scale), 1, [1 * scale])
        store.apply(str(scale), 1, [3 * scale])
    assert values(store, "1e-200", as_of=9)[1] == 0.0  # below the smallest double
    assert store.read("1e+200", 0, 9)[1] == (None, INVALID)


def test_types_of_outputs():
    store = store_of(
        Output("max", 0), Output("min", 1), Output("last", 2), Output("distinct_count", 2), Output("sum", 1),
        columns=["timestamp", "bool", "string"],
    )  # fmt: skip
    assert store.output_types == ("timestamp", "bool", "string", "int64", "int64")
    store.apply("k", 1, [77, True, "grüße"])
    store.apply("k", 2, [None, None, None])
    store.apply("k", 3, [-5, False, ""])
    assert values(store, as_of=3) == [77, False, "", 2, 1]


def test_an_integer_key_and_its_text_are_different_entities():
    store = store_of(Output("count"))
    for key in (1, "1", "1", "", "x" * 24, "x" * 25, "y" * 70_000):
        store.apply(key, 1, [1.0])
    assert [values(store, key, 1)[0] for key in (1, "1", "", "x" * 24, "x" * 25, "y" * 70_000, 2)] == [
        1,
        2,
        1,
        1,
        1,
        1,
        0,
    ]
    assert store.stats().entities == 6


def test_groups_are_read_one_at_a_time():
    store = WindowStore(["float64"], [Output("count"), Output("sum", 0), Output("max", 0)], groups=[1, 2])
    store.apply("k", 1, [3.0])
    assert store.read("k", 0, 1) == [(1, PRESENT)]
    assert store.read("k", 1, 1) == [(3.0, PRESENT), (3.0, PRESENT)]
    with pytest.raises(ValueError, match="group"):
        store.read("k", 2, 1)


def test_version_and_log_position():
    store = store_of(Output("count"))
    assert store.version("k") == 0
    assert store.apply("k", 5, [1.0], log_id=3, sequence=40) == 1
    assert store.apply("k", 2, [1.0], log_id=3, sequence=41) == 2
    assert store.version("k") == 2
    assert store.log_position("k") == (3, 41)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"columns": ["text"], "outputs": []}, r"columns\[0\]: expected one of float64"),
        ({"columns": [], "outputs": [Output("median", 0)]}, r"outputs\[0\].function: expected one of count"),
        ({"columns": [], "outputs": [Output("sum", 0)]}, r"outputs\[0\] \(sum\): column"),
        ({"columns": ["float64"], "outputs": [Output("count", 0)]}, r"outputs\[0\] \(count\): column"),
        ({"columns": ["string"], "outputs": [Output("count"), Output("max", 0)]}, r"outputs\[1\] \(max\): .* type"),
        ({"columns": ["timestamp"], "outputs": [Output("sum", 0)]}, r"outputs\[0\] \(sum\): .* type"),
        ({"columns": ["float64"], "outputs": [Output("sum", 0, where=0)]}, "where"),
        ({"columns": [], "outputs": [Output("count", window=0)]}, "window"),
        ({"columns": [], "outputs": [Output("count", window=-5)]}, "window"),
        ({"columns": [], "outputs": [Output("count", closed="neither")]}, "closed"),
        ({"columns": ["float64"], "outputs": [Output("sum", 0, ttl=5)]}, "ttl"),
        ({"columns": [], "outputs": [Output("count")], "groups": [2]}, "groups"),
        ({"columns": [], "outputs": [Output("count")], "lateness": -1}, "lateness"),
        ({"columns": [], "outputs": [], "n_where": 64}, "n_where"),
        ({"columns": ["int64"] * 65, "outputs": []}, "too large"),
    ],
)
def test_a_wrong_layout_says_what_is_wrong(layout, message):
    with pytest.raises(ValueError, match=message):
        WindowStore(**layout)


def test_a_refused_event_changes_nothing():
    store = store_of(Output("sum", 0), Output("distinct_count", 1), columns=["float64", "string"])
    store.apply("k", 1, [1.0, "a"])
    before = store.dump()
    for event_time, row in ((2, [math.inf, "new"]), (2**62, [1.0, "new"]), (-(2**62), [1.0, "new"])):
        with pytest.raises(ValueError):
            store.apply("k", event_time, row)
        assert store.dump() == before
    with pytest.raises(ValueError):
        store.apply("new entity", 2, [math.inf, "new"])
    assert store.stats().entities == 1
    with pytest.raises(ValueError, match="time"):
        store.read("k", 0, 2**62)


def test_out_of_memory_is_an_error_and_changes_nothing():
    outputs = [Output("sum", 0), Output("last", 1), Output("distinct_count", 1, window=10**9), Output("var_pop", 0)]
    store = WindowStore(["float64", "string"], outputs, max_bytes=1 << 18)
    applied = 0
    with pytest.raises(MemoryError, match="max_bytes"):
        for applied in range(100_000):
            store.apply(f"entity {applied % 50}", applied, [10.0 ** (applied % 600 - 300), f"value {applied}"])
    expected = [store.read(f"entity {i}", 0, applied) for i in range(50)]
    held = store.stats()._replace(bytes_used=0, bytes_mapped=0)
    for i in range(60):
        with pytest.raises(MemoryError):
            store.apply(f"entity {i}", applied, [1e-300, "y" * 5000])
    assert [store.read(f"entity {i}", 0, applied) for i in range(50)] == expected
    assert store.stats()._replace(bytes_used=0, bytes_mapped=0) == held
    assert held.applied == applied


def test_a_dump_is_read_at_another_address_and_refused_by_another_layout():
    outputs = [Output("sum", 0, window=100), Output("last", 1)]
    store = WindowStore(["float64", "string"], outputs, fingerprint=1)
    for t in range(1000):
        store.apply(t % 7, t, [t / 8, str(t)])
    dump = store.dump()
    other = WindowStore(["float64", "string"], outputs, fingerprint=1)
    other.load(dump)
    assert all(other.read(k, 0, 999) == store.read(k, 0, 999) for k in range(7))
    assert other.stats() == store.stats()
    for t in range(1000, 2000):
        store.apply(t % 7, t, [t / 8, str(t)])
        other.apply(t % 7, t, [t / 8, str(t)])
    assert other.dump() == store.dump(), "the same events leave the same bytes, at any address"
    with pytest.raises(ValueError, match="layout"):
        WindowStore(["float64", "string"], outputs, fingerprint=2).load(dump)
    with pytest.raises(ValueError, match="cut short"):
        other.load(dump[:-16])
    with pytest.raises(ValueError, match="not a dump"):
        other.load(b"\0" * len(dump))
    assert all(other.read(k, 0, 1999) == store.read(k, 0, 1999) for k in range(7)), "a refused load changes nothing"


SIMPLE = [
    Output(function, None if function == "count" else 0, window=window)
    for function in ("count", "sum", "mean", "max")
    for window in (60_000_000, 3_600_000_000, DAY)
]


def test_memory_per_entity_and_event_is_as_documented():
    store = WindowStore(["float64"], SIMPLE)
    empty = store.stats().bytes_used
    n = 20_000
    for i in range(n):
        store.apply(f"customer {i}", i, [1.0])
    per_entity = (store.stats().bytes_used - empty) / n
    # header 120, 3 tails 72, cells 8 + 24, sums 72, max 48: 344, in units of 16: 352; first chunk 80; table up to 32
    assert 352 + 80 + 16 <= per_entity <= 352 + 80 + 32
    store = WindowStore(["float64"], SIMPLE)
    store.apply("k", 0, [1.0])
    one = store.stats().bytes_used
    n = 100_000
    for i in range(1, n):
        store.apply("k", i, [1.0])
    assert 16 <= (store.stats().bytes_used - one) / (n - 1) <= 17.2


def test_old_events_leave_and_memory_stays_bounded():
    store = WindowStore(["float64"], [Output("sum", 0, window=1000), Output("max", 0)], lateness=100)
    for t in range(20_000):
        store.apply("k", t, [float(t)])
    used = store.stats().bytes_used
    for t in range(20_000, 200_000):
        store.apply("k", t, [float(t)])
    assert store.stats().bytes_used == used
    assert store.stats().events < 1000 + 100 + 3 * 256
    assert values(store, as_of=199_999) == [float(sum(range(199_000, 200_000))), 199_999.0]


def test_strings_and_values_are_given_back():
    store = WindowStore(["string"], [Output("distinct_count", 0, window=100), Output("last", 0, window=100)])
    for t in range(20_000):
        store.apply("k", t, [f"value {t}"])
    assert store.stats().strings < 800
    used = 0
    for t in range(20_000, 60_000):
        store.apply("k", t, [f"value {t}"])
        if t < 22_000:  # a few chunks fill and go
            used = max(used, store.stats().bytes_used)
    assert store.stats().bytes_used <= used


def test_idle_entities_are_released_and_their_memory_used_again():
    store = WindowStore(
        ["string"], [Output("distinct_count", 0, window=100), Output("last", 0)], lateness=10, retention=100
    )
    for i in range(5000):
        store.apply(i, i // 50, [f"value {i}"])
    used = store.stats().bytes_mapped
    released = 0
    for _ in range(2000):
        n = store.sweep(160, 16)
        assert n <= 16
        released += n
    # idle: newest < 160 - 100 - 2 * 10, so that what may still come starts the entity anew
    assert released == 40 * 50
    assert store.stats().entities == 3000
    assert store.version(40 * 50 - 1) == 0
    assert store.version(40 * 50) == 1
    for _ in range(2000):
        store.sweep(10_000, 16)
    assert store.stats().entities == store.stats().events == store.stats().strings == 0
    for i in range(5000):
        store.apply(i, 20_000, [f"value {i}"])
    assert store.stats().bytes_mapped <= used * 1.02


@pytest.mark.parametrize("ttl", [None, 5])
@pytest.mark.parametrize("keep", [Output("count"), Output("last", 0), Output("first", 0), Output("distinct_count", 0)])
def test_lifetime_is_never_released_without_retention(keep, ttl):
    """S9: ttl is how old a value may be, not when its entity goes."""
    if keep.function in ("first", "last"):
        keep = keep._replace(ttl=ttl)
    store = store_of(Output("sum", 0, window=10), keep)
    store.apply("k", 1, [1.0])
    for _ in range(10):
        assert store.sweep(10**12, 64) == 0
    value = (1.0 if keep.function in ("first", "last") else 1, PRESENT)
    assert store.read("k", 0, 10**12)[1] == ((None, OUTSIDE_MAX_AGE) if keep.ttl else value)


KEPT = [
    Output("count", window=100),
    Output("sum", 0, window=100, closed="both"),
    Output("max", 0, window=20),
    Output("first", 1, ttl=50),
    Output("last", 1),
    Output("distinct_count", 1),
]


def kept_store():
    return WindowStore(["float64", "string"], KEPT, lateness=10, retention=200)


def test_an_entity_is_known_by_its_own_events_and_the_time_alone():
    """S9: with retention until its newest event is older than that, whether sweep has been there or not."""
    store, alone = kept_store(), kept_store()
    store.apply("k", 0, [1.0, "a"])
    alone.apply("k", 0, [1.0, "a"])
    for at, known in ((100, True), (200, True), (201, False), (500, False)):
        expected = alone.read("k", 0, at)
        store.apply("other", at, [1.0, "b"])
        assert store.read("k", 0, at) == expected
        assert expected[2] == (None, NULL_VALUE if known else NOT_FOUND)
        assert expected[4:] == ([("a", PRESENT), (1, PRESENT)] if known else [(None, NOT_FOUND), (0, PRESENT)])


@pytest.mark.parametrize("value", [(3.0, "z"), (None, None)])
@pytest.mark.parametrize("swept_first", [False, True])
def test_after_retention_and_lateness_an_entity_starts_anew(value, swept_first):
    """Its version counts on unless it was released; nothing else is left of what it was, for a request event too."""
    key = "a key of more than twenty-four bytes"
    store, fresh = kept_store(), kept_store()
    for t in range(500):
        store.apply(key, t, [1e300, f"value {t}"])
    for s in (store, fresh):
        s.apply("other", 719, [1.0, "b"])
    assert store.sweep(719, 8) == 0
    if swept_first:
        store.apply("other", 730, [1.0, "b"])
        fresh.apply("other", 730, [1.0, "b"])
        while store.version(key):
            store.sweep(730, 8)
    reads = [s.read(key, 0, 725, (725, list(value))) for s in (store, fresh)]
    assert reads[0] == reads[1]
    assert store.apply(key, 725, value) == (1 if swept_first else 501)
    fresh.apply(key, 725, value)
    for at in (724, 725, 770, 930, 9000):
        assert store.read(key, 0, at) == fresh.read(key, 0, at)
    assert store.stats().strings == fresh.stats().strings
    assert store.stats().events == fresh.stats().events


def test_within_retention_and_lateness_an_entity_goes_on():
    store = kept_store()
    store.apply("k", 0, [1.0, "a"])
    store.apply("k", 210, [1.0, "b"])
    assert store.read("k", 0, 210)[3:] == [(None, OUTSIDE_MAX_AGE), ("b", PRESENT), (2, PRESENT)]


def test_statuses_of_an_older_time_look_at_what_was_before_it():
    """S5, S9: an event after T makes nobody known at T, and one that has left the ring still does."""
    store = WindowStore(["float64"], [Output("sum", 0, window=10), Output("max", 0)], [1, 1], lateness=50)
    store.apply("k", 40, [None])
    assert store.read("k", 0, 30) == [(None, NOT_FOUND)]
    assert store.read("k", 1, 30) == [(None, NOT_FOUND)]
    assert store.read("k", 0, 50) == [(None, NULL_VALUE)]
    assert store.read("k", 0, 51) == [(None, NOT_FOUND)]
    assert store.read("k", 1, 51) == [(None, NULL_VALUE)], "Lifetime: for ever"
    for t in range(1000, 1600):
        store.apply("k", t, [None])
    assert store.stats().events < 600
    assert store.read("k", 1, 1550) == [(None, NULL_VALUE)]


def test_what_state_no_longer_holds_is_invalid():
    """S14, S17: before watermark - lateness nothing is known, also of an entity that nobody has seen."""
    store = store_of(Output("count"), Output("sum", 0, window=5), Output("max", 0), lateness=10)
    store.apply("k", 100, [1.0])
    for key in ("k", "nobody"):
        assert store.read(key, 0, 89) == [(None, INVALID)] * 3
        assert store.read(key, 0, 89, (89, [2.0])) == [(None, INVALID)] * 3
    assert store.read("k", 0, 90) == [(0, PRESENT), (None, NOT_FOUND), (None, NOT_FOUND)]
    store.sweep(200)
    assert store.read("k", 0, 189) == [(None, INVALID)] * 3
    assert store.read("k", 0, 190)[0] == (1, PRESENT)


def test_history_that_nobody_has_is_invalid_until_windows_have_refilled():
    store = store_of(Output("count"), Output("count", window=10), Output("sum", 0, window=10, closed="both"))
    store.miss_before(100)
    store.apply("k", 105, [1.0])
    assert store.read("k", 0, 105) == [(None, INVALID)] * 3
    assert store.read("k", 0, 109) == [(None, INVALID), (1, PRESENT), (None, INVALID)]
    moved = store_of(Output("count"), Output("count", window=10), Output("sum", 0, window=10, closed="both"))
    moved.load(store.dump())
    assert moved.read("k", 0, 110) == [(None, INVALID), (1, PRESENT), (1.0, PRESENT)]


def test_a_window_of_length_0_closed_both_is_that_instant():
    store = store_of(
        Output("count", window=0, closed="both"), Output("sum", 0, window=0, closed="both"), Output("count")
    )
    for t, x in ((1, 1.0), (2, 2.0), (2, 3.0), (3, 4.0)):
        store.apply("k", t, [x])
    assert store.read("k", 0, 3) == [(1, PRESENT), (4.0, PRESENT), (4, PRESENT)]
    assert store.read("k", 0, 3, (3, [0.5])) == [(2, PRESENT), (4.5, PRESENT), (5, PRESENT)]
    assert store.read("k", 0, 4) == [(0, PRESENT), (None, NULL_VALUE), (4, PRESENT)]
    for closed in ("right", "left"):
        with pytest.raises(ValueError, match="longer than 0"):
            store_of(Output("count", window=0, closed=closed))


def test_beyond_the_double_range_is_invalid():
    outputs = [Output(f, 0) for f in ("sum", "mean", "var_pop", "stddev_samp", "max")]
    store = store_of(*outputs)
    for _ in range(2):
        store.apply("k", 1, [1.7e308])
    assert store.read("k", 0, 1) == [(None, INVALID)] * 2 + [(0.0, PRESENT)] * 2 + [(1.7e308, PRESENT)]
    store.apply("k", 1, [-1.7e308])
    assert store.read("k", 0, 1)[0] == (1.7e308, PRESENT)
    assert store.read("k", 0, 1)[2:4] == [(None, INVALID)] * 2


@pytest.mark.parametrize("kind", ["int64", "float64"])
@pytest.mark.parametrize(
    "numbers",
    [
        [10**18 + 7] * 5,
        [4111111111111111] * 10,
        [0.1] * 7,
        [1e-200, 3e-200, 7e-200],
        [1e-320, 3e-320],
        [1750000000_000000000 + 1000 * i for i in range(5)],
        [2**63 - 1, -(2**63), 5],
        [1e150, -1e150, 3.0],
        [1.5, 1e16, -7.25, 5e-324],
        [3],
    ],
)
def test_variance_is_exact(kind, numbers):
    """S13: the numerator exact, rounded once, then divided; 0 for a constant. Right edges at an older time too."""
    if kind == "int64":
        if not all(isinstance(x, int) for x in numbers):
            pytest.skip("no integers")
    else:
        numbers = [float(x) for x in numbers]
    store = store_of(Output("var_pop", 0), Output("var_samp", 0), columns=(kind,), lateness=100)
    for i, x in enumerate(numbers):
        store.apply("k", i, [x])
    for n in range(1, len(numbers) + 1):
        xs = [Fraction(x) for x in numbers[:n]]
        top = n * sum(x * x for x in xs) - sum(xs) ** 2
        scale = Fraction(2) ** (top.numerator.bit_length() - top.denominator.bit_length())
        for ddof, (value, status) in enumerate(store.read("k", 0, n - 1)):
            if n <= ddof:
                assert (value, status) == (None, NULL_VALUE)
                continue
            rounded = Fraction(float(top / scale))
            assert value == float(Fraction(float(rounded) / float(n * (n - ddof))) * scale) if top else value == 0.0


def test_erase_forgets_one_entity_and_nothing_else():
    outputs = [
        Output("sum", 0, window=1000),
        Output("var_pop", 0),
        Output("first", 1),
        Output("last", 1),
        Output("distinct_count", 1),
        Output("distinct_count", 1, window=50),
    ]
    secret = "a secret of some length that is interned"
    key = "somebody@a-rather-long-domain.example"
    store, without = (WindowStore(["float64", "string"], outputs, lateness=5) for _ in range(2))
    rng = random.Random(3)
    for t in range(6000):
        who = rng.choice([key, "b", 7, "7"])
        row = [rng.choice([0.1, 1e300, -1e-300, 5e-324]), rng.choice(["shared", secret if who == key else "c"])]
        store.apply(who, t, row)
        if who != key:
            without.apply(who, t, row)
    assert sorted(store.keys(), key=repr) == sorted([key, "b", 7, "7"], key=repr)
    assert secret.encode() in store.dump()
    assert store.erase(key)
    assert not store.erase(key)
    assert not store.erase("nobody")
    assert sorted(store.keys(), key=repr) == sorted(without.keys(), key=repr)
    assert store.version(key) == 0
    assert store.read(key, 0, 6000) == store.read("nobody", 0, 6000)
    for text in (secret, key):
        assert text.encode() not in store.dump()
    stats, expected = store.stats(), without.stats()
    assert (stats.entities, stats.events, stats.strings) == (expected.entities, expected.events, expected.strings)
    for who in ("b", 7, "7"):
        for at in (5999, 5994, 6500):
            assert store.read(who, 0, at) == without.read(who, 0, at)
    store.apply(key, 6000, [2.0, "again"])
    assert values(store, key, 6000) == [2.0, 0.0, "again", "again", 1, 1]


def test_erasing_everything_gives_all_memory_back():
    store = WindowStore(["string"], [Output("distinct_count", 0), Output("last", 0)])
    empty = store.stats().bytes_used
    store.apply("k", 0, ["a"])
    store.erase("k")
    for i in range(3000):
        store.apply(i % 100, i, [f"value {i % 431}"])
    tables = store.stats()
    for key in list(store.keys()):
        assert store.erase(key)
    stats = store.stats()
    assert (stats.entities, stats.events, stats.strings) == (0, 0, 0)
    assert store.keys() == []
    assert stats.bytes_used - empty <= 2 * 16 * (tables.entities + tables.strings), "only the tables stay grown"


def test_keys_of_a_grown_table():
    store = store_of(Output("count", window=10))
    assert store.keys() == []
    for i in range(3001):
        store.apply(i if i % 2 else f"key {i}" * (1 + i % 3), 0, [1.0])
    expected = {i if i % 2 else f"key {i}" * (1 + i % 3) for i in range(3001)}
    assert len(store.keys()) == 3001
    assert set(store.keys()) == expected


def longest_calls(run):
    """Per call the least of three runs, so that what another process does to one of them does not count; in seconds."""
    runs = [run() for _ in range(3)]
    return sorted((min(times) for times in zip(*runs)), reverse=True)


def test_no_call_pauses_for_a_millisecond():
    """Growing the table to many entities, sweeping them, and releasing one large entity go in small steps."""
    clock = time.perf_counter

    def grow_and_sweep():
        store = WindowStore(["string"], [Output("count", window=100), Output("last", 0, window=100)])
        times = []
        for i in range(40_000):
            begin = clock()
            store.apply(i, 0, ["a"])
            times.append(clock() - begin)
        for i in range(60_000):
            store.apply("large", 0, [f"{i % 977}"])
        for _ in range(1500):
            begin = clock()
            store.sweep(1000, 64)
            times.append(clock() - begin)
        assert store.stats().entities == 0
        return times

    longest = longest_calls(grow_and_sweep)
    assert longest[0] < 0.001, longest[:5]


def of_format_1(store):
    """A dump as format 1 wrote it: the same layout of memory, another number (offset 16 of the header)."""
    dump = bytearray(store.dump())
    dump[16:20] = (1).to_bytes(4, "little")
    return bytes(dump)


def test_stores_of_format_1_load_unless_they_may_be_wrong():
    """Where chunks could be damaged, or ttl released entities, they are refused and built anew."""
    sound = store_of(Output("count"), Output("max", 0, window=10))
    sound.apply("k", 1, [2.0])
    moved = store_of(Output("count"), Output("max", 0, window=10))
    moved.load(of_format_1(sound))
    assert moved.read("k", 0, 1) == [(1, PRESENT), (2.0, PRESENT)]
    assert moved.dump()[16:20] == (2).to_bytes(4, "little"), "from now on of the new format"
    hit = {"columns": ["float64"] * 6}  # records of 7 words
    for outputs, more in (([Output("max", 0, window=10)], hit), ([Output("last", 0, ttl=5)], {})):
        old, new = store_of(*outputs, **more), store_of(*outputs, **more)
        old.apply("k", 1, [2.0] * len(more.get("columns", [0])))
        with pytest.raises(ValueError, match="build it anew"):
            new.load(of_format_1(old))
        assert new.stats().entities == 0
        new.load(old.dump())
