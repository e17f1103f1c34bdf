"""Types of the event log's records as columns, and back."""

from collections.abc import Sequence
from typing import Any

from .log import RecordSchemas

CODE_BYTES: int
SCORE_ID_BYTES: int

class SchemaColumns:
    is_score: bool
    n: int
    rows: int
    raws: int
    @property
    def columns(self) -> dict[str, Any]: ...

class RecordColumns:
    def __init__(self, layouts: list[tuple[bool, list[str], int]], schemas: RecordSchemas) -> None: ...
    def count(self, data: Any, log_id: int, number: int, start: int, end: int) -> int: ...
    def take(self, data: Any, log_id: int, number: int, start: int, end: int) -> int: ...
    def __getitem__(self, i: int) -> SchemaColumns: ...

class Source:
    def __init__(self, is_score: bool, types: list[str], time_field: int, arrays: dict[str, Any]) -> None: ...

def build_records(
    log_id: int,
    number: int,
    first_sequence: int,
    start: int,
    prelude: list[bytes],
    marks: Sequence[int],
    records: int,
    sources: list[tuple[int, Source]],
    schemas: RecordSchemas,
) -> tuple[Any, Any]: ...
def same_records(a: Any, a_at: int, b: Any, b_at: int, b_end: int) -> tuple[int, int]: ...
def erase_key(
    data: Any,
    log_id: int,
    number: int,
    start: int,
    end: int,
    schemas: RecordSchemas,
    holders: list[tuple[list[str], list[int]]],
    text: bytes | None,
    integer: int | None,
    new_text: bytes,
    new_integer: int,
) -> tuple[Any, int, int]: ...
