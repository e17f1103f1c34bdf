"""Types of decisions, their words and their ids."""

from collections.abc import Sequence
from typing import Any, NoReturn, final

OUTCOMES: tuple[str, ...]
STATUSES: tuple[str, ...]

class IdSource:
    def __init__(self) -> None: ...
    def take(self, now_us: int) -> str: ...

class DecisionTexts:
    pipeline: str
    actions: tuple[str, ...]
    reasons: tuple[str, ...]
    models: tuple[tuple[str, str], ...]
    experiments: tuple[str, ...]
    arms: tuple[tuple[str, ...], ...]
    failures: tuple[str, ...]
    features: tuple[tuple[str, str, int], ...]
    fallback: str | None
    def __init__(
        self,
        *,
        pipeline: str,
        actions: Sequence[str],
        reasons: Sequence[str],
        models: Sequence[tuple[str, str]],
        experiments: Sequence[str],
        arms: Sequence[Sequence[str]],
        failures: Sequence[str],
        features: Sequence[tuple[str, str, int]],
        fallback: str | None,
    ) -> None: ...
    def reasons_for(self, fired: int, failed: int = -1) -> tuple[str, ...]: ...

@final
class Decision:
    """What one event was answered. Made by an Engine only."""

    def __reduce__(self) -> NoReturn: ...
    @property
    def id(self) -> str: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def score(self) -> float | None: ...
    @property
    def reasons(self) -> tuple[str, ...]: ...
    @property
    def model(self) -> str | None: ...
    @property
    def model_version(self) -> str | None: ...
    @property
    def arms(self) -> dict[str, str | None]: ...
    @property
    def outcome(self) -> str: ...
    @property
    def features(self) -> dict[str, Any] | None: ...
    @property
    def statuses(self) -> dict[str, str] | None: ...
    def explained(self) -> list[tuple[str, Any, str]]: ...
    def json(self, explain: bool = False) -> bytes: ...
    def as_dict(self) -> dict[str, Any]: ...

def value_of(slot: bytes, status: int, type: str, strings: bytes = b"") -> Any: ...
