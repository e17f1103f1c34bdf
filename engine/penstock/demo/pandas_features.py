"""The handbook's 15 features computed the handbook's way, in pandas (control path).

An independent computation: it shares nothing with the engine but the input. What must stay true: a row's window
(t - w, t] holds the row itself and the ties before it in table order, and never the ties after it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.demo.generator import Progress, Transactions

DELAY_DAYS = 7
WINDOWS = (1, 7, 30)

# Names as the engine gives them, in the order of the handbook's table.
FEATURES = (
    "amount",
    "weekend",
    "night",
    *(f"spend.{what}_{w}d" for w in WINDOWS for what in ("count", "mean_amount")),
    *(f"terminal_risk.{what}_{w}d" for w in WINDOWS for what in ("count", "mean_fraud")),
)

Floats = npt.NDArray[np.float64]


def frame(data: Transactions) -> Any:
    """The transactions as a DataFrame indexed by row number: customer, terminal, amount, fraud, at."""
    import pandas as pd

    return pd.DataFrame(
        {
            "customer": data.customer,
            "terminal": data.terminal,
            "amount": data.amount,
            "fraud": data.fraud.astype(np.float64),
            "at": data.at,
        }
    )


def customer_windows(rows: Any) -> Any:
    """Count and mean amount over 1, 7 and 30 days of one customer's rows, the row itself included."""
    import pandas as pd

    amount = pd.Series(rows["amount"].to_numpy(), index=rows["at"])
    columns: dict[str, Any] = {}
    for w in WINDOWS:
        total = amount.rolling(f"{w}D").sum()
        count = amount.rolling(f"{w}D").count()
        columns[f"spend.count_{w}d"] = count
        columns[f"spend.mean_amount_{w}d"] = total / count
    return pd.DataFrame(columns).set_index(rows.index)


def terminal_windows(rows: Any) -> Any:
    """Count and share of frauds over 1, 7 and 30 days of one terminal's rows, as known 7 days later; no rows: 0."""
    import pandas as pd

    fraud = pd.Series(rows["fraud"].to_numpy(), index=rows["at"])
    unknown = fraud.rolling(f"{DELAY_DAYS}D")
    unknown_frauds, unknown_count = unknown.sum(), unknown.count()
    columns: dict[str, Any] = {}
    for w in WINDOWS:
        window = fraud.rolling(f"{DELAY_DAYS + w}D")
        frauds = window.sum() - unknown_frauds
        count = window.count() - unknown_count
        columns[f"terminal_risk.count_{w}d"] = count
        columns[f"terminal_risk.mean_fraud_{w}d"] = (frauds / count).fillna(0.0)
    return pd.DataFrame(columns).set_index(rows.index)


def _grouped(table: Any, key: str, compute: Any, step: Iterator[None]) -> Any:
    import pandas as pd

    parts = []
    for _, rows in table.groupby(key, sort=False):
        parts.append(compute(rows))
        next(step)
    return pd.concat(parts)


def features(data: Transactions, progress: Progress | None = None) -> dict[str, Floats]:
    """All 15 features of all rows, float64 (n,) each, in table order. `progress(done, groups)` counts the groups."""
    table = frame(data)
    groups = table["customer"].nunique() + table["terminal"].nunique()

    def count() -> Iterator[None]:
        for done in range(1, groups + 1):
            if progress is not None and (done % 100 == 0 or done == groups):
                progress(done, groups)
            yield

    step = count()
    at = table["at"].dt
    out: dict[str, Floats] = {
        "amount": data.amount,
        "weekend": (at.day_of_week >= 5).to_numpy(dtype=np.float64),
        "night": (at.hour <= 6).to_numpy(dtype=np.float64),
    }
    for key, compute in (("customer", customer_windows), ("terminal", terminal_windows)):
        columns = _grouped(table, key, compute, step)
        place = columns.index.to_numpy()
        for name in columns.columns:
            values = np.empty(len(table), dtype=np.float64)
            values[place] = columns[name].to_numpy()
            out[name] = values
    return {name: out[name] for name in FEATURES}
