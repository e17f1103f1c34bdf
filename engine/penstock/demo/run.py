"""`penstock demo`: the Fraud Detection Handbook benchmark from an empty folder to a running server (control path).

What must stay true: every figure it prints was computed in this run by the engine, and what it compares with
(the published table, pandas, the slow features) shares no code with the engine.
"""

import argparse
import json
import os
import platform
import shlex
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.demo import dataset, pandas_features, slow_features, training
from penstock.demo.generator import (
    ADDED_EXPECTED,
    CUSTOMERS,
    DAYS,
    FRAUDS_EXPECTED,
    TERMINALS,
    TRANSACTIONS_EXPECTED,
    Transactions,
)
from penstock.demo.report import Progress, fact, heading, say, table, verdict

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

TOLERANCE = 1e-9  # between the engine's features and pandas', which sums in another order
ORACLE_ROWS = 1_000
ONE_BY_ONE_ROWS = 5_000
WARM_DAYS = 31  # before the test week: the longest window, and a day
NEEDED = ("numba", "onnxruntime", "pandas", "pyarrow", "skl2onnx", "sklearn", "xgboost")


class History(NamedTuple):
    """The transactions and labels of some days, ready to replay, and the row number of the first transaction."""

    transactions: Any
    labels: Any
    first_row: int


class Figures:
    """The rows of `--json`: name, value, unit, floor, ratio, command."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float | int, unit: str) -> None:
        """One figure; the demo has no floor of its own, the benchmarks have."""
        row = {"name": f"demo.{name}", "value": value, "unit": unit, "floor": None, "ratio": None}
        self.rows.append({**row, "command": self.command})

    def write(self, path: Path) -> None:
        """Write all rows, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(self.rows, file, indent=1)
        os.replace(file.name, path)


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; 0 where the counts and every parity proof hold, 1 where one does not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="penstock demo", description="The Fraud Detection Handbook benchmark.")
    parser.add_argument("--days", type=int, default=DAYS, help=f"days of transactions ({dataset.FEWEST_DAYS}..{DAYS})")
    parser.add_argument("--no-serve", action="store_true", help="stop before serving the app")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--host", default="127.0.0.1", help="where to serve")
    parser.add_argument("--port", type=int, default=8000, help="where to serve")
    given = list(args) if args is not None else None
    options = parser.parse_args(given)
    if not dataset.FEWEST_DAYS <= options.days <= DAYS:
        parser.error(f"--days: expected {dataset.FEWEST_DAYS} to {DAYS}, got {options.days}")
    missing = _missing()
    if missing:
        parser.error(f"the demo needs {', '.join(missing)}: pip install 'penstock[demo]'")
    warnings.filterwarnings("ignore")
    figures = Figures(shlex.join(["penstock", "demo", *(given or [])]))
    started = time.perf_counter()
    print("Penstock demo: the Fraud Detection Handbook benchmark")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, cache {dataset.cache_folder()}")

    data, counts_right = show_data(options.days, figures)
    when = dataset.weeks(options.days)
    features, us_per_event = show_replay(data, figures)
    models = dataset.cache_folder() / f"models-{options.days}"
    train_models(data, when, features, models)
    scored = dataset.test_rows(data, when)
    past = history(data, when)
    show_table(data, when, scored, score_everything(data, past, models, features), figures)
    show_split(data, scored, past, models)
    mismatches = show_parity(data, when, features, past, models, us_per_event, figures)
    figures.add("parity_mismatches", mismatches, "values")
    figures.add("seconds", round(time.perf_counter() - started, 1), "s")
    if options.json is not None:
        figures.write(options.json)
        say(f"figures in {options.json}")
    right = counts_right and mismatches == 0
    say(f"\nall of it in {time.perf_counter() - started:.0f} s")
    if not right:
        say(verdict(False, bad="the demo did not come out as it must: see WRONG above"))
    elif not options.no_serve:
        serve(data, past, models, options.host, options.port)
    return 0 if right else 1


def _missing() -> list[str]:
    from importlib.util import find_spec

    return [name for name in NEEDED if find_spec(name) is None]


