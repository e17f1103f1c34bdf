"""The row of many models: 1,000 loaded models, binary inferences spread over them, against one model.

Both servers run at once on core 0 and are asked in turn, at the same rate in an open loop: half of what the many reach
in a closed one. Every model is a file of its own with the same 100 trees, 0.5 MB in memory: all of them together fit no
cache, one does. Memory is the resident size of the server.
Run as a script: python bench/load/many.py
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.remove(str(Path(__file__).resolve().parent))

import numpy as np
from app import train
from load.generator import CACHE, frame, free_port, run_load
from load.oip import captured, inputs, models_server
from load.serving import CONNECTIONS, median
from rows import error_row, row
from timing import note

COMMAND = "make bench ARGS='--only many'"
MODELS = 1000
RUNS, RUN_S = 7, 4.0


def folder(n: int) -> Path:
    """A model folder m0000, m0001, ... whose files are links to one."""
    source = train.folder() / "served" / "fraud" / "1" / "model.onnx"
    place = CACHE / f"many-{n}"
    if not place.exists():
        draft = CACHE / f"many-{n}.{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        for i in range(n):
            version = draft / f"m{i:04d}" / "1"
            version.mkdir(parents=True)
            os.link(source, version / "model.onnx")
        draft.rename(place)
    return place


def requests(n: int) -> Path:
    """20,000 whole requests, framed, to n models in random order: all have the same length."""
    template, _ = captured("m0000", "probabilities", 15)
    x = inputs(15)
    order = np.random.default_rng(2).integers(0, n, size=len(x))
    before = template[: -4 * x.shape[1]]
    path = CACHE / f"many-{n}.requests"
    path.write_bytes(
        frame([before.replace(b"/m0000/", b"/m%04d/" % i, 1) + values.tobytes() for i, values in zip(order, x)])
    )
    return path


def rows_of(n: int) -> list[dict[str, Any]]:
    port, one_port = free_port(), free_port()
    paths = {port: requests(n), one_port: requests(1)}

    def load(to: int, **options: Any) -> dict[str, Any]:
        return run_load(to, request_raw=paths[to], framed=True, connections=CONNECTIONS, **options)

    note(f"loading {n} models")
    with (
        models_server(one_port, folder(1), ready="m0000") as one,
        models_server(port, folder(n), ready=f"m{n - 1:04d}") as many,
    ):
        note(f"ready after {many.started_s:.1f} s, {many.resident_bytes() / 1e6:.0f} MB")
        best: dict[int, list[float]] = {port: [], one_port: []}
        for _ in range(3):
            for to in (port, one_port):
                best[to].append(load(to, duration=2.0, warmup=0.5)["requests_per_s"])
        rate = round(median(best[port]) / 2)
        results: dict[int, list[dict[str, Any]]] = {port: [], one_port: []}
        cpu: dict[int, list[float]] = {port: [], one_port: []}
        for seed in range(RUNS):
            for to, server in ((port, many), (one_port, one)):
                before = server.cpu_seconds()
                done = load(to, rate=rate, duration=RUN_S, warmup=0.5, seed=seed)
                results[to].append(done)
                cpu[to].append(1e6 * (server.cpu_seconds() - before) / done["total_requests"])
        memory, one_memory = many.resident_bytes() / 1e6, one.resident_bytes() / 1e6
    found = []
    for name, key in (("p50", "p50_us"), ("p99", "p99_us")):
        value, floor = (median([r[key] for r in results[to]]) / 1000 for to in (port, one_port))
        if name == "p99":
            found.append(row("models.many_p99_ratio", value / floor, "many/one", COMMAND))
        found.append(row(f"models.many_{name}_ms", value, "ms", COMMAND, floor, value / floor))
    value, floor = median(cpu[port]), median(cpu[one_port])
    most, floor_most = median(best[port]), median(best[one_port])
    return [
        *found,
        row("models.many_requests_per_s", most, "requests/s", COMMAND, floor_most, most / floor_most),
        row("models.many_cpu_us", value, "us/request", COMMAND, floor, value / floor),
        row("models.many_memory_mb", memory, "MB", COMMAND, one_memory, memory / one_memory),
        row("models.many_start_s", many.started_s, "s", COMMAND, one.started_s, many.started_s / one.started_s),
        row("models.many_rate", rate, "requests/s", COMMAND),
        row("models.many_count", n, "models", COMMAND),
    ]


def run() -> list[dict[str, Any]]:
    train.folder()
    try:
        return rows_of(MODELS)
    except Exception as e:
        return [error_row("models.many_p99_ratio", f"{type(e).__name__}: {e}", COMMAND)]


if __name__ == "__main__":
    from rows import table

    print(table(run()))
