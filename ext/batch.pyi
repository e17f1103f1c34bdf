"""Types of table runs through the engine core."""

from collections.abc import Callable
from typing import Any

from .core import Core

class VerdictColumns:
    def __init__(
        self, ids: Any, action: Any, model: Any, failed: Any, score: Any, fired: Any, arms: Any, outcome: Any
    ) -> None: ...

def run_table(
    core: Core,
    tables: list[tuple[Any, ...]],
    order: Any,
    out: list[tuple[int, int, int, int]],
    pipeline: int,
    ingest: bool,
    verdicts_out: VerdictColumns | None,
    progress: Callable[[int], None] | None,
) -> list[list[str | None] | None]: ...