def show_data(days: int, figures: Figures) -> tuple[Transactions, bool]:
    """Step 1: generate or load, and check the counts where they are known."""
    heading(1, "Transactions")
    with Progress(f"generating {days} days of transactions") as progress:
        data, cached = dataset.load_transactions(days, progress)
    frauds = int(data.fraud.sum())
    known = days == DAYS
    right = not known or (len(data), frauds, data.added) == (TRANSACTIONS_EXPECTED, FRAUDS_EXPECTED, ADDED_EXPECTED)

    def judged(value: int, expected: int) -> str:
        return verdict(value == expected, "as published", f"WRONG, published {expected:,}") if known else ""

    fact("transactions", f"{len(data):,}", judged(len(data), TRANSACTIONS_EXPECTED))
    fact("frauds", f"{frauds:,}", judged(frauds, FRAUDS_EXPECTED))
    names = ("large amounts", "compromised terminals", "compromised customers")
    for name, value, expected in zip(names, data.added, ADDED_EXPECTED, strict=True):
        fact(f"  by {name}", f"{value:,}", judged(value, expected))
    say(f"{CUSTOMERS:,} customers, {TERMINALS:,} terminals, {days} days from 2018-04-01")
    say(f"{'read from the cache' if cached else 'generated'} in {progress.seconds:.1f} s")
    figures.add("transactions", len(data), "events")
    figures.add("frauds", frauds, "events")
    figures.add("data_seconds", round(progress.seconds, 2), "s")
    return data, right


def show_replay(data: Transactions, figures: Figures) -> tuple[dict[str, Floats], float]:
    """Step 2: all transactions and labels through the engine; the 15 features of every row, and us per event."""
    from penstock import Engine
    from penstock.demo import fraud_training

    heading(2, "Window features: the history replayed through the engine")
    tables = {"FraudLabel": dataset.labels_table(data), "Transaction": dataset.transactions_table(data)}
    engine = Engine(fraud_training, clock="event")
    with Progress(f"replaying {2 * len(data):,} events") as progress:
        out = engine.replay(tables, out="training")
    features = columns(out, pandas_features.FEATURES)
    us = progress.seconds * 1e6 / len(data)
    fact("events (transactions and labels)", f"{2 * len(data):,}")
    fact("features per transaction", f"{len(features)}", "amount, weekend, night; 6 per customer, 6 per terminal")
    fact("seconds", f"{progress.seconds:.2f}")
    fact("microseconds per transaction", f"{us:.2f}", "its label included")
    figures.add("replay_seconds", round(progress.seconds, 3), "s")
    figures.add("us_per_event", round(us, 3), "us")
    return features, us


def columns(out: Any, names: Sequence[str]) -> dict[str, Floats]:
    """Columns of an Arrow table as float64 (n,); null is NaN."""
    import pyarrow as pa

    return {name: out.column(name).cast(pa.float64()).to_numpy() for name in names}


def train_models(data: Transactions, when: dataset.Weeks, features: dict[str, Floats], models: Path) -> None:
    """Step 3: the handbook's models on the training week, from the engine's own features."""
    heading(3, "Training, from the engine's own features")
    rows = dataset.train_rows(data, when)
    x = np.stack([features[name][rows] for name in pandas_features.FEATURES], axis=1)
    with Progress(f"training {len(training.RECIPES)} models") as progress:
        training.train(x, data.fraud[rows], list(pandas_features.FEATURES), models, progress.note)
    first = _day(when.train)
    fact("transactions of the training week", f"{len(rows):,}", f"{first} to {_day(when.train + 6)}")
    fact("frauds among them", f"{int(data.fraud[rows].sum()):,}")
    fact("seconds", f"{progress.seconds:.1f}")
    say(f"stored in {models}")


def _day(day: int) -> str:
    return str(np.datetime64("2018-04-01") + day)


def history(data: Transactions, when: dataset.Weeks) -> History:
    """All that a window of the test week can see, up to the end of that week."""
    first = int(np.searchsorted(data.day, when.test - WARM_DAYS))
    end = int(np.searchsorted(data.day, when.test + 7))
    label_day = data.day + dataset.DELAY_DAYS
    labels = np.nonzero((label_day >= when.test - WARM_DAYS) & (label_day < when.test + 7))[0]
    return History(
        dataset.transactions_table(data, slice(first, end)), dataset.labels_table(data, labels), first_row=first
    )


def score_everything(data: Transactions, past: History, models: Path, features: dict[str, Floats]) -> dict[str, Floats]:
    """Step 4, first half: every model's score of every transaction of `past`, by key; the features must be the same."""
    from penstock import Engine
    from penstock.demo import fraud_benchmark

    heading(4, "The published table, scored by the engine")
    engine = Engine(fraud_benchmark, models=models, clock="event")
    with Progress(f"scoring {past.transactions.num_rows:,} transactions with {len(fraud_benchmark.MODELS)} models"):
        out = engine.replay({"FraudLabel": past.labels, "Transaction": past.transactions}, out="benchmark")
    return {key: columns(out, [slot(ref)])[slot(ref)] for key, ref in fraud_benchmark.MODELS.items()}


