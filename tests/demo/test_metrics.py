"""The metrics against scikit-learn, and card precision against cases worked by hand and a pandas computation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.demo.metrics import auc_roc, average_precision, card_precision

rows = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0])), min_size=2, max_size=60)


@settings(max_examples=60, deadline=None)
@given(rows.filter(lambda r: len({label for label, _ in r}) == 2))
def test_equal_scikit_learn_with_ties(sample: list[tuple[bool, float]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    label, score = [int(y) for y, _ in sample], [s for _, s in sample]
    assert auc_roc(label, score) == pytest.approx(metrics.roc_auc_score(label, score), abs=1e-12)
    assert average_precision(label, score) == pytest.approx(metrics.average_precision_score(label, score), abs=1e-12)


def test_one_class_nan_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected both classes, got 0 frauds in 2 rows"):
        auc_roc([0, 0], [0.1, 0.2])
    with pytest.raises(ValueError, match="NaN in 1 rows"):
        average_precision([0, 1], [0.1, float("nan")])
    with pytest.raises(ValueError, match="equal length"):
        auc_roc([0, 1], [0.1])


def columns(*table: tuple[int, int, float, int, float]) -> dict[str, np.ndarray]:
    day, customer, amount, label, score = zip(*table, strict=True)
    return {
        "day": np.array(day),
        "customer": np.array(customer),
        "amount": np.array(amount, dtype=float),
        "label": np.array(label),
        "score": np.array(score),
    }


def test_card_precision_by_hand() -> None:
    # Card 1: its best score of the day and its one fraud are of different rows. Found on day 0, it leaves day 1.
    table = columns(
        (0, 1, 10, 1, 0.1), (0, 1, 10, 0, 0.9), (0, 2, 10, 0, 0.8), (0, 3, 10, 1, 0.2),
        (1, 1, 10, 1, 0.9), (1, 3, 10, 1, 0.5), (1, 4, 10, 0, 0.4), (1, 5, 10, 1, 0.1),
    )  # fmt: skip
    assert card_precision(**table, k=2) == (1 / 2 + 1 / 2) / 2
    assert card_precision(**table, k=1) == (1 / 1 + 1 / 1) / 2
    assert card_precision(**table, k=100) == (2 / 100 + 1 / 100) / 2  # card 3 is found on day 0 too


def test_tied_cards_rank_by_what_they_spent_then_by_number() -> None:
    assert card_precision(**columns((0, 1, 10, 0, 0.5), (0, 2, 6, 1, 0.5), (0, 2, 6, 0, 0.5)), k=1) == 1.0
    assert card_precision(**columns((0, 2, 10, 1, 0.5), (0, 1, 10, 0, 0.5)), k=1) == 0.0


def test_card_precision_equals_pandas_where_nothing_ties() -> None:
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(5)
    n = 3_000
    day, customer = rng.integers(0, 5, n), rng.integers(0, 400, n)
    label, score, amount = (rng.random(n) < 0.05).astype(int), rng.permutation(n) / n, rng.random(n)
    frame = pd.DataFrame({"day": day, "customer": customer, "label": label, "score": score})
    found: list[int] = []
    shares = []
    for d in range(5):
        today = frame[(frame.day == d) & ~frame.customer.isin(found)].groupby("customer")[["score", "label"]].max()
        top = today.sort_values("score", ascending=False).head(20)
        found += list(top[top.label == 1].index)
        shares.append(top.label.sum() / 20)
    assert card_precision(day, customer, amount, label, score, k=20) == pytest.approx(np.mean(shares), abs=1e-12)
