"""Types of the search for a spine's own events in the log."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .history import EventMapping
from .log import RecordSchemas

class Look:
    source: int
    def __init__(
        self,
        source: int,
        compared: list[tuple[int, str, bool, npt.NDArray[np.int64], Any, npt.NDArray[np.uint8]]],
        skip: npt.NDArray[np.uint8],
        has_near: bool,
        time: int,
    ) -> None: ...
    def near(self, taken: npt.NDArray[np.uint8]) -> tuple[int, int]: ...

class SpineSearch:
    def __init__(
        self,
        looks: list[Look],
        times: npt.NDArray[np.int64],
        order: npt.NDArray[np.int64],
        bounds: npt.NDArray[np.int64] | None,
        sequence: npt.NDArray[np.int64],
        event_time: npt.NDArray[np.int64],
        ingest_time: npt.NDArray[np.int64],
        taken: npt.NDArray[np.uint8],
    ) -> None: ...
    def feed(
        self,
        data: Any,
        log_id: int,
        number: int,
        start: int,
        end: int,
        schemas: RecordSchemas,
        mappings: list[EventMapping | None],
        times: list[int],
        last_sequence: int,
        most: int,
    ) -> tuple[int, str]: ...
    def finish(self) -> None: ...
    @property
    def totals(self) -> tuple[int, int | None]: ...
