"""How late the loop serves what is ready."""

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Final

LAGS: Final[tuple[float, ...]]

class LoopLag:
    """A kernel timer that the loop reads; its lateness is the loop's."""

    period_ns: int
    ticks: int
    total_ns: int
    longest_ns: int
    held_ns: int
    def __init__(self, period: float = 0.005) -> None: ...
    def start(self, loop: AbstractEventLoop, also: Callable[[], object] | None = None) -> None: ...
    def stop(self) -> None: ...
    def tick(self) -> None: ...
    def counters(self) -> list[int]: ...
    def held_counters(self) -> list[int]: ...
