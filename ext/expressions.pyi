"""Types of the expression evaluator: the native program of one expression."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TYPES: dict[str, int]
OPCODES: dict[str, int]
MAX_REGISTERS: int

class Program:
    type: str
    n_slots: int
    def __init__(
        self,
        code: list[tuple[int, int, int, int, int]],
        type: str,
        text: bytes = b"",
        floats: Sequence[float] = (),
        ints: Sequence[int] = (),
        strings: Sequence[tuple[int, int]] = (),
    ) -> None: ...
    def evaluate(
        self, slots: npt.NDArray[np.uint64], status: npt.NDArray[np.uint8], arena: bytes = b""
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]: ...
    def test(
        self, slots: npt.NDArray[np.uint64], status: npt.NDArray[np.uint8], arena: bytes = b""
    ) -> npt.NDArray[np.int8]: ...
    @property
    def code(self) -> list[str]: ...
