"""A process that scores with a log is killed, another one goes on, and the log proves what was served (control path).

Run as `python -m penstock.demo.survival FOLDER MODELS` it is the process that will be killed: it ingests the past that
lies in FOLDER as Arrow files, scores the test week one by one, and says after each how many it has acknowledged.
What must stay true: the number that was read last before the kill was acknowledged, so recovery must have as many.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from penstock.demo.replays import History
    from penstock.offline.parity import ParityReport
    from penstock.offline.recovery import RecoveryReport

__all__ = ["Survived", "kill_and_recover"]


class Survived(NamedTuple):
    """What became of the killed process's work. scored: found in the log; acknowledged: before the kill."""

    acknowledged: int
    scored: int
    recovery: RecoveryReport
    parity: ParityReport
    parity_seconds: float
    log_bytes: int


def kill_and_recover(past: History, models: Path, rows: int) -> Survived:
    """Score up to `rows` transactions of the test week in a process with a log, kill it half-way, recover, compare."""
    import pyarrow as pa

    from penstock import Engine, PenstockError
    from penstock.demo import fraud
    from penstock.offline.options import LogOptions
    from penstock.offline.parity import parity

    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as name:
        folder = Path(name)
        week = past.transactions.slice(past.test_row, rows)
        for file, table in (
            ("before", past.transactions.slice(0, past.test_row)),
            ("labels", past.labels.slice(0, past.test_label)),
            ("week", week),
        ):
            with pa.OSFile(str(folder / f"{file}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        command = [sys.executable, "-m", "penstock.demo.survival", str(folder), str(models)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        acknowledged = 0
        assert process.stdout is not None
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged >= week.num_rows // 2:
                process.kill()
        if process.wait() != -signal.SIGKILL:
            raise PenstockError(f"the process that was to be killed ended by itself, with code {process.returncode}")
        with Engine(
            fraud, models=models, clock="event", log=folder / "log", log_options=LogOptions(keeper=False)
        ) as engine:
            recovery = engine.recovery
            size = sum(path.stat().st_size for path in (folder / "log" / "segments").glob("*.log"))
        assert recovery is not None
        began = time.perf_counter()
        report = parity(fraud, folder / "log", models=models)
        seconds = time.perf_counter() - began
        scored = report.pipelines[0].scores
        return Survived(acknowledged, scored, recovery, report, seconds, size)


def main(folder: Path, models: Path) -> None:
    """Score until killed."""
    import pyarrow as pa

    from penstock import Engine, Timestamp
    from penstock.demo import fraud
    from penstock.offline.options import LogOptions

    tables = {
        f: pa.ipc.open_file(pa.memory_map(str(folder / f"{f}.arrow"))).read_all() for f in ("before", "labels", "week")
    }
    engine = Engine(fraud, models=models, clock="event", log=folder / "log", log_options=LogOptions(keeper=False))
    engine.ingest(tables["labels"], event="FraudLabel")
    engine.ingest(tables["before"], event="Transaction")
    week = tables["week"]
    times = week.column("at").cast("int64").to_pylist()
    fields = zip(*(week.column(name).to_pylist() for name in ("customer", "terminal", "amount")), strict=True)
    for done, ((customer, terminal, amount), at) in enumerate(zip(fields, times, strict=True), 1):
        engine.score(fraud.Transaction(customer, terminal, amount, Timestamp(at)))
        print(done, flush=True)
    time.sleep(60)  # to be killed


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
