"""Types of the event log's writer and of looking at segments."""

from typing import Any, NamedTuple

from .steps import Source

FORMAT: int
HEAD: int
STATES: tuple[str, ...]

class LogStats(NamedTuple):
    position: int
    synced: int
    segments: int
    number: int
    syncs: int
    rolls: int
    waits: int
    longest_sync_us: int
    clock_steps: int
    last_step_us: int
    state: str
    error: int
    spare_error: int
    unsynced_us: int
    longest_unsynced_us: int
    late_syncs: int
    last_late_us: int

class SegmentHead(NamedTuple):
    format: int
    log_id: int
    number: int
    first_sequence: int
    created: int
    capacity: int
    whole: bool

class SegmentMark(NamedTuple):
    synced: int
    end: int
    last_sequence: int

class Scan(NamedTuple):
    end: int
    stop: str
    records: int
    events: int
    scores: int
    first_sequence: int | None
    last_sequence: int | None
    last_ingest_time: int | None

class Record(NamedTuple):
    offset: int
    length: int
    kind: str
    schema: int
    outcome: int
    sequence: int
    ingest_time: int
    versions: tuple[int, ...]
    body: bytes

class RecordLayout(NamedTuple):
    is_score: bool
    fields: list[tuple[str, str, int]]
    versions: int
    actions: int = 0
    models: int = 0
    failures: int = 0
    reasons: int = 0
    arms: tuple[int, ...] = ()

class RecordSchemas:
    n: int
    def __init__(self, layouts: list[RecordLayout], prelude: int = 0) -> None: ...

class EventLog:
    log_id: int
    sync_us: int
    folder: str
    def __init__(
        self,
        folder: str,
        log_id: int,
        number: int,
        next_sequence: int,
        segment_bytes: int,
        sync_us: int,
        max_age_us: int,
        prelude: list[bytes],
        sources: list[Source],
        watched: list[str],
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def position(self) -> int: ...
    def begin(self) -> None: ...
    def set_prelude(self, prelude: list[bytes]) -> None: ...
    @property
    def has_spare(self) -> bool: ...
    def roll(self) -> None: ...
    def wait(self, position: int | None = None) -> None: ...
    @property
    def state(self) -> str: ...
    @property
    def taking(self) -> str | None: ...
    def error_text(self) -> str: ...
    def stats(self) -> LogStats: ...

def segment_head(data: Any) -> SegmentHead | None: ...
def segment_mark(data: Any) -> SegmentMark | None: ...
def scan(data: Any, log_id: int, number: int, start: int = ..., schemas: RecordSchemas | None = None) -> Scan: ...
def ingest_times(data: Any, log_id: int, number: int, start: int, end: int) -> bytes: ...
def resync(data: Any, log_id: int, number: int, start: int) -> int: ...
def record_at(data: Any, log_id: int, number: int, offset: int) -> Record | None: ...
def put_record(data: Any, log_id: int, number: int, offset: int, length: int) -> None: ...
def put_sealed(data: Any, end: int, last_sequence: int) -> None: ...
def put_head(data: Any, log_id: int, number: int, first_sequence: int, created: int) -> None: ...
