"""`penstock demo`: the Fraud Detection Handbook benchmark from an empty folder to a running server (control path).

What must stay true: every figure it prints was computed in this run by the engine, and what it compares with
(the published table, pandas, the slow features) shares no code with the engine.
"""

import argparse
import json
import os
import platform
import shlex
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from penstock.terminal import Progress, fact, heading, say, table, verdict

if TYPE_CHECKING:
    from penstock.demo.replays import History

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

TOLERANCE = 1e-9  # between the engine's features and pandas', which sums in another order
ORACLE_ROWS = 1_000
ONE_BY_ONE_ROWS = 5_000
SURVIVAL_ROWS = 40_000  # of the test week: the process is killed half-way
NEEDED = ("numba", "onnxruntime", "pandas", "pyarrow", "skl2onnx", "sklearn", "xgboost")


class Figures:
    """The rows of `--json`: name, value, unit, floor, ratio, command."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, unit: str) -> None:
        """One figure. The demo has no floors; the benchmarks have."""
        row = {"name": f"demo.{name}", "value": value, "unit": unit, "floor": None, "ratio": None}
        self.rows.append({**row, "command": self.command})

    def write(self, path: Path) -> None:
        """Write all rows, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(unfinished, path)


def main(args: Sequence[str] = ()) -> int:
    """Run the demo; 0 where the counts and every parity proof hold, 1 where one does not (2: wrong arguments)."""
    parser = argparse.ArgumentParser(prog="penstock demo", description="The Fraud Detection Handbook benchmark.")
    parser.add_argument("--days", type=int, default=DAYS, help=f"days of transactions ({dataset.FEWEST_DAYS}..{DAYS})")
    parser.add_argument("--no-serve", action="store_true", help="stop before serving the app")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--host", default="127.0.0.1", help="where to serve")
    parser.add_argument("--port", type=int, default=8000, help="where to serve")
    options = parser.parse_args(list(args))
    if not dataset.FEWEST_DAYS <= options.days <= DAYS:
        parser.error(f"--days: expected {dataset.FEWEST_DAYS} to {DAYS}, got {options.days}")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(f"the demo needs {', '.join(missing)}: pip install 'penstock[demo]'")
    warnings.filterwarnings("ignore")
    port = options.port if options.no_serve else free_port(options.host, options.port)
    from penstock.demo import replays

    figures = Figures(shlex.join(["penstock", "demo", *args]))
    started = time.perf_counter()
    print("Penstock demo: the Fraud Detection Handbook benchmark")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, cache {dataset.cache_folder()}")

    data, counts_right = show_data(options.days, figures)
    when = dataset.weeks(options.days)
    features, us_per_event = show_replay(data, figures)
    models = dataset.cache_folder() / f"models-{options.days}"
    trained = show_training(data, when, features, models)
    past = replays.history(data, when)
    rows = dataset.test_rows(data, when)
    again = show_table(data, when, rows, past, models, trained, figures)
    show_split(data, rows, past, models)
    mismatches = show_parity(data, features, again, past, models, us_per_event, figures)
    figures.add("parity_mismatches", mismatches, "values")
    lost = show_survival(past, models, figures)
    seconds = time.perf_counter() - started
    figures.add("seconds", round(seconds, 1), "s")
    right = counts_right and mismatches == 0 and lost == 0
    say(f"\nall of it in {seconds:.0f} s")
    if options.json is not None:
        figures.write(options.json)
        say(f"figures in {options.json}")
    if not right:
        say(verdict(False, bad="the demo did not come out as it must: see WRONG above"))
    elif not options.no_serve:
        serve(past, models, options.host, port)
    return 0 if right else 1


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
    from penstock.demo import replays

    heading(2, "Window features: the history replayed through the engine")
    with Progress(f"replaying {2 * len(data):,} events") as progress:
        features, seconds = replays.all_features(data, progress)
    us = seconds * 1e6 / len(data)
    fact("events: transactions and labels", f"{2 * len(data):,}")
    fact("features per transaction", f"{len(features)}", "3 of the event, 6 per customer, 6 per terminal")
    fact("seconds", f"{seconds:.2f}", "Arrow tables in, string keys, Arrow columns out")
    fact("microseconds per transaction", f"{us:.2f}", "its label included")
    figures.add("replay_seconds", round(seconds, 3), "s")
    figures.add("us_per_event", round(us, 3), "us")
    return features, us


