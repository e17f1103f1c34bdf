"""Point-in-time join over Arrow buffers: the Python view of ext/asof_join.h. Arrays are pyarrow arrays."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

KINDS: Final[dict[str, int]]
NOT_FOUND: Final[int]
OUTSIDE_MAX_AGE: Final[int]
MOST_ROWS: Final[int]

Rows = npt.NDArray[np.uint32]
Times = npt.NDArray[np.int64]

class ColumnError(ValueError):
    row: int | None

class KeyIndex:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def encode(self, chunks: list[Any], ids: Rows | None, add: bool) -> None: ...

def ordered(times: Times) -> bool: ...
def first_outside(times: Times, low: int, high: int) -> int: ...

class SpineOrder:
    def __init__(self, times: Times) -> None: ...

class FeatureRows:
    ordered: bool

    def __init__(self, keys: KeyIndex, segments: list[tuple[Any, Any, Any | None]], cutoff: bool) -> None: ...
    def find(
        self,
        ids: Rows,
        times: Times,
        found: Rows,
        order: SpineOrder | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None: ...
    def apply_ttl(self, times: Times, found: Rows, ttl: int) -> None: ...

class Values:
    def __init__(self, chunks: list[Any], width: int, nan: bool) -> None: ...
    def gather(
        self,
        found: Rows,
        out: npt.NDArray[np.uint8],
        validity: npt.NDArray[np.uint8],
        statuses: npt.NDArray[np.int8] | None = None,
    ) -> int: ...
    def gather_offsets(
        self,
        found: Rows,
        offsets: Times,
        validity: npt.NDArray[np.uint8],
        statuses: npt.NDArray[np.int8] | None = None,
    ) -> int: ...
    def gather_text(self, found: Rows, offsets: Times, out: npt.NDArray[np.uint8]) -> None: ...
