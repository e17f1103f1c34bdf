"""Types of the splitter: unit id -> arm of one compiled experiment."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

ALGORITHMS: dict[str, int]

class Assigner:
    name: str
    arms: tuple[str, ...]
    def __init__(
        self,
        name: str,
        arms: Sequence[str],
        algorithm: str,
        split: tuple[int, int, bytes, bytes],
        bounds: Sequence[int],
        segments: Sequence[int],
        cover: tuple[int, int, bytes, bytes] | None = None,
        cover_bound: int = 0,
    ) -> None: ...
    def assign(self, unit: str | int | None) -> str | None: ...
    def assign_many(
        self, units: Sequence[str | int | None] | npt.NDArray[np.int64] | tuple[Buffer, npt.NDArray[np.int32]]
    ) -> npt.NDArray[np.int16]: ...
    def hash_value(self, unit: str | int) -> int: ...
    def cover_value(self, unit: str | int) -> int | None: ...
    @property
    def cover_bound(self) -> int | None: ...
    @property
    def segments(self) -> list[tuple[int, int]]: ...

def hash_bytes(algorithm: str, text: bytes, seed: int = 0, prefix: int = 0, suffix: int = 0) -> int: ...