def show_training(data: Transactions, when: dataset.Weeks, features: dict[str, Floats], models: Path) -> dict[str, Any]:
    """Step 3: the handbook's models on the training week, from the engine's own features; returns them by key."""
    heading(3, "Training, from the engine's own features")
    rows = dataset.train_rows(data, when)
    x = matrix(features, rows)
    with Progress(f"training {len(training.RECIPES)} models") as progress:
        trained = training.train(x, data.fraud[rows], list(pandas_features.FEATURES), models, progress.note)
    fact("transactions of the training week", f"{len(rows):,}", f"{_day(when.train)} to {_day(when.train + 6)}")
    fact("frauds among them", f"{int(data.fraud[rows].sum()):,}")
    fact("seconds", f"{progress.seconds:.1f}")
    say(f"stored in {models}")
    return trained


def matrix(features: dict[str, Floats], rows: Rows) -> Floats:
    """Rows of the features as (rows, 15), in the order in which the models are trained."""
    return np.stack([features[name][rows] for name in pandas_features.FEATURES], axis=1)


def _day(day: int) -> str:
    return str(np.datetime64("2018-04-01") + day)


def show_table(
    data: Transactions,
    when: dataset.Weeks,
    rows: Rows,
    past: "History",
    models: Path,
    trained: dict[str, Any],
    figures: Figures,
) -> dict[str, Floats]:
    """Step 4: every model's scores of the test week through the engine, judged beside the published table.

    Returns the features of this replay, which started 31 days before the test week, for the proof of parity.
    """
    from penstock.demo import replays

    heading(4, "The published table, scored by the engine")
    keys = [recipe.key for recipe in training.RECIPES]
    with Progress(f"scoring {past.transactions.num_rows:,} transactions with {len(keys)} models") as progress:
        scores, kinds, features = replays.all_scores(past, models, keys, progress)
    place = rows - past.first_row
    x = matrix(features, place)
    lines, outside, apart = [], [], 0.0
    for recipe in training.RECIPES:
        score = scores[recipe.key][place]
        own = trained[recipe.key].predict_proba(x)[:, 1]
        apart = max(apart, float(np.abs(score - own).max()))
        got = training.judge(data, rows, score)
        cells = [recipe.title, kinds[recipe.key]]
        for name, value, published in zip(got._fields, got, recipe.published, strict=True):
            figures.add(f"{recipe.key}.{name}", round(value, 6), "1")
            off = value - published
            cells += [f"{value:.4f}", *((f"{published:.3f}", f"{off:+.4f}") if when.published else ("n/a", "n/a"))]
            if when.published and abs(off) > recipe.tolerance:
                outside.append(f"{recipe.title} {name}")
        lines.append(cells)
    fact("transactions of the test week", f"{len(rows):,}", f"{_day(when.test)} to {_day(when.test + 6)}")
    fact("frauds among them", f"{int(data.fraud[rows].sum()):,}", "without customers known to be compromised")
    fact("scores of the engine", f"{len(rows) * len(lines):,}", f"at most {apart:.0e} from the libraries' own")
    say()
    header = [column for name in ("AUC", "AP", "CP@100") for column in (name, "publ.", "diff")]
    say(table(["model", "runtime", *header], lines))
    say()
    if not when.published:
        say(f"the published table is not applicable: its weeks need {dataset.PUBLISHED_DAYS} days")
    elif outside:
        say(verdict(False, bad=f"outside the tolerance: {', '.join(outside)}"))
    else:
        say(verdict(True, "as published") + ", within .001; the unlimited tree and the forest depend on the order of")
        say("rows inside one second, which is not published: within .005")
    say("AP: average precision. CP@100: card precision, the 100 cards with the highest scores of a day.")
    say("publ.: the handbook's table. trees: the tree kernel; onnx: ONNX Runtime.")
    return features


