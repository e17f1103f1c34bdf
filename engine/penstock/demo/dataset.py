"""The demo's data: the cached transactions, the Arrow tables the engine replays, and the weeks (control path).

What must stay true: a cached file is used only where it is whole; anything else in its place is generated anew, and
the file appears under its name in one step.
"""

import os
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.demo.generator import Progress, Transactions, generate

FORMAT = 1  # in the file's name: another layout is another file
PUBLISHED_TRAIN_DAY = 115  # 2018-07-25
PUBLISHED_DAYS = 149  # scenario 3 looks 14 days ahead of the last test day
DELAY_DAYS = 7
FEWEST_DAYS = 30
COLUMNS = tuple(field.name for field in fields(Transactions))

Rows = npt.NDArray[np.int64]


def cache_folder() -> Path:
    """$PENSTOCK_CACHE, else penstock under $XDG_CACHE_HOME, else under ~/.cache; then demo."""
    own = os.environ.get("PENSTOCK_CACHE")
    if own:
        return Path(own) / "demo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "demo"


def load_transactions(days: int, progress: Progress | None = None) -> tuple[Transactions, bool]:
    """The transactions of `days` days, and whether they came from the cache."""
    path = cache_folder() / f"transactions-{FORMAT}-{days}.npz"
    cached = _read(path)
    if cached is not None:
        return cached, True
    data = generate(days, progress=progress)
    _write(path, data)
    return data, False


def _read(path: Path) -> Transactions | None:
    """The file's transactions, or None where it is missing or damaged (each member of a zip has a CRC)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
    added = columns.pop("added")
    if added.shape != (3,) or len({column.shape for column in columns.values()}) != 1:
        return None
    return Transactions(**columns, added=(int(added[0]), int(added[1]), int(added[2])))


def _write(path: Path, data: Transactions) -> None:
    """A cache that cannot be written is not an error: the next run generates again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            columns: dict[str, Any] = {field: np.asarray(getattr(data, field)) for field in COLUMNS}
            np.savez(file, allow_pickle=False, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _keys(prefix: str, numbers: npt.NDArray[np.int32]) -> Any:
    import pyarrow as pa

    names = pa.array([f"{prefix}{n}" for n in range(int(numbers.max(initial=-1)) + 1)], pa.string())
    return names.take(pa.array(numbers))


def transactions_table(data: Transactions, rows: Rows | slice = slice(None)) -> Any:
    """Arrow table of Transaction events: customer "C12", terminal "T34", amount, at (us, UTC), in table order."""
    import pyarrow as pa

    return pa.table(
        {
            "customer": _keys("C", data.customer[rows]),
            "terminal": _keys("T", data.terminal[rows]),
            "amount": pa.array(data.amount[rows]),
            "at": pa.array(data.at[rows], pa.timestamp("us", tz="UTC")),
        }
    )


def labels_table(data: Transactions, rows: Rows | slice = slice(None)) -> Any:
    """Arrow table of FraudLabel events: terminal, fraud (0.0 or 1.0), at = the transaction's time + exactly 7 days."""
    import pyarrow as pa

    return pa.table(
        {
            "terminal": _keys("T", data.terminal[rows]),
            "fraud": pa.array(data.fraud[rows].astype(np.float64)),
            "at": pa.array(data.at[rows] + np.timedelta64(DELAY_DAYS, "D"), pa.timestamp("us", tz="UTC")),
        }
    )


class Weeks(NamedTuple):
    """First days (since the start) of the training week and of the test week; `published`: the handbook's own."""

    train: int
    test: int
    published: bool


def weeks(days: int) -> Weeks:
    """The handbook's weeks where the data covers them, else the last three weeks: train, delay, test."""
    if days < FEWEST_DAYS:
        raise ValueError(f"days: expected at least {FEWEST_DAYS} (windows, then three weeks), got {days}")
    published = days >= PUBLISHED_DAYS
    train = PUBLISHED_TRAIN_DAY if published else days - 21
    return Weeks(train, train + 7 + DELAY_DAYS, published)


def train_rows(data: Transactions, when: Weeks) -> Rows:
    """Row numbers of the training week, ascending."""
    return np.nonzero((data.day >= when.train) & (data.day < when.train + 7))[0]


def test_rows(data: Transactions, when: Weeks) -> Rows:
    """Row numbers of the test week without the customers known to be compromised on each day, ascending.

    Known on a test day: who had a fraud in the training week, or in the week after it, 8 days ago or more.
    """
    day, customer, fraud = data.day, data.customer, data.fraud == 1
    trained = (day >= when.train) & (day < when.train + 7)
    known = np.zeros(int(customer.max(initial=0)) + 1, dtype=bool)
    known[customer[trained & fraud]] = True
    parts = []
    for d in range(7):
        known[customer[(day == when.train + 7 + d - 1) & fraud]] = True
        today = np.nonzero(day == when.test + d)[0]
        parts.append(today[~known[customer[today]]])
    return np.concatenate(parts)
