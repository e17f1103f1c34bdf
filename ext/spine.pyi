"""Types of the merge of a spine with the event log."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .core import Core
from .events import ColumnSet, EventReader
from .history import EventMapping
from .log import RecordSchemas
from .steps import Source
from .windows import WindowStore

MODES: dict[str, int]

class SpineRun:
    def __init__(
        self,
        core: Core,
        source: Source,
        store: WindowStore,
        reader: EventReader,
        columns: ColumnSet,
        key: tuple[int, bool, bool, bool],
        part: int,
        parts: int,
        mode: str,
        lateness: int,
        budget: int,
        width: int,
    ) -> None: ...
    def choose(self) -> npt.NDArray[np.int64]: ...
    def begin(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        times: npt.NDArray[np.int64],
        kinds: npt.NDArray[np.uint8],
        bounds: npt.NDArray[np.int64],
        bound_times: npt.NDArray[np.int64],
        groups: list[tuple[int, bool, bool, list[int]]],
        outputs: list[tuple[int, int, bool, bool, bytes | None]],
        beyond: npt.NDArray[np.uint8],
        anything: npt.NDArray[np.uint8],
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
        last_sequence: int,
        most: int,
    ) -> tuple[int, str]: ...
    def finish(self) -> bool: ...
    def text_column(
        self, index: int, slots: npt.NDArray[np.uint64], status: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.int64], bytes]: ...
    @property
    def never_fits(self) -> bool: ...
    @property
    def totals(self) -> tuple[int, int, int]: ...

class FunctionRun:
    def __init__(self, core: Core, reader: EventReader, columns: ColumnSet, width: int) -> None: ...
    def run(
        self,
        first: int,
        n: int,
        fixed: list[tuple[int, int, int]],
        texts: list[tuple[int, int, int, int]],
        out: list[tuple[int, bool, int, int]],
    ) -> tuple[list[list[str | None] | None], int, BaseException | None]: ...
