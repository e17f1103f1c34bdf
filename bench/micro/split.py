"""The split rows: unit id -> arm, one by one from Python and in batches from Arrow's string layout, for every hash.

Ids are 36-character UUIDs, two arms, no coverage; `split.assign_ns` and `split.assign_batch_ns_per_id` are the slower
of growthbook-v2 and murmur3-32, the other rows say each. Floor of one: a loop over the same ids that calls `len`.
Floor of a batch: NumPy adding up the same bytes. Peer: Eppo's formula with hashlib. Run as a script:
python bench/micro/split.py
"""

from __future__ import annotations

import hashlib
import random
import sys
import uuid
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import row, table
from timing import interleaved

COMMAND = "make bench ARGS='--only split'"
SINGLE, BATCH, ROUNDS = 20_000, 100_000, 9
MAIN = ("growthbook-v2", "murmur3-32/flagd")


def run() -> list[dict[str, Any]]:
    from penstock.definitions import Experiment
    from penstock.experiments.assignment import HASHES, compile_experiment

    source = random.Random(1)
    ids = [str(uuid.UUID(int=source.getrandbits(128))) for _ in range(BATCH)]
    some = ids[:SINGLE]
    data = "".join(ids).encode()
    offsets = np.cumsum([0] + [len(i) for i in ids]).astype(np.int32)
    raw = np.frombuffer(data, np.uint8)
    assigners = {
        name: compile_experiment(Experiment("bench", unit="id", arms={"a": 0.5, "b": 0.5}, hash=name))
        for name in HASHES
    }
    for assigner in assigners.values():  # one by one and in a batch must agree before either is timed
        single = [assigner.arms.index(arm) if (arm := assigner.assign(i)) else -1 for i in some[:1000]]
        if assigner.assign_many((data, offsets))[:1000].tolist() != single:
            raise AssertionError(f"{assigner}: a batch differs from one by one")

    def loop(function: Any) -> Any:
        def call() -> None:
            for unit in some:
                function(unit)

        return call

    def eppo(unit: str) -> str:
        return "a" if int(hashlib.md5(f"bench-{unit}".encode()).hexdigest()[:8], 16) % 10000 < 5000 else "b"

    singles = {name: loop(a.assign) for name, a in assigners.items()} | {"floor": loop(len), "hashlib": loop(eppo)}
    batches: dict[str, Any] = {"floor": lambda: raw.sum(dtype=np.uint64)}
    for name, a in assigners.items():
        batches[name] = lambda a=a: a.assign_many((data, offsets))
    batches["list"] = lambda: assigners["growthbook-v2"].assign_many(ids)
    one = {name: 1e9 * s / SINGLE for name, s in interleaved(singles, rounds=ROUNDS, warmup=2).items()}
    many = {name: 1e9 * s / BATCH for name, s in interleaved(batches, rounds=ROUNDS, warmup=2).items()}

    worst_one, worst_many = max(one[name] for name in MAIN), max(many[name] for name in MAIN)
    rows = [
        row("split.assign_ns", worst_one, "ns", COMMAND, one["floor"], worst_one / one["floor"]),
        row("split.assign_batch_ns_per_id", worst_many, "ns/id", COMMAND, many["floor"], worst_many / many["floor"]),
        row("split.assign_list_ns_per_id", many["list"], "ns/id", COMMAND, many["floor"], many["list"] / many["floor"]),
        row("split.hashlib_formula_ns", one["hashlib"], "ns", COMMAND, one["floor"], one["hashlib"] / one["floor"]),
    ]
    for name in HASHES:
        key = name.replace("/", ".")
        rows.append(row(f"split.{key}.assign_ns", one[name], "ns", COMMAND, one["floor"], one[name] / one["floor"]))
        ratio = many[name] / many["floor"]
        rows.append(row(f"split.{key}.batch_ns_per_id", many[name], "ns/id", COMMAND, many["floor"], ratio))
    return rows


if __name__ == "__main__":
    print(table(run()))
