"""Chunks of window state: one function says head, capacity and size, for every record and number of summaries."""

import random

import pytest

from penstock._ext.windows import Output, WindowStore, chunk_growth, format_1_damaged

CHUNK_HEADER, SUMMARY = 16, 16 + 24  # bytes: the header; a winner and a rest for each min or max of a cell


def test_every_chunk_holds_what_it_says():
    for stride in range(2, 301):
        for summaries in range(201):
            sizes = chunk_growth(stride, summaries)
            held = 0
            for bytes, head, capacity, full in sizes:
                assert head + capacity * stride * 8 <= bytes, (stride, summaries)
                assert capacity > held, (stride, summaries)
                assert head >= CHUNK_HEADER + (SUMMARY * summaries if full else 0), (stride, summaries)
                held = capacity
            assert [full for *_, full in sizes] == [False] * (len(sizes) - 1) + [True]
            assert sizes[0][2] >= 2
            assert held >= 16


def test_what_format_1_could_have_damaged():
    """The layouts that were hit: found by running the old kernel, and the formula agrees."""
    one = [stride for stride in range(2, 33) if format_1_damaged(stride, 1)]
    assert one == [7, 14, 15, 28, 29, 30, 31]
    assert not any(format_1_damaged(stride, 0) for stride in range(2, 301))
    assert all(format_1_damaged(33, summaries) for summaries in (22, 38, 46, 54))
    assert format_1_damaged(62, 6)


def columns_and_outputs(stride, summaries, n_where):
    """Columns and outputs of a layout with records of `stride` words that keep so many min and max of cells."""
    columns = stride - 1 - (n_where > 0)
    outputs = []
    cells = [(c, where) for where in (None, *range(n_where)) for c in range(columns)]
    for i in range(summaries):
        column, where = cells[i // 2]
        outputs.append(Output(("min", "max")[i % 2], column, where, window=1000))
    return columns, outputs


@pytest.mark.parametrize("seed", range(4))
def test_events_of_one_key_in_any_layout(seed):
    """A list of the events says what is right; long enough that chunks grow, fill and are summarized."""
    rng = random.Random(seed)
    cases = [(stride, rng.choice((1, 2, 3, 6, 22, 38, 54, 120, 200))) for stride in range(2 + seed, 301, 4)]
    cases += [(7, 1), (14, 2), (15, 1), (28, 3), (31, 4), (33, 22), (33, 38), (33, 46), (33, 54), (62, 6)]
    for stride, summaries in cases:
        n_where = min(63, max(0, -(-summaries // (2 * (stride - 1))) - 1))
        if n_where and stride == 2:
            continue
        summaries = min(summaries, 2 * (stride - 1 - (n_where > 0)) * (1 + n_where))
        columns, outputs = columns_and_outputs(stride, summaries, n_where)
        store = WindowStore(["float64"] * columns, [Output("count", window=1000), *outputs], n_where=n_where)
        capacity = chunk_growth(stride, summaries)[-1][2]
        events = []
        for i in range(3 * capacity + 2 if capacity < 200 else capacity + 9):
            row = [float(rng.randrange(-99, 99)) for _ in range(columns)]
            mask = rng.getrandbits(n_where) if n_where else 0
            t = i * 1000 // (2 * capacity) * 2
            store.apply("k", t, row, where_mask=mask)
            events.append((t, row, mask))
        inside = [e for e in events if t - 1000 < e[0] <= t]
        found = [value for value, _ in store.read("k", 0, t)]
        assert found[0] == len(inside), (stride, summaries)
        for value, output in zip(found[1:], outputs):
            of = [e[1][output.column] for e in inside if output.where is None or e[2] >> output.where & 1]
            right = (min if output.function == "min" else max)(of, default=None)
            assert value == right, (stride, summaries, output)
