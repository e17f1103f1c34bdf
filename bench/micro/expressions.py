"""The expressions row: ten rules over one row, 2,048 rotating rows, the native evaluator without Python per row.

Floor: NumPy computing one of the ten, per row. Peer: the same ten as Python lambdas. Run as a script:
python bench/micro/expressions.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import row, table
from timing import interleaved

COMMAND = "python bench/micro/expressions.py"
ROWS, ROUNDS = 2_048, 15
SLOTS = {"score": (0, "float64"), "amount": (1, "float64"), "count": (2, "int64"), "at": (3, "timestamp")} | {
    "mean": (4, "float64"),
    "country": (5, "string"),
}
RULES = {
    "score > 0.9": lambda s, a, c, t, m, k: s > 0.9,
    "count > 30": lambda s, a, c, t, m, k: c > 30,
    "amount > 3 * mean": lambda s, a, c, t, m, k: a > 3 * m,
    "at.hour <= 6": lambda s, a, c, t, m, k: t // 3_600_000_000 % 24 <= 6,
    "score > 0.5 and amount > 220": lambda s, a, c, t, m, k: s > 0.5 and a > 220,
    "country in ('RU', 'NG', 'KP')": lambda s, a, c, t, m, k: k in ("RU", "NG", "KP"),
    "amount / count > 50": lambda s, a, c, t, m, k: a / c > 50,
    "mean is null or amount < 0.01": lambda s, a, c, t, m, k: m is None or a < 0.01,
    "not (country == 'US') and score > 0.8": lambda s, a, c, t, m, k: k != "US" and s > 0.8,
    "abs(amount - mean) > 100 or count >= 100": lambda s, a, c, t, m, k: abs(a - m) > 100 or c >= 100,
}


def run() -> list[dict[str, Any]]:
    from penstock.expressions import compile_expression

    source = np.random.default_rng(1)
    countries = ["US", "DE", "RU", "FR"]
    arena = "".join(countries).encode()
    score, amount, mean = source.random(ROWS), source.exponential(60, ROWS), source.exponential(60, ROWS)
    count, at = source.integers(1, 60, ROWS), source.integers(0, 10**16, ROWS)
    country = source.integers(0, 4, ROWS)
    slots = np.empty((ROWS, 6), np.uint64)
    columns = (score, amount, count, at, mean, (country * 2) | (2 << 32))
    for i, column in enumerate(columns):
        slots[:, i] = column.view(np.uint64)
    status = np.ones(slots.shape, np.uint8)
    programs = [compile_expression(text, SLOTS).program for text in RULES]
    lists = [column.tolist() for column in columns[:5]]
    python_rows = list(zip(*lists, [countries[i] for i in country]))
    for program, (text, rule) in zip(programs, RULES.items()):
        if program.test(slots, status, arena).tolist() != [int(rule(*r)) for r in python_rows]:
            raise AssertionError(f"{text}: the native program differs from Python")

    def native() -> None:
        for program in programs:
            program.test(slots, status, arena)

    def python() -> None:
        for rule in RULES.values():
            for r in python_rows:
                rule(*r)

    seconds = interleaved({"native": native, "python": python, "floor": lambda: score > 0.9}, ROUNDS, warmup=2)
    us = {name: 1e6 * s / ROWS for name, s in seconds.items()}
    return [
        row("expressions.ten_us", us["native"], "us/row", COMMAND, us["floor"], us["native"] / us["floor"]),
        row("expressions.ten_python_us", us["python"], "us/row", COMMAND, us["native"], us["python"] / us["native"]),
    ]


if __name__ == "__main__":
    print(table(run()))
