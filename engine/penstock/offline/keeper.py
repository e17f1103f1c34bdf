"""The keeper (control path): a child process that takes snapshots, compacts closed segments and drops old history.

It reads the log folder as it grows and never asks the serving process for anything, so scoring is not held up: a
snapshot is the one before plus the log's tail, replayed here. Each round runs in a process of its own, which gives its
memory back. What must stay true: a round that is killed at any point leaves the folder as it was, or better; the keeper
and its round end when its parent does (children.py), so that a new server's keeper has the folder for itself.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..children import end_with_parent, parent_arguments, parent_lives
from ..errors import LogError, PenstockError
from .options import LogOptions

if TYPE_CHECKING:
    from .log_folder import LogFolder

__all__ = ["Keeper", "KeeperStatus", "main", "one_round", "start_keeper", "take_snapshot"]

LOOK_EVERY = 1.0  # seconds between two looks at the folder
ROUND_LOOK_EVERY = 0.2  # seconds between two looks at a round
MOST_OFTEN = 30.0  # seconds between two rounds
RETRY = 60.0  # seconds after a round that failed
AT_LEAST = 600.0  # seconds after which a closed segment is worth a round


class KeeperStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper tells its parent, once a second where it has changed.

    behind: bytes of records that the newest snapshot does not hold, as far as they are on disk: what a start would
    replay. free: bytes that the folder's disk has left. rounds, failures: since the keeper was started; error: why the
    last round failed, "" where it did not. snapshot_created: microseconds since 1970, snapshot_bytes: of its files;
    None where there is no snapshot, or none that can be read.
    """

    behind: int
    free: int
    rounds: int = 0
    failures: int = 0
    error: str = ""
    snapshot_created: int | None = None
    snapshot_bytes: int | None = None


class Keeper:
    """The keeper as its parent sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._said = b""
        self._status: KeeperStatus | None = None
        if process.stdout is not None:
            os.set_blocking(process.stdout.fileno(), False)
            with contextlib.suppress(OSError):  # what was not fetched is soon old: not much of it is kept
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)

    def status(self) -> KeeperStatus | None:
        """What the keeper told last, some seconds ago at most, or before the round that is under way; None where it has
        told nothing yet, or has ended. Never waits."""
        if self.process.stdout is None or not self.alive:
            return None
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.process.stdout.fileno(), 1 << 16):
                self._said = (self._said + part)[-(1 << 16) :]
        *lines, self._said = self._said.split(b"\n")
        if lines:
            with contextlib.suppress(msgspec.DecodeError):  # the middle of a line, where many were not fetched
                self._status = msgspec.json.decode(lines[-1], type=KeeperStatus)
        return self._status

    def stop(self, timeout: float = 2.0) -> None:
        """End the keeper; a round under way is ended with it, and leaves nothing behind."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
            self.process.stdout = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def start_keeper(folder: LogFolder, options: LogOptions) -> Keeper:
    """Start the keeper of a folder that this process has open for writing."""
    command = [sys.executable, "-m", "penstock.offline.keeper", str(folder.path.resolve())]
    command += ["--options", msgspec.json.encode(options).decode(), *parent_arguments()]
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return Keeper(process)


@contextlib.contextmanager
def one_round(path: Path) -> Iterator[None]:
    """Rounds of one folder come one after the other: snapshots, compaction, retention, erasure."""
    from .log_folder import LogFolder

    LogFolder(path)  # it must be there
    try:
        stream = (path / "keeper.lock").open("a+")
    except OSError as error:
        raise LogError(f"{path}: cannot be worked on: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            print(f"penstock: waiting for process {stream.read(16).strip()}, which works on {path}", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def take_snapshot(path: str | Path, progress: Any = None, start_partial: bool = False) -> Path | None:
    """Write a snapshot of a log folder's state as of now, from the newest snapshot and the log's tail; the folder may
    be in use. Returns the snapshot's folder, or None where nothing is new or there is no state. start_partial: as the
    engine was started (LogOptions)."""
    from ..engine import Engine
    from ..features.layouts import plan_from_layouts
    from ..features.snapshot import SnapshotPosition, prune, write_snapshot
    from .log_folder import LogFolder
    from .recovery import recover_state

    folder = LogFolder(path)
    try:
        plan = plan_from_layouts((folder.path / "layouts.json").read_bytes())
    except FileNotFoundError:
        raise LogError(f"{folder.path}: no layouts.json: no engine has used this log yet") from None
    except PenstockError as error:
        raise LogError(f"{folder.path / 'layouts.json'}: {error}") from None
    engine = Engine(plan, clock="event")
    found = recover_state(engine, folder, progress=progress, start_partial=start_partial)
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

    keep = parse_retention(options.retention)
    with one_round(Path(path)):
        steps: list[tuple[str, Callable[[], object]]] = [
            ("no snapshot", lambda: take_snapshot(path, start_partial=options.start_partial or options.start_cold)),
            ("not compacted", lambda: compact(path, options.parquet)),
        ]
        if keep is not None:
            steps.append(("old history was not dropped", lambda: retain(path, keep)))
        for what, step in steps:
            try:
                step()
            except (PenstockError, OSError) as error:
                raise LogError(f"{what}: {error}") from error


def _numbers(path: Path) -> list[int]:
    """Numbers of the segments, oldest first."""
    return sorted(int(name[:12]) for name in os.listdir(path / "segments") if name.endswith(".log"))


def _snapshots(path: Path) -> list[Path]:
    """Folders of the snapshots, newest first."""
    found = (p for p in (path / "snapshots").glob("[0-9]*") if p.name[:20].isdigit())
    return sorted(found, key=lambda p: p.name, reverse=True)


def _waiting(path: Path) -> int:
    """Bytes of segments that began behind the newest snapshot: what a start would replay."""
    from .._ext.log import segment_head

    snapshots = _snapshots(path)
    newest, total = int(snapshots[0].name[:20]) if snapshots else -1, 0
    for number in _numbers(path)[:-1]:
        file = path / "segments" / f"{number:012d}.log"
        with file.open("rb") as stream:
            head = segment_head(memoryview(stream.read(4096)))
        if head is not None and head.first_sequence > newest:
            total += file.stat().st_size
    return total


def _used(path: Path, number: int) -> int:
    """Bytes of records in the newest segment, by its last sync mark."""
    from .._ext.log import segment_mark

    try:
        with (path / "segments" / f"{number:012d}.log").open("rb") as stream:
            mark = segment_mark(memoryview(stream.read(4096)))
    except (FileNotFoundError, ValueError):
        return 0
    return mark.synced if mark is not None else 0


class _Position(msgspec.Struct):
    created: int


class _File(msgspec.Struct):
    path: str


class _Store(msgspec.Struct):
    files: list[_File]


class _Manifest(msgspec.Struct):
    position: _Position
    stores: dict[str, _Store]


class _Snapshot(msgspec.Struct):
    """What of a snapshot's manifest.json (features/snapshot.py, which needs NumPy) the status tells."""

    manifest: _Manifest


def _newest_snapshot(path: Path) -> tuple[int, int] | tuple[None, None]:
    """When the newest snapshot was made, and the bytes of its files."""
    for folder in _snapshots(path):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Snapshot).manifest
            files = {file.path for store in found.stores.values() for file in store.files}
            return found.position.created, sum((folder.parent / file).stat().st_size for file in files)
    return None, None