def show_split(data: Transactions, rows: Rows, past: "History", models: Path) -> None:
    """Step 5: two models, 50/50 over customers, and what each arm decided on the test week."""
    from penstock.demo import fraud, replays

    heading(5, "The experiment: two models, 50/50 over customers")
    with Progress("deciding the test week") as progress:
        decided = replays.decisions(past, models, progress)
    arm, action = (column[rows - past.first_row] for column in decided)
    customer, label = data.customer[rows], data.fraud[rows] == 1
    arms = list(fraud.fraud.experiments[0].arms)
    lines = []
    for name in arms:
        mine = arm == name
        flagged = mine & (action != "approve")
        frauds, hits = int((mine & label).sum()), int((flagged & label).sum())
        lines.append(
            [
                name,
                f"{len(np.unique(customer[mine])):,}",
                f"{int(mine.sum()):,}",
                *(f"{int((mine & (action == a)).sum()):,}" for a in ("approve", "review", "decline")),
                f"{frauds:,}",
                f"{hits / frauds:.1%}" if frauds else "-",
                f"{hits / int(flagged.sum()):.1%}" if flagged.any() else "-",
            ]
        )
    header = ["arm", "customers", "transactions", "approve", "review", "decline", "frauds", "caught", "precision"]
    say(table(header, lines))
    say()
    both = len(np.intersect1d(*(customer[arm == name] for name in arms)))
    say(f"customers in both arms: {both}   {verdict(both == 0)}")


def show_parity(
    data: Transactions,
    features: dict[str, Floats],
    again: dict[str, Floats],
    past: "History",
    models: Path,
    us_per_event: float,
    figures: Figures,
) -> int:
    """Step 6: the time beside pandas', and the proofs; returns how many values differed."""
    from penstock.demo import replays

    heading(6, "Parity, and the time beside pandas")
    with Progress("computing the same features in pandas") as progress:
        theirs = pandas_features.features(data, progress)
    theirs_us = progress.seconds * 1e6 / len(data)
    figures.add("pandas_us_per_event", round(theirs_us, 3), "us")
    fact("microseconds per transaction, engine", f"{us_per_event:.2f}")
    note = f"the handbook's way, same rows: {theirs_us / us_per_event:.1f} times as long"
    fact("microseconds per transaction, pandas", f"{theirs_us:.2f}", note)
    say()

    # not (a <= b) rather than a > b: NaN is a mismatch.
    off = {name: np.abs(features[name] - theirs[name]) for name in theirs}
    wrong = sum(int(np.count_nonzero(~(d <= TOLERANCE))) for d in off.values())
    largest = max(float(d.max()) for d in off.values())
    fact("features compared with pandas", f"{len(data) * len(off):,}", f"largest difference {largest:.1e}")
    fact("  differ by more than 1e-9", f"{wrong:,}", verdict(wrong == 0))

    sample = np.sort(np.random.RandomState(0).choice(len(data), size=min(ORACLE_ROWS, len(data)), replace=False))
    slow_wrong = 0
    with Progress(f"{len(sample):,} rows the slow way, in exact fractions") as progress:
        for done, row in enumerate(sample.tolist(), 1):
            expected = slow_features.features_of(data, row)
            slow_wrong += sum(features[name][row] != value for name, value in expected.items())
            progress(done, len(sample))
    fact("features compared with the slow oracle", f"{len(sample) * len(off):,}", "bit for bit, a sample of rows")
    fact("  differ", f"{slow_wrong:,}", verdict(slow_wrong == 0))

    replay_wrong, compared = 0, 0
    for name, values in again.items():
        mine = values[past.test_row :]
        whole = features[name][past.first_row + past.test_row :][: len(mine)]
        compared += len(mine)
        replay_wrong += int(np.count_nonzero(mine.view(np.int64) != whole.view(np.int64)))
    note = f"bit for bit; one began {replays.WARM_DAYS} days before"
    fact("features of the test week, two replays", f"{compared:,}", note)
    fact("  differ", f"{replay_wrong:,}", verdict(replay_wrong == 0))

    with Progress(f"scoring {ONE_BY_ONE_ROWS:,} transactions one by one, and as a table"):
        compared, score_wrong = replays.one_by_one(past, models, ONE_BY_ONE_ROWS)
    fact("scores one by one against score_batch", f"{compared:,}", "bit for bit, action and arm too")
    fact("  differ", f"{score_wrong:,}", verdict(score_wrong == 0))
    figures.add("oracle_mismatches", int(slow_wrong), "values")
    figures.add("replay_mismatches", replay_wrong, "values")
    figures.add("score_mismatches", score_wrong, "values")
    return wrong + int(slow_wrong) + replay_wrong + score_wrong


