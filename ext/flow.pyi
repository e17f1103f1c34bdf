"""Admission and queues: lanes, the loop's queue, the native pool."""

from asyncio import AbstractEventLoop
from typing import Any, Final

WAITS: Final[tuple[float, ...]]

class Lane:
    """Limits and counters of one pipeline, event type or model."""

    name: str
    row_ns: int
    least_ns: int
    row_bytes: int
    may_pool: bool
    max_rows: int
    default_timeout: int
    max_timeout: int
    waiting: int
    pooled: int
    admitted: int
    queued: int
    refused_full: int
    refused_late: int
    dropped_late: int
    waited_ns: int
    def __init__(
        self,
        name: str,
        *,
        max_rows: int = 4096,
        default_timeout: float = 0.0,
        max_timeout: float = 0.0,
        row_ns: int = 0,
        may_pool: bool = False,
    ) -> None: ...
    def seed(self, row_ns: int) -> None: ...
    def counters(self) -> dict[str, Any]: ...

class Work: ...

class Flow:
    """The queues of one loop."""

    slice_ns: int
    n_threads: int
    running: int
    slices: int
    def __init__(self, threads: int = 2, slice_s: float = 1e-3) -> None: ...
    def start(self, loop: AbstractEventLoop) -> None: ...
    def stop(self) -> None: ...
    @property
    def idle(self) -> bool: ...
    @property
    def queued_seconds(self) -> tuple[float, float]: ...
    def run_slice(self) -> None: ...
    def collect(self) -> None: ...