class _Teller:
    """Tells the parent what has changed; one that does not listen is not waited for, and may have ended."""

    def __init__(self) -> None:
        self.told: KeeperStatus | None = None
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(sys.stdout.fileno(), False)

    def tell(self, status: KeeperStatus) -> None:
        if status == self.told:
            return
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stdout.fileno(), msgspec.json.encode(status) + b"\n")
            self.told = status


def _has_ended(parent: int, seconds: float) -> bool:
    """Wait so long; whether the parent has ended, or has closed our standard input for us to end."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) or not parent_lives(parent)  # a forked child of the parent may still hold the pipe


def _watch(path: Path, options: LogOptions, parent: int) -> None:
    """Look at the folder until the parent ends; start a round when the log has grown enough, or a segment was closed.

    A round that fails is tried again after a while.
    """
    last_number, last_bytes = None, 0
    grown, closed = 0, False
    next_round = 0.0
    rounds = failures = 0
    failed = ""
    teller, snapshot = _Teller(), _newest_snapshot(path)
    while True:
        if _has_ended(parent, LOOK_EVERY):
            return
        now = time.monotonic()
        try:
            numbers = _numbers(path)
            number = numbers[-1] if numbers else 0
            used = _used(path, number)
            if last_number is None:
                grown, closed = _waiting(path) + used, len(numbers) > 1
                last_number, last_bytes = number, used
                next_round = now
                closed_since = now
        except FileNotFoundError:
            continue  # somebody else compacts: look again
        except OSError as error:
            if now >= next_round:
                print(f"penstock: warning: keeper: {error}", file=sys.stderr, flush=True)
                next_round = now + AT_LEAST
            continue
        grown += (number - last_number) * options.segment_bytes + used - last_bytes
        if number != last_number and not closed:
            closed, closed_since = True, now
        last_number, last_bytes = number, used
        with contextlib.suppress(OSError):
            disk = os.statvfs(path)
            teller.tell(
                KeeperStatus(
                    behind=grown,
                    free=disk.f_bavail * disk.f_frsize,
                    rounds=rounds,
                    failures=failures,
                    error=failed,
                    snapshot_created=snapshot[0],
                    snapshot_bytes=snapshot[1],
                )
            )
        if now < next_round or not (grown >= options.snapshot_bytes or (closed and now - closed_since >= AT_LEAST)):
            continue
        command = [sys.executable, "-m", "penstock.offline.keeper", str(path), "--once"]
        command += ["--options", msgspec.json.encode(options).decode(), *parent_arguments()]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while True:
            try:
                _, said = process.communicate(timeout=ROUND_LOOK_EVERY)
                break
            except subprocess.TimeoutExpired:
                if _has_ended(parent, 0):
                    process.kill()
                    process.wait()
                    return
        rounds += 1
        snapshot = _newest_snapshot(path)
        if process.returncode == 0:
            failed = ""
            grown, closed = 0, False
            next_round = time.monotonic() + MOST_OFTEN
        else:
            failures += 1
            failed = (said.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"])[0][:1000]
            print(f"penstock: warning: keeper: {failed}", file=sys.stderr, flush=True)
            next_round = time.monotonic() + RETRY


def main(arguments: list[str] | None = None) -> int:
    """Run as `python -m penstock.offline.keeper DIR`."""
    parser = argparse.ArgumentParser(prog="penstock.offline.keeper")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--parent-thread-lasts", action="store_true")
    given = parser.parse_args(arguments)
    end_with_parent(given.parent, given.parent_thread_lasts)
    options = msgspec.json.decode(given.options, type=LogOptions)
    with contextlib.suppress(OSError):
        # Only where nothing else wants the core: a server that shares it does not wait for a slice of ours. That holds
        # within one session: another one would have a share of its own.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if not given.once:
        _watch(given.folder, options, given.parent)
        return 0
    try:
        round_of(given.folder, options)
    except PenstockError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
