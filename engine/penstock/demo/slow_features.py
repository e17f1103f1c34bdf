"""The 15 features of one row, slow and obvious: a scan of all rows and exact rationals (control path).

What must stay true: nothing here is shared with the engine but the meaning of the numbers (SEMANTICS S2, S8, S13),
so that equal bits mean something.
"""

from datetime import UTC, datetime
from fractions import Fraction

import numpy as np

from penstock.demo.generator import SECONDS_PER_DAY, START, Transactions

DELAY_DAYS = 7
WINDOWS = (1, 7, 30)


def features_of(data: Transactions, row: int) -> dict[str, float]:
    """Features by name. A window of w days at time t is (t - w, t]; the row itself and earlier ties are in it.

    Labels count as known 7 days after their transaction, and before the transactions of that second.
    """
    now = int(data.second[row])
    at = datetime.fromtimestamp(int(START.astype("datetime64[s]").astype(np.int64)) + now, UTC)
    out = {
        "amount": float(data.amount[row]),
        "weekend": float(at.weekday() >= 5),
        "night": float(at.hour <= 6),
    }
    own = np.nonzero(data.customer[: row + 1] == data.customer[row])[0]
    here = np.nonzero(data.terminal == data.terminal[row])[0]
    known_at = data.second[here] + DELAY_DAYS * SECONDS_PER_DAY
    for w in WINDOWS:
        since = now - w * SECONDS_PER_DAY
        amounts = data.amount[own[data.second[own] > since]].tolist()
        out[f"spend.count_{w}d"] = float(len(amounts))
        out[f"spend.mean_amount_{w}d"] = float(sum(map(Fraction, amounts))) / len(amounts)
        frauds = data.fraud[here[(known_at > since) & (known_at <= now)]].tolist()
        out[f"terminal_risk.count_{w}d"] = float(len(frauds))
        out[f"terminal_risk.mean_fraud_{w}d"] = float(sum(frauds)) / len(frauds) if frauds else 0.0
    return out