def slot(ref: str) -> str:
    """The column of a model's score."""
    return "score." + ref.replace("@", "_")


def show_table(
    data: Transactions, when: dataset.Weeks, rows: Rows, scores: dict[str, Floats], figures: Figures
) -> None:
    """Step 4, second half: the three figures of each model beside the published ones, with the difference."""
    first = int(np.searchsorted(data.day, when.test - WARM_DAYS))
    lines = []
    outside = []
    for recipe in training.RECIPES:
        got = training.judge(data, rows, scores[recipe.key][rows - first])
        off = [a - b for a, b in zip(got, recipe.published, strict=True)]
        near = max(map(abs, off)) <= recipe.tolerance
        if when.published:
            compared = [*(f"{v:.3f}" for v in recipe.published), *(f"{v:+.4f}" for v in off)]
            outside += [] if near else [recipe.title]
        else:
            compared = ["n/a"] * 6
        lines.append([recipe.title, *(f"{v:.4f}" for v in got), *compared])
        for name, value in zip(got._fields, got, strict=True):
            figures.add(f"{recipe.key}.{name}", round(value, 6), "1")
    fact("transactions of the test week", f"{len(rows):,}", f"{_day(when.test)} to {_day(when.test + 6)}")
    fact("frauds among them", f"{int(data.fraud[rows].sum()):,}", "customers known to be compromised are left out")
    say()
    published = ["published AUC", "AP", "CP@100", "difference AUC", "AP", "CP@100"]
    say(table(["model", "AUC", "AP", "CP@100", *published], lines))
    say()
    if not when.published:
        say(f"the published table is not applicable: its weeks need {dataset.PUBLISHED_DAYS} days")
    elif outside:
        say(verdict(False, bad=f"outside the tolerance: {', '.join(outside)}"))
    else:
        say(
            verdict(True, "as published")
            + ": within .001; the unlimited tree and the forest, which depend on the order of\n"
            "rows inside one second, within .005"
        )
    say("AP: average precision. CP@100: card precision, the 100 cards of highest score a day")


def show_split(data: Transactions, rows: Rows, past: History, models: Path) -> None:
    """Step 5: two models, 50/50 over customers, and what each arm decided on the test week."""
    from penstock import Engine
    from penstock.demo import fraud

    heading(5, "The experiment: two models, 50/50 over customers")
    engine = Engine(fraud, models=models, clock="event")
    out = engine.replay({"FraudLabel": past.labels, "Transaction": past.transactions}, out="fraud")
    place = rows - past.first_row
    arm = np.asarray(out.column("challenger").to_pylist(), dtype=object)[place]
    action = np.asarray(out.column("action").to_pylist(), dtype=object)[place]
    customer, label = data.customer[rows], data.fraud[rows] == 1
    lines = []
    for name in fraud.fraud.experiments[0].arms:
        mine = arm == name
        caught = mine & (action != "approve")
        hits, frauds = int((caught & label).sum()), int((mine & label).sum())
        lines.append(
            [
                name,
                f"{len(np.unique(customer[mine])):,}",
                f"{int(mine.sum()):,}",
                *(f"{int((mine & (action == a)).sum()):,}" for a in ("approve", "review", "decline")),
                f"{frauds:,}",
                f"{hits / frauds:.1%}" if frauds else "-",
                f"{hits / int(caught.sum()):.1%}" if caught.any() else "-",
            ]
        )
    header = ["arm", "customers", "transactions", "approve", "review", "decline", "frauds", "caught", "precision"]
    say(table(header, lines))
    say()
    both = len(np.intersect1d(*(customer[arm == name] for name in fraud.fraud.experiments[0].arms)))
    say(f"customers in both arms: {both} {verdict(both == 0)}")


