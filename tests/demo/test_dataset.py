"""The cache survives damage, the tables say what the engine expects, the weeks are the handbook's."""

from pathlib import Path

import numpy as np
import pytest

from penstock.demo import dataset
from penstock.demo.generator import SECONDS_PER_DAY, Transactions, generate


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A cache of its own and a small data set; the list holds the days of every generation."""
    calls: list[int] = []

    def fewer(days: int, progress: object = None) -> Transactions:
        calls.append(days)
        return generate(days, 100, 800)

    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    monkeypatch.setattr(dataset, "generate", fewer)
    return calls


def equal(a: Transactions, b: Transactions) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in dataset.COLUMNS)


def test_the_cache_is_used_and_a_damaged_one_is_made_again(small: list[int], tmp_path: Path) -> None:
    first, cached = dataset.load_transactions(6)
    assert not cached
    again, cached = dataset.load_transactions(6)
    assert cached
    assert equal(first, again)
    (file,) = (tmp_path / "demo").iterdir()  # and no temporary file is left
    whole = file.read_bytes()
    middle = len(whole) // 2
    damages = [b"", b"not a zip", whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]]
    for damage in damages:
        file.write_bytes(damage)
        data, cached = dataset.load_transactions(6)
        assert not cached
        assert equal(first, data)
        assert file.read_bytes() == whole
    assert len(small) == 1 + len(damages)


def test_a_cache_that_cannot_be_written_is_no_error(small: list[int], tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file where the folder should be")
    assert len(dataset.load_transactions(6)[0]) > 0


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert dataset.cache_folder() == Path("/x/penstock/demo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert dataset.cache_folder() == Path("/h/.cache/penstock/demo")


def test_tables() -> None:
    pa = pytest.importorskip("pyarrow")
    data = generate(8, 60, 800)
    events, labels = dataset.transactions_table(data), dataset.labels_table(data)
    assert events.schema == pa.schema(
        [
            ("customer", pa.string()),
            ("terminal", pa.string()),
            ("amount", pa.float64()),
            ("at", pa.timestamp("us", "UTC")),
        ]
    )
    assert events.column("customer")[0].as_py() == f"C{data.customer[0]}"
    assert events.column("at")[0].as_py().isoformat().startswith("2018-04-01T")
    delay = np.subtract(labels.column("at").to_numpy(), events.column("at").to_numpy())
    assert (delay == np.timedelta64(7, "D")).all()
    some = np.array([3, 5])
    assert dataset.labels_table(data, some).equals(labels.take(some))


def test_weeks() -> None:
    assert dataset.weeks(183) == dataset.Weeks(115, 129, True)
    assert dataset.weeks(149).published
    assert dataset.weeks(148) == dataset.Weeks(127, 141, False)
    assert dataset.weeks(40) == dataset.Weeks(19, 33, False)
    with pytest.raises(ValueError, match="at least 30"):
        dataset.weeks(29)


def test_known_customers_leave_the_test_week_day_by_day() -> None:
    """One transaction per customer and day of a test week; each customer's fraud falls on another day."""
    when = dataset.weeks(40)
    fraud_day = {0: 19, 1: 25, 2: 26, 3: 27, 4: 31, 5: 32, 6: 33, 7: 18}
    rows = sorted([(d, c, 0) for d in range(33, 40) for c in fraud_day] + [(d, c, 1) for c, d in fraud_day.items()])
    day, customer, fraud = (np.array(column) for column in zip(*rows, strict=True))
    zero = np.zeros(len(rows))
    data = Transactions(
        day * SECONDS_PER_DAY,
        customer.astype(np.int32),
        zero.astype(np.int32),
        zero,
        fraud,
        zero.astype(np.int8),
        (0, 0, 0),
    )
    kept = dataset.test_rows(data, when)
    last = {c: max((day[i] for i in kept if customer[i] == c), default=None) for c in fraud_day}
    # Frauds of the training week (19..25) are known at once, those of day 26 + i from test day 34 + i on.
    assert last == {0: None, 1: None, 2: 33, 3: 34, 4: 38, 5: 39, 6: 39, 7: 39}
    assert set(day[dataset.train_rows(data, when)]) == {19, 25}
    assert (np.diff(kept) > 0).all()
