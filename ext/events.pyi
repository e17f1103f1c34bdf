"""Types of the event reader: user Structs, decoded JSON, dicts and Arrow columns into rows."""

from typing import Any

from penstock.definitions.event import Event
from penstock.plan import EventPlan

KEY_BYTES: int
TEXT_BYTES: int
TYPE_CODES: dict[str, int]
SCALES: dict[str | None, int]

class ColumnSet:
    """Columns by address: (data, validity, validity offset, offsets, wide offsets, bit offset, bits) each."""

    rows: int
    def __init__(self, columns: list[tuple[Any, ...]], rows: int, keep: list[Any]) -> None: ...

class EventReader:
    user_type: type[Event]
    wire_type: type[Any]
    def __init__(self, plan: EventPlan, keys: set[int], aggregated: set[int]) -> None: ...
