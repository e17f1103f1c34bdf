"""pandas' features equal the slow ones, ties included."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pandas")

from penstock.demo.generator import Transactions, generate
from penstock.demo.pandas_features import FEATURES, features
from penstock.demo.slow_features import features_of


def crowded(data: Transactions) -> Transactions:
    """The same rows in few places and on a coarse clock, so that windows are full and edges and ties are hit."""
    second = data.second // 3_600 * 3_600
    return replace(data, second=second, customer=data.customer % 5, terminal=data.terminal % 7)


@pytest.mark.parametrize("make", [lambda data: data, crowded])
def test_equal_the_slow_features(make: object) -> None:
    data = make(generate(45, 30, 800))  # type: ignore[operator]
    theirs = features(data)
    assert list(theirs) == list(FEATURES)
    worst = 0.0
    for row in np.random.RandomState(1).choice(len(data), 300, replace=False).tolist():
        slow = features_of(data, row)
        assert set(slow) == set(FEATURES)
        worst = max(worst, *(abs(slow[name] - theirs[name][row]) for name in FEATURES))
    assert worst < 1e-11


def test_a_tie_sees_those_before_it_only() -> None:
    n = 3
    zero = np.zeros(n, dtype=np.int8)
    data = Transactions(
        second=np.full(n, 40 * 86_400),
        customer=np.zeros(n, dtype=np.int32),
        terminal=np.zeros(n, dtype=np.int32),
        amount=np.array([1.0, 2.0, 6.0]),
        fraud=zero,
        scenario=zero,
        added=(0, 0, 0),
    )
    theirs = features(data)
    assert theirs["spend.count_1d"].tolist() == [1, 2, 3]
    assert theirs["spend.mean_amount_30d"].tolist() == [1.0, 1.5, 3.0]
    assert theirs["terminal_risk.mean_fraud_30d"].tolist() == [0.0, 0.0, 0.0]
    assert [features_of(data, row)["spend.count_7d"] for row in range(n)] == [1, 2, 3]


def test_labels_count_from_exactly_seven_days_on() -> None:
    week = 7 * 86_400
    second = np.array([0, week - 1, week, week + 86_400 - 1, week + 86_400])
    n = len(second)
    data = Transactions(
        second=second,
        customer=np.arange(n, dtype=np.int32),
        terminal=np.zeros(n, dtype=np.int32),
        amount=np.ones(n),
        fraud=np.array([1, 0, 0, 0, 0], dtype=np.int8),
        scenario=np.zeros(n, dtype=np.int8),
        added=(0, 0, 0),
    )
    expected = [0.0, 0.0, 1.0, 1.0, 0.0]  # known at one week, out of the 1-day window a day later
    assert features(data)["terminal_risk.mean_fraud_1d"].tolist() == expected
    assert [features_of(data, row)["terminal_risk.mean_fraud_1d"] for row in range(n)] == expected