def show_survival(past: "History", models: Path, figures: Figures) -> int:
    """Step 7: a process that scores is killed, another goes on from its log; returns how much was lost or differs."""
    from penstock.demo.survival import kill_and_recover

    heading(7, "State that survives: the event log")
    with Progress("scoring the test week in a process with a log, and killing it"):
        found = kill_and_recover(past, models, SURVIVAL_ROWS)
    recovery, report = found.recovery, found.parity
    lost = max(0, found.acknowledged - found.scored)
    (pipeline,) = report.pipelines
    compared = sum(f.compared for f in pipeline.features)
    wrong = sum(f.mismatched for f in [*pipeline.features, *([pipeline.decisions] if pipeline.decisions else [])])
    fact("acknowledged before the kill", f"{found.acknowledged:,}", "scored one by one, then SIGKILL")
    fact("  lost", f"{lost:,}", verdict(lost == 0))
    rate = f"{recovery.events / recovery.seconds:,.0f} events a second"
    fact("events recovered from the log", f"{recovery.events:,}", f"in {recovery.seconds:.2f} s, {rate}")
    fact("features of the log's scores compared", f"{compared:,}", f"bit for bit, in {found.parity_seconds:.2f} s")
    fact("  differ, decisions too", f"{wrong:,}", verdict(wrong == 0))
    figures.add("acknowledged_lost", lost, "events")
    figures.add("log_mismatches", wrong, "values")
    figures.add("recovery_seconds", round(recovery.seconds, 3), "s")
    return lost + wrong


def free_port(host: str, port: int) -> int:
    """The port to serve on, 0 made a free one. Raises PenstockError at the start of the demo, not at its end."""
    from penstock.server.lifecycle import bind

    listener = bind(host, port)
    try:
        return int(listener.getsockname()[1])
    finally:
        listener.close()


def serve(past: "History", models: Path, host: str, port: int) -> None:
    """Step 8: the fraud app over HTTP, with the test week and the month before it as if they ended just now."""
    from penstock.demo import replays
    from penstock.server import serve as serve_engine

    url = f"http://{host}:{port}"
    heading(8, f"Serving the fraud app on {url}")
    now = np.datetime64(int(time.time()), "s")
    with Progress("ingesting a month of transactions and labels"):
        recent = replays.recent(past, now)
        engine = replays.warm(recent, recent.transactions.num_rows, recent.labels.num_rows, models, clock="wall")
    customer, terminal = (recent.transactions.column(name)[-1].as_py() for name in ("customer", "terminal"))
    usual = {"customer": customer, "terminal": terminal, "amount": 25.0, "at": f"{now}Z"}
    odd = {**usual, "terminal": replays.riskiest_terminal(recent), "amount": 350.0}
    say("its state: the test week and the month before it, moved in time by whole weeks to end just now")
    say("in another terminal, a usual transaction, an odd one, what is known of its customer, and the metrics:\n")
    say(f"curl -s {url}/v1/score/fraud -d '{json.dumps(usual)}'")
    say(f"curl -s '{url}/v1/score/fraud?explain=true' -d '{json.dumps(odd)}'")
    say(f"curl -s {url}/v1/features/spend -d '{json.dumps({'keys': [customer]})}'")
    say(f"curl -s {url}/metrics")
    say("\nCtrl-C stops it")
    serve_engine(engine, host=host, port=port)
