"""How an engine keeps its log (control path): one typed struct, and what its texts mean. Opens nothing."""

from __future__ import annotations

import msgspec

from ..definitions.durations import duration_us

LEAST_SEGMENT, MOST_SEGMENT = 1 << 12, 1 << 40

__all__ = ["LogOptions", "check_place", "parse_retention", "parse_sync"]


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine keeps its log.

    sync: "always" (a call returns when its event is on disk; calls that arrive together share a sync), "10ms" or any
    length (calls do not wait; a power cut loses at most that much), "never" (the kernel decides).
    scores: share of the entities, by key hash, whose scores are logged: 1.0 all, 0 none.
    start_cold: layouts that no snapshot holds start empty instead of being rebuilt from history.
    start_partial: layouts that no snapshot holds are rebuilt from what retention left of history, though they need
        more: what cannot be known is INVALID, windows until they have refilled, Lifetime for ever.
    segment_bytes: size of a log file. segment_seconds: a file is closed after so long although it is not full.
    keeper: a child process takes snapshots and compacts while the engine runs.
    snapshot_bytes: of log between two snapshots.
    parquet: where compacted history is kept: a folder or an object store; by default DIR/parquet.
    retention: how long history is kept, for example "90d"; None: for ever.
    """

    sync: str = "10ms"
    scores: float = 1.0
    start_cold: bool = False
    start_partial: bool = False
    segment_bytes: int = 64 << 20
    segment_seconds: float = 3600.0
    keeper: bool = True
    snapshot_bytes: int = 1 << 30
    parquet: str | None = None
    retention: str | None = None

    def __post_init__(self) -> None:
        parse_sync(self.sync)
        parse_retention(self.retention)
        check_place(self.parquet)
        if not 0 <= self.scores <= 1:
            raise ValueError(f"scores: expected a share from 0 to 1, got {self.scores!r}")
        if not LEAST_SEGMENT <= self.segment_bytes <= MOST_SEGMENT:
            raise ValueError(f"segment_bytes: expected {LEAST_SEGMENT} to {MOST_SEGMENT}, got {self.segment_bytes!r}")
        if not 0 <= self.segment_seconds <= 366 * 86_400:
            raise ValueError(f"segment_seconds: expected 0 (never) to a year, got {self.segment_seconds!r}")
        if self.snapshot_bytes < 1:
            raise ValueError(f"snapshot_bytes: expected at least 1, got {self.snapshot_bytes!r}")


def parse_sync(text: str) -> int:
    """Microseconds between syncs; 0 for "always", -1 for "never". Raises ValueError."""
    if text == "always":
        return 0
    if text == "never":
        return -1
    try:
        us = duration_us(text)
    except ValueError:
        us = 0
    if not 1000 <= us <= 60_000_000:
        raise ValueError(f'sync: expected "always", "never" or a length from 1ms to 60s such as "10ms", got {text!r}')
    return us


def check_place(uri: str | None) -> None:
    """Raises ValueError for a place that history cannot be kept in."""
    if uri is not None and "://" in uri and uri.partition("://")[0] not in ("file", "s3"):
        raise ValueError(f"parquet: expected a folder or s3://bucket/prefix, got {uri!r}")


def parse_retention(text: str | None) -> int | None:
    """Microseconds that history is kept; None: for ever. Raises ValueError."""
    return None if text is None else duration_us(text)
