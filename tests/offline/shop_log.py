"""Filling a log of the shop app, and ways to write one anew with its records in another order (control path)."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock import Engine
from penstock._ext import log as native
from penstock.offline.log_folder import LogFolder
from penstock.offline.options import LogOptions

SHOP = Path(__file__).with_name("shop.py")
OPTIONS = LogOptions(segment_bytes=1 << 20, keeper=False)
START = 1_790_000_000_000_000  # some day in 2026, microseconds


def order(i: int, at: int, rng: random.Random) -> dict[str, Any]:
    return {
        "id": f"o{i}",
        "customer": f"c{rng.randrange(20)}",
        "shop": rng.randrange(-3, 4),
        "amount": round(rng.expovariate(0.1), 2),
        "note": rng.choice([None, "", "gift", "späť" * rng.randrange(1, 9)]),
        "at": at,
    }


def fill(engine: Engine, n: int, seed: int = 1, first: int = 0) -> list[Any]:
    """n orders and logins, some late, some with equal times; returns the decisions."""
    rng = random.Random(seed)
    decisions = []
    at = START + first * 30_000_000
    for i in range(first, first + n):
        at += rng.choice([0, 1, 30_000_000, 60_000_000])
        when = at - rng.choice([0, 0, 0, 300_000_000, 3_000_000_000])
        if rng.random() < 0.3:
            engine.ingest({"customer": f"c{rng.randrange(20)}", "ok": rng.random() < 0.4, "at": when}, "Login")
        decisions.append(engine.score(order(i, when, rng), pipeline="orders", explain=True))
    return decisions


def raw_records(folder: Path) -> list[tuple[str, int, bytes]]:
    """(kind, sequence, bytes) of every record of the first segment, prelude included."""
    logs = LogFolder(folder)
    segment = logs.segment(logs.numbers()[0])
    found = []
    at = segment.start
    while (record := native.record_at(segment.data, segment.log_id, segment.number, at)) is not None:
        found.append((record.kind, record.sequence, bytes(segment.data[at : at + record.length])))
        at += record.length
    segment.close()
    return found


def _with_its_versions(data: bytes, schemas: list[Any]) -> bytes:
    """An event record with as many versions as its outcome gives: an applied one has one per store, another none."""
    there = data[14]
    wanted = len(schemas[int.from_bytes(data[10:12], "little")]["stores"]) if data[9] == 1 else 0
    if there == wanted:
        return data
    return data[:14] + bytes([wanted]) + data[15:32] + bytes(8 * wanted) + data[32 + 8 * there :]


def rewritten(folder: Path, change: Callable[[list[tuple[str, int, bytes]]], list[tuple[str, int, bytes]]]) -> None:
    """Write the log's only segment anew with its records as `change` gives them: a whole log of another story."""
    logs = LogFolder(folder)
    number = logs.numbers()[0]
    records = change(raw_records(folder))
    schemas = [json.loads(data[32:]) for kind, _, data in records if kind == "schema"]
    records = [(kind, n, _with_its_versions(data, schemas) if kind == "event" else data) for kind, n, data in records]
    size = native.HEAD + sum(len(data) for _, _, data in records)
    out = bytearray(size)
    native.put_head(out, logs.log_id, number, 0, 0)
    at = native.HEAD
    last = -1
    for kind, sequence, data in records:
        out[at : at + len(data)] = data
        out[at + 16 : at + 24] = sequence.to_bytes(8, "little", signed=True)
        native.put_record(out, logs.log_id, number, at, len(data))
        at += len(data)
        last = sequence if kind == "event" else last
    native.put_sealed(out, size, last)
    logs.segment_path(number).write_bytes(out)
