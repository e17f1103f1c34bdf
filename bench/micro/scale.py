"""The rows of a large log: 1 million entities and 20 million events, 3 windows x 4 aggregations, one column.

Bytes per event in log, snapshot and memory; the time of a snapshot, and of a start from a snapshot with a tail of two
million events and from the log alone. Not part of a plain `make bench`: it takes two minutes, 4 GB of disk and of
memory. Run as a script: python bench/micro/scale.py [millions of events]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rows import row
from timing import note

COMMAND = "make bench ARGS='--only scale'"
ENTITIES, EVENTS, TAIL, TABLE = 1_000_000, 20_000_000, 2_000_000, 500_000
APP = Path(__file__).resolve().parents[1] / "app" / "windows_bench.py"
RESULTS = Path(__file__).resolve().parents[1] / "results"
START = 1_790_000_000_000_000


def tables(events: int, size: int) -> Any:
    """Tables of events over a day, every entity in each run of a million: keys E0 to E999999, values with cents."""
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(3)
    names = pa.array([f"E{i}" for i in range(ENTITIES)])
    order = np.concatenate([rng.permutation(ENTITIES) for _ in range(-(-events // ENTITIES))])
    for begin in range(0, events, size):
        n = min(size, events - begin)
        at = START + (86_400_000_000 * np.arange(begin, begin + n)) // events
        yield pa.table(
            {
                "key": names.take(pa.array(order[begin : begin + n])),
                "value": rng.integers(1, 100_000, n) / 100,
                "at": pa.array(at).cast(pa.timestamp("us", "UTC")),
            }
        )


def run(events: int = EVENTS, tail: int = TAIL) -> list[dict[str, Any]]:
    RESULTS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=RESULTS, prefix="scale-"))
    try:
        return _rows(folder, events, tail)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rows(folder: Path, events: int, tail: int) -> list[dict[str, Any]]:
    from penstock import Engine
    from penstock.offline.keeper import take_snapshot
    from penstock.offline.options import LogOptions

    options = LogOptions(keeper=False)
    note(f"ingesting {events:,} events of {ENTITIES:,} entities")
    engine = Engine(str(APP), log=folder / "log", log_options=options, clock="event")
    seconds = snapshot = 0.0
    done = 0
    taken = False
    for table in tables(events, min(TABLE, tail)):
        begin = time.perf_counter()
        engine.ingest(table, "Sample")
        seconds += time.perf_counter() - begin
        done += table.num_rows
        if not taken and done >= events - tail:
            note("taking a snapshot")
            engine.sync()
            begin = time.perf_counter()
            take_snapshot(folder / "log")
            snapshot = time.perf_counter() - begin
            taken = True
    store = engine.stats()["stores"][0]
    probe = engine.features("activity", ["E17", "E99999"], as_of=START + 86_400_000_000).rows
    engine.close()
    del engine
    log_bytes, snapshot_bytes = _size(folder / "log" / "segments"), _size(folder / "log" / "snapshots")

    def start() -> tuple[float, Any]:
        begin = time.perf_counter()
        with Engine(str(APP), log=folder / "log", log_options=options, clock="event") as again:
            took = time.perf_counter() - begin
            if again.features("activity", ["E17", "E99999"], as_of=START + 86_400_000_000).rows != probe:
                raise RuntimeError("recovery gave another state")
            return took, again.recovery

    note("starting from the snapshot and the tail")
    with_snapshot, report = min((start() for _ in range(2)), key=lambda pair: pair[0])
    if report.snapshot is None or report.events != tail:
        raise RuntimeError(f"expected a snapshot and {tail:,} events, got {report.lines()}")
    note("starting from the log alone")
    shutil.rmtree(folder / "log" / "snapshots")
    from_log, report = start()
    if report.events != events:
        raise RuntimeError(f"expected {events:,} events, got {report.lines()}")
    return [
        row("scale.ingest_events_per_s", events / seconds, "events/s", COMMAND),
        row("scale.log_bytes_per_event", log_bytes / events, "bytes", COMMAND),
        row("scale.snapshot_bytes_per_event", snapshot_bytes / (events - tail), "bytes", COMMAND),
        row("scale.memory_bytes_per_event", store["bytes"] / events, "bytes", COMMAND),
        row("scale.memory_mb", store["bytes"] / 1e6, "MB", COMMAND),
        row("scale.snapshot_s", snapshot, "s", COMMAND),
        row("scale.recovery_s", with_snapshot, "s", COMMAND),
        row("scale.recovery_log_only_s", from_log, "s", COMMAND),
    ]


if __name__ == "__main__":
    from rows import table as show

    millions = float(sys.argv[1]) if len(sys.argv) > 1 else EVENTS / 1e6
    print(show(run(int(millions * 1e6), int(millions * 1e5))))
