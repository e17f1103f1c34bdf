"""The keeper (control path): a child process that takes snapshots, compacts closed segments and drops old history.

It reads the log folder as it grows and never asks the serving process for anything, so scoring is not held up: a
snapshot is the one before plus the log's tail, replayed here. Each round runs in a process of its own, which gives its
memory back. What must stay true: a round that is killed at any point leaves the folder as it was, or better; the keeper
ends when its parent does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .options import LogOptions

if TYPE_CHECKING:
    from .log_folder import LogFolder

__all__ = ["Keeper", "main", "one_round", "start_keeper", "take_snapshot"]

LOOK_EVERY = 1.0  # seconds between two looks at the folder
MOST_OFTEN = 30.0  # seconds between two rounds
AT_LEAST = 600.0  # seconds after which a closed segment is worth a round


class Keeper:
    """The keeper as its parent sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def stop(self, timeout: float = 2.0) -> None:
        """End the keeper; a round that does not finish in time is ended with it, and leaves nothing behind."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def start_keeper(folder: LogFolder, options: LogOptions) -> Keeper:
    """Start the keeper of a folder that this process has open for writing."""
    command = [sys.executable, "-m", "penstock.offline.keeper", str(folder.path.resolve())]
    command += ["--options", msgspec.json.encode(options).decode()]
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return Keeper(process)


@contextlib.contextmanager
def one_round(path: Path) -> Iterator[None]:
    """Rounds of one folder come one after the other: snapshots, compaction, retention, erasure."""
    with (path / "keeper.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def take_snapshot(path: str | Path, progress: Any = None) -> Path | None:
    """Write a snapshot of a log folder's state as of now, from the newest snapshot and the log's tail; the folder may
    be in use. Returns the snapshot's folder, or None where nothing is new or there is no state."""
    from ..engine import Engine
    from ..features.layouts import plan_from_layouts
    from ..features.snapshot import SnapshotPosition, prune, write_snapshot
    from .log_folder import LogFolder
    from .recovery import recover_state

    folder = LogFolder(path)
    plan = plan_from_layouts((folder.path / "layouts.json").read_bytes())
    if not plan.stores:
        return None
    engine = Engine(plan, clock="event")
    found = recover_state(engine, folder, progress=progress)
    history = found.history
    if history.last_sequence <= found.at and not found.rebuilt:
        return None
    # The snapshot must not be ahead of what a power cut leaves of the log.
    for number in folder.numbers()[-2:]:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder.segment_path(number), os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
    marks = {e.name: engine.core.watermark(e.index) for e in plan.events.values()}
    position = SnapshotPosition(
        log_id=folder.log_id,
        sequence=history.last_sequence,
        ingest_time=engine.core.last_ingest_time,
        watermarks={name: mark for name, mark in marks.items() if mark is not None},
        created=time.time_ns() // 1000,
    )
    stores = {store.fingerprint: engine.stores[store.index] for store in plan.stores}
    folder.snapshots_path.mkdir(exist_ok=True)
    written = write_snapshot(folder.snapshots_path, stores, position, found.snapshot)
    prune(folder.snapshots_path, keep=2)
    return written


def round_of(path: str | Path, options: LogOptions) -> None:
    """One round: snapshot, compaction, retention."""
    from .compaction import compact
    from .options import parse_retention
    from .retention import retain

    with one_round(Path(path)):
        take_snapshot(path)
        compact(path, options.parquet)
        keep = parse_retention(options.retention)
        if keep is not None:
            retain(path, keep)


def _newest(path: Path) -> int:
    """Number of the newest segment."""
    return max((int(name[:12]) for name in os.listdir(path / "segments") if name.endswith(".log")), default=0)


def _used(path: Path, number: int) -> int:
    """Bytes of records in the newest segment, by its last sync mark."""
    from .._ext.log import segment_mark

    try:
        with (path / "segments" / f"{number:012d}.log").open("rb") as stream:
            mark = segment_mark(memoryview(stream.read(4096)))
    except (FileNotFoundError, ValueError):
        return 0
    return mark.synced if mark is not None else 0


def _watch(path: Path, options: LogOptions) -> None:
    """Look at the folder until stdin ends; start a round when the log has grown enough, or a segment was closed."""
    last_number, last_bytes = None, 0
    parent = os.getppid()
    grown, closed = 0, False
    last_round = time.monotonic() - MOST_OFTEN
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY)
        ended = ready or os.getppid() != parent  # a forked child of the parent may still hold the pipe
        number = _newest(path)
        used = _used(path, number)
        if last_number is None:
            last_number, last_bytes = number, used
        grown += (number - last_number) * options.segment_bytes + used - last_bytes
        closed = closed or number != last_number
        last_number, last_bytes = number, used
        if ended:
            return
        now = time.monotonic()
        waited = now - last_round
        if waited >= MOST_OFTEN and (grown >= options.snapshot_bytes or (closed and waited >= AT_LEAST)):
            grown, closed, last_round = 0, False, now
            command = [sys.executable, "-m", "penstock.offline.keeper", str(path), "--once"]
            command += ["--options", msgspec.json.encode(options).decode()]
            result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            if result.returncode:
                reason = result.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
                print(f"penstock: warning: no snapshot this time: {reason[0]}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run as `python -m penstock.offline.keeper DIR`."""
    from ..errors import PenstockError

    parser = argparse.ArgumentParser(prog="penstock.offline.keeper")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args(arguments)
    options = msgspec.json.decode(given.options, type=LogOptions)
    with contextlib.suppress(OSError):
        # Only where nothing else wants the core: a server that shares it does not wait for a slice of ours.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if not given.once:
        _watch(given.folder, options)
        return 0
    try:
        round_of(given.folder, options)
    except PenstockError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
