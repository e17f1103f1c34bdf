"""The seeded streams of the benchmarks: card transactions with labels for the fraud app, zipf samples for the windows.

Control path. What must stay true: the same seed gives the same events on every machine, and event times rise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

START = 1_522_540_800  # 2018-04-01T00:00:00Z, unix seconds
STEP = 9  # seconds between transactions: 1.75 million in half a year, as in the demo
LABEL_DELAY = 7 * 86_400
CUSTOMERS, TERMINALS = 5_000, 10_000
WINDOWS_US = {"1d": 86_400_000_000, "7d": 7 * 86_400_000_000, "30d": 30 * 86_400_000_000}

FEATURES = [
    "amount",
    "weekend",
    "night",
    *(f"spend.{f}_{w}" for f in ("count", "mean_amount") for w in WINDOWS_US),
    *(f"terminal_risk.{f}_{w}" for f in ("count", "mean_fraud") for w in WINDOWS_US),
]


@dataclass(frozen=True)
class Stream:
    """n transactions in time order. customer, terminal: int64 (n,); amount, fraud: float64 (n,); at: int64 us (n,)."""

    customer: np.ndarray
    terminal: np.ndarray
    amount: np.ndarray
    fraud: np.ndarray
    at: np.ndarray

    def tables(self) -> dict[str, Any]:
        """Arrow tables by event type; a label's time is its transaction's plus 7 days."""
        import pyarrow as pa

        terminal = pa.array([f"T{i}" for i in range(TERMINALS)]).take(pa.array(self.terminal))
        return {
            "FraudLabel": pa.table(
                {
                    "terminal": terminal,
                    "fraud": self.fraud,
                    "at": pa.array(self.at + LABEL_DELAY * 1_000_000).cast(pa.timestamp("us", "UTC")),
                }
            ),
            "Transaction": pa.table(
                {
                    "customer": pa.array([f"C{i}" for i in range(CUSTOMERS)]).take(pa.array(self.customer)),
                    "terminal": terminal,
                    "amount": self.amount,
                    "at": pa.array(self.at).cast(pa.timestamp("us", "UTC")),
                }
            ),
        }


def transactions(n: int, seed: int = 7, scale: int = 1) -> Stream:
    """n transactions, one every 9 / `scale` seconds from START over `scale` times the usual customers and terminals;
    about 1 % frauds, at compromised terminals and in large amounts."""
    rng = np.random.default_rng(seed)
    customers, terminals = scale * CUSTOMERS, scale * TERMINALS
    rate = rng.gamma(2.0, size=customers)
    customer = rng.choice(customers, size=n, p=rate / rate.sum())
    terminal = rng.integers(0, terminals, size=n)
    usual = rng.uniform(5, 100, size=customers)
    amount = np.round(np.abs(rng.normal(usual[customer], usual[customer] / 2)) + 0.01, 2)
    at = START * 1_000_000 + STEP * 1_000_000 * np.arange(n, dtype=np.int64) // scale
    # A terminal is compromised in some of the 30-day spans.
    compromised = rng.random((terminals, 64)) < 0.01
    bad = compromised[terminal, (at // (30 * 86_400_000_000)) % 64]
    fraud = (bad & (rng.random(n) < 0.7)) | ((amount > 180) & (rng.random(n) < 0.5)) | (rng.random(n) < 0.001)
    return Stream(customer, terminal, amount, fraud.astype(np.float64), at)


def _window(keys: np.ndarray, at: np.ndarray, values: np.ndarray, ask_keys: np.ndarray, ask_at: np.ndarray, w: int):
    """Count and mean of `values` over (ask_at - w, ask_at] of each asked key; the mean of nothing is 0."""
    span = np.int64(1) << 46  # two years; 130,000 keys fit beside it
    base = np.int64(START * 1_000_000 - (100 * 86_400_000_000))
    place = keys * span + (at - base)
    order = np.argsort(place, kind="stable")
    place, total = place[order], np.concatenate([[0.0], np.cumsum(values[order])])
    last = np.searchsorted(place, ask_keys * span + (ask_at - base), side="right")
    first = np.searchsorted(place, ask_keys * span + np.maximum(ask_at - w - base, 0), side="right")
    count = last - first
    return count.astype(np.float64), np.where(count > 0, (total[last] - total[first]) / np.maximum(count, 1), 0.0)


def features(stream: Stream) -> np.ndarray:
    """The 15 features of every transaction in the order of FEATURES, float64 (n, 15): training data, near enough.

    Sums are running float64 sums, not exact ones; the engine's own features are what is benchmarked.
    """
    day = stream.at // 86_400_000_000
    columns = [stream.amount, ((day + 3) % 7 >= 5) * 1.0, (stream.at // 3_600_000_000 % 24 <= 6) * 1.0]
    for keys, at, values in (
        (stream.customer, stream.at, stream.amount),
        (stream.terminal, stream.at + LABEL_DELAY * 1_000_000, stream.fraud),
    ):
        asked = stream.customer if keys is stream.customer else stream.terminal
        results = [_window(keys, at, values, asked, stream.at, w) for w in WINDOWS_US.values()]
        columns += [count for count, _ in results] + [mean for _, mean in results]
    return np.stack(columns, axis=1)


def samples(n: int, entities: int = 50_000, days: int = 7, seed: int = 11) -> Any:
    """An Arrow table of n samples (key: string, value: float64, at: timestamp[us, UTC]) over `days`, times rising and
    distinct, keys zipf(1.1) over `entities`."""
    import pyarrow as pa

    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, entities + 1) ** 1.1
    cumulative = np.cumsum(weight / weight.sum())
    key = np.minimum(np.searchsorted(cumulative, rng.random(n)), entities - 1)
    key = rng.permutation(entities)[key]
    at = np.sort(rng.integers(0, days * 86_400_000_000, size=n))
    at = np.maximum.accumulate(at - np.arange(n)) + np.arange(n)  # distinct
    value = np.round(rng.lognormal(3.0, 1.0, size=n), 2)
    return pa.table(
        {
            "key": pa.array([f"user-{i:06d}" for i in range(entities)]).take(pa.array(key)),
            "value": value,
            "at": pa.array(at + START * 1_000_000).cast(pa.timestamp("us", "UTC")),
        }
    )
