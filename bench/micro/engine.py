"""The engine rows: the fraud app (15 features of two entities, split, a 100-tree model, rules), one event and batches.

Every contender has an engine of its own, warmed by the same 40 days of transactions and labels, and scores the same
later events once, in time order, as a live engine would. Floor of the single rows: a loop over the same events that
calls a builtin which does nothing. Run as a script: python bench/micro/engine.py
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app import stream, train
from rows import row
from timing import interleaved, note

COMMAND = "make bench ARGS='--only engine'"
WARM = 40 * 86_400 // stream.STEP  # events of 40 days: the 30-day window is full and evicts
PER_ROUND, ROUNDS, BATCH = 20_000, 7, 2_048


class Turns:
    """Hands out the next part of a list of prepared work at every call."""

    def __init__(self, parts: list[Any], work: Any) -> None:
        self.parts, self.work, self.turn = parts, work, 0

    def __call__(self) -> None:
        part, self.turn = self.parts[self.turn], self.turn + 1
        self.work(part)


def check(engine: Any, models: Path, at: int) -> None:
    """What is timed must be right: 64 decisions carry LightGBM's own score of the engine's features, and differ."""
    import lightgbm
    import numpy as np
    from app import fraud_bench

    from penstock import Timestamp

    boosters = {v: lightgbm.Booster(model_file=models / "fraud_trees" / v / "model.txt") for v in ("1", "2")}
    seen = set()
    for i in range(64):
        event = fraud_bench.Transaction(f"C{i}", f"T{i * 7}", 1.5 * i, Timestamp(at))
        decision = engine.score(event, False, explain=True)
        version = str(decision.model_version)
        x = np.array([[float(decision.features[f]) for f in stream.FEATURES]])
        expected = float(boosters[version].predict(x)[0])
        if decision.score is None or abs(decision.score - expected) > 1e-15:
            raise RuntimeError(f"{event}: score {decision.score}, LightGBM says {expected}")
        seen.add((version, decision.action, decision.score))
    if len({s for _, _, s in seen}) < 16 or len({v for v, _, _ in seen}) != 2:
        raise RuntimeError(f"the decisions are all alike: {sorted(seen)[:4]}")


def run() -> list[dict[str, Any]]:
    from app import fraud_bench

    from penstock import Engine, Timestamp

    rounds = ROUNDS + 1  # one that warms up
    note(f"warming 4 engines with {WARM:,} transactions each")
    data = stream.transactions(WARM + PER_ROUND * rounds)
    tables = data.tables()
    last = int(data.at[WARM - 1])
    history = {
        "FraudLabel": tables["FraudLabel"].slice(0, max(0, WARM - stream.LABEL_DELAY // stream.STEP)),
        "Transaction": tables["Transaction"].slice(0, WARM),
    }
    models = train.folder() / "models"

    def warm_engine() -> Any:
        engine = Engine(fraud_bench, models=models)
        engine.replay(history)
        return engine

    engines = [warm_engine() for _ in range(4)]
    check(engines[3], models, last)

    def structs(begin: int) -> list[Any]:
        return [
            fraud_bench.Transaction(f"C{c}", f"T{t}", a, Timestamp(at))
            for c, t, a, at in zip(
                *(column[begin : begin + PER_ROUND].tolist() for column in (data.customer, data.terminal, data.amount)),
                data.at[begin : begin + PER_ROUND].tolist(),
            )
        ]

    starts = [WARM + i * PER_ROUND for i in range(rounds)]
    objects = [structs(begin) for begin in starts]
    dicts = [
        [
            {
                "customer": e.customer,
                "terminal": e.terminal,
                "amount": e.amount,
                "at": datetime.fromtimestamp(int(e.at) / 1e6, UTC),
            }
            for e in part
        ]
        for part in objects
    ]
    slices = [
        [
            tables["Transaction"].slice(begin + i, min(BATCH, PER_ROUND - i)).combine_chunks()
            for i in range(0, PER_ROUND, BATCH)
        ]
        for begin in starts
    ]

    def score_each(engine: Any) -> Any:
        def work(part: list[Any], score: Any = engine.score) -> None:
            for event in part:
                score(event)

        return work

    def score_tables(part: list[Any], score: Any = engines[2].score_batch) -> None:
        for table in part:
            score(table)

    def evaluate_each(part: list[Any], score: Any = engines[3].score) -> None:
        for event in part:
            score(event, False)

    def call_nothing(part: list[Any], nothing: Any = id) -> None:
        for event in part:
            nothing(event)

    note(f"struct, dict, batches of {BATCH:,}: {ROUNDS} interleaved rounds of {PER_ROUND:,} events")
    seconds = interleaved(
        {
            "struct": Turns(objects, score_each(engines[0])),
            "dict": Turns(dicts, score_each(engines[1])),
            "batch": Turns(slices, score_tables),
            "evaluate": Turns(objects, evaluate_each),
            "nothing": Turns(objects, call_nothing),
        },
        rounds=ROUNDS,
    )
    us = {name: 1e6 * took / PER_ROUND for name, took in seconds.items()}
    floor = us["nothing"]
    applied = engines[0].stats()["outcomes"]["Transaction"]["applied"]
    if applied != WARM + PER_ROUND * rounds:
        raise RuntimeError(f"expected every event to be applied, got {applied} of {WARM + PER_ROUND * rounds}")
    return [
        row("engine.score_single_us", us["struct"], "us/event", COMMAND, floor, us["struct"] / floor),
        row("engine.score_dict_us", us["dict"], "us/event", COMMAND, floor, us["dict"] / floor),
        row("engine.score_batch_us_per_event", us["batch"], "us/event", COMMAND),
        row("engine.evaluate_single_us", us["evaluate"], "us/event", COMMAND, floor, us["evaluate"] / floor),
    ]


if __name__ == "__main__":
    from rows import table as show

    print(show(run()))
