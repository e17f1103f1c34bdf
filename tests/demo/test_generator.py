"""The generator against the slow one, row for row, and against figures of the published data set."""

import numpy as np
import pytest

pytest.importorskip("pandas")

from oracles import fraud_generator as oracle
from penstock.demo import generator


@pytest.mark.parametrize(("days", "customers", "terminals"), [(40, 60, 800), (3, 200, 10_000)])
def test_equals_the_slow_generator(days: int, customers: int, terminals: int) -> None:
    data = generator.generate(days=days, customers=customers, terminals=terminals)
    rows = oracle.transactions(days, customers, terminals)
    assert len(data) == len(rows) > 500
    for name in ("second", "day", "customer", "terminal", "amount", "fraud", "scenario"):
        assert getattr(data, name).tolist() == [r[name] for r in rows], name
    assert sum(data.added) == data.fraud.sum() > 0


def test_profiles_are_the_published_ones() -> None:
    customers = generator.draw_customers()
    first = [column[0] for column in customers]
    assert first == pytest.approx([54.881350, 71.518937, 62.262521, 2.179533], abs=5e-7)
    x, y = generator.draw_terminals()
    assert [x[0], y[0]] == pytest.approx([41.702200, 72.032449], abs=5e-7)
    assert len(x) == 10_000


def test_fewer_days_are_a_prefix_and_ties_keep_their_order() -> None:
    short, long = generator.generate(5, 300, 2_000), generator.generate(9, 300, 2_000)
    n = len(short)
    assert n < len(long)
    assert short.customer.tolist() == long.customer[:n].tolist()
    assert short.terminal.tolist() == long.terminal[:n].tolist()
    tied = np.nonzero(np.diff(long.second) == 0)[0]
    assert len(tied) > 0
    assert (long.customer[tied] <= long.customer[tied + 1]).all()


def test_progress_ends_at_the_end() -> None:
    seen: list[tuple[int, int]] = []
    generator.generate(1, 120, 500, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (120, 120)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_no_days_is_refused() -> None:
    with pytest.raises(ValueError, match="days: expected at least 1, got 0"):
        generator.generate(0)
