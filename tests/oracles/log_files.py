"""The event log read slowly and plainly: segments as Python values, by struct alone, with a CRC32C of its own.

It knows the format from ext/event_record.h and shares no code with it, so that the two prove each other.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 4096
KINDS = {1: "schema", 2: "mark", 3: "event", 4: "score"}
OUTCOMES = ("off", "applied", "duplicate", "late", "quarantined")
MASK64 = (1 << 64) - 1

_TABLE = []
for _byte in range(256):
    _crc = _byte
    for _ in range(8):
        _crc = _crc >> 1 ^ (0x82F63B78 if _crc & 1 else 0)
    _TABLE.append(_crc)


def crc32c(data: bytes, start: int = 0) -> int:
    crc = start ^ 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def seed(log_id: int, segment: int, offset: int) -> int:
    x = ((log_id ^ segment * 0x9E3779B97F4A7C15) + offset * 0xD6E8FEB86659FD93) & MASK64
    x ^= x >> 32
    return (x * 0xD6E8FEB86659FD93 & MASK64) >> 32


class Entry(NamedTuple):
    """One record. values: of an event by field, of a score by slot; statuses likewise."""

    segment: int
    offset: int
    length: int
    kind: str
    outcome: int
    sequence: int
    ingest_time: int
    versions: tuple[int, ...]
    schema: Any
    values: dict[str, Any]
    statuses: dict[str, int]
    score_id: str


def read_segment(path: Path, log_id: int, check: bool = False) -> list[Entry]:
    """Every record of a segment up to the first that was not finished. check: also recompute each checksum (slow)."""
    data = path.read_bytes()
    number = int(path.name.split(".")[0])
    at = HEAD
    schemas: list[Any] = []
    found = []
    while at + 32 <= len(data):
        crc, length, kind, outcome, schema, n, n_versions, _, sequence, ingest = struct.unpack_from(
            "<IIBBHHBBqq", data, at
        )
        if not length:
            break
        if check:
            body = struct.pack("<I", length) + data[at + 8 : at + length]
            assert crc32c(body, seed(log_id, number, at)) == crc, f"{path} at {at}"
        body = data[at + 32 : at + length]
        values: dict[str, Any] = {}
        statuses: dict[str, int] = {}
        versions: tuple[int, ...] = ()
        score_id = ""
        known = None
        if KINDS[kind] == "schema":
            known = json.loads(body)
            assert schema == len(schemas)
            schemas.append(known)
        elif KINDS[kind] == "mark":
            values = dict(enumerate(struct.unpack(f"<{len(body) // 8}q", body)))
        else:
            known = schemas[schema]
            if KINDS[kind] == "score":
                score_id = body[:26].decode()
                body = body[72:]
                types = [(name, kind) for name, kind in known["values"]]
            else:
                types = [(field["name"], field["type"]) for field in known["fields"]]
            assert len(types) == n
            versions = struct.unpack_from(f"<{n_versions}Q", body)
            slots = body[8 * n_versions :]
            status = slots[8 * n : 9 * n]
            strings = slots[8 * n + (n + 7) // 8 * 8 :]
            for i, (name, kind_of) in enumerate(types):
                raw = slots[8 * i : 8 * i + 8]
                statuses[name] = status[i]
                if status[i] & 7 != 1:
                    values[name] = None
                elif kind_of == "float64":
                    values[name] = struct.unpack("<d", raw)[0]
                elif kind_of == "string":
                    offset, size = struct.unpack("<II", raw)
                    values[name] = strings[offset : offset + size].decode()
                elif kind_of == "bool":
                    values[name] = bool(raw[0])
                else:
                    values[name] = struct.unpack("<q", raw)[0]
        found.append(
            Entry(
                number,
                at,
                length,
                KINDS[kind],
                outcome,
                sequence,
                ingest,
                versions,
                known,
                values,
                statuses,
                score_id,
            )
        )
        at += length
    return found


def read_log(folder: Path, check: bool = False) -> list[Entry]:
    """Every record of a log folder, in order."""
    log_id = json.loads((folder / "log.json").read_bytes())["log_id"]
    found = []
    for path in sorted((folder / "segments").glob("*.log")):
        found += read_segment(path, log_id, check)
    return found


def events_of(folder: Path) -> list[Entry]:
    return [entry for entry in read_log(folder) if entry.kind == "event"]
