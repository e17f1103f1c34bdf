"""Log folders in small segments, what history reads of them, and a kill at any file operation (control path)."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from offline.shop_log import OPTIONS, SHOP, START, fill

from penstock import Engine
from penstock._ext import log as native
from penstock._ext import log_columns
from penstock.offline.batches import BatchStore
from penstock.offline.history import History
from penstock.offline.log_folder import LogFolder

LATER = START + 6 * 3_600_000_000  # than all events of the logs here, within a day


def shop_log(folder: Path, runs: int = 3, n: int = 150) -> Path:
    """A log of so many runs of the shop app, each at least one closed segment."""
    for run in range(runs):
        with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
            fill(engine, n, seed=run, first=run * n)
    return folder


def records_of(folder: Path, first: int = 0, last: int = 1 << 62) -> list[bytes]:
    """Every event and score of a log's history, in order, but for its checksum."""
    history = History(LogFolder(folder))
    history.check()
    found = []
    for piece in history.pieces(first, last):
        at = piece.start
        assert native.scan(piece.data, piece.log_id, piece.number, at).end == piece.end
        while at < piece.end:
            record = native.record_at(piece.data, piece.log_id, piece.number, at)
            assert record is not None
            if record.kind in ("event", "score"):
                found.append(bytes(piece.data[at + 4 : at + record.length]))
            at += record.length
    return found


def state_of(engine: Engine) -> dict[str, Any]:
    """Features of every key of the shop app, and what the next event gets."""
    keys = {"spend": [f"c{i}" for i in range(20)], "logins": [f"c{i}" for i in range(20)], "shops": list(range(-3, 4))}
    found: dict[str, Any] = {view: engine.features(view, names, as_of=LATER).rows for view, names in keys.items()}
    found["marks"] = [engine.core.watermark(event.index) for event in engine.plan.events.values()]
    found["next"] = engine.core.next_sequence
    return found


def recovered(folder: Path) -> dict[str, Any]:
    """State and decisions of an engine that opens a copy of the folder."""
    copy = folder.with_name(f"{folder.name}-copy-{random.randrange(1 << 40)}")
    shutil.copytree(folder, copy)
    with Engine(str(SHOP), log=copy, log_options=OPTIONS) as engine:
        found = state_of(engine)
        again = fill(engine, 30, seed=2, first=430)  # ids of before: the first decisions come back, then new ones
        found["again"] = [(d.action, d.arms, d.features, d.outcome) for d in again]
    shutil.rmtree(copy)
    return found


def is_tidy(folder: Path) -> bool:
    """Whether the Parquet files are those that the manifests name."""
    store = BatchStore.of(LogFolder(folder))
    named = {file.path for batch in store.batches() for file in batch.files}
    named |= {f"batches/{batch.name}.json" for batch in store.batches()}
    there = {path for part in ("events", "scores", "batches") for path in store.listed(part)}
    return named == there and not (folder / "writing.json").exists()


class Killed(BaseException):
    """The process ends here."""


OPERATIONS = [
    (BatchStore, "write_table"),
    (BatchStore, "read_table"),
    (BatchStore, "write"),
    (BatchStore, "remove"),
    (Path, "write_bytes"),
    (Path, "unlink"),
    (Path, "replace"),
    (log_columns, "build_records"),
]


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[list[str]]:
    """Raise Killed before the step-th file operation. Gives the operations that were begun."""
    begun: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun.append(name)
            if len(begun) == step:
                raise Killed
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrapped(name, getattr(owner, name)))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield begun


def every_kill(folder: Path, work: Callable[[Path], Any], check: Callable[[Path], None]) -> int:
    """Run some work on copies of a folder, killed at every file operation; check each copy as it was left, let the work
    finish, and check again. Returns how many kills there were."""
    for step in itertools.count(1):
        copy = folder.with_name(f"{folder.name}-{step}")
        shutil.copytree(folder, copy)
        try:
            with killed_at(step):
                work(copy)
        except Killed:
            check(copy)
            work(copy)
            check(copy)
            assert is_tidy(copy)
            shutil.rmtree(copy)
        else:
            check(copy)
            return step - 1
    raise AssertionError
