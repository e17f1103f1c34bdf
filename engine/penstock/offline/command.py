"""The offline commands (control path): parity, backfill, and looking after a log folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import PenstockError
from ..terminal import Progress, table

__all__ = ["OFFLINE", "main"]

OFFLINE = {
    "parity": "compute every logged score anew from the log, and compare",
    "backfill": "a pipeline's features over all of a log",
    "train": "features as of each row of a table, from a log",
    "log": "look after a log folder",
}


def main(command: str, arguments: Sequence[str]) -> int:
    """Run one of the offline commands; returns the exit code."""
    sys.path.insert(0, "")
    return {"parity": _parity, "backfill": _backfill, "train": _train, "log": _log}[command](list(arguments))


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"penstock {command}", description=OFFLINE[command].capitalize() + ".", allow_abbrev=False
    )


def _parity(arguments: list[str]) -> int:
    parser = _parser("parity")
    parser.add_argument("app", help="a Python file or module with the app's definitions")
    parser.add_argument("--log", metavar="DIR", required=True, help="the log folder; it may be in use")
    parser.add_argument("--models", metavar="DIR", help="compare the decisions too, with the models in this folder")
    parser.add_argument("--pipeline", metavar="NAME", action="append", help="only this pipeline; may be given again")
    parser.add_argument("--by-time", action="store_true", help="also a training set of each score's time alone")
    parser.add_argument(
        "--independent", action="store_true", help="a sample of scores, from raw events without the engine: views alone"
    )
    parser.add_argument("--sample", metavar="N", type=int, help="with --independent: scores per pipeline (1,000)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="with --independent: another sample")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    if given.sample is not None and given.sample < 1:
        raise PenstockError(f"--sample: expected at least 1, got {given.sample}")
    from .parity import parity

    with Progress("comparing logged scores with the log") as progress:
        report = parity(
            given.app,
            given.log,
            models=given.models,
            pipelines=given.pipeline,
            by_time=given.by_time,
            independent=given.independent,
            sample=given.sample,
            seed=given.seed,
            progress=progress,
        )
    if given.json:
        import msgspec

        print(msgspec.json.encode(report).decode())
    else:
        print(report)
    return 1 if not report.ok else 0 if report.compared else 2


def _writable(out: str) -> None:
    """Raises PenstockError, before the work, where a local output file could not be written after it."""
    if "://" in out:
        return
    path = Path(out)
    if path.is_dir():
        raise PenstockError(f"--out {out}: is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise PenstockError(f"--out {out}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PenstockError(f"--out {out}: the folder cannot be written to")


def _backfill(arguments: list[str]) -> int:
    parser = _parser("backfill")
    parser.add_argument("app", help="a Python file or module with the app's definitions")
    parser.add_argument("--log", metavar="DIR", required=True, help="the log folder; it may be in use")
    parser.add_argument("--out", metavar="FILE", required=True, help="the Parquet file to write")
    parser.add_argument("--pipeline", metavar="NAME", help="needed where the app has several")
    parser.add_argument("--features", metavar="NAME,NAME", help="these features only")
    parser.add_argument("--spine", choices=("events", "scores"), default="events", help="a row per event or per score")
    given = parser.parse_args(arguments)
    from .replay import backfill

    features = given.features.split(",") if given.features else None
    _writable(given.out)
    with Progress(f"computing features into {given.out}") as progress:
        backfill(
            given.app,
            given.log,
            pipeline=given.pipeline,
            features=features,
            spine=given.spine,
            out=given.out,
            progress=progress,
        )
    return 0


def _train(arguments: list[str]) -> int:
    parser = _parser("train")
    parser.add_argument("app", help="a Python file or module with the app's definitions")
    parser.add_argument("--log", metavar="DIR", required=True, help="the log folder; it may be in use")
    parser.add_argument("--spine", metavar="FILE", required=True, help="Parquet file: keys, a time column, what else")
    parser.add_argument("--out", metavar="FILE", required=True, help="the Parquet file to write")
    parser.add_argument("--features", metavar="NAME,NAME", help="views or features; default: the only pipeline's")
    parser.add_argument("--pipeline", metavar="NAME", help="all features of this pipeline")
    parser.add_argument("--time", metavar="COLUMN", help="the spine's time, where it cannot be told")
    parser.add_argument("--sequence", metavar="COLUMN", help="the event of the log before which a row is read")
    parser.add_argument("--backfill", action="store_true", help="also what was ingested after a row's time")
    parser.add_argument(
        "--own", choices=("auto", "never"), default="auto", help="whether rows are looked for in the log"
    )
    parser.add_argument("--statuses", action="store_true", help="a status column beside each feature")
    parser.add_argument("--workers", metavar="N", type=int, help="default: one per core")
    parser.add_argument("--memory", metavar="SIZE", default="1GiB", help="for state, over all workers (1GiB)")
    parser.add_argument("--on", choices=("threads", "ray"), default="threads", help="where the work is done")
    given = parser.parse_args(arguments)
    from ..tables import pyarrow

    if given.workers is not None and given.workers < 1:
        raise PenstockError(f"--workers: expected at least 1, got {given.workers}")
    _writable(given.out)

    pyarrow()
    import pyarrow.parquet as pq

    try:
        spine = pq.read_table(given.spine)
    except FileNotFoundError:
        raise PenstockError(f"--spine {given.spine}: no such file") from None
    except (OSError, ValueError) as error:
        raise PenstockError(f"--spine {given.spine}: {error}") from None
    try:
        _train_into(given, spine)
    except ValueError as error:
        if isinstance(error, PenstockError):
            raise
        raise PenstockError(str(error)) from None
    return 0


def _train_into(given: Any, spine: Any) -> None:
    from .training import TrainingSummary, training_set

    told: list[TrainingSummary] = []
    with Progress(f"computing features as of {spine.num_rows:,} rows into {given.out}") as progress:
        training_set(
            given.app,
            given.log,
            spine,
            features=given.features.split(",") if given.features else None,
            pipeline=given.pipeline,
            time=given.time,
            sequence=given.sequence,
            backfill=given.backfill,
            statuses=given.statuses,
            workers=given.workers,
            memory=given.memory,
            out=given.out,
            progress=progress,
            on=given.on,
            own=given.own,
            summary=told.append,
        )
    print(told[0])
    for sentence in told[0].warnings:
        print(f"warning: {sentence}", file=sys.stderr)


def _log(arguments: list[str]) -> int:
    parser = _parser("log")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, about in (
        ("status", "segments, snapshots and what they hold"),
        ("verify", "check every record of every segment"),
        ("snapshot", "take a snapshot of the state now"),
        ("compact", "turn closed segments into Parquet"),
        ("retain", "drop history that is older than --keep"),
        ("erase", "forget one entity: its key in every event becomes a random one"),
    ):
        action = actions.add_parser(name, help=about, allow_abbrev=False)
        action.add_argument("folder", help="the log folder")
        if name == "compact":
            action.add_argument("--to", metavar="URI", help="a folder or s3://bucket/prefix; default DIR/parquet")
        if name == "retain":
            action.add_argument("--keep", metavar="LENGTH", required=True, help="for example 90d")
        if name == "erase":
            action.add_argument("--entity", required=True, help="the entity's name, for example customer")
            key = action.add_mutually_exclusive_group(required=True)
            key.add_argument("--key", help="its key, a string")
            key.add_argument("--int-key", type=int, help="its key, an integer")
    given = parser.parse_args(arguments)
    return int(globals()[f"_log_{given.action}"](given) or 0)


def _log_status(given: Any) -> None:
    from .history import History, look_again
    from .log_folder import LogFolder

    folder = LogFolder(given.folder)
    rows = []
    for segment in folder.segments():
        mark = segment.mark
        sealed = segment.sealed_end is not None
        first = segment.head.first_sequence if segment.head is not None else "?"
        last = mark.last_sequence if sealed and mark is not None else "open"
        rows.append([segment.path.name, f"{segment.size:,}", f"{first}", f"{last}"])
    history = History(folder)
    history.check()
    print(f"log {folder.log_id} in {folder.path}, {history.last_sequence + 1:,} events")
    if history.batches:
        batches = [[b.name, f"{b.events:,}", f"{b.records:,}", f"{len(b.segments)}"] for b in history.batches]
        print(f"{table(['batch in Parquet', 'events', 'records', 'segments'], batches)}\n")
    print(table(["segment", "bytes", "first event", "last event"], rows) if rows else "no segments")
    snapshots = look_again(lambda: _snapshots(folder.snapshots_path))
    if snapshots:
        print()
        print(table(["snapshot of event", "bytes"], snapshots))


def _snapshots(path: Path) -> list[list[str]]:
    """The event and the bytes of each snapshot, oldest first."""
    found = sorted(p for p in path.glob("[0-9]*") if p.is_dir())
    return [[str(int(p.name[:20])), f"{sum(f.stat().st_size for f in p.iterdir()):,}"] for p in found]


def _log_verify(given: Any) -> int:
    from .history import History
    from .log_folder import LogFolder

    folder = LogFolder(given.folder)
    wrong = 0
    rows = []
    numbers = folder.numbers()
    with Progress(f"checking {len(numbers)} segments") as progress:
        for i, segment in enumerate(folder.segments()):
            progress(i, len(numbers))
            try:
                _, damages, scan = folder.check(segment)
            except PenstockError as error:
                rows.append([segment.path.name, "", str(error)])
                wrong += 1
                continue
            notes = "; ".join(map(str, damages))
            wrong += any(d.kind != "tail" for d in damages)
            rows.append([segment.path.name, f"{scan.records:,}", notes or "ok"])
    history = History(folder)
    try:
        history.check()
        for name, problem in history.check_batches():
            rows.append([f"batch {name}", "", "ok" if problem is None else str(problem)])
            wrong += problem is not None
    except PenstockError as error:
        rows.append(["", "", str(error)])
        wrong += 1
    print(table(["segment", "records", ""], rows))
    return 1 if wrong else 0


def _log_snapshot(given: Any) -> None:
    from .keeper import one_round, take_snapshot

    with one_round(Path(given.folder)), Progress("taking a snapshot") as progress:
        written = take_snapshot(given.folder, progress)
    print(f"wrote {written}" if written is not None else "nothing is new since the last snapshot")


def _log_compact(given: Any) -> None:
    from .compaction import compact
    from .keeper import one_round
    from .options import check_place

    try:
        check_place(given.to)
    except ValueError as error:
        raise PenstockError(f"--to: {error}") from None
    with one_round(Path(given.folder)), Progress("compacting") as progress:
        report = compact(Path(given.folder), given.to, progress=progress)
    print(report)


def _log_retain(given: Any) -> None:
    from ..definitions.durations import duration_us
    from .keeper import one_round
    from .retention import retain

    try:
        keep = duration_us(given.keep)
    except ValueError as error:
        raise PenstockError(f"--keep: {error}") from None
    with one_round(Path(given.folder)):
        report = retain(Path(given.folder), keep)
    print(report)


def _log_erase(given: Any) -> None:
    from .erasure import erase

    key = given.key if given.key is not None else given.int_key
    print(erase(Path(given.folder), given.entity, key))