def show_parity(
    data: Transactions,
    when: dataset.Weeks,
    features: dict[str, Floats],
    past: History,
    models: Path,
    us_per_event: float,
    figures: Figures,
) -> int:
    """Step 6: the time beside pandas', and the three proofs; returns how many values differed."""
    heading(6, "Parity, and the time beside pandas")
    with Progress("computing the same features in pandas") as progress:
        theirs = pandas_features.features(data, progress)
    theirs_us = progress.seconds * 1e6 / len(data)
    fact("microseconds per transaction, engine", f"{us_per_event:.2f}")
    fact(
        "microseconds per transaction, pandas", f"{theirs_us:.2f}", f"{theirs_us / us_per_event:.1f} times the engine's"
    )
    figures.add("pandas_us_per_event", round(theirs_us, 3), "us")
    say()

    # ~(a <= b) rather than a > b: NaN is a mismatch.
    off = {name: np.abs(features[name] - theirs[name]) for name in theirs}
    wrong = sum(int(np.count_nonzero(~(d <= TOLERANCE))) for d in off.values())
    largest = max(float(d.max()) for d in off.values())
    fact("features compared with pandas", f"{len(data) * len(off):,}", f"largest difference {largest:.1e}")
    fact("  differ by more than 1e-9", f"{wrong:,}", verdict(wrong == 0))

    rng = np.random.RandomState(0)
    sample = np.sort(rng.choice(len(data), size=min(ORACLE_ROWS, len(data)), replace=False))
    slow_wrong = 0
    with Progress(f"{len(sample):,} rows the slow way, in exact fractions") as progress:
        for done, row in enumerate(sample.tolist(), 1):
            expected = slow_features.features_of(data, row)
            slow_wrong += sum(features[name][row] != value for name, value in expected.items())
            progress(done, len(sample))
    fact("features compared with the slow oracle", f"{len(sample) * len(off):,}", "bit for bit")
    fact("  differ", f"{slow_wrong:,}", verdict(slow_wrong == 0))

    rows, score_wrong = one_by_one(data, when, past, models)
    fact("scores one by one against score_batch", f"{rows:,}", "bit for bit; action and arm too")
    fact("  differ", f"{score_wrong:,}", verdict(score_wrong == 0))
    figures.add("oracle_mismatches", slow_wrong, "values")
    figures.add("score_mismatches", score_wrong, "values")
    return wrong + slow_wrong + score_wrong


def one_by_one(data: Transactions, when: dataset.Weeks, past: History, models: Path) -> tuple[int, int]:
    """Two engines with the same past: one scores the test week's transactions one by one, the other as one table."""
    from penstock.demo import fraud

    start = int(np.searchsorted(data.day, when.test)) - past.first_row
    before, rows = past.transactions.slice(0, start), past.transactions.slice(start, ONE_BY_ONE_ROWS)
    single, batch = warm(past, before, models), warm(past, before, models)
    out = batch.score_batch(rows)
    events = [
        fraud.Transaction(customer=r["customer"], terminal=r["terminal"], amount=r["amount"], at=at)
        for r, at in zip(rows.to_pylist(), _timestamps(rows), strict=True)
    ]
    decisions = [single.score(event) for event in events]
    theirs = zip(*(out.column(name).to_pylist() for name in ("score", "action", "challenger")), strict=True)
    wrong = 0
    for decision, (score, action, arm) in zip(decisions, theirs, strict=True):
        same = np.float64(decision.score).tobytes() == np.float64(score).tobytes()
        wrong += not (same and decision.action == action and decision.arms["challenger"] == arm)
    return rows.num_rows, wrong


def _timestamps(rows: Any) -> list[Any]:
    from penstock import Timestamp

    return [Timestamp(us) for us in rows.column("at").cast("int64").to_pylist()]


def warm(past: History, transactions: Any, models: Path) -> Any:
    """An engine of the fraud app that has seen the labels of `past` and the given transactions."""
    from penstock import Engine
    from penstock.demo import fraud

    engine = Engine(fraud, models=models, clock="event")
    engine.ingest(past.labels, event="FraudLabel")
    engine.ingest(transactions, event="Transaction")
    return engine


def serve(data: Transactions, past: History, models: Path, host: str, port: int) -> None:
    """Step 7: the fraud app over HTTP, with the month before the end of the test week in its state."""
    from penstock.server import serve as serve_engine

    heading(7, f"Serving the fraud app on http://{host}:{port}")
    engine = warm(past, past.transactions, models)
    last = past.transactions.slice(past.transactions.num_rows - 1).to_pylist()[0]
    at = "2018-08-15T12:00:00Z"
    event = json.dumps({"customer": last["customer"], "terminal": last["terminal"], "amount": 250.0, "at": at})
    url = f"http://{host}:{port}"
    say("in another terminal:\n")
    say(f"curl -s {url}/v1/score/fraud -d '{event}'")
    say(f"curl -s {url}/v1/features/spend -d '{json.dumps({'keys': [last['customer']], 'as_of': at})}'")
    say(f"curl -s {url}/health/ready")
    say(f"curl -s {url}/metrics")
    say("\nCtrl-C stops it")
    serve_engine(engine, host=host, port=port)
