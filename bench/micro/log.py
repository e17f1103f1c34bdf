"""The log rows: what the event log costs an engine, how fast it is read back, and features computed from it.

The app, models and stream are the engine rows'. `log.score_overhead` sets two engines side by side, one with event and
score log, on the same events; `log.append_events_per_s` ingests a table with a sync every 10 ms, beside the same ingest
without a log (floor); `log.recovery_events_per_s` replays a log of events and scores into a fresh engine, checks
included, beside reading and checking the records alone (floor); `replay.events_per_s` gives all fraud features of every
event of the log, one core, as Arrow columns. The log lies on the disk of the working folder. Run as a script:
python bench/micro/log.py
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app import stream, train
from rows import row
from timing import interleaved, note

COMMAND = "make bench ARGS='--only log'"
WARM = 200_000
PER_ROUND, ROUNDS = 20_000, 15
TABLE = 100_000  # events of one ingested table
RESULTS = Path(__file__).resolve().parents[1] / "results"


def run() -> list[dict[str, Any]]:
    RESULTS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=RESULTS, prefix="log-"))
    try:
        return _rows(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    from app import fraud_bench

    from penstock import Engine, Timestamp
    from penstock.offline.history import History
    from penstock.offline.log_folder import LogFolder
    from penstock.offline.options import LogOptions
    from penstock.offline.parity import parity
    from penstock.offline.replay import backfill

    options = LogOptions(sync="10ms", keeper=False)
    models = train.folder() / "models"
    rounds = ROUNDS + 1
    data = stream.transactions(WARM + max(PER_ROUND, TABLE) * rounds)
    tables = data.tables()
    warm = {name: table.slice(0, WARM) for name, table in tables.items()}

    note(f"score_overhead: {ROUNDS} interleaved rounds of {PER_ROUND:,} events")
    without = Engine(fraud_bench, models=models)
    with_log = Engine(fraud_bench, models=models, log=folder / "scores", log_options=options)
    for engine in (without, with_log):
        engine.replay(warm)
    parts = [
        [
            fraud_bench.Transaction(f"C{c}", f"T{t}", a, Timestamp(at))
            for c, t, a, at in zip(
                *(column[b : b + PER_ROUND].tolist() for column in (data.customer, data.terminal, data.amount)),
                data.at[b : b + PER_ROUND].tolist(),
            )
        ]
        for b in (WARM + i * PER_ROUND for i in range(rounds))
    ]

    def score_each(engine: Any) -> Any:
        turn = iter(parts)

        def work(score: Any = engine.score) -> None:
            for event in next(turn):
                score(event)

        return work

    seconds = interleaved({"without": score_each(without), "with": score_each(with_log)}, rounds=ROUNDS)
    us = {name: 1e6 * took / PER_ROUND for name, took in seconds.items()}
    with_log.close()
    bytes_per_score = _bytes(folder / "scores") / (2 * WARM + PER_ROUND * rounds)

    note("append: tables of events, sync every 10 ms, beside the same without a log")
    ingesting = {
        "without": Engine(fraud_bench, models=models),
        "with": Engine(fraud_bench, models=models, log=folder / "events", log_options=options),
    }
    slices = [tables["Transaction"].slice(i * TABLE, TABLE).combine_chunks() for i in range(rounds)]

    def ingest_next(engine: Any) -> Any:
        turn = iter(slices)

        def work() -> None:
            engine.ingest(next(turn), "Transaction")

        return work

    append = interleaved({name: ingest_next(engine) for name, engine in ingesting.items()}, rounds=ROUNDS)
    ingesting["with"].close()

    note("recovery: a log of events and scores into a fresh engine")
    log = folder / "scores"

    def recover() -> int:
        engine = Engine(fraud_bench, models=models, log=log, log_options=options)
        events = engine.recovery.events if engine.recovery is not None else 0
        engine.close()
        return events

    def check() -> int:
        return sum(segment.scan().events for segment in LogFolder(log).segments())

    events = recover()
    if events != 2 * WARM + PER_ROUND * rounds or events != check():
        raise RuntimeError(f"recovered {events} events, the log has {check()}")
    report = parity(fraud_bench, log, models=models)
    if not report.ok or report.pipelines[0].scores != PER_ROUND * rounds:
        raise RuntimeError(f"parity of the log that is timed:\n{report}")
    started = time.perf_counter()
    idle = Engine(fraud_bench, models=models)
    start = time.perf_counter() - started
    del idle
    read = interleaved({"recover": recover, "check": check}, rounds=5)

    note("replay: all fraud features of every event of the log")
    history = History(LogFolder(log))
    history.check()
    replayed = interleaved({"backfill": lambda: backfill(fraud_bench, log)}, rounds=5)
    scored_type = WARM + PER_ROUND * rounds
    recovering = max(read["recover"] - start, 1e-9)
    return [
        row("log.append_events_per_s", TABLE / append["with"], "events/s", COMMAND, TABLE / append["without"],
            append["without"] / append["with"]),
        row("log.score_overhead", us["with"] / us["without"], "ratio", COMMAND),
        row("log.score_with_us", us["with"], "us/event", COMMAND, us["without"], us["with"] / us["without"]),
        row("log.bytes_per_scored_event", bytes_per_score, "bytes", COMMAND),
        row("log.recovery_events_per_s", events / recovering, "events/s", COMMAND, events / read["check"],
            read["check"] / recovering),
        row("replay.events_per_s", events / replayed["backfill"], "events/s", COMMAND),
        row("replay.rows_per_s", scored_type / replayed["backfill"], "rows/s", COMMAND),
    ]  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "segments").glob("*.log"))


if __name__ == "__main__":
    from rows import table as show

    print(show(run()))
