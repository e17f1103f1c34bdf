"""Records with a right checksum and wrong contents, and every reader of a log on them (control path).

Run as a process of its own (`python crafted.py BASE WORK SEED SAMPLE`): a reader that touches foreign memory ends it.
It prints a JSON line per changed log before and after the readers ran.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from offline.shop_log import OPTIONS, SHOP, START

from penstock import Engine
from penstock._ext import log as native
from penstock.errors import LogError, PenstockError
from penstock.offline.command import main as command
from penstock.offline.compaction import compact
from penstock.offline.erasure import erase
from penstock.offline.keeper import take_snapshot
from penstock.offline.log_folder import LogFolder
from penstock.offline.parity import parity
from penstock.offline.replay import backfill
from penstock.offline.training import training_set

WORDS = [0, 1, 2, 7, 0x20, 0xFF, 0x100, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]


class Change(NamedTuple):
    """Four bytes of a record's, from an offset in the segment on."""

    record: int
    kind: str
    at: int
    put: int


def records(data: Any, log_id: int, number: int = 1) -> Iterator[tuple[int, Any]]:
    """(offset, record) of every record of a segment."""
    at = native.HEAD
    while (record := native.record_at(data, log_id, number, at)) is not None:
        yield at, record
        at += record.length


def patched(data: bytes, log_id: int, offset: int, length: int, at: int, put: bytes) -> bytearray:
    """A segment with other bytes in one record, and the record's checksum right."""
    out = bytearray(data)
    out[at : at + len(put)] = put
    native.put_record(out, log_id, 1, offset, length)
    return out


def every_change(data: bytes, log_id: int, rng: random.Random) -> Iterator[Change]:
    """Every word of some records of each kind and schema, set to each of WORDS and to something else."""
    seen: dict[tuple[str, int, int], int] = {}
    for offset, record in records(data, log_id):
        key = record.kind, record.schema, record.outcome
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 2:
            continue
        for at in range(offset + 8, offset + record.length, 4):
            was = int.from_bytes(data[at : at + 4], "little")
            for put in (*WORDS, was ^ 1 << rng.randrange(32), rng.randrange(1 << 32)):
                if put != was:
                    yield Change(offset, record.kind, at, put)


def readers() -> dict[str, Callable[[Path], object]]:
    # So late that rows see all of the log, by the time at which it was ingested too.
    spine = pa.table(
        {
            "customer": [f"c{i}" for i in range(20)],
            "shop": [0] * 20,
            "amount": [1.0] * 20,
            "note": ["n"] * 20,
            "id": [f"row{i}" for i in range(20)],
            "at": pa.array([START + 10**14] * 20, type=pa.timestamp("us", "UTC")),
        }
    )

    def start(folder: Path) -> None:
        with Engine(str(SHOP), log=folder, log_options=OPTIONS) as engine:
            for i in range(12):
                order = {"id": f"o{i}", "customer": "c1", "shop": 1, "amount": 1.0, "note": None, "at": START + i}
                decision = engine.score(order, pipeline="orders")  # repeats what was decided
                decision.json(), decision.msgpack(), decision.as_dict()
            engine.features("spend", ["c1"], as_of=START + 10**9)

    def verify(folder: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            if command("log", ["verify", str(folder)]):
                raise LogError(said.getvalue())

    def compacted(folder: Path) -> None:
        compact(folder)
        verify(folder)
        parity(str(SHOP), folder)
        erase(folder, "customer", "c2")

    return {
        "verify": verify,
        "start": start,
        "parity": lambda folder: parity(str(SHOP), folder),
        "backfill": lambda folder: backfill(str(SHOP), folder),
        "train": lambda folder: training_set(str(SHOP), folder, spine, pipeline="orders", time="at", workers=1),
        "train backfill": lambda folder: training_set(
            str(SHOP), folder, spine, pipeline="orders", time="at", workers=1, backfill=True
        ),
        "snapshot": take_snapshot,
        "compact": compacted,
        "erase": lambda folder: erase(folder, "customer", "c1"),
        "erase a number": lambda folder: erase(folder, "shop", 1),
    }


def main(base: Path, work: Path, seed: int, sample: int) -> None:
    rng = random.Random(seed)
    log_id = LogFolder(base).log_id
    name = Path("segments") / f"{1:012d}.log"
    data = (base / name).read_bytes()
    changes = list(every_change(data, log_id, rng))
    fits: dict[bool, list[Change]] = {True: [], False: []}
    folder = LogFolder(Path(shutil.copytree(base, work / "check")))
    for change in changes:
        length = int.from_bytes(data[change.record + 4 : change.record + 8], "little")
        put = change.put.to_bytes(4, "little")
        (folder.path / name).write_bytes(patched(data, log_id, change.record, length, change.at, put))
        segment = folder.segment(1)
        refused = ""
        try:
            segment.scan()
        except LogError as error:
            refused = str(error)
        finally:
            segment.close()
        assert not refused or str(segment.path) in refused
        fits[not refused].append(change)
    print(json.dumps({"changes": len(changes), "of_their_schema": len(fits[True])}), flush=True)
    for fit, some in fits.items():
        for change in rng.sample(some, min(sample, len(some))):
            print(json.dumps({"begun": change}), flush=True)
            length = int.from_bytes(data[change.record + 4 : change.record + 8], "little")
            made = patched(data, log_id, change.record, length, change.at, change.put.to_bytes(4, "little"))
            found, kept = {}, True
            for reader, read in readers().items():
                copy = Path(shutil.copytree(base, work / "log"))
                (copy / name).write_bytes(made)
                try:
                    read(copy)
                    found[reader] = "read"
                except PenstockError as error:
                    found[reader] = f"refused: {error}"
                    kept = kept and (copy / name).read_bytes() == made
                    kept = kept and (fit or not list(copy.rglob("*.parquet")))
                except Exception as error:
                    found[reader] = f"raised: {type(error).__name__}: {error}"
                shutil.rmtree(copy)
            print(json.dumps({"change": change, "fits": fit, "found": found, "kept": kept}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
