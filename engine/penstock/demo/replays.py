"""Everything the demo asks of the engine: replays of history, warm engines, scores one by one (control path).

What must stay true: only the public interface is used, as any user would.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock import Engine, Timestamp
from penstock.demo import dataset, fraud, fraud_benchmark, fraud_training
from penstock.demo.generator import Progress, Transactions
from penstock.demo.pandas_features import FEATURES

Floats = npt.NDArray[np.float64]

WARM_DAYS = 31  # before the test week: the longest window, and a day


class History(NamedTuple):
    """What the windows of the test week can see, ready to replay: Arrow tables in the order of event time."""

    transactions: Any
    labels: Any
    first_row: int  # of the data set, where the transactions start
    test_row: int  # of `transactions`, where the test week starts
    test_label: int  # of `labels`, where the test week starts

    def tables(self) -> dict[str, Any]:
        """As `Engine.replay` takes them: labels before transactions of the same second."""
        return {"FraudLabel": self.labels, "Transaction": self.transactions}


def history(data: Transactions, when: dataset.Weeks) -> History:
    """From 31 days before the test week to its end."""
    days = (when.test - WARM_DAYS, when.test, when.test + 7)
    first, test, end = (int(np.searchsorted(data.day, day)) for day in days)
    known = data.day + dataset.DELAY_DAYS
    first_label, test_label, end_label = (int(np.searchsorted(known, day)) for day in days)
    return History(
        dataset.transactions_table(data, slice(first, end)),
        dataset.labels_table(data, slice(first_label, end_label)),
        first_row=first,
        test_row=test - first,
        test_label=test_label - first_label,
    )


def columns(out: Any, names: Sequence[str]) -> dict[str, Floats]:
    """Columns of an Arrow table as float64 (n,); null is NaN."""
    import pyarrow as pa

    return {name: out.column(name).cast(pa.float64()).to_numpy() for name in names}


class Share:
    """Turns the engine's "so many more rows are done" into the (done, total) of a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)


def all_features(data: Transactions, progress: Progress | None = None) -> tuple[dict[str, Floats], float]:
    """The 15 features of every transaction, and the seconds from Arrow tables to Arrow columns."""
    tables = {"FraudLabel": dataset.labels_table(data), "Transaction": dataset.transactions_table(data)}
    engine = Engine(fraud_training, clock="event")
    started = time.perf_counter()
    out = engine.replay(tables, out="training", progress=Share(progress, 2 * len(data)))
    seconds = time.perf_counter() - started
    return columns(out, FEATURES), seconds


def all_scores(
    past: History, models: Path, keys: Sequence[str], progress: Progress | None = None
) -> tuple[dict[str, Floats], dict[str, str], dict[str, Floats]]:
    """By the model's key: its score of every transaction of `past`, and what ran it (trees, onnx).

    Third, the features of the last replay.
    """
    share = Share(progress, len(keys) * (past.transactions.num_rows + past.labels.num_rows))
    scores, kinds = {}, {}
    for key in keys:
        engine = Engine(fraud_benchmark.app(key), models=models, clock="event")
        out = engine.replay(past.tables(), out="benchmark", progress=share)
        scores[key] = columns(out, ["score"])["score"]
        (model,) = engine.models.values()
        kinds[key] = str(model["kind"])
    return scores, kinds, columns(out, FEATURES)


def decisions(
    past: History, models: Path, progress: Progress | None = None
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """What the fraud app decided on every transaction of `past`: the arm of each, and the action."""
    engine = Engine(fraud, models=models, clock="event")
    share = Share(progress, past.transactions.num_rows + past.labels.num_rows)
    out = engine.replay(past.tables(), out="fraud", progress=share)
    arm, action = (np.asarray(out.column(name).to_pylist(), dtype=object) for name in ("arm.challenger", "action"))
    return arm, action


def warm(past: History, transactions: int, labels: int, models: Path, clock: str = "event") -> Engine:
    """An engine of the fraud app that has seen so many of the past's transactions and labels."""
    engine = Engine(fraud, models=models, clock=clock)
    engine.ingest(past.labels.slice(0, labels), event="FraudLabel")
    engine.ingest(past.transactions.slice(0, transactions), event="Transaction")
    return engine


def recent(past: History, now: np.datetime64) -> History:
    """The same events moved in time by whole weeks, so that the last of them lies in the week before `now`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    last = max(pc.max(table.column("at")).cast(pa.int64()).as_py() for table in past.tables().values())
    week = 7 * 86_400_000_000
    shift = (int(now.astype("datetime64[us]").astype(np.int64)) - last) // week * week

    def moved(table: Any) -> Any:
        at = pc.add(table.column("at"), pa.scalar(shift, pa.duration("us")))
        return table.set_column(table.schema.get_field_index("at"), "at", at)

    return past._replace(transactions=moved(past.transactions), labels=moved(past.labels))


def riskiest_terminal(past: History) -> str:
    """The terminal with most frauds among the last 10,000 labels, about a day."""
    import pyarrow.compute as pc

    labels = past.labels.slice(max(0, past.labels.num_rows - 10_000))
    counts = labels.filter(pc.greater(labels.column("fraud"), 0)).column("terminal").value_counts()
    if len(counts) == 0:
        return str(past.labels.column("terminal")[-1].as_py())
    return str(max((pair["counts"].as_py(), pair["values"].as_py()) for pair in counts)[1])


def one_by_one(past: History, models: Path, rows: int) -> tuple[int, int]:
    """Two engines with the same past: one scores transactions of the test week one by one, the other as one table.

    Returns how many were compared and how many differ in a bit of the score, in the action or in the arm.
    """
    table = past.transactions.slice(past.test_row, rows)
    single, batch = (warm(past, past.test_row, past.test_label, models) for _ in range(2))
    out = batch.score_batch(table)
    names = ("customer", "terminal", "amount")
    times = table.column("at").cast("int64").to_pylist()
    fields = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    theirs = zip(*(out.column(name).to_pylist() for name in ("score", "action", "arm.challenger")), strict=True)
    wrong = 0
    for (customer, terminal, amount), at, (score, action, arm) in zip(fields, times, theirs, strict=True):
        decision = single.score(fraud.Transaction(customer, terminal, amount, Timestamp(at)))
        same = np.float64(decision.score).tobytes() == np.float64(score).tobytes()
        wrong += not (same and decision.action == action and decision.arms["challenger"] == arm)
    return table.num_rows, wrong
