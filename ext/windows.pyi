"""Window state of one (source, entity): the Python view of ext/window_state.h."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

TYPES: Final[tuple[str, ...]]
FUNCTIONS: Final[tuple[str, ...]]
CLOSED: Final[tuple[str, ...]]
SEED_BYTES: Final[int]
INVALID: Final[int]
PRESENT: Final[int]
NULL_VALUE: Final[int]
NOT_FOUND: Final[int]
OUTSIDE_MAX_AGE: Final[int]

class Output(NamedTuple):
    """One output of a group.

    function: one of FUNCTIONS; column: index into columns (None for count); where: index of the predicate, or None;
    window: microseconds, None for Lifetime; closed: right (T-W < t <= T), both or left (T-W <= t < T);
    ttl: microseconds, first and last only.
    """

    function: str
    column: int | None = None
    where: int | None = None
    window: int | None = None
    closed: str = "right"
    ttl: int | None = None

class Stats(NamedTuple):
    entities: int
    events: int
    applied: int
    bytes_used: int
    bytes_mapped: int
    strings: int
    watermark: int

class WindowStore:
    """Exact window state. Not safe for two threads at once. A bad layout raises ValueError naming what is wrong."""

    columns: tuple[str, ...]
    outputs: tuple[Output, ...]
    groups: tuple[int, ...]
    output_types: tuple[str, ...]
    lateness: int
    retention: int | None
    n_where: int
    fingerprint: int

    def __init__(
        self,
        columns: Sequence[str],
        outputs: Sequence[Output],
        groups: Sequence[int] | None = None,
        lateness: int = 0,
        n_where: int = 0,
        fingerprint: int = 0,
        max_bytes: int = 0,
        retention: int | None = None,
        seed: bytes | None = None,
    ) -> None: ...
    @property
    def seed(self) -> bytes: ...
    def reseed(self, seed: bytes) -> None: ...
    @staticmethod
    def error_text(code: int) -> str: ...
    def apply(
        self,
        key: str | int,
        event_time: int,
        values: Sequence[Any] = (),
        where_mask: int = 0,
        ingest_time: int = 0,
        log_id: int = 0,
        sequence: int = 0,
    ) -> int: ...
    def read(
        self, key: str | int, group: int = 0, as_of: int = 0, extra: tuple[Any, ...] | None = None
    ) -> list[tuple[Any, int]]: ...
    def version(self, key: str | int) -> int: ...
    def log_position(self, key: str | int) -> tuple[int, int]: ...
    def miss_before(self, time: int) -> None: ...
    def sweep(self, watermark: int, max_entities: int = 64) -> int: ...
    def erase(self, key: str | int) -> bool: ...
    def keys(self) -> list[str | int]: ...
    def small_pages(self) -> None: ...
    def stats(self) -> Stats: ...
    def dump(self) -> bytes: ...
    def load(self, data: bytes | bytearray | memoryview) -> None: ...

def chunk_growth(stride: int, summaries: int) -> list[tuple[int, int, int, bool]]: ...
def format_1_damaged(stride: int, summaries: int) -> bool: ...
