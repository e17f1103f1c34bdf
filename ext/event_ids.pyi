"""Event ids and kept decisions: the Python view of ext/id_table.h. Neither class is safe for two threads at once."""

from typing import Final, NamedTuple

SEED_BYTES: Final[int]
LEAST_LIMIT: Final[int]
LEAST_KEPT: Final[int]
MOST_LIMIT: Final[int]

class Entry(NamedTuple):
    pipeline: int
    position: int
    has_decision: bool

class Stats(NamedTuple):
    """ids: entries that take memory, forgotten ones too until it is given back; bytes: of memory, all of it;
    forgotten, forgotten_early (because of the limit): entries whose memory was given back; limit: bytes;
    floor: positions below are forgotten."""

    ids: int
    bytes: int
    forgotten: int
    forgotten_early: int
    limit: int
    floor: int

class KeptStats(NamedTuple):
    """kept: ever; bytes: of memory; limit: bytes; oldest: positions below are gone, 0: none is."""

    kept: int
    bytes: int
    limit: int
    oldest: int

class EventIds:
    """The event ids of one event type that a retry may still send.

    seed: 16 secret bytes (None: random); limit: bytes of memory, at which the oldest ids are forgotten early (None: 64
    GiB); hash_mask is for tests. An id is a str or an int of 64 bits: TypeError or OverflowError otherwise. pipeline:
    0..32766; position: 0..2^48 - 1; ValueError otherwise.
    """

    def __init__(self, seed: bytes | None = None, limit: int | None = None, hash_mask: int = ...) -> None: ...
    def hash(self, id: str | int) -> int: ...
    def put(self, id: str | int, pipeline: int, position: int, has_decision: bool = True) -> None: ...
    def put_many(self, ids: list[str | int], pipeline: int, position: int, has_decision: bool = True) -> None: ...
    def find(self, id: str | int) -> list[Entry]: ...
    def decided(self, id: str | int, pipeline: int) -> int | None: ...
    def __contains__(self, id: object) -> bool: ...
    def count_known(self, ids: list[str | int]) -> int: ...
    def forget_before(self, position: int) -> None: ...
    def tend(self, n: int) -> int: ...
    def advance(self, watermark: int, position: int, remember: int) -> None: ...
    def stats(self) -> Stats: ...
    def check(self) -> str | None: ...

class KeptDecisions:
    """First decisions where there is no log: the newest that fit into `limit` bytes."""

    def __init__(self, limit: int) -> None: ...
    @property
    def next(self) -> int: ...
    def put(self, packed: bytes) -> int: ...
    def get(self, position: int) -> bytes | None: ...
    def stats(self) -> KeptStats: ...
