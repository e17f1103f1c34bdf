"""Types of the replay of recorded events."""

from collections.abc import Callable
from typing import Any

from .batch import VerdictColumns
from .core import Core
from .log import RecordSchemas

class EventMapping:
    def __init__(
        self, source: int, fields: list[int], types: list[str], defaults: list[Any], record_fields: int
    ) -> None: ...

class ScoreMapping:
    pipe: int
    same_plan: bool
    same_words: bool
    def __init__(
        self,
        pipe: int,
        slots: list[int],
        strings: list[int],
        keys: list[int],
        same_plan: bool,
        since: list[int] | None = None,
        models: list[int] | None = None,
        same_words: bool = False,
    ) -> None: ...

class HistoryRun:
    def __init__(
        self,
        core: Core,
        tables: list[Any],
        order: Any,
        out: list[tuple[int, int, int, int]],
        pipeline: int,
        ingest: bool,
        verdicts_out: VerdictColumns | None,
        progress: Callable[[int], None] | None,
        rows: str = "none",
        next_sequence: int = -1,
        ids: bool = False,
        capacity: int = 0,
        places: Any = None,
    ) -> None: ...
    def set_output(
        self, out: list[tuple[int, int, int, int]], verdicts_out: VerdictColumns | None = None, places: Any = None
    ) -> None: ...
    def feed(
        self,
        data: Any,
        log_id: int,
        number: int,
        start: int,
        end: int,
        schemas: RecordSchemas,
        mappings: list[EventMapping | ScoreMapping | None],
        first_sequence: int = ...,
        last_sequence: int = ...,
    ) -> tuple[int, str]: ...
    def done(self) -> None: ...
    @property
    def tallies(self) -> list[tuple[Any, ...]]: ...
    @property
    def totals(self) -> dict[str, Any]: ...
    @property
    def output(self) -> tuple[int, list[list[str | None] | None], list[str]]: ...
