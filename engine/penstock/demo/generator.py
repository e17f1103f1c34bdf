"""The transaction simulator of the Fraud Detection Handbook, written from its published process (control path).

Holds the customers, the terminals, the transactions and the three fraud scenarios. What must stay true: the draws
come from NumPy's and Python's seeded legacy generators in exactly the published order, so that 183 days give exactly
1,754,155 transactions and 14,681 frauds. Rows of one second stay in the order in which they were generated.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

START = np.datetime64("2018-04-01T00:00:00", "us")
DAYS = 183
CUSTOMERS = 5_000
TERMINALS = 10_000
RADIUS = 5.0
SECONDS_PER_DAY = 86_400

TRANSACTIONS_EXPECTED = 1_754_155
FRAUDS_EXPECTED = 14_681
ADDED_EXPECTED = (978, 9_099, 4_604)

Progress = Callable[[int, int], None]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transactions:
    """Columns of equal length n, sorted by `second`, ties in the order of generation."""

    second: Integers  # seconds since START
    customer: npt.NDArray[np.int32]
    terminal: npt.NDArray[np.int32]
    amount: Floats  # rounded to cents, times 5 for scenario 3
    fraud: npt.NDArray[np.int8]  # 0 or 1
    scenario: npt.NDArray[np.int8]  # 0 none, 1 amount, 2 terminal, 3 customer (the last one that applied)
    added: tuple[int, int, int]  # frauds that each scenario added when it was applied

    @property
    def day(self) -> Integers:
        """Days since START, int64."""
        return self.second // SECONDS_PER_DAY

    @property
    def at(self) -> npt.NDArray[Any]:
        """Event time, datetime64[us], UTC."""
        return START + (self.second * 1_000_000).astype("timedelta64[us]")

    def __len__(self) -> int:
        return len(self.second)


class Customers(NamedTuple):
    """One row per customer, float64: place (x, y) in [0, 100), mean amount, mean transactions per day."""

    x: Floats
    y: Floats
    mean_amount: Floats
    mean_per_day: Floats


def draw_customers(n: int = CUSTOMERS) -> Customers:
    """Seed 0; per customer x~U(0,100), y~U(0,100), mean amount~U(5,100), mean transactions per day~U(0,4)."""
    unit = np.random.RandomState(0).random_sample((n, 4))  # uniform(a, b) is a + (b - a) * this, draw by draw
    return Customers(100.0 * unit[:, 0], 100.0 * unit[:, 1], 5.0 + 95.0 * unit[:, 2], 4.0 * unit[:, 3])


def draw_terminals(n: int = TERMINALS) -> tuple[Floats, Floats]:
    """Seed 1; per terminal x~U(0,100), y~U(0,100)."""
    unit = np.random.RandomState(1).random_sample((n, 2))
    return 100.0 * unit[:, 0], 100.0 * unit[:, 1]


def _draw_transactions(
    customers: Customers, terminals: tuple[Floats, Floats], days: int, progress: Progress | None
) -> tuple[list[int], list[int], list[float], list[int]]:
    """Seconds, terminals and amounts of all customers one after the other, and the number of rows of each."""
    seconds: list[int] = []
    chosen: list[int] = []
    amounts: list[float] = []
    counts: list[int] = []
    stream = np.random.RandomState(0)
    poisson, normal, uniform = stream.poisson, stream.normal, stream.uniform
    pick = random.Random()
    choice = pick.choice
    n = len(customers.x)
    for customer in range(n):
        x, y = customers.x[customer], customers.y[customer]
        mean, per_day = float(customers.mean_amount[customer]), float(customers.mean_per_day[customer])
        distance = np.sqrt((terminals[0] - x) ** 2 + (terminals[1] - y) ** 2)
        near = np.nonzero(distance < RADIUS)[0].tolist()
        before = len(seconds)
        stream.seed(customer)
        pick.seed(customer)
        for midnight in range(0, days * SECONDS_PER_DAY, SECONDS_PER_DAY):
            for _ in range(poisson(per_day)):
                second = int(normal(43_200.0, 20_000.0))
                if 0 < second < SECONDS_PER_DAY:
                    amount = normal(mean, mean / 2)
                    if amount < 0:
                        amount = uniform(0, 2 * mean)
                    if near:
                        seconds.append(midnight + second)
                        chosen.append(choice(near))
                        amounts.append(amount)
        counts.append(len(seconds) - before)
        if progress is not None and (customer % 50 == 49 or customer == n - 1):
            progress(customer + 1, n)
    return seconds, chosen, amounts, counts


def generate(
    days: int = DAYS, customers: int = CUSTOMERS, terminals: int = TERMINALS, progress: Progress | None = None
) -> Transactions:
    """The data set of `days` days. `progress(done, customers)` is called now and then.

    The transactions of fewer days are a prefix of those of more; the frauds of the last 14 days are not, because
    scenario 3 draws from the days that exist.
    """
    if days < 1:
        raise ValueError(f"days: expected at least 1, got {days}")
    seconds, chosen, amounts, counts = _draw_transactions(
        draw_customers(customers), draw_terminals(terminals), days, progress
    )
    second = np.array(seconds, dtype=np.int64)
    order = np.argsort(second, kind="stable")
    second = second[order]
    customer = np.repeat(np.arange(customers, dtype=np.int32), counts)[order]
    terminal = np.array(chosen, dtype=np.int32)[order]
    amount: Floats = np.array(amounts, dtype=np.float64)[order].round(2)
    fraud = np.zeros(len(second), dtype=np.int8)
    scenario = np.zeros(len(second), dtype=np.int8)
    added = []

    # 1: every large amount.
    mark = amount > 220
    fraud[mark], scenario[mark] = 1, 1
    added.append(int(fraud.sum()))

    day_start = np.searchsorted(second, np.arange(days + 29) * SECONDS_PER_DAY)
    last_day = int(second[-1] // SECONDS_PER_DAY) if len(second) else 0
    # 2: two terminals a day, all they see for 28 days. A seeded choice without replacement is pandas' sample(n).
    for day in range(last_day):
        rows = slice(day_start[day], day_start[day + 28])
        hit = np.random.RandomState(day).choice(terminals, size=2, replace=False)
        mark = np.isin(terminal[rows], hit)
        fraud[rows][mark], scenario[rows][mark] = 1, 2
    added.append(int(fraud.sum()) - sum(added))

    # 3: three customers a day, a third of what they do in 14 days, at five times the amount.
    for day in range(last_day):
        first, end = day_start[day], day_start[day + 14]
        hit = np.random.RandomState(day).choice(customers, size=3, replace=False)
        candidates = (first + np.nonzero(np.isin(customer[first:end], hit))[0]).tolist()
        chosen_rows = random.Random(day).sample(candidates, k=len(candidates) // 3)
        amount[chosen_rows] *= 5
        fraud[chosen_rows], scenario[chosen_rows] = 1, 3
    added.append(int(fraud.sum()) - sum(added))
    return Transactions(second, customer, terminal, amount, fraud, scenario, (added[0], added[1], added[2]))
